"""What two runs can be compared over: the attacks that both have, and what else makes them unlike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clipdefense.errors import UsageError
from clipdefense.evaluation.counts import counted
from clipdefense.evaluation.ensemble import AFTER
from clipdefense.evaluation.results import Row
from clipdefense.runs.pixels import unlike_units
from clipdefense.runs.results import CellResult, RunResult

WORST = "worst case per image"

Key = tuple[tuple[str, ...], str]
"""An attack, after those before it that a cumulative run counts with it, and what the attacker had."""


def rows_of(cell: CellResult) -> dict[Key, Row]:
    """A cell's rows by what they are."""
    found: dict[Key, Row] = {}
    chain: tuple[str, ...] = ()
    for row in cell.evaluation.rows:
        chain = (*chain, row.attack) if row.attack.startswith(AFTER) else (row.attack,)
        found[chain, row.attacked] = row
    return found


@dataclass(frozen=True)
class InCommon:
    """An attack that two cells have, or the worst case over several.

    Attributes:
        attack, attacked: what it is called.
        a, b: A's rows and B's.
        notes: the attacks that only one of them has.
    """

    attack: str
    attacked: str
    a: list[Row]
    b: list[Row]
    notes: tuple[str, ...] = ()


def in_common(one: CellResult, two: CellResult) -> InCommon:
    """The attacks over which the worst cases of two cells are compared.

    A model and its defence, or two defences, are each attacked in their own way (a defence through its views), so there
    an attack is the same by name. Where both have the same defence, or none, what the attacker had must be the same,
    too.

    Raises:
        UsageError: there is none.
    """
    rows = rows_of(one), rows_of(two)
    alike = _attacked_as(one) == _attacked_as(two)
    named = [{key: (key if alike else key[0]) for key in own} for own in rows]
    shared = set(named[0].values()) & set(named[1].values())
    alone = [[key for key, name in own.items() if name not in shared] for own in named]
    said = [", ".join(dict.fromkeys(_said(key, alike) for key in keys)) for keys in alone]
    names = f"{one.cell.name!r} of A and {two.cell.name!r} of B"
    if not shared:
        raise UsageError(
            f"{names} have no attack in common (A: {said[0]}; B: {said[1]}); give one of the runs an attack of the "
            "other's."
        )
    a, b = ([row for key, row in own.items() if name_of[key] in shared] for own, name_of in zip(rows, named))
    if not any(said):
        return InCommon(WORST, "all attacks", a, b)
    count = f"{counted(len(shared), 'attack')} both have"
    notes = tuple(f"only {run} has {what}: it is in no worst case here" for run, what in zip("AB", said) if what)
    return InCommon(f"{WORST}, over the {count}", "what both have", a, b, notes)


def _attacked_as(cell: CellResult) -> tuple[str | None, bool]:
    """What decides in which ways a cell can be attacked: its defence, or that its model has views of its own."""
    defense = cell.facts.get("defense") or {}
    own_views = not defense and bool(cell.facts["views"] or not cell.facts["attacker_knows"])
    return defense.get("class"), own_views


def _said(key: Key, with_target: bool) -> str:
    attack = " ".join(key[0])
    return f"{attack} ({key[1]})" if with_target else attack


def unlike(ours: RunResult, one: CellResult, theirs: RunResult, two: CellResult) -> Iterator[str]:
    """What else two cells do not have in common that moves verdicts."""
    threats = [cell.cell.threat.threat for cell in (one, two)]
    for name in ("steps", "step_size", "restarts"):
        mine, other = (getattr(threat, name) for threat in threats)
        if mine != other:
            yield f"attacks that do not say otherwise: {name} {mine} in A, {other} in B"
    # a model that draws nothing is judged once, and would say the same on every draw
    drawn = all(len(cell.seeds) == run.config.verdict_seeds for run, cell in ((ours, one), (theirs, two)))
    if drawn and len(one.seeds) != len(two.seeds):
        yield f"right on every draw: of {len(one.seeds)} in A, of {len(two.seeds)} in B"
    other, units = unlike_units(ours, one, theirs, two)
    if other:
        yield f"{other} of {units} work units hold other pixels in A than in B: what changed in them may be the images"
