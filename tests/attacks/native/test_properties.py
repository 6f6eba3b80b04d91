"""The native attacks: known optima, geometry, and what an attack must not depend on or leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.context import predict
from clipdefense.attacks.norms import BALLS, project

from .common import FEW, NATIVE, THREATS

ASCENTS = ["pgd", "apgd-ce", "apgd-dlr"]


class Linear(nn.Module):
    """Logits linear in the pixels, so that the worst case is known in closed form."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 12, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def distance(threat: ThreatModel, x: Tensor, x_adv: Tensor) -> Tensor:
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)


def test_objectives_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    y = torch.tensor([0, 2])
    torch.testing.assert_close(attacks.margin(logits, y), torch.tensor([-1.0, 2.0]))
    expected = torch.tensor([0.40760596, 2.16984602])  # log(1 + e^-1 + e^-2), log(e^-1 + e^2 + 1)
    torch.testing.assert_close(attacks.cross_entropy(logits, y), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ASCENTS)
def test_linear_model_linf_reaches_the_optimum(name: str) -> None:
    # two classes: the loss is monotone in (w_other - w_true) . d, maximised by eps * sign of it
    model = Linear(classes=2)
    x = torch.full((4, 3, 2, 2), 0.5)
    y = torch.tensor([0, 1, 0, 1])
    threat = ThreatModel("linf", 0.1, steps=30)
    x_adv = attacks.run(name, model, x, y, threat, early_stop=False)
    gap = (model.weight[1 - y] - model.weight[y]).view_as(x)
    torch.testing.assert_close(x_adv, x + 0.1 * gap.sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ASCENTS)
def test_linear_model_l2_reaches_the_optimum(name: str) -> None:
    model = Linear(classes=2)
    x = torch.full((4, 3, 2, 2), 0.5)
    y = torch.tensor([0, 1, 0, 1])
    threat = ThreatModel("l2", 0.3, step_size=0.05, steps=60)
    x_adv = attacks.run(name, model, x, y, threat, early_stop=False)
    gap = (model.weight[1 - y] - model.weight[y]).view_as(x)
    best = 0.3 * gap / gap.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv, x + best, atol=2e-3, rtol=0)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_ball_and_box(name: str, threat: ThreatModel, tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    y = torch.arange(len(images)) % 10
    for early_stop in (True, False):
        x_adv = attacks.run(name, tiny_model, images, y, threat, early_stop=early_stop, **FEW[name])
        assert distance(threat, images, x_adv).max() <= threat.eps + 1e-7 * (1 if threat.norm == "linf" else 10)
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert x_adv.dtype == images.dtype and not x_adv.requires_grad


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(["linf", "l2"]), eps=st.floats(1e-4, 2.0))
def test_projection_is_in_ball_and_box_and_leaves_inner_points(seed: int, norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 3, 4, 4, generator=generator)
    far = x + torch.randn(x.shape, generator=generator)
    ball = BALLS[norm]  # type: ignore[index]
    point = project(ball, x, far, eps)
    threat = ThreatModel(norm, min(eps, 1.0) if norm == "linf" else eps)  # type: ignore[arg-type]
    assert distance(threat, x, point).max() <= eps * (1 + 1e-5) + 1e-7
    assert point.min() >= 0 and point.max() <= 1
    torch.testing.assert_close(project(ball, x, point, eps), point, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NATIVE)
def test_attack_beats_random_noise(name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    threat = ThreatModel("linf", 8 / 255, steps=10)
    more = {"apgd-ce": {"steps": 20}, "apgd-dlr": {"steps": 20}, "fab-t": {"steps": 20}, "square": {"queries": 100}}
    x_adv = attacks.run(name, tiny_model, images, labels, threat, **more.get(name, FEW[name]))
    noisy = project(BALLS["linf"], images, images + torch.randn_like(images), threat.eps)
    right = [(predict(tiny_model, z).argmax(1) == labels).sum() for z in (x_adv, noisy)]
    assert right[1] > 0 and (right[0] < right[1] if name == "square" else right[0] == 0)


@pytest.mark.parametrize("name", NATIVE)
def test_same_seed_same_result_other_seed_other_result(
    name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    threat = ThreatModel("linf", 1 / 255, steps=3)

    def attack(**draws: Any) -> Tensor:
        return attacks.run(name, tiny_model, images, labels, threat, early_stop=False, **FEW[name], **draws)

    first, again, other = (attack(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and (name == "fab-t" or not torch.equal(first, other))
    drawn = [attack(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("early_stop", [True, False])
def test_neighbours_order_and_batch_size_do_not_matter(
    name: str, early_stop: bool, make_model: Callable[..., ZeroShotClassifier], images: Tensor
) -> None:
    # float64, so that another batch shape's rounding does not flip a sign
    model, x = make_model(dtype=torch.float64), images.double()
    y = predict(model, x).argmax(dim=1)
    threat = ThreatModel("linf", 2 / 255, steps=5)
    options = {"seed": 4, "early_stop": early_stop, **FEW[name]}
    ids = torch.arange(100, 100 + len(x))
    whole = attacks.run(name, model, x, y, threat, ids=ids, **options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = attacks.run(name, model, x[order], y[order], threat, ids=ids[order], **options)
    torch.testing.assert_close(shuffled, whole[order], atol=1e-9, rtol=0)
    refilled = attacks.run(name, model, x, y, threat, ids=ids, batch_size=5, **options)
    torch.testing.assert_close(refilled, whole, atol=1e-9, rtol=0)
    alone = attacks.run(name, model, x[3:4], y[3:4], threat, ids=ids[3:4], **options)
    torch.testing.assert_close(alone, whole[3:4], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NATIVE)
def test_class_order_does_not_matter(name: str, make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    model, x = make_model(dtype=torch.float64), images.double()
    y = predict(model, x).argmax(dim=1)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    permuted = ZeroShotClassifier(model.tower, model.head.embeddings[order], image_size=32).double().eval()
    threat = ThreatModel("linf", 2 / 255, steps=5)
    options = {"early_stop": False, **FEW[name]}
    there = attacks.run(name, permuted, x, order.argsort()[y], threat, **options)
    torch.testing.assert_close(there, attacks.run(name, model, x, y, threat, **options), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(name: str, classes: int, make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    model = make_model(classes=classes)
    y = predict(model, images).argmax(dim=1)
    x_adv = attacks.run(name, model, images, y, ThreatModel("linf", 16 / 255, steps=10), **FEW[name])
    assert (predict(model, x_adv).argmax(1) == y).sum() < len(y)


@pytest.mark.parametrize("name", NATIVE)
def test_two_classes_in_l2(name: str, make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    model = make_model(classes=2)
    y = predict(model, images).argmax(dim=1)
    x_adv = attacks.run(name, model, images, y, ThreatModel("l2", 3.0, steps=10), **FEW[name])
    assert (predict(model, x_adv).argmax(1) == y).sum() < len(y)


@pytest.mark.parametrize("name", NATIVE)
def test_eps_zero_returns_the_images(name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    x_adv = attacks.run(name, tiny_model, images, labels, ThreatModel("linf", 0.0))
    assert torch.equal(x_adv, images) and x_adv.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_is_left_behind(name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    tiny_model.train()
    tiny_model.tower.ln_post.eval()  # a part kept in eval on purpose stays so
    frozen_weight = next(tiny_model.parameters()).requires_grad_(False)
    modes = [part.training for part in tiny_model.modules()]
    x = images.clone().requires_grad_(True)
    rng = torch.get_rng_state()
    with torch.inference_mode():
        attacks.run(name, tiny_model, images.clone(), labels, THREATS[0], **FEW[name])
    attacks.run(name, tiny_model, x, labels, THREATS[0], **FEW[name])
    assert [part.training for part in tiny_model.modules()] == modes
    assert all(weight.grad is None for weight in tiny_model.parameters()) and x.grad is None
    assert not frozen_weight.requires_grad
    assert sum(not weight.requires_grad for weight in tiny_model.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_one_channel_images() -> None:
    class Grey(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean((1, 2, 3)) - 0.5, 0.5 - x.mean((1, 2, 3))], dim=1)

    x = torch.full((2, 1, 4, 4), 0.52)
    x_adv = attacks.pgd(Grey(), x, torch.zeros(2, dtype=torch.long), ThreatModel("linf", 0.05, steps=5))
    assert x_adv.shape == x.shape and (x_adv.mean((1, 2, 3)) < 0.5).all()
