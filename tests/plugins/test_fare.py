"""FARE: its loss and its attack by hand, what is the target of which, and fits without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.trainer import Trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.randomness import uniform
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense.training.schedule import learning_rate, total_steps, warmup_steps
from clipdefense.weights import read_sidecar
from clipdefense_fare.fare import FARE, fare_loss, squared_distance

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
Make = Callable[..., ZeroShotClassifier]


class LinearTower(nn.Module):
    """phi(x) = W vec(x) on 2 x 2 pixels, so that everything has a closed form."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5, 12, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def linear(seed: int = 2) -> ZeroShotClassifier:
    anchors = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = ZeroShotClassifier(LinearTower(seed), anchors, image_size=2, mean=(0, 0, 0), std=(1, 1, 1))
    return model.double().eval()


def pixels(n: int, seed: int = 5) -> Tensor:
    """2 x 2 images with some pixels at the ends of the range."""
    x = torch.rand(n, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (1.2 * x - 0.1).clamp(0, 1)


def begun(model: ZeroShotClassifier, **options: Any) -> FARE:
    defense = FARE(model, **options)
    defense.begin()
    return defense


def test_loss_by_hand() -> None:
    phi_x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
    target = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    assert squared_distance(phi_x, target).tolist() == [9.0, 25.0]
    assert float(fare_loss(phi_x, target)) == 17.0


def test_loss_gradient() -> None:
    phi_x, target = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    phi_x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: fare_loss(z, target), phi_x)
    (gradient,) = torch.autograd.grad(fare_loss(phi_x, target), phi_x)
    torch.testing.assert_close(gradient, (2 * (phi_x - target) / 3).detach())


@given(n=st.integers(1, 5), d=st.integers(1, 6), scale=st.floats(0.1, 10), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_loss_is_a_squared_distance(n: int, d: int, scale: float, seed: int) -> None:
    a, b, shift = torch.randn(3, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    loss = float(fare_loss(a, b))
    assert loss > 0 and float(fare_loss(a, a)) == 0
    assert float(fare_loss(b, a)) == pytest.approx(loss)
    assert float(fare_loss(scale * a + shift, scale * b + shift)) == pytest.approx(scale**2 * loss)
    assert float(fare_loss(torch.cat([a, a]), torch.cat([b, b]))) == pytest.approx(loss)  # a mean over images
    doubled = torch.cat([a, a], dim=1), torch.cat([b, b], dim=1)
    assert float(fare_loss(*doubled)) == pytest.approx(2 * loss)  # a sum over dimensions


@pytest.mark.parametrize("n", [3, 600])
def test_the_attack_is_sign_ascent_on_the_same_loss(n: int) -> None:
    """600 images are more than an attack's work unit: each still has its own target."""
    model, x = linear(), pixels(n)
    defense = begun(model, threat=cd.ThreatModel("linf", eps=2 / 255, step_size=1 / 255, steps=3))
    with torch.no_grad():
        model.tower.weight.copy_(linear(seed=3).tower.weight)
    W, W_org = model.tower.weight.detach(), defense.original.tower.weight
    added = defense.inner_attack({"x": x, "ids": torch.arange(n) + 7}, seed=11)

    eps, target = 2 / 255, x.flatten(1) @ W_org.T
    start = uniform((3, 2, 2), torch.arange(n) + 7, seed=11, dtype=torch.float64) * 2 * eps - eps
    x_adv = (x + start).clamp(0, 1)
    for _ in range(3):
        gradient = (x_adv.flatten(1) @ W.T - target) @ W
        x_adv = (x_adv + gradient.sign().view_as(x) / 255).clamp(x - eps, x + eps).clamp(0, 1)
    torch.testing.assert_close(added["target"], target)
    torch.testing.assert_close(added["x_adv"], x_adv, atol=1e-12, rtol=0)
    assert added.keys() == {"x_adv", "target"}
    loss = defense.losses(added)
    assert loss.keys() == {"robust"}
    expected = ((x_adv.flatten(1) @ W.T - target) ** 2).sum(dim=1).mean()
    torch.testing.assert_close(loss["robust"].detach(), expected)


def test_the_attack_raises_the_distance(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    defense = begun(tiny_model)
    added = defense.inner_attack({"x": images, "ids": torch.arange(12)}, seed=0)
    noise = uniform((3, 32, 32), torch.arange(12), seed=1) * 4 / 255 - 2 / 255
    with torch.no_grad():
        attacked = squared_distance(tiny_model.embed(added["x_adv"]), added["target"])
        shaken = squared_distance(tiny_model.embed((images + noise).clamp(0, 1)), added["target"])
    assert (attacked > 3 * shaken).all()
    assert (added["x_adv"] - images).abs().max() <= 2 / 255 + 1e-6
    assert added["x_adv"].min() >= 0 and added["x_adv"].max() <= 1


def test_gradient_through_the_model_agrees_with_finite_differences(make_model: Make, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    defense = begun(model, clean_weight=0.25)
    with torch.no_grad():
        model.tower.proj.add_(0.01 * torch.randn_like(model.tower.proj))
    x = images[:3].double()
    batch = {"x": x, "ids": torch.arange(3)}
    batch |= defense.inner_attack(batch, seed=0)
    (weight,) = defense.trainable_parameters("head")

    def loss() -> Tensor:
        return torch.stack(list(defense.losses(batch).values())).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction, step, values = torch.randn_like(weight), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(loss()))
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_targets_of_loss_and_attack() -> None:
    """phi_org(x) for the loss, phi(x) for TRADES; the clean term always compares with phi_org(x)."""
    x, ids = pixels(4), torch.arange(4)
    found = {}
    for trades in (False, True):
        model = linear()
        defense = begun(model, clean_weight=0.25, trades=trades)
        with torch.no_grad():
            model.tower.weight.copy_(linear(seed=3).tower.weight)
        added = found[trades] = defense.inner_attack({"x": x, "ids": ids}, seed=0)
        W, W_org = model.tower.weight.detach(), defense.original.tower.weight
        phi, phi_org, phi_adv = x.flatten(1) @ W.T, x.flatten(1) @ W_org.T, added["x_adv"].flatten(1) @ W.T
        terms = defense.losses({"x": x, **added})
        torch.testing.assert_close(added["original"], phi_org)
        target = phi if trades else phi_org
        torch.testing.assert_close(terms["robust"].detach(), 0.75 * (phi_adv - target).square().sum(dim=1).mean())
        torch.testing.assert_close(terms["clean"].detach(), 0.25 * (phi - phi_org).square().sum(dim=1).mean())
        # no gradient flows into the target: that of the robust term is 2 (phi_adv - target) x_adv^T alone
        (gradient,) = torch.autograd.grad(terms["robust"], model.tower.weight)
        expected = 0.75 * 2 * (phi_adv - target).T @ added["x_adv"].flatten(1) / 4
        torch.testing.assert_close(gradient, expected)
    assert not torch.equal(found[True]["x_adv"], found[False]["x_adv"])


def test_trades_alone_needs_no_original_and_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="a constant embedding has no loss; give clean_weight a value above 0"):
        defense = begun(linear(), trades=True)
    assert defense.inner_attack({"x": pixels(2), "ids": torch.arange(2)}, seed=0).keys() == {"x_adv", "target"}


def test_passes_an_update(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    """A tower pass of the original, ten of the attack, one of the loss, and one of the clean term where it is on."""
    for clean_weight, own in ((0.0, 11), (0.5, 12)):
        defense = begun(tiny_model, clean_weight=clean_weight)
        counts = {"model": 0, "original": 0}

        def count(name: str, counts: dict[str, int] = counts) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                counts[name] += 1
                assert name == "model" or not output.requires_grad

            return hook

        handle = tiny_model.tower.register_forward_hook(count("model"))
        defense.original.tower.register_forward_hook(count("original"))
        batch = {"x": images, "ids": torch.arange(12)}
        defense.losses(batch | defense.inner_attack(batch, seed=0))
        handle.remove()
        assert counts == {"model": own, "original": 1}


def test_the_attack_leaves_nothing_in_the_weights(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with training_only(tiny_model, tiny_model.tower.parameters()):
        for options in ({}, {"trades": True, "clean_weight": 0.5}):
            defense = begun(tiny_model, **options)
            added = defense.inner_attack({"x": images, "ids": torch.arange(12)}, seed=0)
            assert all(weight.grad is None and weight.requires_grad for weight in tiny_model.tower.parameters())
            assert tiny_model.tower.training and not defense.original.tower.training
            assert not any(value.requires_grad for value in added.values())


def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(make_model: Make, images: Tensor) -> None:
    trained, plain = make_model(), make_model()
    options = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "lr": 1e-3}
    defense = FARE(trained, **QUIET, **options, batch_size=12, epochs=1)
    defense.fit(images)
    # the order within the batch enters the rounding: ask the loop's own source for it
    from clipdefense.training.data import Arrays, Share

    source = Arrays(images, None, 10, False, batch_size=12, seed=0)
    (batch,) = source.batches(0, 0, Share())
    x, original = batch["x"], copy.deepcopy(plain)
    for weight in plain.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        target = original.embed(x)

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self, images: Tensor) -> Tensor:
            return self.model.embed(images)

    x_adv = pgd(
        Embedding(),
        x,
        torch.arange(12),
        defense.threat,
        objective=lambda embedding, row: (embedding - target[row]).square().sum(dim=1),
        early_stop=False,
        seed=derive_seed(0, "attack", 0),
        ids=batch["ids"],
    )
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    loss = (plain.embed(x_adv) - target).square().sum(dim=1).mean()
    for trained_weight, weight, gradient in zip(
        trained.tower.parameters(), weights, torch.autograd.grad(loss, weights)
    ):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-3))
    assert defense.history is not None
    assert defense.history.steps[0]["robust"] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_published_settings(tiny_model: ZeroShotClassifier) -> None:
    default, released = FARE(tiny_model), FARE(tiny_model, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 2 / 255, 1 / 255, 10)
        assert (config.optimizer, config.lr, config.weight_decay) == ("adamw", 1e-5, 1e-4)
        assert (config.batch_size, config.schedule, config.train, config.mix) == (128, "cosine", "tower", 1)
        assert not config.bf16
        assert defense.hyper_parameters() == {"clean_weight": 0.0, "trades": False}
    imagenet = 1_281_167 // 128
    assert total_steps(default.config, imagenet) == 20_018
    assert [total_steps(released.config, steps) for steps in (1, 300, imagenet)] == [20_000] * 3
    assert warmup_steps(default.config, 20_018) == warmup_steps(released.config, 20_000) == 1400
    assert warmup_steps(default.config, 50) == 4  # 7 % is three and a half
    assert total_steps(FARE(tiny_model, variant="released", epochs=3).config, 10) == 30
    # update k, from 2 on, has the rate lr k / 1400; the released first one has lr, which is not reproduced
    rates = [learning_rate(released.config, k - 1, 0, 20_000) for k in (1, 2, 700, 1400)]
    assert rates == pytest.approx([1e-5 * k / 1400 for k in (1, 2, 700, 1400)])
    assert learning_rate(released.config, 10_700, 0, 20_000) == pytest.approx(1e-5 / 2)


def test_it_is_an_art_trainer_and_found_by_name(tiny_model: ZeroShotClassifier) -> None:
    assert cd.get_defense("fare") is FARE
    estimator = cd.CLIPClassifier(tiny_model)
    trainer = FARE(estimator, **QUIET, batch_size=4)
    assert isinstance(trainer, Trainer) and trainer.get_classifier() is estimator
    x = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    kept, before = x.copy(), estimator.predict(x)
    trainer.fit(x, np.eye(10, dtype=np.float32)[np.arange(8)], nb_epochs=2, lr=1e-3, warmup_steps=0, verbose=False)
    assert np.array_equal(x, kept)
    assert not np.allclose(estimator.predict(x), before)
    assert trainer.history is not None and len(trainer.history.steps) == 4


def test_labels_change_nothing_but_what_is_measured(make_model: Make, images: Tensor) -> None:
    options: dict[str, Any] = {"show_progress": False, "measure_every": 1, "batch_size": 6, "epochs": 1, "lr": 1e-4}
    models = [make_model() for _ in range(2)]
    without, with_labels = (FARE(model, **options) for model in models)
    without.fit(images)
    with_labels.fit(images, torch.arange(12) % 10)
    for weight, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(weight, other)
    assert without.history is not None and with_labels.history is not None
    assert "clean_accuracy" not in without.history.steps[0] and "robust_accuracy" in with_labels.history.steps[0]
    without.fit_loader([images[:6], images[6:]], max_steps=1)
    assert len(without.history.steps) == 1


def test_a_fit_makes_embeddings_robust(make_model: Make, images: Tensor) -> None:
    """On new images: the attacked embedding comes far nearer to the original clean one than it was, the clean one
    moves away by less than that."""
    model, original = make_model(), make_model()
    threat = cd.ThreatModel("linf", eps=16 / 255, step_size=8 / 255, steps=3)
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(32, 3, 8, 8, generator=generator) * 1.4 - 0.2
    x = nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(0, 1)
    judge = begun(model, threat=threat)

    def distances() -> tuple[float, float]:
        added = judge.inner_attack({"x": images, "ids": torch.arange(12)}, seed=5)
        with torch.no_grad():
            return tuple(float(fare_loss(model.embed(z), added["target"])) for z in (added["x_adv"], images))

    before, at_first = distances()
    defense = FARE(model, threat=threat, **QUIET, batch_size=16, epochs=10, lr=1e-3)
    defense.fit(x)
    after, clean = distances()
    assert at_first == 0 and after < 0.3 * before and clean < 0.1 * before
    for name, value in defense.original.state_dict().items():
        assert torch.equal(value, original.state_dict()[name])
    assert all(torch.equal(a, b) for a, b in zip(model.head.buffers(), original.head.buffers()))


@pytest.mark.parametrize("options", [{"low_memory": True}, {"accumulate": 3}], ids=str)
def test_pieces_and_recomputed_passes_make_the_same_update(make_model: Make, images: Tensor, options: Any) -> None:
    models = [make_model(dtype=torch.float64) for _ in range(2)]
    common = {**QUIET, "clean_weight": 0.25, "batch_size": 12, "epochs": 2, "lr": 1e-4}
    for model, extra in zip(models, ({}, options)):
        FARE(model, **common, **extra).fit(images.double())
    for weight, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(weight, other, rtol=1e-7, atol=1e-10)


class Stopped(Exception):
    pass


class Until(FARE):
    """FARE that stops before its third update, as if pulled out of the socket."""

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.history is not None
        if len(self.history.steps) == 2:
            raise Stopped
        return super().losses(batch)


def test_a_resumed_run_keeps_the_first_original(make_model: Make, tmp_path: Path, images: Tensor) -> None:
    options = {**QUIET, "batch_size": 4, "epochs": 1, "lr": 1e-3, "clean_weight": 0.5, "checkpoint_every": 1}
    unbroken, resumed, original = make_model(), make_model(), make_model()
    FARE(unbroken, **options).fit(images)
    with pytest.raises(Stopped):
        Until(make_model(), **options, checkpoint=str(tmp_path)).fit(images)
    defense = FARE(resumed, **options, checkpoint=str(tmp_path), resume=True)
    defense.fit(images)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), defense.original.parameters()))
    facts = read_sidecar(tmp_path / "model.safetensors")
    assert (facts["method"], facts["hyper_parameters"]) == ("fare", {"clean_weight": 0.5, "trades": False})
    with pytest.raises(UsageError, match=r"1 of its settings: hyper_parameters\.clean_weight is 0\.0, was 0\.5"):
        FARE(make_model(), **{**options, "clean_weight": 0.0}, checkpoint=str(tmp_path), resume=True).fit(images)


def test_the_class_encoder_is_not_copied(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.class_encoder = lambda names: torch.ones(len(names), 32)
    assert begun(tiny_model).original.class_encoder is tiny_model.class_encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean_weight": 1.0}, r"clean_weight is 1\.0; a number of at least 0 and below 1 is expected"),
        ({"clean_weight": -0.1}, r"clean_weight is -0\.1; a number"),
        ({"clean_weight": math.nan}, "clean_weight is nan; a number"),
        ({"clean_weight": True}, "clean_weight is True; a number"),
        ({"clean_weight": "half"}, "clean_weight is 'half'; a number"),
        ({"trades": 1, "clean_weight": 0.5}, "trades is 1; True or False is expected"),
        ({"threat": cd.ThreatModel("linf", eps=1 / 255, restarts=2)}, r"threat has 2 restarts; .* has one start"),
        ({"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        ({"clean_wieght": 0.5}, "training option 'clean_wieght' is unknown"),
    ],
)
def test_bad_options(tiny_model: ZeroShotClassifier, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FARE(tiny_model, **options)


def test_bad_images(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"x has values in \[.*\]; \[0, 1\] is expected"):
        FARE(tiny_model, **QUIET, batch_size=4).fit(255 * images)
