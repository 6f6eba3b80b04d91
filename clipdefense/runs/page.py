"""A run as one HTML page: what was attacked and how, the numbers, what they are compared with, curves and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import clipdefense.runs.exhibits as exhibits
from clipdefense.evaluation import words
from clipdefense.evaluation.charts import Curve, draw_curves, draw_traces, svg
from clipdefense.evaluation.report import WITHHELD, Chart, Grid, Page, Section, percent_of, write_html
from clipdefense.evaluation.results import Row
from clipdefense.evaluation.statistics import wilson
from clipdefense.runs.compare import standing
from clipdefense.runs.config import NO_DEFENSE
from clipdefense.runs.grids import sections
from clipdefense.runs.joint import Joint, joined
from clipdefense.runs.pagefacts import facts_of
from clipdefense.runs.results import CellResult, RunResult, notes, read
from clipdefense.runs.sums import against, glance, means

SHOWN_CLASSES, SHOWN_CELLS, PICTURED_CELLS = 5, 24, 8


Shown = Mapping[CellResult, exhibits.Exhibit | None]


def write_page(
    runs: str | Path | Sequence[RunResult], out: str | Path | None = None, *, baseline: str | None = None
) -> Path:
    """The page of a run, or of several together, also while they are under way.

    Args:
        runs: a run's folder (of shards, too), or runs that were read.
        out: the file; ``report.html`` in the (first) run's folder where not given.
        baseline: the model or defence that the others are compared with, by its name in the run. Where not given, a
            defence is compared with its model alone and a model with the first.

    Returns:
        The file.

    Raises:
        UsageError: no run, a baseline that it does not have, or runs that cannot stand together.
    """
    several = [read(runs, shards=True)] if isinstance(runs, (str, Path)) else runs
    path = several[0].folder / "report.html" if out is None else Path(out)
    write_html(path, page_of(several, baseline))
    return path


def page_of(runs: RunResult | Sequence[RunResult], baseline: str | None = None) -> Page:
    """What the page shows; arguments as :func:`write_page`."""
    joint = joined(runs)
    cells = joint.cells
    shown = {
        cell: exhibits.read(
            exhibits.exhibit_file(cell.folder, cell.cell.number), exhibits.identity(cell.cell, cell.facts)
        )
        for cell in cells
    }
    at_a_glance, over_datasets, tests = sections(joint, glance(joint), means(joint), against(joint, baseline))
    before = (at_a_glance, _unjudged(joint), _threats(joint), *_limits(cells))
    after = (
        _audits(cells),
        over_datasets,
        tests,
        _curves(cells),
        _traces(cells, shown),
        _classes(joint),
        _pictures(cells, shown),
    )
    return Page(
        title=f"Robustness: {', '.join(dict.fromkeys(cell.cell.model.label for cell in cells)) or 'no verdicts yet'}",
        summary=list(_summary(joint)),
        evaluations=[cell.evaluation for cell in cells],
        facts=facts_of(joint),
        marks={cell.cell.name: cell.mark for cell in cells},
        before=[part for part in before if part is not None],
        after=[part for part in after if part is not None],
    )


def _summary(joint: Joint) -> Iterator[str]:
    for cell in joint.cells if len(joint.everything) == 1 else ():
        evaluation = cell.evaluation
        of = f"{evaluation.n} of {cell.images}" if cell.missing else str(evaluation.n)
        right = f"{cell.cell.name}: {100 * evaluation.clean.accuracy:.1f} % right on {of} clean images"
        if evaluation.withheld:
            yield f"{right}; the robust accuracy is withheld, because the audit found that it would mean nothing."
        else:
            caveat = f" ({evaluation.caveat})" if evaluation.caveat else ""
            yield f"{right}, {100 * evaluation.worst_case().accuracy:.1f} % still right under everything tried{caveat}."
    for cell in joint.cells:
        yield from (f"{cell.cell.name}: {note}" for note in notes(cell) if not note.startswith("Audit"))
    if joint.unjudged:
        yield f"{len(joint.unjudged)} of {len(joint.everything)} combinations have no verdicts; they are listed below."
    yield "A robust accuracy says that these attacks failed, not that none succeeds."


def _unjudged(joint: Joint) -> Section | None:
    """Cells of which there is nothing to show yet."""
    return Section("Without verdicts", points=[one.why for one in joint.unjudged]) if joint.unjudged else None


def _threats(joint: Joint) -> Section:
    found: dict[str, None] = {}
    for one in joint.everything:
        side = joint.contents[one.cell.dataset.label]["attacked_at"]
        found[words.threat_in_words(one.cell.threat.threat, side)] = None
    note = "An attacker changes an image so that the model gets it wrong, and may change it by no more than this:"
    return Section("The threat model", note, points=list(found))


def _limits(cells: Sequence[CellResult]) -> Iterator[Section]:
    evaluations = [cell.evaluation for cell in cells]
    yield Section("What was tried", points=words.tried(evaluations))
    yield Section("What was not tried", points=words.not_tried(evaluations))


def _audits(cells: Sequence[CellResult]) -> Section | None:
    audited = [cell for cell in cells if cell.audit]
    if not audited:
        return None
    rows: list[tuple[str, ...]] = []
    for cell in audited:
        rows.append((f"{cell.cell.name}: {cell.audit['verdict']}",))
        for finding in cell.audit["findings"]:
            if finding["verdict"] in ("WARN", "INVALID"):
                why = " ".join(filter(None, (finding["evidence"], finding["advice"])))
                rows.append((finding["verdict"], f"{finding['number']} {finding['name']}", why))
    missing = len(cells) - len(audited)
    note = "Twenty checks of whether the robust accuracy can be believed; PASS means that none of them found a fault."
    note += " Where one is INVALID, no robust accuracy is given."
    note += f" {missing} of {len(cells)} combinations were not audited." if missing else ""
    return Section("Audit", note, grid=Grid(("verdict", "check", "evidence"), tuple(rows)))


def _curves(cells: Sequence[CellResult]) -> Section | None:
    """Worst case per image against eps, a chart for each data set and norm."""
    charts: dict[tuple[str, str], dict[str, dict[float, Row]]] = {}
    for cell in cells:
        if cell.evaluation.withheld or cell.missing:
            continue
        evaluation, what = cell.evaluation, cell.cell
        label = what.model.label if what.defense.spec == NO_DEFENSE else f"{what.model.label} | {what.defense.label}"
        chart = charts.setdefault((what.dataset.label, evaluation.threat.norm), {})
        chart.setdefault(label, {0.0: evaluation.clean})[evaluation.threat.eps] = evaluation.worst_case()
    drawn: list[Chart] = []
    for (dataset, norm), lines in charts.items():
        curves = [
            Curve(label, tuple((eps, row.accuracy, *row.interval) for eps, row in sorted(points.items())))
            for label, points in lines.items()
            if len(points) > 2
        ]
        if curves:
            caption = f"{dataset}, {norm}: the worst case per image over all attacks, with its 95 % Wilson interval."
            drawn.append(Chart(svg(draw_curves(curves)), f"{caption} At eps 0: clean."))
    left_out = sum(bool(cell.missing) for cell in cells)
    note = f"Left out because they are not finished: {left_out} of {len(cells)} combinations." if left_out else ""
    several = len({cell.cell.threat.label for cell in cells}) > 1
    return Section("Accuracy against eps", note, charts=drawn) if drawn or (left_out and several) else None


def _first(shown: int, found: int) -> str:
    return f" The first {shown} of {found} combinations." if found > shown else ""


def _traces(cells: Sequence[CellResult], shown: Shown) -> Section | None:
    found = [(cell, exhibit) for cell in cells if (exhibit := shown[cell]) is not None and exhibit.traces]
    if not found:
        return None
    drawn: list[Chart] = []
    for cell, exhibit in found[:SHOWN_CELLS]:
        attack = words.attack_in_words(exhibit.attack)
        caption = f"{cell.cell.name}: {attack} on {exhibit.images} images that are right without an attack."
        drawn.append(Chart(svg(draw_traces(exhibit.traces)), caption))
    note = (
        "Cross-entropy at each step of the attack, median and quartiles. A line that rises and levels off is an attack "
        "that has done what it can; one that is flat from the start, or still rising at its end, is a reason to doubt "
        "the robust accuracy."
    ) + _first(SHOWN_CELLS, len(found))
    return Section("The attack's loss", note, charts=drawn)


def _classes(joint: Joint) -> Section | None:
    rows: list[tuple[str, ...]] = []
    for cell in joint.cells[:SHOWN_CELLS]:
        names = joint.contents[cell.cell.dataset.label].get("classes") or []
        clean, left = standing(cell, ()), standing(cell, None)
        counted = []
        for label in np.unique(cell.labels):
            here = cell.labels == label
            n = int(here.sum())
            counted.append((float(left[here].mean()), float(clean[here].mean()), -n, int(label)))
        withheld = bool(cell.evaluation.withheld)
        if withheld:  # what an audit withholds does not choose them either
            counted = [(0.0, right, n, label) for _, right, n, label in counted]
        rows.append((f"{cell.cell.name} {cell.mark}".rstrip(),))
        for kept, right, n, label in sorted(counted)[:SHOWN_CLASSES]:
            text = WITHHELD if withheld else percent_of(kept, wilson(kept, -n))
            name = names[label] if label < len(names) else f"class {label}"
            rows.append((name, str(-n), percent_of(right, wilson(right, -n)), text))
    if not rows:
        return None
    note = f"The {SHOWN_CLASSES} classes of which the fewest images stay right under everything tried."
    note += _first(SHOWN_CELLS, len(joint.cells))
    header = ("class", "n", "clean", "worst case")
    return Section("Worst classes", note, grid=Grid(header, tuple(rows), frozenset({1, 2, 3})))


def _pictures(cells: Sequence[CellResult], shown: Shown) -> Section | None:
    found = [(cell, exhibit) for cell in cells if (exhibit := shown[cell]) is not None and exhibit.strips]
    if not found:
        return None
    strips = []
    for cell, exhibit in found[:PICTURED_CELLS]:
        for strip in exhibit.strips:
            strips.append(type(strip)(strip.pictures, f"{cell.cell.name}: {strip.title}"))
    note = (
        "Images that the model gets right, attacked; where the attack broke some, those. Differences are shown ten "
        "times as large, around grey. Attention maps (text-guided, as TGA-ZSR takes them) are the undefended model's."
    )
    note += _first(PICTURED_CELLS, len(found))
    return Section("What it looks like", note, strips=strips)
