"""What an attack maximises: functions ``(logits (N, C), y (N,)) -> (N,)``, larger is closer to (or past) an error.

Targeted objectives take a third argument, the target classes (N,), and are larger the closer the target is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdefense.errors import check_whole, unknown_name

Objective = Callable[..., Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image; summed, never averaged, so that no gradient is divided away by the batch size."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y`` (Carlini and Wagner 2017, f6 without the clamp); positive once misclassified."""
    return _best_other(logits, y) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, ``(max_{j != y} z_j - z_y) / (z_(1) - z_(3))`` (2003.01690, eq. 6).

    Invariant to shifting and scaling the logits, so it cannot saturate. Needs the third largest logit; for two
    classes, where there is none, it is the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    ordered = logits.topk(3, dim=1).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2]).clamp_min(_TINY)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``z_t - z_y``; positive once the target is ahead of the true class."""
    return _at(logits, target) - _at(logits, y)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`` (2003.01690, eq. 7).

    Needs the fourth largest logit; for fewer than four classes it is the targeted margin.
    """
    if logits.shape[1] < 4:
        return targeted_margin(logits, y, target)
    ordered = logits.topk(4, dim=1).values
    scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(logits, y, target) / scale.clamp_min(_TINY)


def targeted_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Log-likelihood of the target class."""
    return -F.cross_entropy(logits, target, reduction="none")


def drift(embedding: Tensor, y: Tensor, clean: Tensor) -> Tensor:
    """``||f(x + d) - f(x)||_2^2`` on embeddings (N, D), un-normalised; the labels play no part."""
    return (embedding - clean).square().sum(dim=1)


_TINY = 1e-12


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED: dict[str, Objective] = {
    "ce": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def get_objective(objective: str | Objective, *, targeted: bool = False) -> Objective:
    """The (targeted) objective of that name, or the callable itself."""
    if callable(objective):
        return objective
    known = TARGETED if targeted else OBJECTIVES
    if objective not in known:
        raise unknown_name("objective", objective, known)
    return known[objective]


def likely_targets(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The most likely wrong classes of each image, most likely first.

    Args:
        logits: (N, C) on the clean images.
        y: (N,) true labels.
        count: how many targets; at most C - 1 are there.

    Returns:
        (N, min(count, C - 1)).

    Raises:
        UsageError: a count below 1.
    """
    check_whole("targets", count, 1)
    others = logits.scatter(1, y[:, None], float("-inf"))
    return torch.topk(others, min(count, logits.shape[1] - 1), dim=1).indices
