"""Runs as files for people and programs: JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipdefense.evaluation.counts import counted
from clipdefense.evaluation.report import WITHHELD, Grid, Section, attacker, kept, notes_of, rows_of, said
from clipdefense.evaluation.words import attack_in_words
from clipdefense.files import write_json, write_text
from clipdefense.runs.grids import sections
from clipdefense.runs.joint import Joint, joined
from clipdefense.runs.latex import latex
from clipdefense.runs.results import CellResult, RunResult, Unjudged, notes
from clipdefense.runs.robustbench import entry
from clipdefense.runs.sums import Mean, against, glance, means

COLUMNS = (
    "model",
    "defense",
    "dataset",
    "norm",
    "eps",
    "attack",
    "attacked",
    "images",
    "n",
    "verdict_seeds",
    "accuracy",
    "low_95",
    "high_95",
    "corrupt",
    "units_done",
    "units_missing",
)
MEANS = (
    "model",
    "defense",
    "threat",
    "attack",
    "attacked",
    "datasets",
    "datasets_not_finished",
    "accuracy",
    "low_95",
    "high_95",
)


def write(runs: RunResult | Sequence[RunResult], out: str | Path, baseline: str | None = None) -> Joint:
    """``summary.json``, ``summary.csv``, ``means.csv``, ``summary.md`` and ``summary.tex``.

    Args:
        runs: one, or several whose cells stand together.
        out: the folder for the files.
        baseline: as :func:`clipdefense.runs.sums.against`.

    Returns:
        What they were made from.

    Raises:
        UsageError: a baseline that the runs do not have, or as :func:`clipdefense.runs.joint.joined`.
    """
    joint, out = joined(runs), Path(out)
    found, pairs, lines = means(joint), against(joint, baseline), glance(joint)
    head = _fingerprints(joint)
    results = [{**_run(joint, cell), **entry(cell)} for cell in joint.cells]
    over = {
        "means": [mean.to_dict() for mean in found],
        "against_baseline": [pair.to_dict() for pair in pairs],
        "without_verdicts": [_unjudged(one) for one in joint.unjudged],
    }
    write_json(out / "summary.json", {**head, "results": results, **over})
    write_text(out / "summary.csv", _csv(COLUMNS, _rows(joint)))
    write_text(out / "means.csv", _csv(MEANS, map(_mean, found)))
    shown = [part for part in sections(joint, lines, found, pairs) if part is not None]
    write_text(out / "summary.md", markdown(joint, shown))
    write_text(out / "summary.tex", latex(joint, lines, found))
    return joint


def _fingerprints(joint: Joint) -> dict[str, Any]:
    if len(joint.runs) == 1:
        return {"fingerprint": joint.runs[0].facts}
    return {"runs": [{"folder": str(run.folder), "fingerprint": run.facts} for run in joint.runs]}


def _run(joint: Joint, cell: CellResult) -> dict[str, str]:
    return {"run": str(cell.folder)} if len(joint.runs) > 1 else {}


def _unjudged(one: Unjudged) -> dict[str, Any]:
    what = one.cell
    return {
        "cell": what.name,
        "model": what.model.label,
        "defense": what.defense.label,
        "dataset": what.dataset.label,
        "norm": what.threat.norm,
        "eps_value": what.threat.eps,
        "why": one.said,
        "units": {"done": one.units, "missing": one.missing},
    }


def _csv(header: Sequence[str], rows: Iterator[Sequence[Any]]) -> str:
    """Text that a spreadsheet would take for a formula gets an apostrophe; numbers stay numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(
            [f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value for value in row]
        )
    return text.getvalue()


def _rows(joint: Joint) -> Iterator[Sequence[Any]]:
    for one in joint.everything:
        threat = one.cell.threat.threat
        what = (one.cell.model.label, one.cell.defense.label, one.cell.dataset.label, threat.norm, threat.eps)
        images, units = joint.contents[one.cell.dataset.label]["images"], (one.units, one.missing)
        if isinstance(one, Unjudged):
            yield (*what, "", "", images, 0, "", one.said, "", "", "", *units)
            continue
        for attack, row, _ in rows_of(one.evaluation):
            number = (row.accuracy, *row.interval) if kept(one.evaluation, row) else (WITHHELD, "", "")
            counts = (images, one.evaluation.n, len(row.correct), *number, len(one.corrupt))
            yield (*what, attack, row.attacked, *counts, *units)


def _mean(mean: Mean) -> Sequence[Any]:
    names = (mean.model, mean.defense, mean.threat, mean.attack, mean.attacked)
    number = (WITHHELD, "", "") if mean.interval is None else (mean.accuracy, *mean.interval)
    return (*names, len(mean.datasets), len(mean.missing), *number)


def markdown(joint: Joint, over: Sequence[Section]) -> str:
    """What is said over all cells, then a table for each with what has to be said of it."""
    parts = [_section(section) for section in over]
    if joint.unjudged:
        lines = [f"- {escaped(one.why)}" for one in joint.unjudged]
        parts.append("\n".join(["## Without verdicts", "", *lines, ""]))
    return "\n".join([*parts, *map(_cell, joint.cells)])


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"[\\`*_<>|]|(?<=\])\(", r"\\\g<0>", text)


def _section(section: Section) -> str:
    assert section.grid is not None
    return "\n".join([f"## {section.title}", "", section.note, "", *_pipes(section.grid), ""])


def _pipes(grid: Grid) -> Iterator[str]:
    yield _line(grid.header)
    yield "|" + "|".join("--:" if column in grid.numbers else "---" for column in range(len(grid.header))) + "|"
    for number, row in enumerate(grid.rows):
        if len(row) == 1:
            yield _line((f"**{escaped(row[0])}**", *("" for _ in grid.header[1:])))
        else:
            strong = number in grid.strong
            yield _line(f"**{escaped(text)}**" if strong and text else escaped(text) for text in row)


def _line(texts: Sequence[str] | Iterator[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _cell(cell: CellResult) -> str:
    evaluation = cell.evaluation
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for attack, row, bottom in rows_of(evaluation):
        if bottom:
            strong.add(len(rows))
        rows.append((attack_in_words(attack), attacker(evaluation, row, bottom), said(evaluation, row, cell.mark)))
    lines = [
        f"## {escaped(cell.cell.name)}",
        "",
        f"Accuracy in %, 95 % Wilson interval; {evaluation.threat}; {counted(evaluation.n, 'image')}.",
        "",
        *_pipes(Grid(("attack", "what the attacker had", "accuracy"), tuple(rows), frozenset(), frozenset(strong))),
        "",
        *(f"- {escaped(note)}" for note in (*notes_of([evaluation]), *notes(cell))),
    ]
    return "\n".join(lines).rstrip() + "\n"
