"""Proofs and comparisons as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipdefense.evaluation import report
from clipdefense.runs.compare import Change, Transferred
from clipdefense.runs.verify import Proof, closing

SHOWN = 24
"""Proofs of which every row is shown."""

OUTCOMES = ("claims", "proved", "< 1e-3", "failed", "over\nbudget")
COMPARED = ("n", "both\nright", "A\nonly", "B\nonly", "neither", "McNemar p")


def proofs(console: Console, found: Sequence[Proof]) -> None:
    """What became of each attack's claims; of many, those that do not hold in full, and what each cell comes to."""
    many = len(found) > SHOWN
    cells: dict[str, list[Proof]] = {}
    for proof in found:
        cells.setdefault(proof.cell, []).append(proof)
    for cell, attacks in cells.items():
        rows = [proof for proof in attacks if not many or proof.proved < proof.claims]
        shown = _counted(f"Not robust, proved again: {cell}", ("attack", "what the attacker had"), OUTCOMES)
        for proof in rows:
            names = map(escape, (proof.attack, proof.attacked))
            shown.add_row(*names, *map(str, proof.counts), style=None if proof.holds else "red")
        if rows:
            console.print(shown)
        for line in filter(None, (proof.share_in_words for proof in rows)):
            console.print(escape(line), soft_wrap=True)
    if many:
        shown = _counted("Not robust, proved again", ("cell",), OUTCOMES)
        for cell, attacks in cells.items():
            sums = [sum(counts) for counts in zip(*(proof.counts for proof in attacks))]
            style = None if all(proof.holds for proof in attacks) else "red"
            shown.add_row(escape(cell), *map(str, sums), style=style)
        console.print(shown)
    for line in closing(found):
        console.print(escape(line), soft_wrap=True)


def changes(console: Console, found: Sequence[Change]) -> None:
    """Verdicts in two runs, attack by attack, a table for each pair of cells."""
    pairs: dict[tuple[str, str], list[Change]] = {}
    for change in found:
        pairs.setdefault((change.a, change.b), []).append(change)
    for (a, b), rows in pairs.items():
        across = rows[0].threats[0] != rows[0].threats[1]
        names = ("attack", "what the attacker had", *(("threat model",) if across else ()))
        shown = _counted(f"Verdicts in A ({a}) and B ({b})", names, COMPARED)
        for change in rows:
            threats = ("{} in A; {} in B".format(*change.threats),) if across else ()
            counts = (change.both, len(change.only_a), len(change.only_b), change.neither)
            paired = (*map(str, counts), f"{change.p_value:.3g}")
            said = (report.WITHHELD.replace(" ", "\n"), "", "", "", "") if change.withheld else paired
            shown.add_row(*map(escape, (change.attack, change.attacked, *threats)), str(change.n), *said)
        console.print(shown)
        why = f"the audit is INVALID, so no robust count is given: {rows[0].withheld}"
        for note in (*rows[-1].notes, *((why,) if rows[0].withheld else ())):
            console.print(escape(note), soft_wrap=True)


def transfers(console: Console, found: Sequence[Transferred]) -> None:
    """What one run's perturbations break in the other."""
    for one in found:
        counts = f"{len(one.broken)} of {one.tried}"
        said = f"A's perturbations break {counts} images that B calls robust ({one.a} on {one.b})"
        if one.withheld:
            said = f"What A's perturbations break of what B calls robust ({one.a} on {one.b}): {report.WITHHELD}"
        for line in (said, *one.notes):
            console.print(escape(line), soft_wrap=True)


def _counted(title: str, names: Sequence[str], counts: Sequence[str]) -> Table:
    """Texts that fold, and counts that are never cut, however narrow the terminal is."""
    shown = _table(title, names)
    for column in counts:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


def _table(title: str, names: Sequence[str]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in names:
        shown.add_column(name, overflow="fold")
    return shown
