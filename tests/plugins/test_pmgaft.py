"""PMG-AFT: its terms by hand, its two variants that never mix, and the statistics that belong to the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.data_generators import NumpyDataGenerator
from art.defences.trainer import Trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import CLIP_MEAN, CLIP_STD, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training import DivergedError, load_weights
from clipdefense.training.data import Arrays, Share
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense.training.schedule import learning_rate, warmup_steps
from clipdefense.weights import read_sidecar
from clipdefense_pmgaft.pmgaft import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PMGAFT,
    clean_loss,
    generalisation_loss,
    robust_loss,
)
from clipdefense_tecoa.tecoa import TeCoA

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
Make = Callable[..., ZeroShotClassifier]
log = math.log

# the warning has a test of its own
pytestmark = pytest.mark.filterwarnings("ignore:pmg-aft, variant 'released', trains with ImageNet's:UserWarning")


def begun(model: ZeroShotClassifier, **options: Any) -> PMGAFT:
    defense = PMGAFT(model, **options)
    defense.begin()
    return defense


def shaken(model: ZeroShotClassifier, size: float = 0.05) -> None:
    """Trained a little, so to speak: away from the teacher."""
    with torch.no_grad():
        for weight in model.tower.parameters():
            weight.add_(size * weight.std(correction=0) * torch.randn_like(weight))


def a_batch(images: Tensor, n: int = 6) -> dict[str, Tensor]:
    x = images[:n]
    x_adv = (x + (torch.rand_like(x) * 2 - 1) * 8 / 255).clamp(0, 1)
    return {"x": x, "x_adv": x_adv, "y": torch.arange(n) % 10, "ids": torch.arange(n)}


def statistics(model: ZeroShotClassifier) -> tuple[list[float], list[float]]:
    return model.mean.flatten().tolist(), model.std.flatten().tolist()


CLIPS = pytest.approx(CLIP_MEAN, abs=1e-7), pytest.approx(CLIP_STD, abs=1e-7)
IMAGENETS = pytest.approx(IMAGENET_MEAN, abs=1e-7), pytest.approx(IMAGENET_STD, abs=1e-7)


def test_terms_by_hand() -> None:
    # rows of exponentials, up to a factor: A (1, 1, 2) and (1, 3, 4), the reference (2, 1, 1) and (2, 2, 4)
    A = torch.tensor([[0.0, 0.0, log(2)], [0.0, log(3), log(4)]], dtype=torch.float64)
    reference = torch.tensor([[log(2), 0.0, 0.0], [0.0, 0.0, log(2)]], dtype=torch.float64)
    first = 1 / 2 * log(2) + 1 / 4 * log(1) + 1 / 4 * log(1 / 2)  # sum of P log(P / Q), P the reference
    second = 1 / 4 * log(2) + 1 / 4 * log(2 / 3) + 1 / 2 * log(1)
    for term in (generalisation_loss, clean_loss):
        assert float(term(A, reference)) == pytest.approx((first + second) / 2, abs=1e-15)
    swapped = (1 / 4 * log(1 / 2) + 1 / 2 * log(2) + 1 / 8 * log(1 / 2) + 3 / 8 * log(3 / 2)) / 2
    assert float(clean_loss(reference, A)) == pytest.approx(swapped, abs=1e-15)
    assert abs(swapped - (first + second) / 2) > 0.003
    assert float(robust_loss(A, torch.tensor([2, 1]))) == pytest.approx((log(2) + log(8 / 3)) / 2, abs=1e-15)


def test_term_gradients() -> None:
    A, other = (3 * torch.randn(2, 4, 6, dtype=torch.float64)).unbind()
    y = torch.tensor([0, 5, 2, 2])
    A.requires_grad_(True)
    K = other.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: robust_loss(z, y), A)
    assert torch.autograd.gradcheck(lambda z: generalisation_loss(z, other), A)
    assert torch.autograd.gradcheck(clean_loss, (A, K))
    P, Q = other.softmax(dim=1), A.detach().softmax(dim=1)
    to_A, to_K = torch.autograd.grad(clean_loss(A, K), (A, K))
    torch.testing.assert_close(to_A, (Q - P) / 4)
    surprise = (P / Q).log()
    torch.testing.assert_close(to_K, P * (surprise - (P * surprise).sum(dim=1, keepdim=True)) / 4)
    assert to_K.abs().max() > 1e-3  # nothing is detached


@given(n=st.integers(1, 4), classes=st.integers(2, 8), size=st.floats(0.01, 100), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_divergences_are_divergences(n: int, classes: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, K = (size * torch.randn(2, n, classes, dtype=torch.float64, generator=generator)).unbind()
    value = float(clean_loss(A, K))
    assert value > -1e-15 and float(clean_loss(A, A)) == 0
    shift = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    assert float(clean_loss(A + shift, K - shift)) == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert float(clean_loss(A.flip(1), K.flip(1))) == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert float(clean_loss(torch.cat([A, A]), torch.cat([K, K]))) == pytest.approx(
        value, rel=1e-9, abs=1e-15
    )  # a mean
    assert float(generalisation_loss(A, K)) == value


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_divergence_of_near_logits_grows_with_the_square_of_the_scale(scale: float) -> None:
    """KL ~ s^2 Var_p(delta cos) / 2, which is why the scale cannot be chosen apart from the reduction."""
    cosines = 0.2 + 0.02 * torch.randn(64, 50, dtype=torch.float64)
    delta = 1e-4 * torch.randn(64, 50, dtype=torch.float64)
    p = (scale * cosines).softmax(dim=1)
    variance = (p * delta**2).sum(dim=1) - (p * delta).sum(dim=1) ** 2
    value = float(clean_loss(scale * (cosines + delta), scale * cosines))
    assert value == pytest.approx(scale**2 * float(variance.mean()) / 2, rel=0.01)


def test_default_uses_the_models_own_logits_and_averages(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    defense, batch = begun(tiny_model, alpha=0.5, beta=2.0), a_batch(images)
    before = statistics(tiny_model)
    shaken(tiny_model)
    with torch.no_grad():
        A, K, O = tiny_model(batch["x_adv"]), tiny_model(batch["x"]), defense.teacher(batch["x_adv"])  # noqa: E741
        terms = defense.losses(batch)
    assert A.abs().max() > 5  # scale 100
    assert terms.keys() == {"robust", "general", "clean"}
    torch.testing.assert_close(terms["robust"], F.cross_entropy(A, batch["y"]))
    kl = [F.kl_div(A.log_softmax(1), ref.log_softmax(1), log_target=True, reduction="batchmean") for ref in (O, K)]
    torch.testing.assert_close(terms["general"], 0.5 * kl[0])
    torch.testing.assert_close(terms["clean"], 2.0 * kl[1])
    assert statistics(tiny_model) == before == statistics(defense.teacher) == CLIPS


@pytest.mark.parametrize("n", [2, 6])
def test_released_uses_cosines_and_sums_as_over_256_images(make_model: Make, images: Tensor, n: int) -> None:
    model = make_model(dtype=torch.float64)
    defense, batch = begun(model, variant="released"), a_batch(images.double(), n)
    shaken(model)
    anchors = model.head.anchors

    def c(model: ZeroShotClassifier, x: Tensor) -> Tensor:
        normalised = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
        return F.normalize(model.tower(normalised), dim=1) @ anchors.T

    with torch.no_grad():
        A, K, O = c(model, batch["x_adv"]), c(model, batch["x"]), c(defense.teacher, batch["x_adv"])  # noqa: E741
        terms = defense.losses(batch)
    assert A.abs().max() <= 1
    torch.testing.assert_close(terms["robust"], F.cross_entropy(A, batch["y"]))
    # of n images: their sum, times 256 / n
    kl = [F.kl_div(A.log_softmax(1), ref.log_softmax(1), log_target=True, reduction="sum") for ref in (O, K)]
    torch.testing.assert_close(terms["general"], 256 / n * kl[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(terms["clean"], 256 / n * kl[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(model.head.scale, torch.tensor(100.0, dtype=torch.float64))


@pytest.mark.parametrize("variant", ["default", "released"])
def test_the_attack_ascends_the_cross_entropy_of_the_variants_logits(
    make_model: Make, images: Tensor, variant: str
) -> None:
    model = make_model(dtype=torch.float64)
    defense = begun(model, variant=variant)
    shaken(model)
    batch = {name: a_batch(images.double())[name] for name in ("x", "y", "ids")}
    added = defense.inner_attack(batch, seed=3)
    assert added.keys() == {"x_adv"}

    class Cosines(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(model.embed(x), dim=1) @ model.head.anchors.T

    found = {}
    for name, attacked in (("default", model), ("released", Cosines())):
        options: dict[str, Any] = {"early_stop": False, "seed": 3, "ids": batch["ids"]}
        found[name] = pgd(attacked, batch["x"], batch["y"], defense.threat, **options)
    torch.testing.assert_close(added["x_adv"], found[variant], atol=1e-12, rtol=0)
    assert not torch.equal(found["default"], found["released"])
    assert (added["x_adv"] - batch["x"]).abs().max() <= 1 / 255 + 1e-12


@pytest.mark.parametrize("variant", ["default", "released"])
def test_gradient_through_the_model_agrees_with_finite_differences(
    make_model: Make, images: Tensor, variant: str
) -> None:
    model = make_model(dtype=torch.float64)
    defense, batch = begun(model, variant=variant), a_batch(images.double(), 3)
    shaken(model)
    (weight,) = defense.trainable_parameters("head")
    direction, step = torch.randn_like(weight), 1e-6
    for name in ("robust", "general", "clean"):
        (gradient,) = torch.autograd.grad(defense.losses(batch)[name], weight)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                values.append(float(defense.losses(batch)[name]))
                weight -= sign * step * direction
        slope = float((gradient * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_each_image_set_is_encoded_once(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    for alpha, beta, own, frozen in ((1, 1, 2, 1), (0, 1, 2, 0), (1, 0, 1, 1), (0, 0, 1, 0)):
        defense = begun(tiny_model, alpha=alpha, beta=beta)
        graphs: dict[str, list[bool]] = {"model": [], "teacher": []}
        modules = {"model": tiny_model, "teacher": getattr(defense, "teacher", None)}
        handles = [
            module.tower.register_forward_hook(lambda m, i, out, seen=graphs[name]: seen.append(out.requires_grad))
            for name, module in modules.items()
            if module is not None
        ]
        defense.losses(a_batch(images))
        for handle in handles:
            handle.remove()
        assert graphs == {"model": [True] * own, "teacher": [False] * frozen}


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


def test_published_settings(tiny_model: ZeroShotClassifier) -> None:
    default, released = PMGAFT(tiny_model), PMGAFT(tiny_model, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 1 / 255, 1 / 255, 2)
        assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 5e-5, 0.9, 0.0)
        assert (config.batch_size, config.epochs, config.schedule) == (256, 10, "cosine")
        assert config.train == "tower" and config.mix == 1 and not config.bf16
    assert warmup_steps(released.config, 50) == 1000 and warmup_steps(default.config, 50) == 5
    assert learning_rate(released.config, 499, 0, 3910) == pytest.approx(5e-5 / 2)
    own = {"logit_scale": 100.0, "kl_weight": 1.0, "mean": CLIPS[0], "std": CLIPS[1]}
    assert default.hyper_parameters() == {"alpha": 1.0, "beta": 1.0, **own}
    theirs = {"logit_scale": 1.0, "kl_weight": 256.0, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    assert released.hyper_parameters() == {"alpha": 1.0, "beta": 1.0, **theirs}
    assert statistics(tiny_model) == CLIPS  # nothing changes before a fit


def test_it_is_an_art_trainer_and_found_by_name(tiny_model: ZeroShotClassifier) -> None:
    assert cd.get_defense("pmg-aft") is PMGAFT
    estimator = cd.CLIPClassifier(tiny_model)
    trainer = PMGAFT(estimator, **QUIET, batch_size=4)
    assert isinstance(trainer, Trainer) and trainer.get_classifier() is estimator
    x = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    before = estimator.predict(x)
    trainer.fit(x, np.eye(10, dtype=np.float32)[np.arange(8)], batch_size=8, nb_epochs=2, lr=1e-3, verbose=False)
    assert not np.allclose(estimator.predict(x), before)
    assert trainer.history is not None and len(trainer.history.steps) == 2


def test_released_changes_the_statistics_in_place_and_says_so(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    estimator = cd.CLIPClassifier(tiny_model)
    defense = PMGAFT(estimator, variant="released", **QUIET, batch_size=12, epochs=1)
    buffer, other = tiny_model.mean, tiny_model.with_classes(["thing 1", "thing 2"])
    with pytest.warns(UserWarning, match=r"mean was \(0\.4815, 0\.4578, 0\.4082\) .* now on they are \(0\.485, 0\.456"):
        defense.fit(images, torch.arange(12) % 10)
    assert tiny_model.mean is buffer and statistics(tiny_model) == IMAGENETS == statistics(defense.teacher)
    predicted = estimator.predict(images.numpy())
    normalised = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = tiny_model.head(tiny_model.tower(normalised))
    np.testing.assert_allclose(predicted, expected.numpy(), atol=1e-4)
    assert statistics(tiny_model.with_classes(["thing 1", "thing 2"])) == IMAGENETS == statistics(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defense.fit(images, torch.arange(12) % 10)  # they are there already
    assert statistics(tiny_model) == IMAGENETS


def test_a_saved_model_keeps_its_statistics(make_model: Make, tmp_path: Path, images: Tensor) -> None:
    model = make_model()
    options = {**QUIET, "batch_size": 6, "epochs": 1, "lr": 1e-3, "checkpoint": str(tmp_path)}
    PMGAFT(model, variant="released", **options).fit(images, torch.arange(12) % 10)
    path = tmp_path / "model.safetensors"
    facts = read_sidecar(path)
    assert (facts["mean"], facts["std"]) == statistics(model) == IMAGENETS
    assert (facts["method"], facts["variant"]) == ("pmg-aft", "released")
    assert facts["hyper_parameters"]["mean"] == list(IMAGENET_MEAN)
    with pytest.raises(UsageError, match=r"has other preprocessing: mean \[0\.48\d+, .* build the model with the file"):
        load_weights(make_model(), path)
    tower, embeddings = make_model().tower, make_model().head.embeddings
    build = {"class_names": facts["class_names"], "image_size": 32, "mean": facts["mean"], "std": facts["std"]}
    fresh = ZeroShotClassifier(tower, embeddings, **build).eval()
    load_weights(fresh, path)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


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


def test_the_class_encoder_is_not_copied(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.class_encoder = lambda names: torch.ones(len(names), 32)
    assert begun(tiny_model).teacher.class_encoder is tiny_model.class_encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1.0}, r"scale is 1\.0, but the scale of the logits, the reduction .* belong together; choose all"),
        ({"logit_scale": 1, "variant": "released"}, "logit_scale is 1, but .* belong together"),
        ({"reduction": "sum"}, "reduction is 'sum', but .* variant='default' or variant='released'"),
        ({"mean": IMAGENET_MEAN}, r"mean is \(0\.485, 0\.456, 0\.406\), but .* belong together"),
        ({"alpha": 0.5, "variant": "released"}, r"alpha is 0\.5 with variant='released', whose code has no such"),
        ({"beta": 0, "variant": "released"}, "beta is 0 with variant='released', whose code has no such"),
        ({"alpha": -1}, "alpha is -1; a number of at least 0 is expected"),
        ({"beta": math.inf}, "beta is inf; a number of at least 0 is expected"),
        ({"alpha": True}, "alpha is True; a number"),
        ({"beta": "1"}, "beta is '1'; a number"),
        ({"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        ({"alhpa": 1}, "training option 'alhpa' is unknown"),
    ],
)
def test_bad_options(tiny_model: ZeroShotClassifier, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PMGAFT(tiny_model, **options)


def test_released_needs_three_channels(tiny_model: ZeroShotClassifier) -> None:
    grey = ZeroShotClassifier(tiny_model.tower, tiny_model.head.embeddings, image_size=32, mean=(0.5,), std=(0.5,))
    with pytest.raises(UsageError, match=r"the model takes 1 channels; variant='released' sets ImageNet's statistics"):
        PMGAFT(grey, variant="released")


def test_it_needs_labels(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with pytest.raises(UsageError, match="y is None, but this method learns from labels"):
        PMGAFT(tiny_model, **QUIET, batch_size=4).fit(images)
