"""A run in the terminal: every cell of a small one, and of a large one what is said over all cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
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

NAME, BORDER = 12, 3
"""Characters to which a name's column may fold before columns of numbers go on below, and those around a column."""


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
        for table in _tables(section, console.width):
            console.print(table)
        _say(console, section.note)
    for cell in (cell for cell in joint.cells if cell.unrepeatable):
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


def _tables(section: report.Section, width: int) -> Iterator[Table]:
    """A section's grid in ``width`` characters, its numbers never broken.

    Where it gets narrow, what stands behind an interval goes under it, then names fold, and then columns go on in a
    further table.
    """
    assert section.grid is not None
    grid = section.grid
    names = [column for column in range(len(grid.header)) if column not in grid.numbers]
    if sum(_wide(grid, column) for column in range(len(grid.header))) >= width:
        under = [tuple(text.replace("] ", "]\n") for text in row) for row in grid.rows]
        grid = replace(grid, rows=tuple(under))
    room = width - 1 - sum(min(_wide(grid, column), NAME + BORDER) for column in names)
    parts: list[list[int]] = [[]]
    for column in sorted(grid.numbers):
        if parts[-1] and sum(_wide(grid, one) for one in (*parts[-1], column)) > room:
            parts.append([])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        yield _table(section.title + (", further columns" if number else ""), grid, sorted([*names, *part]))


def _wide(grid: report.Grid, column: int) -> int:
    """Characters of a column with its border; a row of one text is a heading, which may fold."""
    texts = [grid.header[column], *(row[column] for row in grid.rows if len(row) > 1)]
    return BORDER + max(cell_len(line) for text in texts for line in text.split("\n"))


def _table(title: str, grid: report.Grid, columns: Sequence[int]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in columns:
        right = column in grid.numbers
        justify: Literal["left", "right"] = "right" if right else "left"
        shown.add_column(escape(grid.header[column]), justify=justify, overflow="fold", no_wrap=right)
    for number, row in enumerate(grid.rows):
        heading = len(row) == 1
        if heading:
            shown.add_section()
        texts = row if heading else [row[column] for column in columns]
        shown.add_row(*map(escape, texts), style="bold" if heading or number in grid.strong else None)
    return shown
