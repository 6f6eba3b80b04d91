"""Comparison of like with like: one threat model, the attacks that both have, and no number that an audit withholds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from clipdefense.cli import application
from clipdefense.errors import UsageError
from clipdefense.evaluation.report import WITHHELD
from clipdefense.runs.compare import Change, Transferred, compare, standing, transfer
from clipdefense.runs.config import RunConfig
from clipdefense.runs.likeness import WORST
from clipdefense.runs.results import audit_file, read
from clipdefense.runs.run import run
from clipdefense.runs.show import changes, transfers

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def ran(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Path]:
    """``ran("a", attacks=[...])``: the folder of such a run, without pictures."""

    def make(name: str, **tables: object) -> Path:
        run(make_config(exhibits=False, **tables), tmp_path / name, device="cpu")
        return tmp_path / name

    return make


def shown(found: list[Change], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    changes(console, found)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def in_words(text: str) -> str:
    """Without the lines of tables and the breaks of narrow columns."""
    return " ".join("".join(letter for letter in text if letter not in "│┃┏┓┗┛━─").split())


def test_other_radii_and_norms_are_refused_unless_asked_for(ran: Callable[..., Path]) -> None:
    small, large = (ran(name, threats=[{"eps": eps, "steps": 2}]) for name, eps in (("a", "1/255"), ("b", "4/255")))
    round_ = ran("c", threats=[{"norm": "l2", "eps": 1 / 255, "steps": 2}])
    with pytest.raises(UsageError, match=r"in linf, eps 1/255, .*in linf, eps 4/255.* or say --across-threats"):
        compare(small, large)
    with pytest.raises(UsageError, match=r"in linf, eps 1/255, .*in l2, eps 1/255"):
        compare(small, round_)
    found = compare(small, large, across_threats=True)
    assert {change.threats for change in found} == {("linf, eps 1/255", "linf, eps 4/255")}
    text = shown(found, 250)
    assert "threat model" in text and text.count("linf, eps 1/255 in A; linf, eps 4/255 in B") == len(found)
    assert found[-1].to_dict()["threats"] == ("linf, eps 1/255", "linf, eps 4/255")
    assert "threat model" not in shown(compare(small, small), 250)
    # a cell is matched by its name, which may hide the radius
    hidden = [ran(f"n{eps[0]}", threats=[{"eps": eps, "steps": 1, "name": "ball"}]) for eps in ("1/255", "2/255")]
    with pytest.raises(UsageError, match="say --across-threats"):
        compare(*hidden)


def test_the_command_asks_for_the_flag(ran: Callable[..., Path], tmp_path: Path) -> None:
    small, large = (ran(name, threats=[{"eps": eps, "steps": 1}]) for name, eps in (("a", "1/255"), ("b", "4/255")))
    arguments = ["compare", str(small), str(large)]
    refused = CliRunner().invoke(application(), arguments)
    assert isinstance(refused.exception, UsageError)
    assert CliRunner().invoke(application(), [*arguments, "--across-threats"]).exit_code == 0
    (tmp_path / "file").write_text("")
    nowhere = [*arguments, "--across-threats", "--out", str(tmp_path / "file" / "x.json")]
    early = CliRunner().invoke(application(), nowhere)
    assert isinstance(early.exception, UsageError) and early.output == ""  # before anything is shown


def test_the_worst_case_is_over_the_attacks_that_both_have(ran: Callable[..., Path]) -> None:
    few = ran("few", attacks=["pgd", "pgd,steps=1", "pgd,steps=2"])
    more = ran("more", attacks=["pgd", "pgd,steps=1", "apgd-ce,steps=5"])
    a, b = (read(folder).cells[0] for folder in (few, more))
    worst = compare(few, more)[-1]
    assert worst.attack == f"{WORST}, over the 2 attacks both have"
    right = [
        standing(cell, [row for row in cell.evaluation.rows if row.attack in ("pgd", "pgd,steps=1")]) for cell in (a, b)
    ]
    # the two have run the same two attacks with the same seed, so nothing differs over them
    assert (worst.both, worst.only_a, worst.only_b) == (int((right[0] & right[1]).sum()), (), ())
    assert len(worst.notes) == 2
    assert worst.notes[0].startswith("only A has pgd,steps=2 (") and worst.notes[1].startswith("only B has apgd-ce,")
    text = in_words(shown([worst]))
    assert "over the 2 attacks both have" in in_words(shown([worst], 250)) and worst.notes[0] in text
    # all of them, where they are the same
    assert compare(few, few)[-1].attack == WORST and compare(few, few)[-1].notes == ()


def test_without_an_attack_in_common_there_is_nothing_to_compare(ran: Callable[..., Path]) -> None:
    one, other = ran("a", attacks=["pgd,steps=1"]), ran("b", attacks=["pgd,steps=2"])
    with pytest.raises(UsageError, match=r"have no attack in common \(A: pgd,steps=1 \(.*; B: pgd,steps=2 \(.*\)"):
        compare(one, other)


def test_a_defence_is_attacked_in_its_own_way(ran: Callable[..., Path]) -> None:
    noise = {"spec": "random-noise", "eot": 1, "options": {"eps": "2/255"}}
    folder = ran("a", defenses=["none", noise, {**noise, "name": "blind", "views": []}], verdict_seeds=2)
    cells = {cell.cell.defense.label: cell for cell in read(folder).cells}

    def worst(one: str, two: str) -> Change:
        return compare(folder, folder, cell_a=cells[one].cell.name, cell_b=cells[two].cell.name)[-1]

    # the same attack by name: on the model itself there, by transfer and through the view here
    against = worst("none", "random-noise")
    assert against.attack == WORST and against.notes == ()
    right = [standing(cells[label], None) for label in ("none", "random-noise")]
    assert against.both == int((right[0] & right[1]).sum())
    # of one defence, what the attacker had must be the same too
    same = worst("random-noise", "blind")
    assert same.attack == f"{WORST}, over the 1 attack both have"
    assert same.notes == ("only A has pgd (adaptive view eot): it is in no worst case here",)


def test_what_a_cumulative_row_counts_is_part_of_what_it_is(ran: Callable[..., Path]) -> None:
    attacks = (["pgd", "apgd-ce,steps=2"], ["pgd,steps=1", "apgd-ce,steps=2"])
    one, other = (ran(name, attacks=listed, cumulative=True) for name, listed in zip("ab", attacks))
    rows = [row.attack for row in read(one).cells[0].evaluation.rows]
    assert rows[1] == read(other).cells[0].evaluation.rows[1].attack == "+ apgd-ce,steps=2"
    with pytest.raises(UsageError, match="have no attack in common"):
        compare(one, other)
    assert [change.attack for change in compare(one, one)] == [*rows, WORST]


def test_what_else_differs_is_noted(ran: Callable[..., Path]) -> None:
    noise = {"spec": "random-noise", "options": {"eps": "2/255"}}
    one = ran("a", threats=[{"eps": "4/255", "steps": 1}], defenses=[{**noise, "eot": 2}], verdict_seeds=1)
    two = ran("b", threats=[{"eps": "4/255", "steps": 2}], defenses=[{**noise, "eot": 3}], verdict_seeds=2)
    found = compare(one, two)
    assert found[-1].attack == f"{WORST}, over the 1 attack both have"
    assert found[-1].notes == (
        "only A has pgd (adaptive view eot, 2 EOT draws): it is in no worst case here",
        "only B has pgd (adaptive view eot, 3 EOT draws): it is in no worst case here",
        "attacks that do not say otherwise: steps 1 in A, 2 in B",
        "right on every draw: of 1 in A, of 2 in B",
    )
    assert all(note in shown(found) for note in found[-1].notes)


def test_what_an_audit_withholds_is_not_shown(ran: Callable[..., Path], tmp_path: Path) -> None:
    one, other = ran("a", save_adv=True, attacks=["pgd,steps=1", "pgd"]), ran("b", attacks=["pgd,steps=1"])
    path = audit_file(other, 0)
    path.parent.mkdir()
    path.write_text(json.dumps({"verdict": "INVALID", "withheld": "its gradients are zero.", "findings": []}))
    for pair in ((one, other), (other, one)):
        found = compare(*pair)
        text = shown(found, 250)
        assert text.count("withheld:") == text.count("INVALID") - 1 == len(found) == 2
        assert "so no robust count is given: its gradients are zero." in text
        for change in (found[0].to_dict(), found[-1].to_dict()):
            hidden = ("both", "neither", "only_a", "only_b", "images_only_a", "images_only_b", "p_value")
            assert all(change[key] is None for key in hidden) and change["n"] == 40
    (tried,) = transfer(one, other, device="cpu")
    assert tried.tried > 0 and tried.to_dict()["tried"] is tried.to_dict()["broken"] is None
    console = Console(width=80, file=io.StringIO())
    transfers(console, [tried])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.rstrip().endswith(WITHHELD) and f" {tried.tried} " not in text
    out = tmp_path / "compared.json"
    result = CliRunner().invoke(application(), ["compare", str(one), str(other), "--out", str(out)])
    assert result.exit_code == 0 and json.loads(out.read_text())["changes"][0]["p_value"] is None


def test_counts_are_whole_at_80_columns() -> None:
    long = "a-model-with-a-name | a-defence | a-data-set:test | linf 4/255"
    only = tuple(range(100_000))
    threats = ("linf, eps 1/255", "linf, eps 4/255")
    row = Change(
        long, long, "apgd-t,steps=100,targets=9", "adaptive view bpda-eot", 355228, 123456, 31772, only, only, threats
    )
    lines = shown([row]).splitlines()
    assert max(map(len, lines)) <= 80
    for number in ("355228", "123456", "100000", "31772"):
        assert any(number in line for line in lines), number
    one = Transferred(long, long, 7, (1, 2))
    console = Console(width=80, file=io.StringIO())
    transfers(console, [one])
    assert "break 2 of 7 images" in console.file.getvalue()  # type: ignore[attr-defined]
