"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from clipdefense.errors import UsageError
from clipdefense.training.config import TrainingConfig


def total_steps(config: TrainingConfig, steps_per_epoch: int | None) -> int | None:
    """Updates of the whole run, or None where neither the data nor ``max_steps`` bounds them.

    Raises:
        UsageError: a cosine schedule without a last step.
    """
    if steps_per_epoch is not None:
        whole = config.epochs * steps_per_epoch
        return whole if config.max_steps is None else min(whole, config.max_steps)
    if config.max_steps is None and config.schedule == "cosine":
        raise UsageError("the loader has no length, which the cosine schedule needs; pass max_steps.")
    return config.max_steps


def warmup_steps(config: TrainingConfig, total: int | None) -> int:
    """Updates of warm-up that a run of ``total`` updates really takes."""
    if total is None or config.warmup_cap == 1:
        return config.warmup_steps
    return min(config.warmup_steps, math.ceil(config.warmup_cap * total))


def learning_rate(config: TrainingConfig, step: int, epoch: int, total: int | None) -> float:
    """Learning rate of update ``step`` (from 0), which lies in ``epoch`` (from 0).

    Linear warm-up ``lr * (step + 1) / W`` for ``step < W``, then the schedule; the cosine is
    ``lr * (1 + cos(pi * (step - W) / (total - W))) / 2``.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        assert total is not None
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if config.schedule == "milestones":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return config.lr
