"""Defences, a model and a budget that the tests of adaptive evaluation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.adaptive import Adaptive
from clipdefense.randomness import uniform

THREAT = cd.ThreatModel("linf", 2 / 255, steps=3)
SUITE = Adaptive(eot_draws=(1, 3), black_box="square,queries=6", black_box_draws=2)


class Shuffle(cd.InputDefense):
    """Noise, with a view of it."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return (x + noise).clamp(0, 1) - x

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed) - 0.5) * 0.1

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, ids, seed: self.bpda(model, x, ids, seed), eot=2),)


class Blind(Shuffle):
    """The same, keeping its views to itself."""

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return ()


class Nothing(cd.TestTimeDefense):
    """What it deploys is chosen by a test."""

    deployed: Callable[[nn.Module], nn.Module] = staticmethod(lambda model: model)

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.deployed(model)

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("plain", lambda x, ids, seed: model(x)),)
