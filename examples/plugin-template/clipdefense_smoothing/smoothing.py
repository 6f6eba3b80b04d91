"""A blur of random strength: an example of a randomised test-time defence, not a good one.

    x -> (1 - s) x + s blur(x),   s ~ U(0, strength), one draw an image

``blur`` is the mean over 3 x 3 pixels, at the border over those that are there.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

import clipdefense as cd
from clipdefense.randomness import uniform


def blur(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels; (N, C, H, W) -> the same shape."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Smoothing(cd.InputDefense):
    """The blur, per image.

    Attributes:
        traits: randomised.
    """

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def __init__(
        self, model: nn.Module | None = None, *, strength: float = 0.5, seed: int = 0, batch_size: int = 128
    ) -> None:
        """
        Args:
            model: taken, so that all defences are made alike, and not used.
            strength: largest share of the blur, in [0, 1].
            seed: keys the draws.
            batch_size: images handled at a time.

        Raises:
            UsageError: a strength outside its range.
        """
        super().__init__(seed=seed, batch_size=batch_size)
        if not 0 <= strength <= 1:
            raise cd.UsageError(f"strength is {strength!r}; a share in [0, 1] is expected.")
        self.strength = strength

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """s of each image, as wide as the images; a function of (seed, id) alone, so that neighbours change nothing."""
        return self.strength * uniform((1, 1, 1), ids, seed=seed, dtype=x.dtype).expand_as(x)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """What is added to the images: s (blur(x) - x)."""
        assert noise is not None
        return noise * (blur(x) - x)

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        """``exact``: the blur is differentiable, so an attacker needs no surrogate, only more draws."""

        def forward(x: Tensor, ids: Tensor, seed: int) -> Tensor:
            return model(x + self.draw(x.detach(), ids, seed) * (blur(x) - x))

        return (cd.AttackView("exact", forward, eot=8),)
