"""Runs that attacked one defence in different ways, in one report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdefense.runs.config import RunConfig
from clipdefense.runs.joint import joined
from clipdefense.runs.page import page_of
from clipdefense.runs.results import RunResult, read
from clipdefense.runs.run import run

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def noise(make_config: MakeConfig, tmp_path: Path, specs: tuple[str, str]) -> Callable[..., RunResult]:
    """A run of random noise on a data set that is called ``name``."""

    def make(name: str, **ways: Any) -> RunResult:
        defense = {"spec": "random-noise", "options": {"eps": "2/255"}, **ways}
        datasets = [{"spec": specs[1], "name": name, "n": 9}]
        config = make_config(defenses=[defense], datasets=datasets, verdict_seeds=1, exhibits=False)
        run(config, tmp_path / name, device="cpu")
        return read(tmp_path / name)

    return make


def test_other_draws_of_one_defence_are_said_where_the_mean_is_over_both(noise: Callable[..., RunResult]) -> None:
    runs = [noise("one", eot=1), noise("two", eot=2)]
    assert joined(runs).differing == ("defenses.eot",)
    page = page_of(runs)
    (note,) = [part.note for part in page.before if part.title == "At a glance"]
    assert "The runs differ in defenses.eot: each number is over what its own run tried" in note


def test_other_views_of_one_defence_are_said(noise: Callable[..., RunResult]) -> None:
    every, none, again = noise("every", eot=1), noise("none", eot=1, views=[]), noise("again", eot=1)
    assert joined([every, none]).differing == ("defenses.views",)
    assert joined([every, again]).differing == ()


def test_views_in_another_order_are_the_same_and_other_defences_are_not_compared(
    make_config: MakeConfig, noise: Callable[..., RunResult]
) -> None:
    first = noise("first", eot=1)

    def as_if(**ways: Any) -> RunResult:
        config = make_config(defenses=[{"spec": "random-noise", "options": {"eps": "2/255"}, "eot": 1, **ways}])
        return RunResult(first.folder, config, first.facts, ())

    forth, back = as_if(views=["a", "b"]), as_if(views=["b", "a"])
    assert joined([forth, back]).differing == ()
    assert joined([forth, as_if(views=["a"], eot=3)]).differing == ("defenses.views", "defenses.eot")
    assert joined([forth, as_if(views=["a"], eot=3, name="mine")]).differing == ()
