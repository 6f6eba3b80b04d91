"""Wilson's interval against SciPy's, at its ends, and as a property."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from clipdefense.errors import UsageError
from clipdefense.evaluation.statistics import macro, wilson


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (1, 2), (130, 300), (299, 300), (5000, 10000)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_it_equals_scipys(k: int, n: int, confidence: float) -> None:
    reference = binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert wilson(k / n, n, confidence) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_a_value_known_by_hand() -> None:
    """z = 1.96, n = 100, p = 1/2: (0.5 + z^2/200 -+ z sqrt(0.25/100 + z^2/40000)) / (1 + z^2/100)."""
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_none_and_all_of_n_are_not_certainties(n: int) -> None:
    none, every = wilson(0.0, n), wilson(1.0, n)
    assert none.low == pytest.approx(0, abs=1e-15) and 0 < none.high < 1
    assert every.high == pytest.approx(1, abs=1e-15) and 0 < every.low < 1
    assert none.high == pytest.approx(1 - every.low, abs=1e-12)


@given(st.integers(1, 10**6), st.data())
def test_it_holds_the_proportion_and_stays_in_range(n: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    wider = wilson(share, n, 0.99)
    assert wider.low <= low + 1e-12 and high <= wider.high + 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0), "proportion 0.5 of n = 0"),
        ((1.5, 10), "proportion 1.5 of n = 10"),
        ((-0.1, 10), "proportion -0.1"),
        ((float("nan"), 10), "proportion nan"),
        ((0.5, 10, 95), "confidence is 95; a number between 0 and 1"),
    ],
)
def test_what_has_no_interval_is_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wilson(*arguments)  # type: ignore[arg-type]


def test_a_mean_over_data_sets_by_hand() -> None:
    assert macro([(0.3, 50)]) == (0.3, pytest.approx(wilson(0.3, 50)))
    first, second = wilson(0.2, 100), wilson(0.6, 40)
    mean, (low, high) = macro([(0.2, 100), (0.6, 40)])
    assert mean == pytest.approx(0.4)
    assert low == pytest.approx(0.4 - math.hypot(0.2 - first.low, 0.6 - second.low) / 2)
    assert high == pytest.approx(0.4 + math.hypot(first.high - 0.2, second.high - 0.6) / 2)
    assert macro([(0.0, 10)] * 3)[1].low == 0 and macro([(1.0, 10)] * 3)[1].high == 1
    with pytest.raises(UsageError, match="macro got no proportions"):
        macro([])


def test_a_mean_over_data_sets_covers() -> None:
    """Of many draws with known chances, about 95 in 100 intervals hold the true mean."""
    chances, counts = np.array([0.02, 0.4, 0.85]), np.array([60, 200, 40])
    drawn = np.random.default_rng(0).binomial(counts, chances, size=(2000, 3)) / counts
    inside = [low <= chances.mean() <= high for _, (low, high) in (macro(list(zip(row, counts))) for row in drawn)]
    assert 0.93 < np.mean(inside) < 0.98
