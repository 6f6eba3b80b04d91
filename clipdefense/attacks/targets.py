"""Targeted attacks as untargeted ones: towards one wrong class after the other, most likely first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import predict
from clipdefense.attacks.engine import Outcome
from clipdefense.attacks.norms import per_image
from clipdefense.attacks.objectives import likely_targets, margin

Towards = Callable[[int, Tensor, Tensor], Outcome]
"""``(rank of the target, rows still standing, their target classes) -> Outcome`` for those rows."""


def over_targets(model: nn.Module, x: Tensor, y: Tensor, count: int, towards: Towards, batch_size: int) -> Tensor:
    """Attack towards the ``count`` most likely wrong classes; an image that one target breaks leaves at once.

    Args:
        model: images -> logits.
        x: (N, C, H, W); y: (N,) labels.
        count: targets; at most all the wrong classes are there.
        towards: runs one target.
        batch_size: images a forward.

    Returns:
        (N, C, H, W): the point that broke the image, or the one of largest margin over the targets.
    """
    y = y.long()
    ranked = likely_targets(predict(model, x, batch_size=batch_size), y, count)
    result, left = x.detach().clone(), torch.arange(len(x), device=x.device)
    best = torch.full((len(x),), -torch.inf, device=x.device)
    for rank in range(ranked.shape[1]):
        outcome = towards(rank, left, ranked[left, rank])
        result[left[outcome.broken]] = outcome.x_adv[outcome.broken]
        left, reached = left[~outcome.broken], outcome.x_adv[~outcome.broken]
        if not len(left):
            break
        gap = margin(predict(model, reached, batch_size=batch_size), y[left]).to(best.dtype)
        further = gap > best[left]
        result[left] = torch.where(per_image(further, reached), reached, result[left])
        best[left] = torch.maximum(best[left], gap)
    return result
