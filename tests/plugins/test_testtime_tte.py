"""TTE: its crops by hand, that they differ and where they may lie, its average, its faces and its view."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense_testtime.tte import TTE, crop, distinct, ensemble, padding_of

Make = Callable[..., cd.ZeroShotClassifier]


def test_padding_scales_with_the_resolution() -> None:
    sizes = {32: 4, 64: 8, 224: 28, 336: 42, 8: 1}
    for side, padding in sizes.items():
        assert padding_of(torch.empty(1, 3, side, side)) == (padding, padding)
    assert padding_of(torch.empty(1, 3, 32, 224)) == (4, 28)


class TestCrop:
    def test_by_hand(self) -> None:
        x = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(3, 1, 1, 1)  # padded by 1
        middle, up_left, down = crop(x, torch.tensor([[1, 1], [0, 0], [2, 1]])).unbind()
        assert torch.equal(middle, x[0])
        assert not up_left[0, 0].any() and not up_left[0, :, 0].any()
        assert torch.equal(up_left[0, 1:, 1:], x[0, 0, :7, :7])
        assert torch.equal(down[0, :7], x[0, 0, 1:]) and not down[0, 7].any()

    @pytest.mark.parametrize("size", [(32, 32), (16, 40)])
    def test_is_a_window_of_the_padded_image(self, size: tuple[int, int]) -> None:
        x, (p, q) = torch.rand(5, 3, *size), padding_of(torch.empty(1, 1, *size))
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (p, p), (q, q)))
        offset = torch.stack([torch.randint(2 * p + 1, (5,)), torch.randint(2 * q + 1, (5,))], dim=1)
        for got, whole, (row, column) in zip(crop(x, offset), padded, offset.tolist()):
            np.testing.assert_array_equal(got.numpy(), whole[:, row : row + size[0], column : column + size[1]])

    def test_gradient(self) -> None:
        x = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: crop(z, torch.tensor([[0, 2], [1, 0]])), x)


def test_ensemble_is_identity_flip_crops_and_their_flips() -> None:
    x, offsets = torch.rand(2, 3, 16, 16), torch.tensor([[[0, 0], [4, 1]], [[2, 3], [1, 1]]])
    views = list(ensemble(x, offsets))
    assert len(views) == 6
    assert torch.equal(views[0], x) and torch.equal(views[1], x.flip(3))
    for k in range(2):
        assert torch.equal(views[2 + 2 * k], crop(x, offsets[:, k]))
        assert torch.equal(views[3 + 2 * k], crop(x, offsets[:, k]).flip(3))


class TestDraws:
    @given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**32))
    @settings(max_examples=60, deadline=None)
    def test_distinct_numbers_differ_and_are_in_range(self, n: int, more: int, seed: int) -> None:
        u = torch.rand(30, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        chosen = distinct(u, n + more)
        assert chosen.min() >= 0 and chosen.max() < n + more
        assert all(len(set(row)) == n for row in chosen.tolist())

    def test_every_choice_is_equally_likely(self) -> None:
        u = torch.rand(60_000, 3, dtype=torch.float64)
        chosen = distinct(u, 5)
        orders = torch.bincount(chosen[:, 0] * 25 + chosen[:, 1] * 5 + chosen[:, 2], minlength=125)
        orders = orders[orders > 0]
        assert len(orders) == 60  # 5 x 4 x 3
        assert ((orders - 1000).abs() < 5 * 1000**0.5).all()

    def test_by_hand(self) -> None:
        u = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.999], [0.999, 0.0, 0.5]], dtype=torch.float64)
        # second row: rank 2 of 0..4; rank 2 of 0, 1, 3, 4; rank 2 of 0, 1, 4
        assert distinct(u, 5).tolist() == [[0, 1, 2], [2, 3, 4], [4, 0, 2]]

    def test_crops_of_an_image_differ_and_none_is_the_image(self) -> None:
        x = torch.empty(300, 3, 32, 32)
        offsets = TTE(crops=4).draw(x, torch.arange(300), 0)
        assert offsets.shape == (300, 4, 2) and offsets.min() == 0 and offsets.max() == 8
        for places in offsets.tolist():
            assert len({tuple(place) for place in places} | {(4, 4)}) == 5
        assert len({tuple(map(tuple, places)) for places in offsets.tolist()}) > 290  # and images differ
        counts = torch.bincount(offsets[..., 0].flatten() * 9 + offsets[..., 1].flatten(), minlength=81)
        assert (counts > 0).sum() == 80 and counts[40] == 0

    def test_small_images_have_few_crops(self, tiny_model: cd.ZeroShotClassifier) -> None:
        x = torch.rand(2, 3, 8, 8)
        offsets = TTE(crops=8).draw(x, torch.arange(2), 0)
        assert all(len(set(map(tuple, places))) == 8 for places in offsets.tolist())
        message = r"crops is 9, but images of \(8, 8\) pixels, padded by \(1, 1\), have 8 crops besides the image"
        with pytest.raises(cd.UsageError, match=message):
            TTE(crops=9).wrap(tiny_model)(x)

    def test_keyed_by_seed_and_id_alone(self) -> None:
        tte, x, ids = TTE(), torch.empty(6, 3, 224, 224), torch.arange(40, 46)
        offsets = tte.draw(x, ids, 3)
        assert offsets.max() > 28  # 224 px are padded by 28
        order = torch.tensor([5, 0, 3])
        assert torch.equal(tte.draw(x[order], ids[order], 3), offsets[order])
        assert not torch.equal(tte.draw(x, ids, 4), offsets)
        assert not torch.equal(tte.draw(x, ids + 1, 3), offsets)


class TestReleased:
    def test_all_crops_are_one_and_the_same_for_all_images(self) -> None:
        tte, x = TTE(variant="released", seed=5), torch.empty(4, 3, 32, 32)
        offsets = tte.draw(x, torch.arange(4), 5)
        assert offsets.shape == (4, 4, 2) and len(offsets.flatten(0, 1).unique(dim=0)) == 1
        assert torch.equal(tte.draw(x, torch.arange(9, 13), 5), offsets)
        every = torch.cat([tte.draw(x[:1], torch.zeros(1).long(), seed)[0, :1] for seed in range(400)])
        assert every.min() == 0 and every.max() == 7  # 2p - 1, not 2p

    def test_its_ten_passes_see_four_images(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        tte = TTE(variant="released", seed=1)
        place = tte.draw(x, torch.arange(12), 1)[:, 0]
        window = crop(x, place)
        with torch.no_grad():
            expected = model(x) + model(x.flip(3)) + 4 * model(window) + 4 * model(window.flip(3))
            torch.testing.assert_close(tte.wrap(model)(x), expected / 10)
            torch.testing.assert_close(tte.wrap(model)(x), expected / 10)  # and again


class TestDefended:
    def test_is_the_mean_of_the_logits(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images.double()
        tte, ids = TTE(crops=3), torch.arange(12)
        offsets = tte.draw(x, ids, 7)
        with torch.no_grad():
            parts = [model(view) for view in ensemble(x, offsets)]
            expected = torch.stack(parts).mean(dim=0)
            assert len(parts) == 8
            torch.testing.assert_close(tte.wrap(model)(x, ids, 7), expected)
            torch.testing.assert_close(tte.wrap(model)(x, offsets=offsets.int()), expected)
            torch.testing.assert_close(tte.logits(model, x, ids=ids, seed=7), expected)

    def test_gradient_is_that_of_finite_differences(self, make_model: Make, images: Tensor) -> None:
        model, x = make_model(dtype=torch.float64), images[:2].double()
        view = TTE(crops=2).adaptive(model)[0]

        def total(z: Tensor) -> Tensor:
            return view.forward(z, torch.arange(2), 1).square().sum()

        leaf, v, h = x.clone().requires_grad_(True), torch.randn_like(x), 1e-6
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
        with torch.no_grad():
            differences = (total(x + h * v) - total(x - h * v)) / (2 * h)
        torch.testing.assert_close((gradient * v).sum(), differences, rtol=1e-5, atol=1e-4)

    def test_neighbours_and_order_do_not_matter(self, make_model: Make, images: Tensor) -> None:
        model, x, ids = make_model(dtype=torch.float64), images.double(), torch.arange(50, 62)
        with torch.no_grad():
            defended = TTE().wrap(model)
            whole, order = defended(x, ids, 0), torch.randperm(12)
            torch.testing.assert_close(defended(x[order], ids[order], 0), whole[order], atol=1e-9, rtol=0)
            torch.testing.assert_close(defended(x[2:3], ids[2:3], 0), whole[2:3], atol=1e-9, rtol=0)

    def test_un_numbered_draws_follow_a_counter(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        tte = TTE()
        defended = tte.wrap(tiny_model)
        with torch.no_grad():
            first, second = defended(images), defended(images)
            assert not torch.equal(first, second)
            tte.reset()
            parts = [defended(part) for part in images.split(5)]
        torch.testing.assert_close(torch.cat(parts), first, atol=1e-4, rtol=1e-5)

    def test_works_under_inference_mode_and_leaves_nothing_behind(
        self,
        tiny_model: cd.ZeroShotClassifier,
        images: Tensor,
        untouched: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        tte, ids, x = TTE(), torch.arange(12), images.clone().requires_grad_(True)
        with untouched(tiny_model):
            logits = tte.wrap(tiny_model)(x, ids)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
            with torch.inference_mode():
                inside = tte.wrap(tiny_model)(images.clone(), ids.clone())
        assert gradient.flatten(1).any(dim=1).all()
        torch.testing.assert_close(inside.clone(), logits.detach(), atol=1e-4, rtol=1e-5)

    def test_art_and_torchattacks_take_the_wrapped_model(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        tte = TTE(crops=2)
        x, y = images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()]
        classifier = cd.CLIPClassifier(tte.wrap(tiny_model), input_shape=(3, 32, 32), nb_classes=10)
        expected = tte.logits(tiny_model, images).detach()
        tte.reset()
        np.testing.assert_allclose(classifier.predict(x), expected.numpy(), atol=1e-4)
        assert np.abs(classifier.loss_gradient(x, y)).max() > 0
        x_adv = ProjectedGradientDescent(classifier, eps=0.03, eps_step=0.01, max_iter=2, verbose=False).generate(x, y)
        assert 0 < np.abs(x_adv - x).max() <= 0.03 + 1e-6
        assert all(weight.grad is None for weight in tiny_model.parameters())
        torchattacks = pytest.importorskip("torchattacks")
        attacked = torchattacks.PGD(tte.wrap(tiny_model), eps=8 / 255, alpha=2 / 255, steps=2)(images, labels)
        assert 0 < (attacked - images).abs().max() <= 8 / 255 + 1e-6

    def test_the_evaluation_attacks_its_view(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
    ) -> None:
        threat = cd.ThreatModel("linf", 4 / 255)
        result = cd.evaluate(
            tiny_model, images, labels, threat, attacks=["pgd,steps=2"], defense=TTE(), eot=2, verdict_seeds=3
        )
        assert [row.attacked for row in result.rows][1:] == ["adaptive view eot, 2 EOT draws"]
        assert result.clean.correct.shape == (3, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 0}, "crops is 0; a whole number of at least 1"),
        ({"crops": 1.5}, r"crops is 1\.5; a whole number"),
        ({"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        ({"seed": "abc"}, "seed is 'abc'; a whole number is expected"),
        ({"crop": 3}, "option of TTE 'crop' is unknown; did you mean 'crops'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(cd.UsageError, match=message):
        TTE(**options)  # type: ignore[arg-type]


def test_bad_inputs(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    defended = TTE().wrap(tiny_model)
    with pytest.raises(cd.UsageError, match=r"x has shape \(3, 32, 32\)"):
        defended(images[0])
    with pytest.raises(cd.UsageError, match=r"ids has shape \(3,\), torch\.int64; one integer an image"):
        defended(images, torch.arange(3))
    for offsets in (torch.zeros(12, 2).long(), torch.zeros(3, 4, 2).long(), torch.zeros(12, 4, 2)):
        with pytest.raises(cd.UsageError, match=r"offsets has shape .*; integers of shape \(12, n, 2\) are expected"):
            defended(images, offsets=offsets)
    with pytest.raises(cd.UsageError, match=r"offsets lead out of the padded image; rows in 0 \.\. 8, columns"):
        defended(images, offsets=torch.full((12, 4, 2), 9))
    with pytest.raises(cd.UsageError, match=r"model returned .*; logits of shape"):
        TTE().wrap(nn.Identity())(images)


def test_is_found_by_name_and_says_what_it_is(tiny_model: cd.ZeroShotClassifier) -> None:
    assert cd.get_defense("tte") is TTE and TTE.traits == cd.Traits(randomized=True)
    (view,) = cd.get_defense("tte")(tiny_model).adaptive(tiny_model)
    assert (view.name, view.eot, view.extra_loss) == ("eot", 5, None)
