"""Tests on paired verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy.stats import binomtest
from torch import Tensor

from clipdefense.evaluation import statistics


def mcnemar(more: int, fewer: int) -> float:
    """One-sided exact McNemar p: how likely so uneven a split of the discordant pairs is if neither side is ahead.

    Args:
        more: images on which the suspected side is ahead.
        fewer: images on which the other one is.

    Returns:
        p; 1.0 without discordant pairs.
    """
    return statistics.mcnemar(more, fewer, "greater")


def least(splits: Mapping[str, tuple[int, int]]) -> tuple[str, float]:
    """The split (more, fewer) with the least p, and that p times the number of splits (Bonferroni), at most 1."""
    if not splits:
        return "", 1.0
    name = min(splits, key=lambda key: mcnemar(*splits[key]))
    return name, min(1.0, len(splits) * mcnemar(*splits[name]))


def ahead(first: Tensor, second: Tensor) -> tuple[int, int]:
    """(images where only first is True, where only second is), both (N,) bool."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def guessing(right: int, n: int, classes: int) -> float:
    """One-sided binomial p of so many right answers from a model that guesses among the classes."""
    return float(binomtest(right, n, 1 / max(classes, 2), alternative="greater").pvalue) if n else math.nan
