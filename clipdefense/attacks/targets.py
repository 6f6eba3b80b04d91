"""One attack several times: towards one wrong class after the other, or from one random start after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipdefense.attacks.context import predict
from clipdefense.attacks.engine import Outcome, Task
from clipdefense.attacks.forward import keyed
from clipdefense.attacks.norms import per_image
from clipdefense.attacks.objectives import likely_targets, margin
from clipdefense.attacks.options import labelled
from clipdefense.checks import check_labels

Towards = Callable[[int, Task, Tensor], Outcome]
"""``(rank of the target, what still stands, its target classes) -> Outcome``."""


def over_targets(task: Task, count: int, towards: Towards) -> Tensor:
    """Attack towards the ``count`` most likely wrong classes; an image that one target breaks leaves at once.

    Args:
        task: model, images, labels, and how.
        count: targets; at most all the wrong classes are there.
        towards: runs one target.

    Returns:
        (N, C, H, W): the point that broke the image, or the one of largest margin over the targets.
    """
    model, size = task.model, task.options.batch_size

    def verdict(x: Tensor, ids: Tensor) -> Tensor:
        return predict(model, x, batch_size=size, **keyed(model, ids, task.seed))

    clean = verdict(task.x, task.ids)
    check_labels(task.y, len(task.y), classes=clean.shape[1])
    ranked = likely_targets(clean, task.y, count)
    result, left = task.x.clone(), torch.arange(len(task.x), device=task.x.device)
    best = torch.full((len(task.x),), -torch.inf, device=task.x.device)
    for rank in range(ranked.shape[1]):
        progress = labelled(task.options.progress, f"target {rank + 1} of {ranked.shape[1]}")
        outcome = towards(rank, task.rows(left, progress), ranked[left, rank])
        result[left[outcome.broken]] = outcome.x_adv[outcome.broken]
        left, reached = left[~outcome.broken], outcome.x_adv[~outcome.broken]
        if not len(left):
            break
        gap = margin(verdict(reached, task.ids[left]), task.y[left]).to(best.dtype)
        further = gap > best[left]
        result[left] = torch.where(per_image(further, reached), reached, result[left])
        best[left] = torch.maximum(best[left], gap)
    return result


def over_restarts(task: Task, count: int, once: Callable[[int, Tensor], Outcome], goal: Tensor | None = None) -> Tensor:
    """Attack ``count`` times, each time the images that still stand.

    Args:
        task: model, images, labels, and how.
        count: restarts.
        once: ``(number of the restart, rows) -> Outcome`` of those images.
        goal: (N,) classes: an image has fallen once classified as its goal; None, as anything but its label.

    Returns:
        (N, C, H, W): the point that broke the image, or where the last restart left it.
    """
    result, left = task.x.clone(), torch.arange(len(task.x), device=task.x.device)
    for restart in range(count):
        outcome = once(restart, left)
        result[left] = outcome.x_adv
        if restart + 1 == count:
            break
        left = left[~outcome.broken]
        if len(left):  # what did not leave early has not been judged where it ended
            keys = keyed(task.model, task.ids[left], task.seed)
            predicted = predict(task.model, result[left], batch_size=task.options.batch_size, **keys).argmax(dim=1)
            left = left[predicted == task.y[left] if goal is None else predicted != goal[left]]
        if not len(left):
            break
    return result
