"""The attacker's budget, and eps as people write it."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdefense.errors import UsageError
from clipdefense.threat import ThreatModel, format_eps, parse_eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "eps is -1; it must be at least 0"),
        ({"eps": 8}, r"eps is 8, but images are in \[0, 1\]; did you mean 8/255 = 0.0314\?"),
        ({"eps": 0.5 * 255}, r"did you mean 127.5/255 = 0.5000\?"),
        ({"eps": float("nan")}, "eps is nan; a finite number"),
        ({"eps": float("inf"), "norm": "l2"}, "eps is inf; a finite number"),
        ({"eps": "8/255"}, "eps is '8/255'; a finite number"),
        ({"eps": True}, "eps is True; a finite number"),
        ({"norm": "Linf"}, "norm 'Linf' is unknown; did you mean 'linf'"),
        ({"norm": "l1"}, "norm 'l1' is unknown; did you mean 'l2'"),
        ({"norm": 2}, "norm '2' is unknown"),
        ({"step_size": 0}, "step_size is 0; it must be above 0"),
        ({"step_size": -0.1}, "step_size is -0.1; it must be above 0"),
        ({"step_size": 2}, r"step_size is 2, but images are in \[0, 1\]; did you mean 2/255"),
        ({"steps": -1}, "steps is -1; a whole number of at least 0"),
        ({"steps": 1.0}, "steps is 1.0; a whole number"),
        ({"steps": True}, "steps is True; a whole number"),
        ({"restarts": 0}, "restarts is 0; a whole number of at least 1"),
    ],
)
def test_bad_budgets_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ThreatModel(**{"norm": "linf", "eps": 0.1, **options})  # type: ignore[arg-type]


def test_good_budgets() -> None:
    assert ThreatModel("linf", 0).eps == 0
    assert ThreatModel("linf", 1).eps == 1
    assert ThreatModel("l2", 3.5).eps == 3.5  # an L2 radius may exceed 1
    assert ThreatModel("linf", float(np.float64(0.1)), steps=0).steps == 0


def test_it_is_immutable_and_hashable() -> None:
    threat = ThreatModel("linf", 8 / 255)
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0  # type: ignore[misc]
    assert {threat: 1}[ThreatModel("linf", 8 / 255)] == 1
    assert pickle.loads(pickle.dumps(threat)) == threat
    with pytest.raises(UsageError):
        dataclasses.replace(threat, eps=8)


@pytest.mark.parametrize(
    ("eps", "steps", "step_size", "alpha"),
    [
        (8 / 255, 10, None, 2 / 255),  # 2.5 * 8 / 10
        (8 / 255, 20, None, 1 / 255),
        (8 / 255, 2, None, 8 / 255),  # no further than eps
        (8 / 255, 0, None, 8 / 255),
        (8 / 255, 10, 0.3 / 255, 0.3 / 255),
        (0.0, 10, None, 0.0),
    ],
)
def test_the_step_size_rule(eps: float, steps: int, step_size: float | None, alpha: float) -> None:
    assert ThreatModel("linf", eps, step_size=step_size, steps=steps).alpha == pytest.approx(alpha, rel=1e-12)


@given(st.floats(1e-4, 1), st.integers(3, 1000))
def test_the_rule_lets_an_attack_cross_the_ball(eps: float, steps: int) -> None:
    threat = ThreatModel("linf", eps, steps=steps)
    assert threat.alpha <= eps and threat.alpha * steps >= 2 * eps


def test_it_prints_the_norm_and_the_radius() -> None:
    assert str(ThreatModel("linf", 8 / 255)) == "linf, eps 8/255"
    assert str(ThreatModel("l2", 0.5)) == "l2, eps 0.5"


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (0, "0"),
        (1 / 255, "1/255"),
        (0.5 / 255, "0.5/255"),
        (16 / 255, "16/255"),
        (128 / 255, "128/255"),
        (0.5, "0.5"),
        (1.0, "1"),
        (3.0, "3"),
        (0.03, "0.03"),
        (0.0123456, "0.01235"),
        (1e-6, "1e-06"),
    ],
)
def test_eps_is_written_as_people_write_it(eps: float, text: str) -> None:
    assert format_eps(eps) == text


@pytest.mark.parametrize(
    ("text", "eps"),
    [
        ("1/255", 1 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0.5/255", 0.5 / 255),
        ("0.0039", 0.0039),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("0", 0.0),
        ("-1", -1.0),  # a number; the threat model says what is wrong with it
    ],
)
def test_eps_is_read(text: str, eps: float) -> None:
    assert parse_eps(text) == eps


@pytest.mark.parametrize("text", ["", "/255", "8/", "8/0", "eight", "1/2/3", "nan", "inf", "1e999", "8%"])
def test_what_is_not_a_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number; write it as 1/255 or"):
        parse_eps(text)


@given(st.integers(0, 510))
def test_multiples_of_half_a_level_survive_printing_exactly(halves: int) -> None:
    eps = halves / 2 / 255
    assert parse_eps(format_eps(eps)) == eps


@given(st.floats(0, 10))
def test_any_eps_survives_printing_to_four_digits(eps: float) -> None:
    assert parse_eps(format_eps(eps)) == pytest.approx(eps, rel=1e-3, abs=2e-9)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_fraction_is_the_nearest_float(numerator: int, denominator: int) -> None:
    assert parse_eps(f"{numerator}/{denominator}") == numerator / denominator
