"""Random noise on the input: the defence that costs nothing, and what every other one has to beat.

    x -> clip(x + d, 0, 1),   d ~ U(-eps, eps)

TTC's paper (2503.03613) reports it as a baseline, and its released code has it as TTC without steps: the same draws
give the same images here. TTC's eps of 4/255 is the default.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from clipdefense.attacks.norms import box
from clipdefense.defenses import AttackView, Traits
from clipdefense_ttc.noise import UniformNoiseDefense


class RandomNoise(UniformNoiseDefense):
    """Uniform noise, a fresh draw for each image and pass.

    Attributes:
        traits: randomised.
    """

    traits: ClassVar[Traits] = Traits(randomized=True)

    def __init__(self, model: Any = None, *, eps: float = 4 / 255, seed: int = 0, batch_size: int = 128) -> None:
        """
        Args:
            model: taken, so that all defences are made alike, and not used.
            eps: radius of the noise, Linf, in [0, 1] pixels.
            seed: keys the noise.
            batch_size: images handled at a time.

        Raises:
            UsageError: a value outside its range.
        """
        super().__init__(eps=eps, seed=seed, batch_size=batch_size)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return box(x, noise)

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """``eot``: the exact gradient (zero where the box clips), averaged over draws."""

        def forward(x: Tensor, ids: Tensor, seed: int) -> Tensor:
            return model(x + box(x, self.draw(x.detach(), ids, seed)))

        return (AttackView("eot", forward, eot=20),)
