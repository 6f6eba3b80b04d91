"""Two defences and a trainer without a fault, from which those with one derive."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import clipdefense as cd
from clipdefense.randomness import uniform
from clipdefense_tecoa.tecoa import TeCoA


class Blur(cd.InputDefense):
    """A defence without a fault: every image a little greyer."""

    def __init__(self, model: Any, *, seed: int = 0, batch_size: int = 128) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        self.model = model

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return 0.02 * (0.5 - x)


class Noisy(Blur):
    """Noise, keyed as it should be."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed, dtype=x.dtype) - 0.5) * 0.05

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return (x + noise).clamp(0, 1) - x


class Tiny(TeCoA):
    """TeCoA under another name, for faults."""

    name: ClassVar[str] = "tiny"
