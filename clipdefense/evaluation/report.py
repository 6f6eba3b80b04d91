"""Evaluations for people: a table in the terminal, a JSON file, one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.files import write_text
from clipdefense.threat import format_eps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def percent(row: Row) -> str:
    """``"43.3 [37.8, 49.0]"``: accuracy and 95 % Wilson interval."""
    low, high = row.interval
    return f"{100 * row.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


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
        notes += [f"{evaluation.name}: left out {reason}." for reason in evaluation.left_out]
    return notes


def table(evaluations: Sequence[Evaluation]) -> Table:
    """All evaluations as one table: what, attack, what was attacked, n, accuracy with its interval."""
    shown = Table(title=f"Accuracy in %, 95 % Wilson interval; {evaluations[0].threat}", title_justify="left")
    for column in ("judged", "attack", "what the attacker had"):
        shown.add_column(column, overflow="fold")
    for column in ("n", "accuracy"):
        shown.add_column(column, justify="right", no_wrap=True)
    for evaluation in evaluations:
        for index, (attack, row, bottom) in enumerate(rows_of(evaluation)):
            label = evaluation.name if index == 0 else ""
            seeds = len(row.correct)
            n = f"{evaluation.n}" + (f" x {seeds} seeds" if seeds > 1 else "")
            cells = map(escape, (label, attack, attacker(evaluation, row, bottom), n, percent(row)))
            shown.add_row(*cells, style="bold" if bottom else None)
        shown.add_section()
    if notes := notes_of(evaluations):
        shown.caption, shown.caption_justify = escape("\n".join(notes)), "left"
    return shown


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps under one attack: points are (eps, accuracy, low, high)."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Strip:
    """Pictures of one image, each (3, H, W) in [0, 1], with what is said under each."""

    pictures: tuple[tuple[str, Tensor], ...]


@dataclass(frozen=True)
class Page:
    """What an HTML page shows besides the table."""

    title: str
    summary: Sequence[str]
    evaluations: Sequence[Evaluation]
    curves: Sequence[Curve] = ()
    curve_caption: str = ""
    strips: Sequence[Strip] = ()
    strip_caption: str = ""
    facts: dict[str, str] = field(default_factory=dict)


def write_html(path: Path, page: Page) -> None:
    """One HTML file with everything in it: no script, no network, nothing beside it."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("clipdefense.evaluation"), autoescape=select_autoescape(["html.j2"], default=True)
    )
    html = environment.get_template("report.html.j2").render(
        page=page,
        rows_of=rows_of,
        attacker=attacker,
        notes=notes_of(page.evaluations),
        percent=percent,
        chart=_svg(_draw_curves(page.curves)) if page.curves else "",
        picture=lambda image: _png(image),
    )
    write_text(path, html)


def _draw_curves(curves: Sequence[Curve]) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        eps, accuracy, low, high = (list(values) for values in zip(*curve.points))
        (line,) = axes.plot(eps, [100 * value for value in accuracy], marker="o", markersize=4, label=curve.label)
        band = ([100 * value for value in low], [100 * value for value in high])
        axes.fill_between(eps, *band, alpha=0.15, color=line.get_color(), linewidth=0)
    ticks = sorted({point[0] for curve in curves for point in curve.points})
    axes.set_xticks(ticks, [format_eps(tick) for tick in ticks])
    axes.set_xlabel("eps")
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _png(image: Tensor) -> str:
    """A (3, H, W) picture in [0, 1] as a data URI."""
    from PIL import Image

    pixels = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
