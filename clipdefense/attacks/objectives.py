"""What an attack maximises: functions ``(logits (N, C), y (N,)) -> (N,)``, larger is closer to (or past) an error."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from clipdefense.errors import unknown_name

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image; summed, never averaged, so that no gradient is divided away by the batch size."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y`` (Carlini and Wagner 2017, f6 without the clamp); positive once misclassified."""
    true = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(dim=1) - true


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin}


def get_objective(objective: str | Objective) -> Objective:
    """The objective of that name, or the callable itself."""
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]
