"""Intervals and tests for accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from scipy.stats import binomtest, norm

from clipdefense.errors import UsageError


class Interval(NamedTuple):
    """A confidence interval of a proportion."""

    low: float
    high: float


def wilson(proportion: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of a proportion observed on n images.

    Unlike the normal approximation it stays in [0, 1] and does not collapse at 0 % or 100 %. For a mean over several
    seeds of a randomised defence n is still the number of images, which is conservative.

    Args:
        proportion: the observed share, in [0, 1].
        n: images.
        confidence: coverage, such as 0.95.

    Raises:
        UsageError: a proportion outside [0, 1], n below 1, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}; a number between 0 and 1 is expected, such as 0.95.")
    if not 0 <= proportion <= 1 or n < 1:
        raise UsageError(
            f"wilson got the proportion {proportion} of n = {n}; a share in [0, 1] of at least 1 is expected."
        )
    z = float(norm.ppf(0.5 + confidence / 2))
    centre = proportion + z * z / (2 * n)
    spread = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and 1 the exact end is 0 and 1; rounding may leave it a hair outside
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def macro(shares: Sequence[tuple[float, int]], confidence: float = 0.95) -> tuple[float, Interval]:
    """The mean of several independent proportions, each data set counting once, with its interval.

    The interval is that of Zou and Donner (2008), which recovers variances from the Wilson limits (l_k, u_k):
    ``mean - sqrt(sum (p_k - l_k)^2) / K`` and the same upwards. It is about other images of the same data sets, not
    about other data sets, and for one proportion it is Wilson's.

    Args:
        shares: (proportion, n images) of each data set; at least one.
        confidence: coverage.

    Raises:
        UsageError: no share, or one that :func:`wilson` refuses.
    """
    if not shares:
        raise UsageError("macro got no proportions; at least one is expected.")
    mean = sum(share for share, _ in shares) / len(shares)
    limits = [(share, wilson(share, n, confidence)) for share, n in shares]
    below = math.sqrt(sum((share - limit.low) ** 2 for share, limit in limits)) / len(shares)
    above = math.sqrt(sum((limit.high - share) ** 2 for share, limit in limits)) / len(shares)
    return mean, Interval(max(0.0, mean - below), min(1.0, mean + above))


def mcnemar(only_a: int, only_b: int, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """Exact p of McNemar's test (1947) from the two discordant counts: binomial with p = 1/2.

    Args:
        only_a, only_b: images on which only the one, and only the other, is ahead.
        alternative: ``"greater"`` asks whether the first is ahead, ``"two-sided"`` whether either is.

    Returns:
        p; 1.0 without discordant pairs.
    """
    return float(binomtest(only_a, only_a + only_b, 0.5, alternative=alternative).pvalue) if only_a + only_b else 1.0
