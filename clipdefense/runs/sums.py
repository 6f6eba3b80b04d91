"""What is said over several cells, as data: the glance, means over data sets, tests against a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdefense.errors import unknown_name
from clipdefense.evaluation.report import said
from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.evaluation.statistics import Interval, macro, mcnemar
from clipdefense.runs.compare import standing
from clipdefense.runs.config import NO_DEFENSE
from clipdefense.runs.joint import Joint
from clipdefense.runs.likeness import WORST
from clipdefense.runs.results import CellResult, Unjudged


@dataclass(frozen=True)
class Line:
    """A model and a defence on one data set, at a glance.

    Attributes:
        model, defense, dataset: labels.
        clean: the number as text; it carries its image count where a robust one beside it is over fewer.
        robust: the worst case per image under each threat model, as text; empty where that was not asked for.
    """

    model: str
    defense: str
    dataset: str
    clean: str
    robust: tuple[str, ...]


def threats_of(joint: Joint) -> tuple[str, ...]:
    """Labels of the threat models, in order."""
    return tuple(dict.fromkeys(one.cell.threat.label for one in joint.everything))


def glance(joint: Joint) -> tuple[Line, ...]:
    """Clean and worst-case accuracies, a line for each model, defence and data set."""
    found: dict[tuple[str, str, str], dict[str, CellResult | Unjudged]] = {}
    for one in joint.everything:
        what = one.cell
        here = found.setdefault((what.model.label, what.defense.label, what.dataset.label), {})
        here[what.threat.label] = one
    threats = threats_of(joint)
    return tuple(
        Line(*names, _clean(list(here.values())), tuple(_robust(here.get(threat)) for threat in threats))
        for names, here in found.items()
    )


def _clean(ones: Sequence[CellResult | Unjudged]) -> str:
    judged = [one for one in ones if isinstance(one, CellResult)]
    if not judged:
        return ones[0].said if isinstance(ones[0], Unjudged) else ""
    most = max(judged, key=lambda cell: (not cell.missing, len(cell.samples)))
    beside = any(cell.missing for cell in judged)  # one number for all of them, so it says which it is of
    whole = f"(all {len(most.samples)})" if beside else ""
    return said(most.evaluation, most.evaluation.clean, most.mark or whole)


def _robust(one: CellResult | Unjudged | None) -> str:
    if one is None:
        return ""
    if isinstance(one, Unjudged):
        return one.said
    evaluation = one.evaluation
    return " ".join(filter(None, (said(evaluation, evaluation.worst_case()), evaluation.caveat, one.mark)))


@dataclass(frozen=True)
class Mean:
    """An attack over several data sets, each counting once.

    Attributes:
        model, defense, threat: labels.
        attack, attacked: the row that all of the data sets have.
        bottom: whether it is a worst case.
        datasets: labels of those in the mean.
        missing: labels of those that are not finished, and so are left out.
        accuracy, interval: in [0, 1]; None where an audit withholds one of them.
    """

    model: str
    defense: str
    threat: str
    attack: str
    attacked: str
    bottom: bool
    datasets: tuple[str, ...]
    missing: tuple[str, ...]
    accuracy: float | None
    interval: Interval | None

    @property
    def counted(self) -> str:
        """``"16"``, or ``"12 of 16"`` where some are not finished."""
        n = len(self.datasets)
        return f"{n} of {n + len(self.missing)}" if self.missing else str(n)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "defense": self.defense,
            "threat": self.threat,
            "attack": self.attack,
            "attacked": self.attacked,
            "worst_case": self.bottom,
            "datasets": list(self.datasets),
            "datasets_not_finished": list(self.missing),
            "accuracy": self.accuracy,
            "interval_95": None if self.interval is None else list(self.interval),
            "withheld": self.accuracy is None,
        }


def means(joint: Joint) -> tuple[Mean, ...]:
    """Means over data sets, of every model, defence and threat model that has two or more finished ones.

    Under a protocol they are over its own headline data sets. The interval is that of
    :func:`clipdefense.evaluation.statistics.macro`.
    """
    headline = joint.protocol.headline if joint.protocol is not None else ()
    groups: dict[tuple[str, str, str], list[CellResult | Unjudged]] = {}
    for one in joint.everything:
        what = one.cell
        if not headline or what.dataset.spec in headline:
            groups.setdefault((what.model.label, what.defense.label, what.threat.label), []).append(one)
    found: list[Mean] = []
    for names, ones in groups.items():
        cells = [one for one in ones if isinstance(one, CellResult) and not one.missing]
        if len(cells) < 2:
            continue
        over = tuple(cell.cell.dataset.label for cell in cells)
        missing = tuple(one.cell.dataset.label for one in ones if one.missing)
        hidden = any(cell.evaluation.withheld for cell in cells)
        for attack, attacked, bottom, rows in _common([cell.evaluation for cell in cells]):
            kept = not hidden or attack == "clean"
            mean = macro([(row.accuracy, row.correct.shape[1]) for row in rows]) if kept else (None, None)
            found.append(Mean(*names, attack, attacked, bottom, over, missing, *mean))
    return tuple(found)


def _common(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, str, bool, list[Row]]]:
    """Rows that all of the evaluations have."""
    yield "clean", "nothing", False, [evaluation.clean for evaluation in evaluations]
    by_name = [{(row.attack, row.attacked): row for row in evaluation.rows} for evaluation in evaluations]
    for name in by_name[0]:
        if all(name in rows for rows in by_name):
            yield *name, False, [rows[name] for rows in by_name]
    compared = [evaluation.compared() for evaluation in evaluations]
    if all(compared):
        for rows in zip(*compared):
            yield _label(rows), "all its attacks", True, list(rows)
    worst = [evaluation.worst_case() for evaluation in evaluations]
    yield _label(worst), "all its attacks", True, worst


def _label(rows: Sequence[Row]) -> str:
    """One name for bottom lines, which carry their caveats in theirs."""
    return " / ".join(dict.fromkeys(row.attack for row in rows))


@dataclass(frozen=True)
class Paired:
    """A cell against its baseline on the images that both have verdicts on.

    Attributes:
        cell, baseline: names of the two.
        differs: the baseline, as far as it is another.
        what: ``"clean"`` or the worst case per image.
        n: images in common; of: images of the data set.
        gained, lost: right in the cell alone, in the baseline alone, on every draw; None where an audit withholds
            either's robust accuracy, as is p.
        p: of McNemar's exact test, two-sided.
    """

    cell: str
    baseline: str
    differs: str
    what: str
    n: int
    of: int
    partial: bool
    gained: int | None = None
    lost: int | None = None
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = {"cell": self.cell, "baseline": self.baseline, "what": self.what}
        counts = {"n": self.n, "images": self.of, "finished": not self.partial}
        return {
            **names,
            **counts,
            "gained": self.gained,
            "lost": self.lost,
            "p_value": self.p,
            "withheld": self.p is None,
        }


def against(joint: Joint, baseline: str | None = None) -> tuple[Paired, ...]:
    """McNemar's test of each cell against a baseline.

    Args:
        joint: the runs.
        baseline: the model or defence that the others are compared with, by its label. Where not given, a defence is
            compared with its model alone and a model with the first.

    Raises:
        UsageError: no cell has such a baseline.
    """
    known = {label for one in joint.everything for label in (one.cell.model.label, one.cell.defense.label)}
    if baseline is not None and baseline not in known:
        raise unknown_name("baseline", baseline, sorted(known))
    found: list[Paired] = []
    for number, cell in enumerate(joint.cells):
        other = _baseline(number, joint.cells, baseline)
        if other is None:
            continue
        common, left, right = np.intersect1d(cell.samples, other.samples, return_indices=True)
        partial = bool(cell.missing or other.missing)
        names = (cell.cell.name, other.cell.name, _differs(other, cell))
        for what, rows in (("clean", ()), (WORST, None)):
            head = (*names, what, len(common), cell.images, partial)
            if rows is None and (cell.evaluation.withheld or other.evaluation.withheld):
                found.append(Paired(*head))
                continue
            ours, theirs = standing(cell, rows)[left], standing(other, rows)[right]
            gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            found.append(Paired(*head, gained, lost, mcnemar(gained, lost)))
    return tuple(found)


def _differs(other: CellResult, cell: CellResult) -> str:
    """The baseline's name, as far as it is another than the cell's."""
    labels = (
        ("model", other.cell.model.label, cell.cell.model.label),
        ("defence", other.cell.defense.label, cell.cell.defense.label),
    )
    return ", ".join(f"{what} {theirs}" for what, theirs, ours in labels if theirs != ours)


def _baseline(number: int, cells: Sequence[CellResult], name: str | None) -> CellResult | None:
    """The cell on the same images under the same threat that this one is compared with."""
    what = cells[number].cell

    def alike(place: int) -> bool:
        other = cells[place].cell
        return (other.dataset.label, other.threat.label) == (what.dataset.label, what.threat.label) and place != number

    same = [(place, cells[place]) for place in range(len(cells)) if alike(place)]
    if name is None:
        undefended = [(place, one) for place, one in same if one.cell.defense.spec == NO_DEFENSE]
        if what.defense.spec != NO_DEFENSE:
            return next((one for _, one in undefended if one.cell.model.label == what.model.label), None)
        return undefended[0][1] if undefended and undefended[0][0] < number else None
    if name in (what.model.label, what.defense.label):
        return None
    pairs = [(one.cell.model.label, one.cell.defense.label, one) for _, one in same]
    by_defense = [one for model, defense, one in pairs if (model, defense) == (what.model.label, name)]
    by_model = [one for model, defense, one in pairs if (model, defense) == (name, what.defense.label)]
    return next(iter([*by_defense, *by_model]), None)
