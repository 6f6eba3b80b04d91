"""Noise that a caller passes in to TTC: what is taken, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import clipdefense as cd
from clipdefense.attacks.norms import box
from clipdefense_ttc.ttc import TTC


class TestNoisePassedIn:
    @pytest.mark.parametrize("method", ["perturbation", "drift"])
    def test_outside_the_ball_is_refused(self, method: str, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        call = getattr(TTC(tiny_model, eps=4 / 255), method)
        noise = torch.zeros_like(images)
        noise[3, 0, 1, 2] = -0.02
        with pytest.raises(cd.UsageError, match=r"noise reaches 0\.02, but eps is 0\.01569.*noise\.clamp"):
            call(images, noise=noise)
        for bad in (float("nan"), float("inf")):
            noise[3, 0, 1, 2] = bad
            with pytest.raises(cd.UsageError, match=f"noise reaches {bad}, but eps"):
                call(images, noise=noise)
        with pytest.raises(cd.UsageError, match="noise is of list; a floating-point tensor of x's shape"):
            call(images, noise=[0.0])
        with pytest.raises(cd.UsageError, match=r"noise is of torch\.int64; a floating-point tensor"):
            call(images, noise=torch.zeros_like(images).long())
        with pytest.raises(cd.UsageError, match=r"noise has shape \(2, 3, 32, 32\)"):
            call(images, noise=torch.zeros_like(images[:2]))

    def test_rounding_beyond_the_ball_is_taken_off(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        x, eps = images.double(), 4 / 255
        ttc = TTC(make_model(dtype=torch.float64), eps=eps, threshold=0.0)  # noise alone
        noise = torch.full_like(images, eps).double()
        assert float(noise.max()) > eps  # float32 rounds 4/255 up
        delta = ttc.perturbation(x, noise=noise)
        assert float(delta.max()) == eps
        half = torch.full_like(images, 0.1, dtype=torch.bfloat16)  # rounds to 0.10009765625
        assert float(TTC(make_model(), eps=0.1, threshold=0.0).perturbation(images, noise=half).max()) <= 0.1 + 1e-7

    def test_outside_the_box_is_clipped_as_the_methods_own_draws_are(
        self, tiny_model: cd.ZeroShotClassifier, images: Tensor
    ) -> None:
        ttc = TTC(tiny_model, threshold=0.0)
        ids = torch.arange(len(images))
        noise = ttc.draw(images, ids, 0)
        assert ((images + noise < 0) | (images + noise > 1)).any()
        delta = ttc.perturbation(images, noise=noise)
        assert torch.equal(delta, box(images, noise))
        assert torch.equal(delta, ttc.perturbation(images, ids=ids))

    def test_a_defence_that_is_off_takes_no_noise(self, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
        ttc = TTC(tiny_model, eps=0.0)
        assert not ttc.perturbation(images, noise=torch.zeros_like(images)).any()
        with pytest.raises(cd.UsageError, match=r"noise reaches 0\.01, but eps is 0"):
            ttc.perturbation(images, noise=torch.full_like(images, 0.01))

    def test_smoothed_clips_it_to_the_ball(
        self, make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor
    ) -> None:
        model, x = make_model(dtype=torch.float64), images[:3].double().requires_grad_(True)
        ttc, noise = TTC(model), torch.rand_like(x).detach() - 0.5
        inside = noise.clamp(-ttc.eps, ttc.eps)
        assert torch.equal(ttc.smoothed(x, noise), ttc.smoothed(x, inside))
        assert (ttc.smoothed(x, noise) - x).abs().max() <= ttc.eps + 1e-12
