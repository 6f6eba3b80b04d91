"""Random noise, anti-adversary and hedge defence: their terms, their steps by hand, their passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.norms import box
from clipdefense_testtime.anti_adversary import AntiAdversary, pseudo_label_loss
from clipdefense_testtime.hedge import HedgeDefense, hedge_loss
from clipdefense_testtime.noise import RandomNoise
from clipdefense_ttc.ttc import TTC

Make = Callable[..., cd.ZeroShotClassifier]


class LinearModel(nn.Module):
    """Logits linear in the pixels: z = W vec(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class Passes:
    """Counts images through a module, forward and backward, by hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.forward = self.backward = 0
        module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


class TestTerms:
    def test_pseudo_label_loss(self) -> None:
        z = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(3.0), math.log(4.0)]], dtype=torch.float64)
        expected = torch.tensor([math.log(2.0), math.log(2.0)], dtype=torch.float64)  # -log 2/4 and -log 4/8
        torch.testing.assert_close(pseudo_label_loss(z, torch.tensor([0, 2])), expected)
        leaf, y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 1])
        usual = nn.functional.cross_entropy(leaf, y, reduction="none")
        torch.testing.assert_close(pseudo_label_loss(leaf, y), usual)
        assert torch.autograd.gradcheck(lambda z: pseudo_label_loss(z, y), leaf)
        assert torch.autograd.gradgradcheck(lambda z: pseudo_label_loss(z, y), leaf)

    @pytest.mark.parametrize("margin", [0.0, 5.0, 30.0, 80.0])
    def test_pseudo_label_loss_keeps_its_gradient_where_the_model_is_sure(self, margin: float) -> None:
        z = torch.tensor([[margin, 0.0, -1.0, -2.0]], requires_grad=True)
        (gradient,) = torch.autograd.grad(pseudo_label_loss(z, torch.tensor([0])).sum(), z)
        e = np.exp([-margin, -margin - 1, -margin - 2])
        expected = np.array([-e.sum(), *e]) / (1 + e.sum())
        np.testing.assert_allclose(gradient[0].numpy(), expected, rtol=1e-4)

    def test_hedge_loss(self) -> None:
        z = torch.tensor([[0.7, 0.7], [math.log(3.0), 0.0]], dtype=torch.float64)
        # softmax (1/2, 1/2) and (3/4, 1/4): KL = 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 log 4/3
        expected = torch.tensor([0.0, 0.5 * math.log(4 / 3)], dtype=torch.float64)
        torch.testing.assert_close(hedge_loss(z), expected)

    def test_hedge_loss_is_the_cross_entropy_of_all_classes(self) -> None:
        z = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
        total = sum(nn.functional.cross_entropy(z, torch.full((6,), c), reduction="none") for c in range(7))
        assert isinstance(total, Tensor)
        torch.testing.assert_close(7 * (hedge_loss(z) + math.log(7)), total)
        (gradient,) = torch.autograd.grad(hedge_loss(z).sum(), z)
        torch.testing.assert_close(gradient, (z.softmax(dim=1) - 1 / 7).detach())
        assert torch.autograd.gradcheck(hedge_loss, z)


class TestRandomNoise:
    def test_it_is_ttc_without_steps(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        noise, ttc = RandomNoise(eps=0.05, seed=4), TTC(tiny_model, eps=0.05, steps=0, seed=4)
        assert torch.equal(noise.perturbation(images), ttc.perturbation(images))
        assert RandomNoise().eps == ttc.eps - 0.05 + 4 / 255

    def test_it_fills_its_range(self) -> None:
        x, eps = torch.full((20, 3, 16, 16), 0.5), 8 / 255
        delta = RandomNoise(eps=eps).perturbation(x)
        n = delta.numel()
        assert float(delta.abs().max()) <= eps
        assert abs(float(delta.mean())) < 5 * eps / math.sqrt(3 * n)
        assert float(delta.std()) == pytest.approx(eps / math.sqrt(3), rel=0.02)

    def test_needs_no_model_and_makes_no_passes(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        passes = Passes(tiny_model)
        assert torch.equal(RandomNoise(tiny_model).perturbation(images), RandomNoise().perturbation(images))
        assert passes.forward == 0

    def test_view_has_the_exact_gradient(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        defense, ids = RandomNoise(eps=0.1), torch.arange(len(images))
        leaf = x.clone().requires_grad_(True)
        view = defense.adaptive(model)[0]
        (gradient,) = torch.autograd.grad(view.forward(leaf, ids, 2).sum(), leaf)
        noise = defense.draw(x, ids, 2)
        at = (x + noise).clamp(0, 1).requires_grad_(True)
        (inside,) = torch.autograd.grad(model(at).sum(), at)
        clipped = (x + noise < 0) | (x + noise > 1)
        assert clipped.any() and view.eot == 20
        torch.testing.assert_close(gradient, inside.masked_fill(clipped, 0.0))


class TestAntiAdversary:
    def test_two_steps_by_hand(self) -> None:
        model = LinearModel()
        w = model.weight.detach().numpy()
        x = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
        x[0, 0, 0, 0], x[0, 2, 1, 1] = 0.01, 0.99  # the box binds here
        flat, d = x.flatten().numpy(), np.zeros(12)
        label = (w @ flat).argmax()
        for _ in range(2):
            gradient = w.T @ (softmax(w @ (flat + d)) - np.eye(4)[label])
            d = np.clip(np.clip(d - 0.03 * np.sign(gradient), -0.05, 0.05), -flat, 1 - flat)
        assert (np.abs(d) == 0.05).any() and (np.abs(d) < 0.0100001).any()
        delta = AntiAdversary(model, eps=0.05, step_size=0.03).perturbation(x)
        np.testing.assert_allclose(delta.flatten().numpy(), d, atol=1e-12)

    def test_released_is_its_normalised_space(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        mean, std = model.mean.double(), model.std.double()

        def logits(normalised: Tensor) -> Tensor:
            return model.head(model.tower(normalised))

        start = (x - mean) / std
        label, moved = logits(start).argmax(dim=1), start
        for _ in range(2):
            leaf = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits(leaf), label), leaf)
            moved = moved - 0.15 * gradient.sign()
        released = AntiAdversary(model, variant="released")
        delta = released.perturbation(x)
        torch.testing.assert_close(delta, ((moved - start) * std).detach(), atol=1e-9, rtol=0)
        assert (x + delta).min() < 0 and (x + delta).max() > 1  # as the docstring says
        assert delta.abs().max() > 18 / 255

    def test_it_makes_the_model_surer_of_what_it_said(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        small = AntiAdversary(model, eps=1e-3, step_size=5e-4).perturbation(x)
        with torch.no_grad():
            before, after = model(x).softmax(dim=1), model(x + small).softmax(dim=1)
            said = before.argmax(dim=1, keepdim=True)
            assert (after.gather(1, said) > before.gather(1, said)).all()
            strong = AntiAdversary(model).wrap(model)(x)
        assert torch.equal(strong.argmax(dim=1), said[:, 0])  # hence the view "pseudo-label"

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_passes(self, steps: int, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        passes = Passes(tiny_model)
        delta = AntiAdversary(tiny_model, steps=steps).perturbation(images)
        assert (passes.forward, passes.backward) == (12 * steps, 12 * steps)
        assert delta.any() == (steps > 0)

    def test_it_is_deterministic(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        defense = AntiAdversary(tiny_model)
        first = defense.perturbation(images)
        assert torch.equal(defense.perturbation(images, ids=torch.arange(12) + 9, seed=8), first)
        with pytest.raises(cd.UsageError, match="noise was given, but the anti-adversary starts at the image itself"):
            defense.perturbation(images, noise=torch.zeros_like(images))

    def test_defaults(self, tiny_model: cd.ZeroShotClassifier) -> None:
        defense = AntiAdversary(tiny_model)
        assert (defense.eps, defense.step_size, defense.steps) == (4 / 255, 2 / 255, 2)


class TestHedge:
    def test_two_steps_by_hand_from_a_start_outside_the_box(self) -> None:
        model = LinearModel()
        w = model.weight.detach().numpy()
        x = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
        x[0, 0] = 0.99
        start = torch.linspace(-0.04, 0.05, 12, dtype=torch.float64).view(1, 3, 2, 2).flip(1)
        assert (x + start > 1).any()
        flat, d, points = x.flatten().numpy(), start.flatten().numpy(), []
        for _ in range(2):
            points.append(flat + d)
            gradient = w.T @ (softmax(w @ (flat + d)) - 0.25)
            d = np.clip(np.clip(d + 0.02 * np.sign(gradient), -0.05, 0.05), -flat, 1 - flat)
        assert points[0].max() > 1 >= points[1].max()
        delta = HedgeDefense(model, eps=0.05, step_size=0.02, steps=2).perturbation(x, noise=start)
        np.testing.assert_allclose(delta.flatten().numpy(), d, atol=1e-12)

    def test_the_first_gradient_is_taken_at_the_unclipped_start(self) -> None:
        """A model whose gradient's sign changes where the box ends."""

        class Kink(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                first = (x.flatten(1) - 1).abs().sum(dim=1)
                return torch.stack([first + 1, torch.zeros_like(first)], dim=1)

        x, noise = torch.full((1, 1, 1, 2), 0.98), torch.tensor([[[[0.04, -0.04]]]])
        one = HedgeDefense(Kink(), eps=0.05, step_size=0.01, steps=1).perturbation(x, noise=noise)
        # at 1.02 the first logit, the larger, rises upwards, and the box takes the step back; at 0.94, downwards
        torch.testing.assert_close(one, torch.tensor([[[[0.02, -0.05]]]]))

    def test_loss_rises(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        defense, start = HedgeDefense(model, eps=2e-3, step_size=5e-4, steps=3), torch.zeros_like(x)
        with torch.no_grad():
            assert (hedge_loss(model(x + defense.perturbation(x, noise=start))) > hedge_loss(model(x))).all()

    @pytest.mark.parametrize("steps", [0, 2])
    def test_passes_and_noise_alone(self, steps: int, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        passes = Passes(tiny_model)
        defense, ids = HedgeDefense(tiny_model, steps=steps), torch.arange(12)
        delta = defense.perturbation(images, ids=ids)
        assert (passes.forward, passes.backward) == (12 * steps, 12 * steps)
        assert torch.equal(delta, box(images, defense.draw(images, ids, 0))) == (steps == 0)
        assert not HedgeDefense(tiny_model, eps=0.0).perturbation(images).any()

    def test_published_settings(self, tiny_model: cd.ZeroShotClassifier) -> None:
        defense = HedgeDefense(tiny_model)
        assert (defense.eps, defense.step_size, defense.steps) == (0.031, 0.007, 20)
