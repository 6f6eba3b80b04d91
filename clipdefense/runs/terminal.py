"""A run in the terminal: every cell of a small one, and of a large one what is said over all cells."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipdefense.evaluation import report
from clipdefense.runs.grids import glance_section
from clipdefense.runs.joint import Joint, joined
from clipdefense.runs.results import notes, read
from clipdefense.runs.sums import glance, means

SHOWN_CELLS = 4
"""A run of more cells is shown as its glance and its means, where the details are kept."""


def tables(console: Console, folder: str | Path, page: Path | None = None) -> None:
    """A run's numbers, and what has to be said of them.

    Args:
        console: where.
        folder: of the run.
        page: its page, where the folder is kept; a large run is then shown in short, and the last line says where the
            details are. None shows every cell.
    """
    joint = joined(read(folder, shards=True))
    if page is None or len(joint.everything) <= SHOWN_CELLS:
        _cells(console, joint)
        return
    section = glance_section(joint, glance(joint), means(joint))
    if section is not None and section.grid is not None:
        console.print(_table(section))
        _say(console, section.note)
    unsound = [cell for cell in joint.cells if cell.unrepeatable]
    for cell in unsound:
        for note in notes(cell):
            _say(console, f"{cell.cell.name}: {note}")
    _say(console, f"each attack of the {len(joint.everything)} combinations: {Path(folder) / 'summary.md'} and {page}")


def _cells(console: Console, joint: Joint) -> None:
    for cell in joint.cells:
        console.print(report.table([cell.evaluation], {cell.cell.name: cell.mark}))
        for note in notes(cell):
            _say(console, note)
    for one in joint.unjudged:
        _say(console, one.why)


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)


def _table(section: report.Section) -> Table:
    assert section.grid is not None
    shown = Table(title=section.title, title_justify="left")
    for number, name in enumerate(section.grid.header):
        right = number in section.grid.numbers
        shown.add_column(escape(name), justify="right" if right else "left", overflow="fold")
    for number, row in enumerate(section.grid.rows):
        if len(row) == 1:
            shown.add_section()
        shown.add_row(*map(escape, row), style="bold" if len(row) == 1 or number in section.grid.strong else None)
    return shown
