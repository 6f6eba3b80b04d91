"""A run as one HTML page: what was attacked and how, the numbers, what they are compared with, curves and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import clipdefense.runs.exhibits as exhibits
from clipdefense.data.protocols import get_protocol
from clipdefense.errors import unknown_name
from clipdefense.evaluation import words
from clipdefense.evaluation.charts import Curve, draw_curves, draw_traces, svg
from clipdefense.evaluation.report import WITHHELD, Chart, Grid, Page, Section, percent, said, write_html
from clipdefense.evaluation.results import Row
from clipdefense.evaluation.statistics import Interval, macro, mcnemar, wilson
from clipdefense.runs.compare import standing
from clipdefense.runs.config import NO_DEFENSE
from clipdefense.runs.results import CellResult, RunResult, notes, read

SHOWN_CLASSES, SHOWN_CELLS, PICTURED_CELLS = 5, 24, 8


def write_page(folder: str | Path, out: str | Path | None = None, *, baseline: str | None = None) -> Path:
    """The page of a run, also while it is under way.

    Args:
        folder: of the run.
        out: the file; ``report.html`` in the folder where not given.
        baseline: the model or defence that the others are compared with, by its name in the run. Where not given, a
            defence is compared with its model alone and a model with the run's first.

    Returns:
        The file.

    Raises:
        UsageError: no run, or a baseline that it does not have.
    """
    result = read(folder)
    path = result.folder / "report.html" if out is None else Path(out)
    write_html(path, page_of(result, baseline))
    return path


def page_of(result: RunResult, baseline: str | None = None) -> Page:
    """What the page shows; arguments as :func:`write_page`."""
    cells = result.cells
    shown = {cell.cell.number: exhibits.read(exhibits.exhibit_file(result.folder, cell.cell.number)) for cell in cells}
    parts = (
        _audits(cells),
        _macros(result),
        _against(cells, baseline),
        _curves(cells),
        _traces(cells, shown),
        _classes(result),
        _pictures(cells, shown),
    )
    return Page(
        title=f"Robustness: {', '.join(dict.fromkeys(cell.cell.model.label for cell in cells)) or 'no verdicts yet'}",
        summary=list(_summary(result)),
        evaluations=[cell.evaluation for cell in cells],
        facts=_facts(result),
        before=[*_glance(cells), _threats(result), *_limits(cells)],
        after=[part for part in parts if part is not None],
    )


def _summary(result: RunResult) -> Iterator[str]:
    for cell in result.cells if len(result.cells) == 1 else ():
        evaluation = cell.evaluation
        right = f"{cell.cell.name}: {100 * evaluation.clean.accuracy:.1f} % right on {evaluation.n} clean images"
        if cell.withheld:
            yield f"{right}; the robust accuracy is withheld, because the audit found that it would mean nothing."
        else:
            caveat = f" ({evaluation.caveat})" if evaluation.caveat else ""
            yield f"{right}, {100 * evaluation.worst_case().accuracy:.1f} % still right under everything tried{caveat}."
    for cell in result.cells:
        yield from (f"{cell.cell.name}: {note}" for note in notes(cell) if not note.startswith("Audit"))
    yield "A robust accuracy says that these attacks failed, not that none succeeds."


def _glance(cells: Sequence[CellResult]) -> Iterator[Section]:
    """Clean and worst-case accuracies of several cells, a column for each threat model."""
    threats = list(dict.fromkeys(cell.cell.threat.label for cell in cells))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        what, evaluation = cell.cell, cell.evaluation
        line = lines.setdefault((what.model.label, what.defense.label, what.dataset.label), {})
        line["clean"] = percent(evaluation.clean)
        caveat = f" {evaluation.caveat}" if evaluation.caveat else ""
        line[what.threat.label] = said(evaluation, evaluation.worst_case()) + caveat
    if len(cells) > 1:
        columns = ("clean", *threats)
        rows: list[tuple[str, ...]] = []
        for dataset in dict.fromkeys(names[2] for names in lines):
            rows.append((dataset,))
            here = {names: line for names, line in lines.items() if names[2] == dataset}
            rows += [(*names[:2], *(line.get(column, "") for column in columns)) for names, line in here.items()]
        note = (
            "In %, with the 95 % Wilson interval: images still right under every attack that was tried, and every draw."
        )
        numbers = frozenset(range(2, 2 + len(columns)))
        yield Section("At a glance", note, grid=Grid(("model", "defence", *columns), tuple(rows), numbers))


def _threats(result: RunResult) -> Section:
    found: dict[str, None] = {}
    for cell in result.cells:
        side = result.facts["contents"][cell.cell.dataset.label]["attacked_at"]
        found[words.threat_in_words(cell.evaluation.threat, side)] = None
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


def _number(share: float, interval: Interval) -> str:
    return f"{100 * share:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _macros(result: RunResult) -> Section | None:
    """Means over data sets, each counting once."""
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    named = result.config.protocol
    headline = get_protocol(named).headline if named is not None else ()
    for cell in result.cells:
        what = cell.cell
        if headline and what.dataset.spec not in headline:
            continue
        groups.setdefault((what.model.label, what.defense.label, what.threat.label), []).append(cell)
    rows: list[tuple[str, ...]] = []
    strong = set()
    for names, cells in groups.items():
        if len(cells) < 2:
            continue
        rows.append((" | ".join(names),))
        for attack, attacked, each in _common(cells):
            if attack.startswith("worst case"):
                strong.add(len(rows))
            hidden = attack != "clean" and any(cell.withheld for cell in cells)
            text = WITHHELD if hidden else _number(*macro([(row.accuracy, row.correct.shape[1]) for row in each]))
            rows.append((attack, attacked, str(len(cells)), text))
    if not rows:
        return None
    note = (
        "Each data set counts once; the 95 % interval (Zou and Donner, from the Wilson limits) is about other images "
        "of the same data sets."
    )
    note += f" The protocol's own mean is over {len(headline)} data sets." if headline else ""
    header = ("attack", "what the attacker had", "data sets", "mean accuracy")
    return Section("Mean over data sets", note, grid=Grid(header, tuple(rows), frozenset({2, 3}), frozenset(strong)))


def _common(cells: Sequence[CellResult]) -> Iterator[tuple[str, str, list[Row]]]:
    """Rows that all of the cells have."""
    evaluations = [cell.evaluation for cell in cells]
    yield "clean", "nothing", [evaluation.clean for evaluation in evaluations]
    by_name = [{(row.attack, row.attacked): row for row in evaluation.rows} for evaluation in evaluations]
    for name in by_name[0]:
        if all(name in rows for rows in by_name):
            yield *name, [rows[name] for rows in by_name]
    worst = [evaluation.worst_case() for evaluation in evaluations]
    yield worst[0].attack, "all its attacks", worst


def _against(cells: Sequence[CellResult], baseline: str | None) -> Section | None:
    """McNemar's test against a baseline."""
    known = {label for cell in cells for label in (cell.cell.model.label, cell.cell.defense.label)}
    if baseline is not None and baseline not in known:
        raise unknown_name("baseline", baseline, sorted(known))
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        other = _baseline(cell, cells, baseline)
        if other is None:
            continue
        _, left, right = np.intersect1d(cell.samples, other.samples, return_indices=True)
        rows.append((f"{cell.cell.name}, against {_differs(other, cell)}",))
        for name, attacks in (("clean", False), ("worst case per image", True)):
            if attacks and (cell.withheld or other.withheld):
                rows.append((name, WITHHELD, "", "", ""))
                continue
            ours, theirs = (
                standing(one, None if attacks else ())[place] for one, place in ((cell, left), (other, right))
            )
            only, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            p = mcnemar(only, lost)
            counts = (str(len(left)), f"+{only}", f"-{lost}", f"{p:.3g}")
            rows.append((name, *counts))
    if not rows:
        return None
    note = (
        "On the same images: how many only the first gets right (+), how many only the baseline (-), and the p of "
        "McNemar's exact test that either is as likely. A randomised defence is right where it is on every draw."
    )
    header = ("attack", "n", "gained", "lost", "p")
    return Section("Against a baseline", note, grid=Grid(header, tuple(rows), frozenset({1, 2, 3, 4})))


def _differs(other: CellResult, cell: CellResult) -> str:
    """The baseline's name, as far as it is another than the cell's."""
    labels = zip(("model", "defence"), (other.cell.model, other.cell.defense), (cell.cell.model, cell.cell.defense))
    return ", ".join(f"{what} {theirs.label}" for what, theirs, ours in labels if theirs != ours)


def _baseline(cell: CellResult, cells: Sequence[CellResult], name: str | None) -> CellResult | None:
    """The cell on the same images under the same threat that this one is compared with."""
    what = cell.cell
    same = [c for c in cells if (c.cell.dataset, c.cell.threat) == (what.dataset, what.threat) and c is not cell]
    if name is None:
        undefended = [c for c in same if c.cell.defense.spec == NO_DEFENSE]
        own = [c for c in undefended if c.cell.model == what.model]
        if what.defense.spec != NO_DEFENSE:
            return own[0] if own else None
        return undefended[0] if undefended and undefended[0].cell.number < what.number else None
    if name in (what.model.label, what.defense.label):
        return None
    by_defense = [c for c in same if c.cell.defense.label == name and c.cell.model == what.model]
    by_model = [c for c in same if c.cell.model.label == name and c.cell.defense == what.defense]
    return next(iter([*by_defense, *by_model]), None)


def _curves(cells: Sequence[CellResult]) -> Section | None:
    """Worst case per image against eps, a chart for each data set and norm."""
    charts: dict[tuple[str, str], dict[str, dict[float, Row]]] = {}
    for cell in cells:
        if cell.withheld:
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
    return Section("Accuracy against eps", charts=drawn) if drawn else None


def _traces(cells: Sequence[CellResult], shown: dict[int, exhibits.Exhibit | None]) -> Section | None:
    drawn: list[Chart] = []
    for cell in cells:
        exhibit = shown[cell.cell.number]
        if exhibit is not None and exhibit.traces and len(drawn) < SHOWN_CELLS:
            caption = f"{cell.cell.name}: {exhibit.attack} on {exhibit.images} images that are right without an attack."
            drawn.append(Chart(svg(draw_traces(exhibit.traces)), caption))
    if not drawn:
        return None
    note = (
        "Cross-entropy at each step of the attack, median and quartiles. A line that rises and levels off is an attack "
        "that has done what it can; one that is flat from the start, or still rising at its end, is a reason to doubt "
        "the robust accuracy."
    )
    return Section("The attack's loss", note, charts=drawn)


def _classes(result: RunResult) -> Section | None:
    rows: list[tuple[str, ...]] = []
    for cell in result.cells[:SHOWN_CELLS]:
        names = result.facts["contents"][cell.cell.dataset.label].get("classes") or []
        clean, left = standing(cell, ()), standing(cell, None)
        counted = []
        for label in np.unique(cell.labels):
            here = cell.labels == label
            n = int(here.sum())
            counted.append((float(left[here].mean()), float(clean[here].mean()), -n, int(label)))
        if cell.withheld:
            counted = [
                (0.0, right, n, label) for _, right, n, label in counted
            ]  # what an audit withholds does not choose them either
        rows.append((cell.cell.name,))
        for kept, right, n, label in sorted(counted)[:SHOWN_CLASSES]:
            text = WITHHELD if cell.withheld else _number(kept, wilson(kept, -n))
            name = names[label] if label < len(names) else f"class {label}"
            rows.append((name, str(-n), _number(right, wilson(right, -n)), text))
    if not rows:
        return None
    note = f"The {SHOWN_CLASSES} classes of which the fewest images stay right under everything tried."
    header = ("class", "n", "clean", "worst case")
    return Section("Worst classes", note, grid=Grid(header, tuple(rows), frozenset({1, 2, 3})))


def _pictures(cells: Sequence[CellResult], shown: dict[int, exhibits.Exhibit | None]) -> Section | None:
    found = [(cell, exhibit) for cell in cells if (exhibit := shown[cell.cell.number]) is not None and exhibit.strips]
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
    if len(found) > PICTURED_CELLS:
        note += f" The first {PICTURED_CELLS} of {len(found)} combinations."
    return Section("What it looks like", note, strips=strips)


def _facts(result: RunResult) -> dict[str, str]:
    facts: dict[str, str] = {}
    if result.config.protocol is not None:
        protocol = get_protocol(result.config.protocol)
        facts["protocol"] = f"{protocol.name}: {protocol.title} ({protocol.source})"
        facts["what to know of the protocol"] = " ".join(protocol.notes)
    for label, content in result.facts["contents"].items():
        side = " x ".join(str(length) for length in content["attacked_at"])
        facts[f"data set {label}"] = (
            f"{content['images']} images, attacked at {side} px, labels {content['labels_sha256']}"
        )
    for cell in result.cells:
        facts[f"model {cell.cell.model.label}"] = (
            f"{cell.facts.get('model')}, weights {cell.facts.get('weights_sha256')}"
        )
        if cell.facts.get("defense"):
            options = (f"{key}={value}" for key, value in cell.facts["defense"].items() if key != "class")
            facts[f"defence {cell.cell.defense.label}"] = ", ".join(options)
    places = {
        f"{device}, {threads} threads, {bucket} a forward"
        for cell in result.cells
        for device, threads, bucket in cell.made_on
    }
    facts["computed on"] = "; ".join(sorted(places))
    facts["seed"] = str(result.config.seed)
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in result.facts["versions"].items())
    if result.config.save_adv:
        facts["to prove it again"] = "clipdefense verify FOLDER classifies every broken image once more, on any machine"
    return facts
