"""Random noise, anti-adversary and hedge defence: their three faces, their views, what must not leak out of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from torch import Tensor, nn

import clipdefense as cd
from clipdefense_testtime.anti_adversary import AntiAdversary
from clipdefense_testtime.hedge import HedgeDefense
from clipdefense_testtime.noise import RandomNoise

Make = Callable[..., cd.InputDefense]
MAKERS: dict[str, Make] = {
    "random-noise": RandomNoise,
    "anti-adversary": AntiAdversary,
    "hedge": lambda model, **options: HedgeDefense(model, **{"steps": 3, **options}),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
VIEWS = {
    "random-noise": ("eot",),
    "anti-adversary": ("bpda", "smoothed", "pseudo-label"),
    "hedge": ("bpda-eot", "smoothed", "start"),
}
PAIRS = [pytest.param(MAKERS[name], view, id=f"{name}-{view}") for name in VIEWS for view in VIEWS[name]]
each_view = pytest.mark.parametrize(("make", "view"), PAIRS)


def view_of(defense: cd.TestTimeDefense, model: nn.Module, name: str) -> cd.AttackView:
    return {view.name: view for view in defense.adaptive(model)}[name]


@each
class TestEach:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_stays_in_ball_and_box(
        self, make: Make, dtype: torch.dtype, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x = make_model(dtype=dtype), images.to(dtype)
        defense = make(model, eps=8 / 255)
        delta = defense.perturbation(x)
        assert delta.dtype == dtype and not delta.requires_grad
        assert 0 < delta.abs().max() <= 8 / 255 + 1e-7
        assert (x + delta).min() >= 0 and (x + delta).max() <= 1 + 1e-7

    def test_neighbours_chunks_and_order_do_not_matter(
        self, make: Make, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x, ids = make_model(dtype=torch.float64), images.double(), torch.arange(50, 62)
        whole = make(model).perturbation(x, ids=ids)
        order = torch.randperm(len(x))
        for got, expected in (
            (make(model, batch_size=5).perturbation(x, ids=ids), whole),
            (make(model).perturbation(x[order], ids=ids[order]), whole[order]),
            (make(model).perturbation(x[2:3], ids=ids[2:3]), whole[2:3]),
        ):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)

    def test_un_numbered_draws_follow_a_counter(
        self, make: Make, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        defense = make(tiny_model)
        first, second = defense.perturbation(images), defense.perturbation(images)
        assert torch.equal(first, second) != defense.traits.randomized
        defense.reset()
        assert torch.equal(defense.perturbation(images), first)
        split = make(tiny_model, batch_size=4)
        torch.testing.assert_close(torch.cat([split.perturbation(part) for part in images.split(4)]), first)

    def test_works_under_no_grad_and_inference_mode(
        self, make: Make, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        defense, ids = make(tiny_model), torch.arange(12)
        plain = defense.perturbation(images, ids=ids)
        with torch.no_grad():
            assert torch.equal(defense.perturbation(images, ids=ids), plain)
            logits = defense.wrap(tiny_model)(images, ids)
        with torch.inference_mode():
            assert torch.equal(defense.perturbation(images.clone(), ids=ids.clone()), plain)
            torch.testing.assert_close(defense.wrap(tiny_model)(images.clone(), ids), logits)

    def test_gradient_is_the_identity_and_nothing_leaks(
        self,
        make: Make,
        tiny_model: cd.ZeroShotClassifier,
        images: Tensor,
        untouched: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        defense, x = make(tiny_model), images.clone().requires_grad_(True)
        with untouched(tiny_model):
            out, _ = defense.forward(x)
            (gradient,) = torch.autograd.grad((out * 3).sum(), x)
            for view in defense.adaptive(tiny_model):
                (through,) = torch.autograd.grad(view.forward(x, torch.arange(12), 0).square().sum(), x)
                assert through.flatten(1).any(dim=1).all(), view.name
        assert torch.equal(gradient, torch.full_like(x, 3.0)) and x.grad is None

    def test_art_predicts_the_defended_model_and_attacks_it(
        self, make: Make, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        x, y = images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()]
        classifier = cd.CLIPClassifier(tiny_model, preprocessing_defences=[make(tiny_model)])
        with torch.no_grad():
            expected = make(tiny_model).wrap(tiny_model)(images)
        np.testing.assert_allclose(classifier.predict(x), expected.numpy(), atol=1e-4)
        gradient = classifier.loss_gradient(x, y)
        assert gradient.shape == x.shape and np.abs(gradient).max() > 0
        x_adv = ProjectedGradientDescent(classifier, eps=0.03, eps_step=0.01, max_iter=2, verbose=False).generate(x, y)
        assert 0 < np.abs(x_adv - x).max() <= 0.03 + 1e-6
        assert all(weight.grad is None for weight in tiny_model.parameters())
        clone = copy.deepcopy(classifier)
        inside = clone.preprocessing_defences[0]
        assert getattr(inside, "model", clone.model) is clone.model is not tiny_model

    def test_torchattacks_face(
        self, make: Make, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        torchattacks = pytest.importorskip("torchattacks")
        defended = make(cd.CLIPClassifier(tiny_model)).wrap(tiny_model)
        x_adv = torchattacks.PGD(defended, eps=8 / 255, alpha=2 / 255, steps=2)(images, labels)
        assert 0 < (x_adv - images).abs().max() <= 8 / 255 + 1e-6

    def test_the_evaluation_attacks_each_view(
        self, make: Make, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        defense, threat = make(tiny_model), cd.ThreatModel("linf", 4 / 255)
        options: dict[str, Any] = {"attacks": ["pgd,steps=1"], "defense": defense, "eot": 1, "verdict_seeds": 2}
        result = cd.evaluate(tiny_model, images, labels, threat, **options)
        names = [view.name for view in defense.adaptive(tiny_model)]
        assert [row.attacked for row in result.rows][1:] == [f"adaptive view {name}" for name in names]
        assert len(result.clean.correct) == (2 if defense.traits.randomized else 1)


class TestViews:
    @each_view
    def test_draws_are_keyed_and_no_neighbour_matters(
        self, make: Make, view: str, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x, ids = make_model(dtype=torch.float64), images[:4].double(), torch.tensor([7, 3, 90, -5])
        defense = make(model)
        forward = view_of(defense, model, view).forward
        whole, order = forward(x, ids, 2), torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(forward(x[order], ids[order], 2), whole[order], atol=1e-9, rtol=0)
        torch.testing.assert_close(forward(x[1:2], ids[1:2], 2), whole[1:2], atol=1e-9, rtol=0)
        for other in (forward(x, ids + 1, 2), forward(x, ids, 3)):
            assert ((other - whole).abs().amax(dim=1) > 1e-6).tolist() == [defense.traits.randomized] * 4

    @each_view
    def test_values_are_the_same_in_every_mode(
        self, make: Make, view: str, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        forward, ids = view_of(make(tiny_model), tiny_model, view).forward, torch.arange(3)
        logits = forward(images[:3].clone().requires_grad_(True), ids, 1)
        assert logits.requires_grad
        with torch.no_grad():
            outside = forward(images[:3], ids, 1)
            assert not outside.requires_grad
            torch.testing.assert_close(outside, logits.detach(), atol=1e-4, rtol=1e-5)
        with torch.inference_mode():
            inside = forward(images[:3].clone(), ids.clone(), 1)
        torch.testing.assert_close(inside.clone(), logits.detach(), atol=1e-4, rtol=1e-5)

    @pytest.mark.parametrize("name", ["anti-adversary", "hedge"])
    def test_straight_through_gradient_is_the_one_at_the_defended_image(
        self, name: str, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x, ids = make_model(dtype=torch.float64), images.double(), torch.arange(12)
        defense = MAKERS[name](model)
        view = defense.adaptive(model)[0]
        leaf = x.clone().requires_grad_(True)
        (through,) = torch.autograd.grad(view.forward(leaf, ids, 3).square().sum(), leaf)
        at = (x + defense.perturbation(x, ids=ids, seed=3)).requires_grad_(True)
        (direct,) = torch.autograd.grad(model(at).square().sum(), at)
        torch.testing.assert_close(through, direct, atol=1e-9, rtol=1e-6)
        assert view.eot == (20 if defense.traits.randomized else 1)

    @pytest.mark.parametrize("options", [{}, {"variant": "released"}])
    def test_anti_adversary_smoothed(
        self, options: dict[str, Any], make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), (images.double() * 0.8 + 0.1)[:3]
        defense = AntiAdversary(model, **options)
        sharp = defense.smoothed(x.clone().requires_grad_(True), kappa=1e9).detach()
        torch.testing.assert_close(sharp - x, defense.perturbation(x), atol=1e-9, rtol=0)
        self.check_gradient(lambda z: model(defense.smoothed(z)), x)

    def test_hedge_smoothed(self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), (images.double() * 0.8 + 0.1)[:3]
        defense = HedgeDefense(model, steps=3)
        noise = defense.draw(x, torch.arange(3), 0)
        sharp = defense.smoothed(x.clone().requires_grad_(True), noise, kappa=1e9).detach()
        torch.testing.assert_close(sharp - x, defense.perturbation(x, noise=noise), atol=1e-9, rtol=0)
        self.check_gradient(lambda z: model(defense.smoothed(z, noise)), x)
        still = HedgeDefense(model, steps=0)
        assert torch.equal(still.smoothed(x, noise), x + still.perturbation(x, noise=noise))

    def check_gradient(self, function: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-7) -> None:
        v, leaf = torch.randn_like(x), x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
        above, below = (function((x + sign * h * v).requires_grad_(True)).sum() for sign in (1, -1))
        torch.testing.assert_close((gradient * v).sum(), ((above - below) / (2 * h)).detach(), rtol=1e-4, atol=1e-4)

    def test_the_deciding_heads(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        ids = torch.arange(12)
        label = view_of(AntiAdversary(tiny_model), tiny_model, "pseudo-label").forward(images, ids, 0)
        torch.testing.assert_close(label, tiny_model(images))
        hedge = HedgeDefense(tiny_model)
        start = view_of(hedge, tiny_model, "start").forward(images, ids, 5)
        torch.testing.assert_close(start, tiny_model(images + hedge.draw(images, ids, 5)))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (RandomNoise, {"eps": 4}, "eps is 4.*did you mean 4/255"),
        (RandomNoise, {"batch_size": 0}, "batch_size is 0"),
        (RandomNoise, {"epss": 0.1}, "option of RandomNoise 'epss' is unknown; did you mean 'eps'"),
        (AntiAdversary, {"eps": -0.1}, r"eps is -0\.1; a number in \[0, 1\] pixel units is expected"),
        (AntiAdversary, {"step_size": "2/255"}, "step_size is '2/255'; a number"),
        (AntiAdversary, {"steps": 1.5}, r"steps is 1\.5; a whole number of at least 0 is expected"),
        (AntiAdversary, {"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        (AntiAdversary, {"variant": "released", "eps": 0.1}, r"eps is 0\.1 and step_size None, but variant 'released'"),
        (HedgeDefense, {"eps": 8}, "eps is 8.*did you mean 8/255"),
        (HedgeDefense, {"steps": -1}, "steps is -1; a whole number"),
        (HedgeDefense, {"seed": "abc"}, "seed is 'abc'; a whole number"),
    ],
)
def test_bad_options(make: Make, options: dict[str, Any], message: str, tiny_model: cd.ZeroShotClassifier) -> None:
    with pytest.raises(cd.UsageError, match=message):
        make(tiny_model, **options)


def test_bad_models_and_inputs(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    for make in (AntiAdversary, HedgeDefense):
        with pytest.raises(cd.UsageError, match="model is a str; a torch module, images -> logits, or a CLIPClass"):
            make("ViT-B-32")
        with pytest.raises(cd.UsageError, match=r"model returned .*; logits of shape"):
            make(nn.Identity()).perturbation(images)
    with pytest.raises(cd.UsageError, match="model is a Linear without std, which variant 'released' takes"):
        AntiAdversary(nn.Linear(3, 3), variant="released")
    for defense in (RandomNoise(), HedgeDefense(tiny_model)):
        with pytest.raises(cd.UsageError, match=r"noise reaches 0\.5, but eps is"):
            defense.perturbation(images, noise=torch.full_like(images, -0.5))
    for name in MAKERS:
        with pytest.raises(cd.UsageError, match="divide by 255"):
            MAKERS[name](tiny_model).perturbation(images * 255)


def test_they_are_found_by_name_and_say_what_they_are(tiny_model: cd.ZeroShotClassifier) -> None:
    for name, cls, traits in (
        ("random-noise", RandomNoise, cd.Traits(randomized=True)),
        ("anti-adversary", AntiAdversary, cd.Traits(optimizes_in_forward=True)),
        ("hedge", HedgeDefense, cd.Traits(randomized=True, optimizes_in_forward=True)),
    ):
        assert cd.get_defense(name) is cls and cls.traits == traits
        assert tuple(view.name for view in cd.get_defense(name)(tiny_model).adaptive(tiny_model)) == VIEWS[name]
