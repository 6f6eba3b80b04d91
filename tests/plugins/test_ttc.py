"""TTC: hand-computed steps, its passes, its three faces (tensors, ART, module), and what must not leak out of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.norms import box
from clipdefense_ttc.ttc import TTC, drift_loss, drift_ratio, iterate_weights


class LinearTower(nn.Module):
    """Embeddings linear in the pixels: f(x) = W vec(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def linear() -> cd.ZeroShotClassifier:
    anchors = torch.randn(3, 5, dtype=torch.float64)
    model = cd.ZeroShotClassifier(LinearTower(), anchors, image_size=2, mean=(0, 0, 0), std=(1, 1, 1))
    return model.double().eval()


class Passes:
    """Counts images through the tower, forward and backward, by hooks."""

    def __init__(self, model: cd.ZeroShotClassifier) -> None:
        self.forward = self.backward = 0
        model.tower.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def test_terms_by_hand() -> None:
    clean, noisy = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 5.0], [1.0, 2.0]])
    torch.testing.assert_close(drift_ratio(noisy, clean), torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(drift_loss(noisy, clean), torch.tensor([1.0, 1.0]))
    expected = torch.tensor([0.0158762, 0.1173104, 0.8668133], dtype=torch.float64)
    torch.testing.assert_close(iterate_weights(2, 2.0), expected, atol=1e-6, rtol=0)
    assert torch.isfinite(iterate_weights(100, 50.0)).all()  # exp(5000) would overflow


def test_two_steps_by_hand(linear: cd.ZeroShotClassifier) -> None:
    x = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    d_0 = (torch.rand(1, 3, 2, 2, dtype=torch.float64) - 0.5) * 0.02
    ttc = TTC(linear, eps=0.05, step_size=0.03, steps=2, beta=1.0, threshold=1e9)
    gram = linear.tower.weight.detach().T @ linear.tower.weight.detach()
    d, iterates = d_0.flatten(), [d_0.flatten()]
    for _ in range(2):
        d = (d + 0.03 * (gram @ d).sign()).clamp(-0.05, 0.05)  # the gradient of ||W d||^2 is 2 W'W d
        iterates.append(d)
    e = np.exp([0.0, 1.0, 2.0])
    by_hand = sum(w * i for w, i in zip(e / e.sum(), iterates))
    torch.testing.assert_close(ttc.perturbation(x, noise=d_0).flatten(), by_hand, atol=1e-12, rtol=0)


def test_the_gate_is_per_image(linear: cd.ZeroShotClassifier) -> None:
    x = torch.rand(6, 3, 2, 2, dtype=torch.float64) * 0.8 + 0.1
    noise = (torch.rand(6, 3, 2, 2, dtype=torch.float64) - 0.5) * 0.2
    r = TTC(linear, eps=0.1).drift(x, noise=noise)
    threshold = float(r.median())
    ttc = TTC(linear, eps=0.1, step_size=0.02, threshold=threshold)
    delta = ttc.perturbation(x, noise=noise)
    benign = r >= threshold
    assert 0 < benign.sum() < 6
    assert torch.equal(delta[benign], box(x, noise)[benign])
    assert (delta[~benign] != noise[~benign]).flatten(1).any(dim=1).all()
    zero = TTC(linear, eps=0.1, step_size=0.02, threshold=threshold, benign="zero").perturbation(x, noise=noise)
    assert not zero[benign].any()
    torch.testing.assert_close(zero[~benign], delta[~benign])


def test_an_image_that_cannot_be_measured_is_not_counterattacked(linear: cd.ZeroShotClassifier) -> None:
    x = torch.zeros(1, 3, 2, 2, dtype=torch.float64)  # f(0) = 0, r = inf or nan
    ttc = TTC(linear, eps=0.1)
    noise = torch.rand_like(x) * 0.1
    assert torch.equal(ttc.perturbation(x, noise=noise), noise)
    assert not ttc.perturbation(x, noise=torch.zeros_like(x)).any()


@pytest.mark.parametrize(("share", "forwards", "backwards"), [("none", 2, 0), ("all", 4, 3), ("mixed", None, None)])
def test_passes_equal_theory(
    share: str, forwards: int | None, backwards: int | None, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    n, steps = len(images), 3
    r = TTC(tiny_model).drift(images)
    threshold = {"none": 0.0, "all": 1e9, "mixed": float(r.sort().values[4])}[share]
    stable = int((r < threshold).sum())
    passes = Passes(tiny_model)
    ttc = TTC(tiny_model, steps=steps, threshold=threshold)
    ttc.perturbation(images, ids=torch.arange(n))
    if share == "mixed":
        assert stable == 4
        assert (passes.forward, passes.backward) == (2 * n + steps * stable, steps * stable)
    else:
        assert forwards is not None and backwards is not None
        assert (passes.forward, passes.backward) == (forwards * n, backwards * n)


def test_reference_tower_measures_the_drift(make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor) -> None:
    model, reference = make_model(), make_model()
    with torch.no_grad():
        for weight in model.tower.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    ids = torch.arange(len(images))
    r = TTC(reference).drift(images, ids=ids)
    ttc = TTC(model, reference=reference, threshold=float(r.median()))
    torch.testing.assert_close(ttc.drift(images, ids=ids), r)
    assert not torch.allclose(TTC(model).drift(images, ids=ids), r)
    passes, of_reference = Passes(model), Passes(reference)
    delta = ttc.perturbation(images, ids=ids)
    stable = r < ttc.threshold
    noise = box(images, ttc.draw(images, ids, 0))
    assert torch.equal(delta[~stable], noise[~stable]) and not torch.equal(delta[stable], noise[stable])
    n, k = len(images), int(stable.sum())
    assert (of_reference.forward, of_reference.backward) == (2 * n, 0)
    assert (passes.forward, passes.backward) == (n + 2 * k, 2 * k)
    assert all(p.requires_grad for p in reference.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_ball_and_box(
    dtype: torch.dtype, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
) -> None:
    ttc = TTC(make_model(dtype=dtype), eps=8 / 255, step_size=4 / 255, steps=4, threshold=1e9)
    x = images.to(dtype)
    delta = ttc.perturbation(x)
    assert delta.dtype == dtype and not delta.requires_grad
    assert delta.abs().max() <= 8 / 255 + 1e-7
    assert (x + delta).min() >= -1e-7 and (x + delta).max() <= 1 + 1e-7


def test_neighbours_chunks_and_order_do_not_matter(
    make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
) -> None:
    model, x, ids = make_model(dtype=torch.float64), images.double(), torch.arange(50, 50 + len(images))
    whole = TTC(model).perturbation(x, ids=ids)
    torch.testing.assert_close(TTC(model, batch_size=5).perturbation(x, ids=ids), whole, atol=1e-12, rtol=0)
    order = torch.randperm(len(x))
    torch.testing.assert_close(TTC(model).perturbation(x[order], ids=ids[order]), whole[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(TTC(model).perturbation(x[2:3], ids=ids[2:3]), whole[2:3], atol=1e-12, rtol=0)


def test_un_numbered_draws_follow_a_counter(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    ttc = TTC(tiny_model, threshold=0.0)  # noise alone
    first, second = ttc.perturbation(images), ttc.perturbation(images)
    assert not torch.equal(first, second)
    ttc.reset()
    assert torch.equal(ttc.perturbation(images), first)
    split = TTC(tiny_model, threshold=0.0)
    parts = [split.perturbation(part) for part in images.split(5)]
    assert torch.equal(torch.cat(parts), first)
    assert not torch.equal(TTC(tiny_model, threshold=0.0, seed=1).perturbation(images), first)
    # the same picture again draws anew: noise is never keyed by content
    twice = ttc.perturbation(images[:1].repeat(2, 1, 1, 1))
    assert not torch.equal(twice[0], twice[1])


def test_off_and_noise_only(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    passes = Passes(tiny_model)
    assert not TTC(tiny_model, eps=0.0).perturbation(images).any()
    noise = (torch.rand_like(images) - 0.5) * 8 / 255
    assert torch.equal(TTC(tiny_model, steps=0).perturbation(images, noise=noise), box(images, noise))
    assert passes.forward == 0


def test_gradient_is_the_identity_and_nothing_leaks(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    tiny_model.train()
    tiny_model.tower.ln_post.eval()
    modes = [part.training for part in tiny_model.modules()]
    ttc = TTC(tiny_model, threshold=1e9)
    x = images.clone().requires_grad_(True)
    out, _ = ttc.forward(x)
    (gradient,) = torch.autograd.grad((out * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0)) and x.grad is None
    assert all(p.grad is None and p.requires_grad for p in tiny_model.parameters())
    assert [part.training for part in tiny_model.modules()] == modes


def test_works_under_no_grad_and_inference_mode(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    ids = torch.arange(len(images))
    plain = TTC(tiny_model, threshold=1e9).perturbation(images, ids=ids)
    with torch.no_grad():
        assert torch.equal(TTC(tiny_model, threshold=1e9).perturbation(images, ids=ids), plain)
    with torch.inference_mode():
        inside = TTC(tiny_model, threshold=1e9).perturbation(images.clone(), ids=ids)
    assert torch.equal(inside.clone(), plain)


def test_view_gradient_is_the_gradient_at_the_defended_image(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    ttc = TTC(tiny_model, threshold=1e9)
    view, *_ = ttc.adaptive(tiny_model)
    assert view.eot > 1
    x = images.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(view.forward(x, torch.arange(len(x)), 3), labels)
    (through,) = torch.autograd.grad(loss, x)
    again = cd.ViewModule(view, tiny_model, seed=3)
    at = (images + ttc.perturbation(images, ids=torch.arange(len(images)), seed=3)).requires_grad_(True)
    (direct,) = torch.autograd.grad(nn.functional.cross_entropy(tiny_model(at), labels), at)
    torch.testing.assert_close(through, direct, atol=1e-7, rtol=1e-5)
    assert not torch.equal(again(images), again(images))  # fresh draws each pass


def test_smoothed_view_becomes_the_defence_when_sharp(
    make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
) -> None:
    model, x = make_model(dtype=torch.float64), images.double()
    ttc = TTC(model, threshold=float(TTC(model).drift(x).median()), steps=2)
    noise = ttc.draw(x, torch.arange(len(x)), 0)
    r = ttc.drift(x, noise=noise)
    gate = torch.sigmoid((ttc.threshold - r) / (ttc.threshold / 4)).view(-1, 1, 1, 1)
    always = TTC(model, threshold=float("1e9"), steps=2).perturbation(x, noise=noise)
    smoothed = ttc.smoothed(x.requires_grad_(True), noise, kappa=1e9).detach()
    expected = x.detach() + gate * always + (1 - gate) * box(x.detach(), noise)
    torch.testing.assert_close(smoothed, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("benign", ["noise", "zero"])
def test_smoothed_gradient_is_that_of_finite_differences(
    benign: str, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
) -> None:
    model, x = make_model(dtype=torch.float64), (images.double() * 0.8 + 0.1)[:3]
    ttc = TTC(model, threshold=float(TTC(model).drift(x).median()), benign=benign)  # type: ignore[arg-type]
    noise, v = ttc.draw(x, torch.arange(3), 0), torch.randn_like(x)

    def loss(z: Tensor) -> Tensor:
        return model(ttc.smoothed(z, noise)).square().sum()

    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    h = 1e-7
    above, below = (loss((x + sign * h * v).requires_grad_(True)) for sign in (1, -1))
    torch.testing.assert_close((gradient * v).sum(), ((above - below) / (2 * h)).detach(), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


class TestART:
    """TTC in ``preprocessing_defences``, as ART calls it."""

    @pytest.fixture
    def arrays(self, images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()]

    def test_predict_is_the_defended_model(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, arrays: tuple[np.ndarray, np.ndarray]
    ) -> None:
        classifier = cd.CLIPClassifier(tiny_model, preprocessing_defences=[TTC(tiny_model)])
        with torch.no_grad():
            expected = TTC(tiny_model).wrap(tiny_model)(images)
        np.testing.assert_allclose(classifier.predict(arrays[0]), expected.numpy(), atol=1e-4)

    def test_gradient_and_attacks(
        self, tiny_model: cd.ZeroShotClassifier, arrays: tuple[np.ndarray, np.ndarray]
    ) -> None:
        x, y = arrays
        ttc = TTC(tiny_model)
        classifier = cd.CLIPClassifier(tiny_model, preprocessing_defences=[ttc])
        gradient = classifier.loss_gradient(x, y)
        assert gradient.shape == x.shape and np.abs(gradient).max() > 0
        for attack in (
            ProjectedGradientDescent(classifier, eps=0.03, eps_step=0.01, max_iter=2, verbose=False),
            AutoProjectedGradientDescent(
                classifier,
                eps=0.03,
                eps_step=0.06,
                max_iter=2,
                nb_random_init=1,
                loss_type="cross_entropy",
                verbose=False,
            ),
        ):
            assert all(p.grad is None for p in tiny_model.parameters())
            x_adv = attack.generate(x, y)
            assert np.abs(x_adv - x).max() <= 0.03 + 1e-6
        # (the plain estimator that ART's APGD builds for itself leaves gradients on the weights; nothing here can)

    def test_copies_stay_tied_to_their_model(
        self, tiny_model: cd.ZeroShotClassifier, arrays: tuple[np.ndarray, np.ndarray]
    ) -> None:
        classifier = cd.CLIPClassifier(tiny_model, preprocessing_defences=[TTC(tiny_model)])
        for clone in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
            assert clone.preprocessing_defences[0].model is clone.model
            assert clone.model is not tiny_model
            np.testing.assert_allclose(clone.predict(arrays[0]), classifier.predict(arrays[0]), atol=1e-5)
            clone.preprocessing_defences[0].reset()
            classifier.preprocessing_defences[0].reset()

    def test_accepts_the_classifier_itself(self, tiny_model: cd.ZeroShotClassifier) -> None:
        assert TTC(cd.CLIPClassifier(tiny_model)).model is tiny_model


def test_torchattacks_face(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    defended = TTC(tiny_model).wrap(tiny_model)
    x_adv = torchattacks.PGD(defended, eps=8 / 255, alpha=2 / 255, steps=3)(images, labels)
    assert (x_adv - images).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 4}, "eps is 4.*did you mean 4/255"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"eps": "4/255"}, "eps is '4/255'; a number"),
        ({"threshold": "low"}, "threshold 'low'; finite numbers"),
        ({"seed": "abc"}, "seed is 'abc'; a whole number is expected"),
        ({"treshold": 0.1}, "option of TTC 'treshold' is unknown; did you mean 'threshold'"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"benign": "nose"}, "benign 'nose' is unknown; did you mean 'noise'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"reference": nn.Linear(2, 2)}, "reference is a Linear, which has no embed"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tiny_model: cd.ZeroShotClassifier) -> None:
    with pytest.raises(cd.UsageError, match=message):
        TTC(tiny_model, **options)  # type: ignore[arg-type]


def test_bad_images_and_noise(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    with pytest.raises(cd.UsageError, match="divide by 255"):
        TTC(tiny_model).perturbation(images * 255)
    with pytest.raises(cd.UsageError, match="noise has shape"):
        TTC(tiny_model).perturbation(images, noise=images[:2])
    for ids in (torch.arange(len(images) - 1), torch.zeros(len(images)), torch.zeros(len(images), 1).long()):
        with pytest.raises(cd.UsageError, match=r"ids has shape .*; one integer an image is expected"):
            TTC(tiny_model).perturbation(images, ids=ids)
    with pytest.raises(cd.UsageError, match="model is a Linear, which has no embed"):
        TTC(nn.Linear(2, 2))


def test_is_found_by_name() -> None:
    assert cd.get_defense("ttc") is TTC
    assert TTC.traits.randomized and TTC.traits.optimizes_in_forward and not TTC.traits.stateful
