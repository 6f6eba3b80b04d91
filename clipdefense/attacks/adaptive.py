"""What an attacker who knows a defence does besides attacking its views, and what that costs.

The recipe is that of Athalye et al. (2018), Tramer et al. (2020) and Croce et al. (ICML 2022, 2202.13711): gradients
through the defence averaged over its draws, until more draws change nothing; random search that needs no gradient; an
attack on embeddings that needs no label; and of all of it the worst case for each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from clipdefense.attacks.autoattack import stages_of
from clipdefense.errors import UsageError, check_whole
from clipdefense.threat import ThreatModel


@dataclass(frozen=True)
class Adaptive:
    """The budget of an adaptive evaluation beyond the attacks on each view.

    Attributes:
        eot_draws: numbers of draws at which the defended model's own gradient is attacked, rising; 1 alone where the
            defence is not randomised.
        black_box: the attack, with options, that sees the defended model's outputs alone.
        black_box_draws: draws a query of it, for a randomised defence.
        label_free: the attack, with options, that moves embeddings and knows no labels.
        verdict_seeds: fewest draws that may judge a randomised defence.

    Raises:
        UsageError: draws that are no rising whole numbers from 1 on.
    """

    eot_draws: tuple[int, ...] = (1, 4, 16)
    black_box: str = "square,queries=1000"
    black_box_draws: int = 4
    label_free: str = "pgd,objective=drift"
    verdict_seeds: int = 5

    def __post_init__(self) -> None:
        counts = (0, *self.eot_draws)
        whole = all(isinstance(draws, int) for draws in counts)
        if not self.eot_draws or not whole or any(more <= less for less, more in pairwise(counts)):
            raise UsageError(f"eot_draws is {self.eot_draws!r}; rising whole numbers from 1 on, such as (1, 4, 16).")
        for name in ("black_box_draws", "verdict_seeds"):
            check_whole(name, getattr(self, name), 1)


class EmbeddingTarget(nn.Module):
    """A module whose outputs are embeddings, as what ``pgd`` with ``objective="drift"`` attacks.

    Made of a view around an encoder in the model's place, it is the defence as the label-free attack sees it. Each
    pass is a fresh draw.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """
        Args:
            encoder: (N, C, H, W) in [0, 1] -> (N, D), differentiable.
        """
        super().__init__()
        self.encoder = encoder

    def embed(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, D)."""
        return cast(Tensor, self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        """The same: there are no logits."""
        return self.embed(x)


class Passes(NamedTuple):
    """Passes of one image through the model, if it is never broken.

    Attributes:
        steep: forwards with a backward.
        plain: forwards alone.
        draws: of each, where nobody says how many.
    """

    steep: int
    plain: int = 0
    draws: int = 1

    @property
    def total(self) -> int:
        return self.steep + self.plain


def passes(name: str, threat: ThreatModel, options: Mapping[str, Any], classes: int) -> Passes | None:
    """What an attack spends on one image, a draw each, if it is never broken.

    Args:
        name: the attack's.
        threat: its budget.
        options: its keyword arguments.
        classes: of the model.

    Returns:
        None for an attack that is not this library's own.
    """
    if name == "autoattack":
        stages = stages_of(options.get("version", "standard"), options.get("stages"))
        own = options.get("stages") if isinstance(options.get("stages"), Mapping) else {}
        parts = [passes(stage, threat, {**given, **(own or {}).get(stage, {})}, classes) for stage, _, given in stages]
        steep, plain, draws = zip(*filter(None, parts))
        return Passes(sum(steep), sum(plain), max(draws))
    steps, targets = options.get("steps", 100), min(options.get("targets", 9), classes - 1)
    draws_each = options.get("eot", 1)
    counts = {
        "pgd": (threat.steps * threat.restarts, 0),
        "apgd-ce": ((steps + 1) * options.get("restarts", 1), 0),
        "apgd-dlr": ((steps + 1) * options.get("restarts", 1), 0),
        "apgd-t": ((steps + 1) * targets, 0),
        "fab-t": (steps * targets, steps * targets),
        "square": (0, options.get("queries", 5000)),
    }
    return Passes(*counts[name], draws_each) if name in counts else None
