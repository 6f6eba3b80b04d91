"""Runs, proofs and comparisons as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipdefense.evaluation import report
from clipdefense.runs.compare import Change, Transferred
from clipdefense.runs.results import notes, read
from clipdefense.runs.verify import Proof


def tables(console: Console, folder: str | Path) -> None:
    """Every cell of a run: its table, and what has to be said of it."""
    for cell in read(folder).cells:
        console.print(report.table([cell.evaluation]))
        for note in notes(cell):
            console.print(escape(note), soft_wrap=True)


def proofs(console: Console, found: Sequence[Proof]) -> None:
    """What became of each attack's claims."""
    shown = _table("Not robust, proved again", ("cell", "attack", "what the attacker had"))
    for column in ("claims", "proved", "margin < 1e-3", "failed", "over budget", "broken in %, 95 % interval"):
        shown.add_column(column, justify="right")
    for proof in found:
        interval = proof.interval
        share = "" if interval is None else f"{100 * proof.broken_share:.1f} [{100 * interval.low:.1f}, "
        share += "" if interval is None else f"{100 * interval.high:.1f}], {proof.seeds} seeds"
        counts = (proof.claims, proof.proved, proof.near, proof.failed, proof.over_budget)
        cells = (proof.cell, proof.attack, proof.attacked, *map(str, counts), share)
        shown.add_row(*map(escape, cells), style=None if proof.holds else "red")
    console.print(shown)


def changes(console: Console, found: Sequence[Change]) -> None:
    """Verdicts in two runs, attack by attack."""
    shown = _table("Verdicts in A and B", ("A", "B", "attack", "what the attacker had"))
    for column in ("n", "right in both", "in A only", "in B only", "in neither", "McNemar p"):
        shown.add_column(column, justify="right")
    for change in found:
        counts = (change.n, change.both, len(change.only_a), len(change.only_b), change.neither)
        names = (change.a, change.b, change.attack, change.attacked)
        shown.add_row(*map(escape, names), *map(str, counts), f"{change.p_value:.3g}")
    console.print(shown)


def transfers(console: Console, found: Sequence[Transferred]) -> None:
    """What one run's perturbations break in the other."""
    for one in found:
        said = (
            f"A's perturbations break {len(one.broken)} of {one.tried} images that B calls robust ({one.a} on {one.b})"
        )
        console.print(escape(said), soft_wrap=True)


def _table(title: str, names: Sequence[str]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in names:
        shown.add_column(name, overflow="fold")
    return shown
