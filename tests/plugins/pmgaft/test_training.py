"""PMG-AFT in a fit: updates by hand, resumes, failures, what the weights trade."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from art.data_generators import NumpyDataGenerator
from torch import Tensor

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training import DivergedError
from clipdefense.training.data import Arrays, Share
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense_pmgaft.pmgaft import (
    PMGAFT,
    generalisation_loss,
)
from clipdefense_tecoa.tecoa import TeCoA

from .helpers import CLIPS, IMAGENETS, QUIET, Make, a_batch, begun, statistics

# the warning has a test of its own
pytestmark = pytest.mark.filterwarnings("ignore:pmg-aft, variant 'released', trains with ImageNet's:UserWarning")


def test_without_the_divergences_it_is_tecoa(make_model: Make, images: Tensor) -> None:
    models = [make_model(), make_model()]
    options = {**QUIET, "batch_size": 6, "epochs": 2, "lr": 1e-3}
    PMGAFT(models[0], alpha=0, beta=0, **options).fit(images, torch.arange(12) % 10)
    TeCoA(models[1], **options).fit(images, torch.arange(12) % 10)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_the_attack_leaves_nothing_in_the_weights(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with training_only(tiny_model, tiny_model.tower.parameters()):
        for variant in ("default", "released"):
            defense, batch = begun(tiny_model, variant=variant), a_batch(images)
            x_adv = defense.inner_attack(batch, seed=0)["x_adv"]
            assert not x_adv.requires_grad
            assert all(weight.grad is None and weight.requires_grad for weight in tiny_model.tower.parameters())
            assert tiny_model.tower.training and not any(part.training for part in defense.teacher.modules())


@pytest.mark.parametrize("variant", ["default", "released"])
def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(
    make_model: Make, images: Tensor, variant: str
) -> None:
    trained, plain, y = make_model(), make_model(), torch.arange(12) % 10
    options = {"momentum": 0.0, "warmup_steps": 0, "lr": 1e-2}
    PMGAFT(trained, variant=variant, **QUIET, **options, batch_size=12, epochs=1).fit(images, y)
    (batch,) = Arrays(images, y, 10, True, batch_size=12, seed=0).batches(0, 0, Share())
    by_hand = begun(plain, variant=variant)
    for weight in plain.parameters():
        weight.requires_grad_(False)
    batch |= by_hand.inner_attack(batch, seed=derive_seed(0, "attack", 0))
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(sum(by_hand.losses(batch).values()), weights)
    for trained_weight, weight, gradient in zip(trained.tower.parameters(), weights, gradients):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-2))


@pytest.mark.parametrize("options", [{"low_memory": True}, {"accumulate": 3}], ids=str)
def test_pieces_and_recomputed_passes_make_the_same_update(make_model: Make, images: Tensor, options: Any) -> None:
    """The weight of the summed divergences does not depend on the size of the pieces."""
    models = [make_model(dtype=torch.float64) for _ in range(2)]
    common = {**QUIET, "variant": "released", "batch_size": 12, "epochs": 2, "lr": 1e-2, "warmup_steps": 0}
    histories = []
    for model, extra in zip(models, ({}, options)):
        defense = PMGAFT(model, **common, **extra)
        defense.fit(images.double(), torch.arange(12) % 10)
        assert defense.history is not None
        histories.append(defense.history.steps)
    for weight, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)
    for record, other_record in zip(*histories):
        assert record == pytest.approx(other_record, rel=1e-8)
    assert histories[0][1]["clean"] > 0 and histories[0][1]["general"] > 0


class Stopped(Exception):
    pass


class Until(PMGAFT):
    """PMG-AFT that stops before update ``last + 1``, as if pulled out of the socket."""

    last = 2

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.history is not None
        if len(self.history.steps) == self.last:
            raise Stopped
        return super().losses(batch)


class AtOnce(Until):
    last = 0


@pytest.mark.parametrize("variant", ["default", "released"])
def test_a_resumed_run_equals_an_unbroken_one(make_model: Make, tmp_path: Path, images: Tensor, variant: str) -> None:
    options = {**QUIET, "batch_size": 4, "epochs": 1, "lr": 1e-3, "variant": variant, "checkpoint_every": 1}
    options["warmup_steps"] = 0
    data = images, torch.arange(12) % 10
    unbroken, broken, resumed, original = (make_model() for _ in range(4))
    PMGAFT(unbroken, **options).fit(*data)
    with pytest.raises(Stopped):
        Until(broken, **options, checkpoint=str(tmp_path)).fit(*data)
    assert statistics(broken) == statistics(unbroken)  # two updates were made: the statistics stay with them
    defense = PMGAFT(resumed, **options, checkpoint=str(tmp_path), resume=True)
    defense.fit(*data)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.state_dict().values(), resumed.state_dict().values()))
    assert statistics(resumed) == statistics(unbroken) == (IMAGENETS if variant == "released" else CLIPS)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), defense.teacher.parameters()))
    if variant == "default":
        resumed.mean.add_(0.1)
        with pytest.raises(UsageError, match=r"hyper_parameters\.mean is \[0\.58.*, was \[0\.48"):
            PMGAFT(resumed, **options, checkpoint=str(tmp_path), resume=True).fit(*data)


def test_a_fit_that_fails_with_the_old_weights_leaves_the_old_statistics(
    tiny_model: ZeroShotClassifier, images: Tensor
) -> None:
    y, options = torch.arange(12) % 10, {**QUIET, "variant": "released", "batch_size": 4}
    generator = NumpyDataGenerator(images.numpy(), y.numpy(), batch_size=4)
    defense = AtOnce(tiny_model, **options)
    for fit in (
        lambda: defense.fit(images, y),
        lambda: defense.fit_generator(generator),
        lambda: defense.fit_loader([(images, y)]),
    ):
        with pytest.raises(Stopped):
            fit()
        assert statistics(tiny_model) == CLIPS and statistics(defense.teacher) == IMAGENETS
    with pytest.raises(DivergedError, match="step 2"):
        PMGAFT(tiny_model, **options, lr=1e38, schedule="constant", warmup_steps=0).fit(images, y)
    # the update blew up, so the last weights whose losses were finite are those from before it
    assert all(torch.equal(now, old) for now, old in zip(tiny_model.parameters(), defense.teacher.parameters()))
    assert statistics(tiny_model) == CLIPS


def test_weights_trade_robustness_against_the_original_predictions(make_model: Make) -> None:
    """The original knows nothing of these two classes: near to it is not robust, and the reverse."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(104) % 2
    x = 0.3 + 0.3 * torch.rand(104, 3, 32, 32, generator=generator)
    x[y == 0, 0] += 0.2
    x[y == 1, 2] += 0.2
    threat = cd.ThreatModel("linf", eps=4 / 255, steps=3)
    held_out, answers = x[64:], y[64:]
    original = make_model(classes=2)
    robust, distance = [], []
    for weight in (0.1, 1.0):
        model = make_model(classes=2)
        options: dict[str, Any] = {**QUIET, "batch_size": 16, "epochs": 3, "lr": 2e-4}
        defense = PMGAFT(model, alpha=weight, beta=weight, threat=threat, **options)
        defense.fit(x[:64], y[:64])
        x_adv = pgd(model, held_out, answers, threat, seed=1)
        robust.append(float((predict(model, x_adv).argmax(dim=1) == answers).double().mean()))
        distance.append(float(generalisation_loss(predict(model, held_out), predict(original, held_out))))
        teacher = defense.teacher.state_dict()
        assert all(torch.equal(value, teacher[name]) for name, value in original.state_dict().items())
    assert robust[0] >= 0.9 and distance[1] < 0.1 * distance[0]
