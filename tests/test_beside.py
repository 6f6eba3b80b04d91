"""Ours beside what was published: which row stands for which, and over which data sets a mean is set beside a mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from beside import Beside, Line, Measured, join, published_name, table
from clipdefense.data import DatasetRule, Protocol
from clipdefense.evaluation import Evaluation
from clipdefense.evaluation.report import WITHHELD
from clipdefense.evaluation.results import Kind, Row
from clipdefense.evaluation.statistics import macro, wilson
from clipdefense.threat import ThreatModel

PAIR = "apgd-ce and apgd-dlr"
SETS = ("cats", "dogs", "fish")
ATTACKS = ("pgd,steps=10,step_size=1/255,early_stop=false", "autoattack,stages=apgd-ce+apgd-dlr")


def a_protocol(**changes: Any) -> Protocol:
    rules = tuple(DatasetRule(name, templates=("a {}",)) for name in SETS)
    rules = (*rules[:2], replace(rules[2], attacks=("apgd-ce",)))  # two classes
    threats = (ThreatModel("linf", 1 / 255), ThreatModel("linf", 4 / 255))
    given = {"rules": rules, "threats": threats, "attacks": ATTACKS, "headline": SETS, **changes}
    return Protocol("mine", "mine", "folder", **given)


def right(of_ten: int) -> Any:
    return np.arange(10)[None] < of_ten


def measured(dataset: str, clean: int, rows: dict[str, int], eps: int = 1, judged: str = "clip") -> Measured:
    """Ten images; how many of them each attack left."""
    made = tuple(Row(attack, "the model itself", right(left), kind="itself") for attack, left in rows.items())
    name = Row("none", "nothing", right(clean), kind="clean")
    return Measured(judged, dataset, Evaluation("m", ThreatModel("linf", eps / 255), name, made, True, {}))


def entry(attack: str, eps: str, accuracy: dict[str, float], **more: str) -> dict[str, Any]:
    head = {"protocol": "mine", "method": "CLIP", "source": "a paper", "note": ""}
    return {**head, "attack": attack, "eps": eps, **more, "accuracy": accuracy}


def said(share: float, n: int = 10) -> str:
    low, high = wilson(share, n)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_names() -> None:
    assert published_name("autoattack,stages=apgd-ce+apgd-dlr") == PAIR
    assert published_name("autoattack,version=rand,stages=apgd-ce+apgd-dlr") == PAIR
    assert published_name("autoattack") == "AutoAttack"
    assert published_name("autoattack,version=rand") == "autoattack,version=rand"
    assert published_name("pgd,steps=10,step_size=0.004,objective=margin,early_stop=False") == (
        "pgd,steps=10,objective=margin"
    )
    assert published_name("+ apgd-t,targets=9") == "apgd-t"


def test_one_data_set() -> None:
    ours = [measured("cats", 9, {"pgd,steps=10,step_size=0.004": 4, ATTACKS[1]: 3, "pgd,steps=10": 5, "autoattack": 1})]
    theirs = [
        entry("clean", "0", {"cats": 80.0, "mean": 70.0}),
        entry("pgd,steps=10", "1/255", {"cats": 50.0}),
        entry(PAIR, "1/255", {"cats": 30.5}, note="known"),
        entry("AutoAttack", "1/255", {"mean": 12.0}),
        entry("pgd,steps=10", "4/255", {"cats": 1.0}),  # a radius that was not run
        entry("pgd,steps=100", "1/255", {"cats": 1.0}),  # an attack that was not run
    ]
    clean, pgd, pair, auto = join(ours, theirs, a_protocol())
    elsewhere = Line("mean of 3", "", 70.0, None)  # one data set is no mean
    assert clean == Beside(
        "clip", "CLIP", "clean", "0", "a paper", "", (Line("cats", said(0.9), 80.0, 10.0), elsewhere)
    )
    assert pgd.lines == (Line("cats", said(0.4), 50.0, -10.0),)  # the protocol's own PGD, not the one added to it
    assert pair.lines == (Line("cats", said(0.3), 30.5, -0.5),) and pair.note == "known"
    assert auto.lines == (Line("mean of 3", "", 12.0, None),)


def test_a_mean_stands_beside_a_mean_over_the_same_data_sets() -> None:
    ours = [measured(name, left, {"pgd,steps=10": left - 3}) for name, left in zip(SETS, (9, 8, 7))]
    clean = entry("clean", "0", {"cats": 90.0, "dogs": 70.0, "fish": 70.0, "mean": 76.67})
    (whole,) = join(ours, [clean], a_protocol())
    mean, interval = macro([(0.9, 10), (0.8, 10), (0.7, 10)])
    text = f"{100 * mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert [line.data for line in whole.lines] == [*SETS, "mean of 3"]
    assert whole.lines[-1] == Line("mean of 3", text, 76.67, 3.33)
    (part,) = join(ours[:2], [clean], a_protocol())
    assert part.lines[2:] == (Line("mean of 2", part.lines[2].ours, 80.0, 5.0), Line("mean of 3", "", 76.67, None))
    assert part.lines[2].ours.startswith("85.0 [")
    (bare,) = join(ours[:2], [entry("clean", "0", {"mean": 76.67})], a_protocol())
    assert bare.lines == (Line("mean of 2", part.lines[2].ours, None, None), Line("mean of 3", "", 76.67, None))
    other = a_protocol(means=(("theirs", SETS[:2]),))
    (over,) = join(ours, [entry("clean", "0", {"mean": 80.0}, over="theirs")], other)
    assert over.lines == (Line("mean of 2", part.lines[2].ours, 80.0, 5.0),)


def test_of_a_suite_a_data_set_with_attacks_of_its_own_gets_the_first() -> None:
    ours = [measured("cats", 9, {ATTACKS[1]: 3}), measured("fish", 9, {"apgd-ce": 4})]
    (row,) = join(ours, [entry(PAIR, "1/255", {"cats": 30.0, "fish": 50.0})], a_protocol())
    assert [(line.data, line.difference) for line in row.lines] == [("cats", 0.0), ("fish", -10.0), ("mean of 2", -5.0)]
    ours = [measured("cats", 9, {"apgd-ce": 4})]  # APGD-CE alone stands for no suite elsewhere
    assert join(ours, [entry(PAIR, "1/255", {"cats": 30.0})], a_protocol()) == []


def test_cumulative_rows_are_the_suite_so_far() -> None:
    ours = [measured("cats", 9, {"apgd-ce": 4, "+ apgd-t,targets=9": 2, "+ pgd,steps=10": 1})]
    theirs = [entry("apgd-ce and apgd-t", "1/255", {"cats": 25.0}), entry("pgd,steps=10", "1/255", {"cats": 1.0})]
    (row,) = join(ours, theirs, a_protocol())
    assert row.lines == (Line("cats", said(0.2), 25.0, -5.0),)


def test_a_mean_over_radii() -> None:
    averaged = entry("pgd,steps=10", "mean of 1/255, 4/255", {"cats": 40.0})
    ours = [measured("cats", 9, {"pgd,steps=10": left}, eps=eps) for eps, left in ((1, 6), (4, 2))]
    (row,) = join(ours, [averaged], a_protocol())
    assert row.lines == (Line("cats", said(0.4), 40.0, 0.0),)
    assert join(ours[:1], [averaged], a_protocol()) == []


def test_only_the_attacker_who_does_not_know_the_defence_is_set_beside() -> None:
    plain = measured("cats", 9, {"pgd,steps=10": 4}, judged="clip | ttc")
    kinds: tuple[Kind, ...] = ("view", "transfer")
    rows = tuple(replace(plain.evaluation.rows[0], kind=kind, correct=right(n)) for kind, n in zip(kinds, (1, 7)))
    ours = [replace(plain, evaluation=replace(plain.evaluation, rows=rows)), measured("cats", 8, {"pgd,steps=10": 0})]
    found = join(ours, [entry("pgd,steps=10", "1/255", {"cats": 60.0})], a_protocol())
    assert [(row.judged, row.lines[0].difference) for row in found] == [("clip | ttc", 10.0), ("clip", -60.0)]


def test_what_an_audit_withholds_is_in_no_difference() -> None:
    plain = measured("cats", 9, {"pgd,steps=10": 4})
    ours = [replace(plain, evaluation=replace(plain.evaluation, withheld="masked"))]
    theirs = [entry("pgd,steps=10", "1/255", {"cats": 60.0}), entry("clean", "0", {"cats": 60.0})]
    robust, clean = join(ours, theirs, a_protocol())
    assert robust.lines == (Line("cats", WITHHELD, 60.0, None),) and clean.lines[0].difference == 30.0


@pytest.mark.parametrize("width", [160, 240])
def test_it_is_one_table_with_a_row_a_publication(width: int) -> None:
    ours = [measured(name, 9, {"pgd,steps=10": 4}) for name in SETS]
    ours += [measured(name, 9, {"pgd,steps=10": 7}, judged="ttc") for name in SETS]
    theirs = [entry("pgd,steps=10", "1/255", {"cats": 50.0, "mean": 41.0}), entry("clean", "0", {"dogs": 95.25})]
    console = Console(width=width, record=True)
    console.print(table(join(ours, theirs, a_protocol()), "mine"))
    text = console.export_text()
    assert text.count("ours: clip") == 1 and text.count("CLIP") == 2 and text.count("1 a paper") == 1
    assert "Ours beside what was published under mine" in text
    (cats,) = [line for line in text.splitlines() if "cats" in line]
    assert "pgd,steps=10" in cats and "40.0 [" in cats and "50.00" in cats and "-10.0" in cats
    assert "70.0 [" in cats and "+20.0" in cats  # the defended one stands in the same row
    (mean,) = [line for line in text.splitlines() if "mean of 3" in line and "41.00" in line]
    assert "-1.0" in mean
