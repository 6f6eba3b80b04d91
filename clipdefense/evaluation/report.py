"""Evaluations for people: a table in the terminal, one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from clipdefense.evaluation.charts import Curve, draw_curves, png, svg
from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.evaluation.statistics import Interval
from clipdefense.evaluation.words import attack_in_words
from clipdefense.files import write_text

WITHHELD = "withheld: INVALID"
"""What stands in the place of a robust accuracy whose audit found that it means nothing."""


def percent(row: Row) -> str:
    """``"43.3 [37.8, 49.0]"``: accuracy and 95 % Wilson interval."""
    return percent_of(row.accuracy, row.interval)


def percent_of(share: float, interval: Interval) -> str:
    """The same of any proportion: ``"43.3 [37.8, 49.0]"``."""
    return f"{100 * share:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def said(evaluation: Evaluation, row: Row, mark: str = "") -> str:
    """What stands in the accuracy column: the number with its interval, unless an audit withholds it.

    Args:
        evaluation: what was judged; row: one of :func:`rows_of`.
        mark: what has to stand beside its numbers, such as ``"(24 of 40)"`` images of an unfinished run.
    """
    return f"{percent(row) if kept(evaluation, row) else WITHHELD} {mark}".rstrip()


def kept(evaluation: Evaluation, row: Row) -> bool:
    """Whether the accuracy of one of :func:`rows_of` may be shown; the clean one always is."""
    return row is evaluation.clean or not evaluation.withheld


def rows_of(evaluation: Evaluation) -> list[tuple[str, Row, bool]]:
    """(attack, row, is the row a bottom line) in the order they are shown.

    The bottom lines stand together: the worst case under transfer, under an adaptive attacker, and over everything.
    """
    rows = [("clean", evaluation.clean, False)]
    rows += [(row.attack, row, False) for row in evaluation.rows]
    bottom = (*evaluation.compared(), evaluation.worst_case())
    return [*rows, *((row.attack, row, True) for row in bottom)]


def attacker(evaluation: Evaluation, row: Row, bottom: bool) -> str:
    """What the attacker had, with the caveat that goes with every robust number."""
    bare = bottom or row is evaluation.clean or not evaluation.caveat  # a bottom line carries it in its name
    return row.attacked if bare else f"{row.attacked} ({evaluation.caveat})"


def notes_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """What has to be said beside the table: why a number is no more than transfer, and what was left out."""
    notes = []
    for evaluation in evaluations:
        if evaluation.caveat == "transfer only":
            notes.append(f"{evaluation.name}: transfer only; no attacker who knows the defence is among these attacks.")
        if evaluation.withheld:
            why = f"the audit is INVALID, so no robust accuracy is given: {evaluation.withheld}"
            notes.append(f"{evaluation.name}: {why}")
        notes += [f"{evaluation.name}: left out {reason}." for reason in evaluation.left_out]
    return notes


def table(evaluations: Sequence[Evaluation], marks: Mapping[str, str] | None = None) -> Table:
    """All evaluations as one table: what, attack, what was attacked, n, accuracy with its interval.

    Args:
        evaluations: one or more.
        marks: what stands beside the numbers of an unfinished one, by its name.
    """
    shown = Table(title=f"Accuracy in %, 95 % Wilson interval; {evaluations[0].threat}", title_justify="left")
    for column in ("judged", "attack", "what the attacker had"):
        shown.add_column(column, overflow="fold")
    for column in ("n", "accuracy"):
        shown.add_column(column, justify="right", no_wrap=True)
    for evaluation in evaluations:
        mark = (marks or {}).get(evaluation.name, "")
        for index, (attack, row, bottom) in enumerate(rows_of(evaluation)):
            label = evaluation.name if index == 0 else ""
            seeds = len(row.correct)
            n = f"{evaluation.n}" + (f" x {seeds} seeds" if seeds > 1 else "")
            names = (label, attack_in_words(attack), attacker(evaluation, row, bottom))
            shown.add_row(*map(escape, (*names, n, said(evaluation, row, mark))), style="bold" if bottom else None)
        shown.add_section()
    if notes := notes_of(evaluations):
        shown.caption, shown.caption_justify = escape("\n".join(notes)), "left"
    return shown


@dataclass(frozen=True)
class Strip:
    """Pictures of one image, each (3, H, W), float in [0, 1] or uint8, with what is said under each."""

    pictures: tuple[tuple[str, Tensor], ...]
    title: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        header: of the columns.
        rows: a text for each column; a row of one text is a heading over the rows that follow.
        numbers: columns that are set flush right.
        strong: rows that are emphasised.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A figure as :func:`clipdefense.evaluation.charts.svg` draws it, and what is said under it."""

    image: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a note, and what of the rest there is, in this order."""

    title: str
    note: str = ""
    points: Sequence[str] = ()
    grid: Grid | None = None
    charts: Sequence[Chart] = ()
    strips: Sequence[Strip] = ()


@dataclass(frozen=True)
class Page:
    """What an HTML page shows.

    Attributes:
        title, summary: the head.
        evaluations: rows of the main table.
        curves, curve_caption: accuracy against eps.
        strips, strip_caption: pictures.
        facts: what the numbers depend on.
        marks: what stands beside the numbers of an unfinished evaluation, by its name.
        before, after: further parts, before and after the main table.
    """

    title: str
    summary: Sequence[str]
    evaluations: Sequence[Evaluation]
    curves: Sequence[Curve] = ()
    curve_caption: str = ""
    strips: Sequence[Strip] = ()
    strip_caption: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    before: Sequence[Section] = ()
    after: Sequence[Section] = ()


def write_html(path: Path, page: Page) -> None:
    """One HTML file with everything in it: no script, no network, nothing beside it."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("clipdefense.evaluation"),
        autoescape=select_autoescape(["html.j2"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    after = [*page.after]
    if page.curves:
        after.append(Section("Accuracy against eps", charts=[Chart(svg(draw_curves(page.curves)), page.curve_caption)]))
    if page.strips:
        after.append(Section("What it looks like", page.strip_caption, strips=page.strips))
    html = environment.get_template("report.html.j2").render(
        page=page,
        after=after,
        threats=list(dict.fromkeys(str(evaluation.threat) for evaluation in page.evaluations)),
        rows_of=rows_of,
        attacker=attacker,
        notes=notes_of(page.evaluations),
        said=said,
        kept=kept,
        in_words=attack_in_words,
        picture=png,
    )
    write_text(path, html)
