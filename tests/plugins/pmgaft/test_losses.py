"""PMG-AFT: its terms by hand, and its two variants that never mix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense_pmgaft.pmgaft import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    clean_loss,
    generalisation_loss,
    robust_loss,
)

from .helpers import CLIPS, Make, a_batch, begun, statistics

log = math.log

# the warning has a test of its own
pytestmark = pytest.mark.filterwarnings("ignore:pmg-aft, variant 'released', trains with ImageNet's:UserWarning")


def shaken(model: ZeroShotClassifier, size: float = 0.05) -> None:
    """Trained a little, so to speak: away from the teacher."""
    with torch.no_grad():
        for weight in model.tower.parameters():
            weight.add_(size * weight.std(correction=0) * torch.randn_like(weight))


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
