"""What was tried and what was not, read off the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from clipdefense import plugins
from clipdefense.attacks.autoattack import VERSIONS
from clipdefense.evaluation import words
from clipdefense.evaluation.ensemble import as_published, parts, ran
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
    assert parts("+ autoattack") == parts("autoattack,version=standard") == standard
    assert parts("autoattack,version=rand") == {"apgd-ce", "apgd-dlr"}
    assert parts("autoattack,stages={'square': {'queries': 0}, 'fab-t': {'steps': 9}},seed=1") == standard - {"square"}
    assert parts("pgd,steps=10") == {"pgd"} and parts("other:SquareAttack") == {"square"}
    assert not parts("autoattack,stages=anything") and not parts("autoattack,version=nonesuch")
    assert parts("autoattack,stages=apgd-ce+apgd-dlr") == {"apgd-ce", "apgd-dlr"}
    assert parts("other:AutoAttack") == {"autoattack"}  # what another plugin calls so may be anything


def load_telling(name: str) -> Callable[..., torch.Tensor]:
    """A plugin's attack that says what it runs."""

    def attack(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
        return x

    def tell(options: Mapping[str, str]) -> dict[str, dict[str, int]]:
        steps = {"steps": int(options.get("steps", "100"))}
        square = {"queries": int(options.get("max_iter", "5000"))}
        if name == "SquareAttack":
            return {"square": square}
        return {"apgd-ce": steps, "apgd-t": {**steps, "targets": 9}, "fab-t": {**steps, "targets": 9}, "square": square}

    attack.ran = tell  # type: ignore[attr-defined]
    return attack


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plugin."""
    own = plugins.Contribution("attacks", "telling:", f"{__name__}:load_telling", "telling", "a distribution")
    known = plugins.registry()
    by_name = {**known.by_name, ("attacks", "telling:"): [own]}
    monkeypatch.setattr(plugins, "registry", lambda: plugins.Registry(known.plugins, by_name))


@pytest.mark.usefixtures("telling")
def test_a_plugins_ensemble_is_what_the_plugin_says() -> None:
    assert parts("+ telling:AutoAttack") == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert ran("telling:AutoAttack,steps=7")["apgd-t"] == {"steps": 7, "targets": 9}
    assert ran("telling:SquareAttack,max_iter=4") == {"square": {"queries": 4}}
    assert not parts("telling:SquareAttack,max_iter=0")
    assert begins(words.not_tried([evaluation("a", "telling:AutoAttack")]), "AutoAttack") == []
    said = words.not_tried([evaluation("a", "telling:AutoAttack,steps=10,max_iter=4")])
    short = "; ".join(f"{name} ran with 10 of 100 steps" for name in ("apgd-ce", "apgd-t", "fab-t"))
    assert begins(said, "AutoAttack") == [
        f"AutoAttack at its published budgets: {short}; square ran with 4 of 5000 queries."
    ]
    assert begins(said, "An attacker who sees")[0].endswith("(one was tried, with 4 queries only).")


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


def test_a_stage_below_its_published_budget_is_no_stage_of_autoattack() -> None:
    token = ("apgd-ce,steps=2", "apgd-t,steps=2,targets=2", "fab-t,steps=2", "square,queries=4")
    said = words.not_tried([evaluation("a", *token)])
    assert begins(said, "AutoAttack") == [
        "AutoAttack at its published budgets: apgd-ce ran with 2 of 100 steps; apgd-t ran with 2 of 100 steps and 2 of "
        "9 targets; fab-t ran with 2 of 100 steps; square ran with 4 of 5000 queries."
    ]
    assert begins(said, "An attacker who sees") == [
        "An attacker who sees answers alone, without gradients (one was tried, with 4 queries only)."
    ]
    full = ("apgd-ce,restarts=5", "apgd-t", "+ fab-t,steps=200")
    assert begins(words.not_tried([evaluation("a", *full, "square,queries=4")]), "AutoAttack") == [
        "AutoAttack at its published budgets: square ran with 4 of 5000 queries."
    ]
    # of several the one that lacks least, wherever it stands
    for three in (("square,queries=4", "square,queries=900", "square,queries=1"), ("square,queries=900",)):
        said = words.not_tried([evaluation("a", "apgd-ce,steps=50", *three)])
        assert begins(said, "AutoAttack") == [
            f"{ENSEMBLE} (apgd-t and fab-t did not run; apgd-ce ran with 50 of 100 steps; square ran with 900 of 5000 "
            "queries)."
        ]
        assert not begins(said, "An attacker who sees")


def test_the_ensembles_own_stages_are_held_to_their_budgets_too() -> None:
    stages = "autoattack,stages={'square': {'queries': 1}, 'apgd-t': {'targets': 5}}"
    said = words.not_tried([evaluation("a", stages)])
    assert begins(said, "AutoAttack") == [
        "AutoAttack at its published budgets: apgd-t ran with 5 of 9 targets; square ran with 1 of 5000 queries."
    ]
    assert begins(said, "An attacker who sees")[0].endswith("(one was tried, with 1 query only).")
    said = words.not_tried([evaluation("a", stages, "+ apgd-t", "square")])
    assert not begins(said, "AutoAttack") and not begins(said, "An attacker who sees")
    asked = words.not_tried([evaluation("a", "square,queries=100", kind="black box")])
    assert not begins(asked, "An attacker who sees")


def test_what_a_plugin_does_not_say_is_not_taken_to_have_run() -> None:
    def lines(*attacks: str) -> list[str]:
        return begins(words.not_tried([evaluation("a", *attacks)]), "AutoAttack")

    assert lines("pgd", "+ other:AutoAttack") == [f"{ENSEMBLE} (what other:AutoAttack is made of is not known)."]
    assert lines("apgd-ce", "apgd-t", "fab-t", "other:SquareAttack") == [
        "AutoAttack at its published budgets: square ran with a number of queries that is not known."
    ]


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
