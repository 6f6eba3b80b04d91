"""What was tried and what was not, read off the rows."""

from __future__ import annotations

import numpy as np
import pytest

from clipdefense.attacks.autoattack import VERSIONS
from clipdefense.evaluation import words
from clipdefense.evaluation.ensemble import as_published, parts
from clipdefense.evaluation.results import Evaluation, Kind, Row
from clipdefense.threat import ThreatModel

RIGHT = np.ones((1, 4), dtype=np.bool_)
ANSWERS = "An attacker who sees answers alone, without gradients (square, or adaptive = true)"
ENSEMBLE = "AutoAttack, the ensemble with which robust accuracies are usually compared"


def evaluation(name: str, *attacks: str, kind: Kind = "itself", adaptive: bool = True) -> Evaluation:
    rows = tuple(Row(attack, "something", RIGHT, kind=kind) for attack in attacks)
    clean = Row("none", "nothing", RIGHT, kind="clean")
    return Evaluation(name, ThreatModel("linf", 4 / 255), clean, rows, adaptive, {})


def begins(texts: list[str], start: str) -> list[str]:
    return [text for text in texts if text.startswith(start)]


def test_the_parts_of_an_ensemble_are_those_that_ran() -> None:
    standard = frozenset(name for name, _, _ in VERSIONS["standard"])
    assert parts("+ autoattack") == parts("autoattack,version=standard") == parts("other:AutoAttack") == standard
    assert parts("autoattack,version=rand") == {"apgd-ce", "apgd-dlr"}
    assert parts("autoattack,stages={'square': {'queries': 0}, 'fab-t': {'steps': 9}},seed=1") == standard - {"square"}
    assert parts("pgd,steps=10") == {"pgd"} and parts("other:SquareAttack") == {"square"}
    assert not parts("autoattack,stages=anything") and not parts("autoattack,version=nonesuch")
    assert parts("autoattack,stages=apgd-ce+apgd-dlr") == {"apgd-ce", "apgd-dlr"}


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("autoattack", ""),
        ("autoattack,version=standard,seed=3", ""),
        ("autoattack,version=rand", "version 'rand', without apgd-t, fab-t and square"),
        ("autoattack,stages={'apgd-t': {'targets': 5}}", "with stages of its own"),
        ("autoattack,steps=10", "with steps of its own"),
        ("autoattack,version=standard,queries=100", "with queries of its own"),
    ],
)
def test_what_is_the_published_autoattack(attack: str, reason: str) -> None:
    assert as_published(attack).endswith(reason) and bool(as_published(attack)) == bool(reason)


def test_what_was_not_tried_is_said_of_whom() -> None:
    plain = words.not_tried([evaluation("a", "pgd"), evaluation("b", "apgd-ce")])
    assert f"{ANSWERS}." in plain
    assert begins(plain, "AutoAttack") == [
        f"{ENSEMBLE}, for a.",
        f"{ENSEMBLE} (apgd-t, fab-t and square did not run), for b.",
    ]
    one_has = words.not_tried([evaluation("a", "pgd"), evaluation("b", "square"), evaluation("c", "autoattack")])
    assert begins(one_has, "An attacker who sees") == [f"{ANSWERS}, for a."]
    assert begins(one_has, "AutoAttack") == [
        f"{ENSEMBLE}, for a.",
        f"{ENSEMBLE} (apgd-ce, apgd-t and fab-t did not run), for b.",
    ]


def test_a_part_is_not_the_whole_ensemble() -> None:
    rand = words.not_tried([evaluation("a", "autoattack,version=rand")])
    assert f"{ANSWERS}." in rand and f"{ENSEMBLE} (apgd-t, fab-t and square did not run)." in rand
    two = words.not_tried([evaluation("a", "apgd-ce", "apgd-t")])
    assert f"{ENSEMBLE} (fab-t and square did not run)." in two
    whole = words.not_tried([evaluation("a", "apgd-ce", "apgd-t", "+ fab-t", "square,queries=5000")])
    assert not begins(whole, "AutoAttack") and not begins(whole, "An attacker who sees")


def test_images_passed_on_are_no_questions_to_the_defence() -> None:
    passed_on = words.not_tried([evaluation("a", "autoattack", kind="transfer", adaptive=False)])
    assert f"{ANSWERS}." in passed_on and "An attacker who knows the defence." in passed_on
    assert f"{ENSEMBLE}, against the defence itself (it ran on the undefended model)." in passed_on
    asked = words.not_tried([evaluation("a", "anything", kind="black box")])
    assert not begins(asked, "An attacker who sees")


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("pgd,step_size=0.00392156862745098,steps=10", "pgd,step_size=1/255,steps=10"),
        ("ttc,eps=0.01568627450980392", "ttc,eps=4/255"),
        ("pgd,restarts=5", "pgd,restarts=5"),
        ("apgd-ce,rho=0.75", "apgd-ce,rho=0.75"),
        ("pgd,version=1.2.3", "pgd,version=1.2.3"),
        ("pgd,step_size=0.5", "pgd,step_size=0.5"),
    ],
)
def test_radii_are_shown_as_fractions(stored: str, shown: str) -> None:
    assert words.attack_in_words(stored) == shown
