"""TTC's adaptive views: each piece by hand, and what an attack through them does to the gate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense_ttc.ttc import TTC
from clipdefense_ttc.views import DefendedEmbedding, GateEvasion, evasion, soft_gate, soft_sign, unrolled

VIEWS = ("bpda-eot", "smoothed", "gate-evasion", "gate-forced-on")
THREAT = cd.ThreatModel("linf", 4 / 255, steps=5)


def views_of(ttc: TTC, model: nn.Module) -> dict[str, cd.AttackView]:
    return {view.name: view for view in ttc.adaptive(model)}


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def by_differences(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-7) -> Tensor:
    above, below = ((x + sign * h * v).requires_grad_(True) for sign in (1, -1))
    return ((function(above).sum() - function(below).sum()) / (2 * h)).detach()


class TestPieces:
    def test_soft_sign(self) -> None:
        gradient = torch.tensor([[1.0, -3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).view(2, 1, 2, 2)
        out = soft_sign(gradient, 0.5).flatten(1)
        expected = torch.tensor([0.25, -0.75, 0.0, 1.0], dtype=torch.float64).tanh()  # the first image's mean is 2
        torch.testing.assert_close(out[0], expected)
        assert not out[1].any()
        assert torch.equal(soft_sign(gradient, 1e9), gradient.sign())
        torch.testing.assert_close(soft_sign(1e-8 * gradient), soft_sign(gradient))  # a gradient's scale plays no part

    def test_soft_sign_gradient(self) -> None:
        gradient = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda g: soft_sign(g, 0.7), gradient)

    def test_soft_gate(self) -> None:
        r = torch.tensor([0.2, 0.15, 0.3, 0.0])
        torch.testing.assert_close(soft_gate(r, 0.2), torch.sigmoid(torch.tensor([0.0, 1.0, -2.0, 4.0])))
        assert soft_gate(torch.tensor([0.1]), 0.0) < 1e-6  # no width, and nothing below the threshold

    def test_evasion(self) -> None:
        r = torch.tensor([0.0, 0.2, 0.24, 0.25, 0.9], requires_grad=True)
        term = evasion(r, 0.2, 0.05)
        torch.testing.assert_close(term, torch.tensor([-0.25, -0.05, -0.01, 0.0, 0.0]), atol=1e-7, rtol=0)
        (slope,) = torch.autograd.grad(term.sum(), r)
        assert slope.tolist() == [1, 1, 1, 0, 0]

    def test_unrolled_gives_gradients_only_where_they_are_wanted(self) -> None:
        def surrogate(x: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
            return gradient

        x = torch.tensor([2.0], requires_grad=True)
        (second,) = torch.autograd.grad(unrolled(surrogate, x), x)
        assert second.item() == 12
        with torch.no_grad():
            assert unrolled(surrogate, x).item() == 12 and not unrolled(surrogate, x).requires_grad
        with torch.inference_mode():
            assert unrolled(surrogate, torch.tensor([2.0])).item() == 12
        assert not unrolled(surrogate, x.detach()).requires_grad


class TestSmoothed:
    @pytest.mark.parametrize("benign", ["noise", "zero"])
    def test_without_steps_it_is_the_noise(
        self, benign: Any, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        ttc = TTC(tiny_model, steps=0, benign=benign)
        noise = ttc.draw(images, torch.arange(len(images)), 0)
        assert torch.equal(ttc.smoothed(images, noise), images + ttc.perturbation(images, noise=noise))
        off = TTC(tiny_model, eps=0.0, benign=benign)
        assert torch.equal(off.smoothed(images, noise), images)

    def test_forced_on_and_sharp_it_is_the_counterattack_of_every_image(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        never, always = (TTC(model, steps=3, threshold=tau) for tau in (0.0, 1e9))
        noise = never.draw(x, torch.arange(len(x)), 0)
        sharp = never.smoothed(x.requires_grad_(True), noise, kappa=1e9, gate_on=True).detach()
        expected = always.perturbation(x.detach(), noise=noise)
        torch.testing.assert_close(sharp - x.detach(), expected, atol=1e-9, rtol=0)
        assert not torch.allclose(expected, never.perturbation(x.detach(), noise=noise))

    def test_forced_on_gradient_is_that_of_finite_differences(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), (images.double() * 0.8 + 0.1)[:3]
        view = views_of(TTC(model), model)["gate-forced-on"]
        v, ids = torch.randn_like(x), torch.arange(3)
        gradient = gradient_of(lambda z: view.forward(z, ids, 5), x)
        differences = by_differences(lambda z: view.forward(z, ids, 5), x, v)
        torch.testing.assert_close((gradient * v).sum(), differences, rtol=1e-4, atol=1e-4)


class TestViews:
    def test_names(self, tiny_model: cd.ZeroShotClassifier) -> None:
        views = TTC(tiny_model).adaptive(tiny_model)
        assert tuple(view.name for view in views) == VIEWS
        assert all(view.eot >= 10 for view in views)
        assert [view.name for view in views if view.extra_loss is not None] == ["gate-evasion"]
        for ungated in (TTC(tiny_model, steps=0), TTC(tiny_model, eps=0.0)):
            assert tuple(view.name for view in ungated.adaptive(tiny_model)) == VIEWS[:2]

    @pytest.mark.parametrize("name", VIEWS)
    def test_draws_are_keyed_by_id_and_seed_and_no_neighbour_matters(
        self, name: str, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x, ids = make_model(dtype=torch.float64), images[:4].double(), torch.tensor([7, 3, 90, -5])
        ttc = TTC(model)
        ttc.threshold = float(ttc.drift(x).median())
        forward = views_of(ttc, model)[name].forward
        whole = forward(x, ids, 2)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(forward(x[order], ids[order], 2), whole[order], atol=1e-9, rtol=0)
        torch.testing.assert_close(forward(x[1:2], ids[1:2], 2), whole[1:2], atol=1e-9, rtol=0)
        assert (forward(x, ids + 1, 2) - whole).abs().amax(dim=1).min() > 1e-6
        assert (forward(x, ids, 3) - whole).abs().amax(dim=1).min() > 1e-6

    @pytest.mark.parametrize("name", VIEWS)
    def test_values_are_the_same_in_every_mode(
        self, name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        view, ids = views_of(TTC(tiny_model), tiny_model)[name], torch.arange(3)
        x = images[:3].clone().requires_grad_(True)
        logits = view.forward(x, ids, 1)
        assert logits.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(view.forward(x, ids, 1), logits.detach(), atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            inside = view.forward(images[:3].clone(), ids.clone(), 1)
            term = None if view.extra_loss is None else view.extra_loss(images[:3].clone(), labels[:3])
        torch.testing.assert_close(inside.clone(), logits.detach(), atol=1e-5, rtol=1e-5)
        assert term is None or torch.isfinite(term).all()

    @pytest.mark.parametrize("name", VIEWS)
    def test_nothing_is_left_behind(
        self,
        name: str,
        make_model: Callable[..., cd.ZeroShotClassifier],
        images: Tensor,
        labels: Tensor,
        untouched: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        model, reference = make_model(), make_model()
        view = views_of(TTC(model, reference=reference), model)[name]
        x = images[:3].clone().requires_grad_(True)
        with untouched(model), untouched(reference):
            total = view.forward(x, torch.arange(3), 0).sum()
            if view.extra_loss is not None:
                total = total + view.extra_loss(x, labels[:3]).sum()
            (gradient,) = torch.autograd.grad(total, x)
        assert gradient.flatten(1).any(dim=1).all() and x.grad is None

    def test_the_evaluation_attacks_each(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        result = cd.evaluate(
            tiny_model, images, labels, THREAT, attacks=["pgd,steps=1"], defense=TTC(tiny_model), eot=1, verdict_seeds=1
        )
        assert [row.attacked for row in result.rows][1:] == [f"adaptive view {name}" for name in VIEWS]
        assert result.adaptive


class TestGateEvasion:
    def test_its_logits_are_those_of_the_noise_alone(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        ids = torch.arange(len(images))
        ttc = TTC(tiny_model, threshold=0.0)  # what TTC does to images it lets pass
        logits = GateEvasion(ttc, tiny_model).forward(images, ids, 4)
        torch.testing.assert_close(logits, ttc.wrap(tiny_model)(images, ids, 4))
        ttc = TTC(tiny_model, threshold=0.0, benign="zero")
        torch.testing.assert_close(GateEvasion(ttc, tiny_model).forward(images, ids, 4), tiny_model(images))

    @pytest.mark.parametrize("referenced", [False, True])
    def test_its_term_by_hand(
        self, referenced: bool, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor, labels: Tensor
    ) -> None:
        model, reference = make_model(), make_model(quick_gelu=False)
        ttc = TTC(model, reference=reference if referenced else None)
        ids = torch.arange(20, 20 + len(images))
        r = ttc.drift(images, noise=ttc.draw(images, ids, 6))
        tau, m = float(r.sort().values[6]), 0.05 * float(r.median())
        ttc.threshold = tau
        gate = GateEvasion(ttc, model, weight=30.0, margin=m)
        x = images.clone().requires_grad_(True)
        gate.forward(x, ids, 6)
        term = gate.extra_loss(x, labels)
        expected = torch.where(r < tau + m, 30 / tau * (r - tau - m), 0.0)
        left = expected < 0
        assert 6 <= left.sum() < len(images)
        torch.testing.assert_close(term.detach(), expected, atol=1e-3, rtol=0)
        (gradient,) = torch.autograd.grad(term.sum(), x)
        assert torch.equal(gradient.flatten(1).any(dim=1), left)

    def test_defaults(self, tiny_model: cd.ZeroShotClassifier) -> None:
        gate = GateEvasion(TTC(tiny_model, threshold=0.2), tiny_model)
        assert (gate.weight, gate.margin) == (10.0, 0.05)  # the model's logit scale is 100
        tiny_model.head.scale.fill_(12.0)
        assert GateEvasion(TTC(tiny_model), tiny_model).weight == pytest.approx(1.2)
        assert GateEvasion(TTC(tiny_model), nn.Sequential(tiny_model)).weight == 10.0

    def test_past_the_margin_the_term_and_its_gradient_are_zero(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        gate = GateEvasion(TTC(tiny_model, threshold=0.0), tiny_model)
        assert not gate.extra_loss(images, labels).any()
        assert not gradient_of(lambda x: gate.extra_loss(x, labels), images).any()

    def test_its_gradient_is_that_of_finite_differences(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor, labels: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), (images.double() * 0.8 + 0.1)[:3]
        gate, v = GateEvasion(TTC(model, threshold=10.0), model), torch.randn_like(x)
        gradient = gradient_of(lambda z: gate.extra_loss(z, labels[:3]), x)
        differences = by_differences(lambda z: gate.extra_loss(z, labels[:3]), x, v)
        torch.testing.assert_close((gradient * v).sum(), differences, rtol=1e-5, atol=1e-5)

    def test_its_draws_are_the_forward_passs_and_without_one_the_same_for_every_image(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor, labels: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        gate = GateEvasion(TTC(model, threshold=10.0), model)
        alone = gate.extra_loss(x, labels)
        torch.testing.assert_close(gate.extra_loss(x[2:5], labels[2:5]), alone[2:5], atol=1e-9, rtol=0)
        gate.forward(x, torch.arange(len(x)), 0)
        first = gate.extra_loss(x, labels)
        gate.forward(x, torch.arange(len(x)) + 50, 0)
        assert (gate.extra_loss(x, labels) - first).abs().min() > 1e-7
        gate.forward(x[2:5], torch.arange(2, 5), 0)  # on another tensor: that draw is not this one's
        torch.testing.assert_close(gate.extra_loss(x, labels), alone, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("attack", ["pgd", "apgd-ce"])
    def test_in_an_attack_term_and_logits_share_their_draws(
        self, attack: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        gate, shared = GateEvasion(TTC(tiny_model), tiny_model), []

        def term(x: Tensor, y: Tensor) -> Tensor:
            shared.append(gate._latest[0]() is x)
            return gate.extra_loss(x, y)

        attacked = cd.ViewModule(cd.AttackView("gate-evasion", gate.forward, term), tiny_model)
        cd.attacks.run(attack, attacked, images[:2], labels[:2], cd.ThreatModel("linf", 4 / 255, steps=2), eot=2)
        assert len(shared) >= 4 and all(shared)

    def test_an_attack_through_it_opens_the_gate_under_fresh_noise(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        ttc, threat = TTC(tiny_model), cd.ThreatModel("linf", 16 / 255, steps=10)

        def drift(x: Tensor) -> Tensor:
            return torch.stack([ttc.drift(x, ids=1000 * k + torch.arange(12)) for k in range(1, 6)]).mean(dim=0)

        clean = drift(images)
        ttc.threshold = 2 * float(clean.max())  # far: on clean images no gate is near to opening

        def attacked(view: cd.AttackView) -> Tensor:
            x_adv = cd.attacks.pgd(cd.ViewModule(view, tiny_model), images, labels, threat, eot=2, early_stop=False)
            return drift(x_adv)

        gate = GateEvasion(ttc, tiny_model, weight=1000.0)
        with_term = attacked(cd.AttackView("gate-evasion", gate.forward, gate.extra_loss))
        without = attacked(cd.AttackView("noise", gate.forward))
        assert (with_term > 1.2 * clean).all()
        assert (with_term / clean).mean() > 1.4 * (without / clean).mean()
        assert (with_term >= ttc.threshold).sum() >= 3
        assert not (without >= ttc.threshold).any()


class TestDefendedEmbedding:
    def test_an_attack_on_it_needs_no_labels(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        ttc, ids = TTC(tiny_model), torch.arange(len(images))

        def attacked(y: Tensor) -> Tensor:
            module = DefendedEmbedding(ttc, tiny_model, seed=1)
            return cd.attacks.run("pgd", module, images, y, THREAT, objective="drift")

        x_adv = attacked(labels)
        assert torch.equal(x_adv, attacked((labels + 3) % 10))
        assert (x_adv - images).abs().max() <= THREAT.eps + 1e-6

        def moved(x: Tensor) -> Tensor:
            defended, clean = (z + ttc.perturbation(z, ids=ids) for z in (x, images))
            with torch.no_grad():
                return (tiny_model.embed(defended) - tiny_model.embed(clean)).norm(dim=1)

        chance = (images + THREAT.eps * (torch.rand_like(images) - 0.5).sign()).clamp(0, 1)
        assert moved(x_adv).mean() > 2 * moved(chance).mean()

    def test_its_passes_are_fresh_draws_of_the_defended_model(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        ttc = TTC(tiny_model)
        module = DefendedEmbedding(ttc, tiny_model, seed=2)
        first, second = module.embed(images), module.embed(images)
        assert not torch.allclose(first, second)
        ids = -1 - torch.arange(len(images))
        noise = ttc.draw(images, ids, 2)
        expected = tiny_model.embed(ttc.smoothed(images.clone().requires_grad_(True), noise))
        torch.testing.assert_close(first, expected.detach(), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            logits = module(images)
            later = ids - 2 * len(images)
            torch.testing.assert_close(logits, ttc.wrap(tiny_model)(images, later, 2))


class TestAutoAttack:
    """AutoAttack's version for randomised models, through TTC as it is published."""

    def test_rand_completes_and_breaks_what_it_says(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        ttc, ids = TTC(tiny_model), torch.arange(len(images))
        module = ttc.wrap(tiny_model)
        assert (ttc.drift(images, ids=ids) < ttc.threshold).any()  # so that the counterattack is attacked, not noise
        stages = {"apgd-ce": {"steps": 4}, "apgd-dlr": {"steps": 4}}
        options: dict[str, Any] = {"version": "rand", "eot": 3, "verdict_draws": 5, "stages": stages}
        threat = cd.ThreatModel("linf", 8 / 255)
        x_adv = cd.attacks.run("autoattack", module, images, labels, threat, ids=ids, **options)
        assert (x_adv - images).abs().max() <= threat.eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1

        def wrong(x: Tensor) -> Tensor:
            with torch.no_grad():
                draws = torch.stack([module(x, ids=ids, seed=seed).argmax(dim=1) != labels for seed in range(5)])
            return draws.float().mean(dim=0) > 0.5

        moved = (x_adv != images).flatten(1).any(dim=1)
        assert moved.sum() > 2 and not (moved & wrong(images)).any()
        assert torch.equal(wrong(x_adv), moved | wrong(images))

    def test_standard_is_refused(self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
        with pytest.raises(cd.UsageError, match=r"is declared randomised.*version='rand'"):
            cd.attacks.run("autoattack", TTC(tiny_model).wrap(tiny_model), images, labels, THREAT)
