"""Uniform noise on the input: drawn by (seed, id), or passed in and checked, and the defences that begin with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipdefense.checks import check_images
from clipdefense.defenses import InputDefense
from clipdefense.errors import UsageError, is_number
from clipdefense.randomness import uniform


class UniformNoiseDefense(InputDefense):
    """A defence whose only randomness is a point of the Linf ball of radius eps around each image.

    Attributes:
        eps: radius of the draw, in [0, 1] pixels.
    """

    def __init__(self, *, eps: float, seed: int = 0, batch_size: int = 128) -> None:
        """
        Args:
            eps: radius of the draw, Linf, in [0, 1] pixels.
            seed: keys the draws.
            batch_size: images handled at a time.

        Raises:
            UsageError: a value outside its range.
        """
        super().__init__(seed=seed, batch_size=batch_size)
        check_pixels(eps=eps)
        self.eps = eps

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """The noise, U(-eps, eps) in each pixel, (N, C, H, W), before the box; a function of (seed, id) alone."""
        u = uniform(tuple(x.shape[1:]), ids, seed=seed, dtype=torch.promote_types(x.dtype, torch.float32))
        return u.mul_(2 * self.eps).sub_(self.eps).to(x.dtype)

    def perturbation(
        self, x: Tensor, *, noise: Tensor | None = None, ids: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """What the defence adds to the images, as :meth:`clipdefense.InputDefense.perturbation` says.

        Args:
            noise: the draw instead of a fresh one, within eps. It may lead out of the box, as the method's own may.

        Raises:
            UsageError: besides, noise that is not finite or leaves the ball of radius eps: no draw of the method's.
        """
        if noise is not None:
            noise = check_noise(x, noise, self.eps)
        return super().perturbation(x, noise=noise, ids=ids, seed=seed)


def check_pixels(**sizes: Any) -> None:
    """Require each to be a number in [0, 1] pixel units.

    Raises:
        UsageError: one is not; a number above 1 is shown as so many 255ths.
    """
    for name, value in sizes.items():
        if not is_number(value) or not 0 <= value <= 1:
            hint = f"; did you mean {value:g}/255?" if is_number(value) and value > 1 else ""
            raise UsageError(f"{name} is {value!r}; a number in [0, 1] pixel units is expected{hint}")


def check_noise(x: Tensor, noise: Tensor, eps: float) -> Tensor:
    """The noise that a caller passed in, in x's dtype, without rounding beyond the ball; the box is not looked at.

    Args:
        x: (N, C, H, W) images in [0, 1].
        noise: of x's shape, Linf at most eps (up to 1e-6, or the rounding of its dtype).
        eps: in [0, 1] pixels.

    Raises:
        UsageError: another type or shape, values that are not finite, or outside the ball.
    """
    check_images(x)
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise UsageError(f"noise is of {got}; a floating-point tensor of x's shape {tuple(x.shape)} is expected.")
    if noise.shape != x.shape:
        raise UsageError(f"noise has shape {tuple(noise.shape)}; x's shape {tuple(x.shape)} is expected.")
    largest = float(noise.detach().abs().max())
    if not largest <= eps + max(1e-6, eps * torch.finfo(noise.dtype).eps):
        raise UsageError(
            f"noise reaches {largest:.4g}, but eps is {eps:.4g}, and the method draws nothing outside of it; "
            "clip it with noise.clamp(-eps, eps), or raise eps."
        )
    return noise.to(x).clamp(-eps, eps)
