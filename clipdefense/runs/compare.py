"""Two runs image by image: which verdicts changed, and whether one's perturbations break the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdefense.errors import UsageError, check_whole, unknown_name
from clipdefense.evaluation.results import Row
from clipdefense.evaluation.statistics import mcnemar
from clipdefense.runs.bank import bank_file, read_bank
from clipdefense.runs.build import Builder, choose_device
from clipdefense.runs.decode import Decoder
from clipdefense.runs.likeness import InCommon, in_common, rows_of, unlike
from clipdefense.runs.memory import sufficed
from clipdefense.runs.pixels import Images, Pixels, same_images
from clipdefense.runs.results import CellResult, RunResult, read
from clipdefense.runs.store import check_same
from clipdefense.runs.verify import SAME_IMAGES, Asker, check_images_same, check_kept, check_subject

# which labels pair the cells of two runs: all, or where no two share those, all but the defence, the model, or both
_ALIKE = (
    ("model", "defense", "dataset", "threat"),
    ("model", "dataset", "threat"),
    ("defense", "dataset", "threat"),
    ("dataset", "threat"),
)


@dataclass(frozen=True)
class Change:
    """The same attack in two runs, on the images that both have verdicts on.

    Attributes:
        a, b: the cells.
        attack, attacked: the row. The worst case per image takes all rows, or, where the runs attacked in different
            ways, those that both have, and says so.
        n: images in common.
        both, neither: right in both runs, wrong in both.
        only_a, only_b: numbers of the images that are right in one run alone. An image is right where it is on every
            verdict seed.
        threats: norm and eps in A and in B, such as ``"linf, eps 1/255"``.
        notes: what else the two do not have in common, on the worst case alone.
        withheld: why an audit withholds the robust accuracies of either; empty where none does. The counts stay, and
            no output shows them.
    """

    a: str
    b: str
    attack: str
    attacked: str
    n: int
    both: int
    neither: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    threats: tuple[str, str]
    notes: tuple[str, ...] = ()
    withheld: str = ""

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided; 1 where nothing changed."""
        return mcnemar(len(self.only_a), len(self.only_b))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is withheld is null."""
        counts: dict[str, Any] = {
            "both": self.both,
            "neither": self.neither,
            "only_a": len(self.only_a),
            "only_b": len(self.only_b),
            "images_only_a": self.only_a,
            "images_only_b": self.only_b,
            "p_value": self.p_value,
        }
        shown = dict.fromkeys(counts) if self.withheld else counts
        return {**self.__dict__, **shown, "withheld": self.withheld or None}


@dataclass(frozen=True)
class Transferred:
    """One run's perturbations tried on another's model.

    Attributes:
        a, b: the cell that made them, the cell that is attacked.
        tried: images that A has a perturbation for, within B's budget, and that B calls robust.
        broken: numbers of those that one of them breaks, on any verdict seed.
        over_budget: images that B calls robust and for which all that A has is outside B's budget.
        units: work units of B that were decoded; other_pixels: of them, those that hold other pixels here than in B's
            run.
        units_a, other_pixels_a: the same of A's; 0 where A is over another choice of images, which cannot be told.
        withheld: as :class:`Change`.
    """

    a: str
    b: str
    tried: int
    broken: tuple[int, ...]
    over_budget: int = 0
    units: int = 0
    other_pixels: int = 0
    units_a: int = 0
    other_pixels_a: int = 0
    withheld: str = ""

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the counts."""
        said = []
        if self.over_budget and not self.withheld:
            said.append(f"A's perturbations of {self.over_budget} more are outside B's threat model and were not tried")
        looked_at = (("A", self.other_pixels_a, self.units_a), ("B", self.other_pixels, self.units))
        said += [
            f"{other} of {units} work units hold other pixels here than in {run}'s run: what breaks or does not in "
            "them may be the images"
            for run, other, units in looked_at
            if other
        ]
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is withheld is null."""
        hidden = dict.fromkeys(("tried", "broken", "over_budget")) if self.withheld else {}
        return {**self.__dict__, **hidden, "withheld": self.withheld or None}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    cell_a: str | None = None,
    cell_b: str | None = None,
    across_threats: bool = False,
) -> list[Change]:
    """Which images changed verdict from run A to run B.

    Args:
        a, b: their folders.
        cell_a, cell_b: cells by name, where it cannot be told which belong together. Without them cells of one name do;
            where there are none, those of one model, data set and threat model, or of one defence, data set and threat
            model, or of one data set and threat model, if no other cell of either run has the same.
        across_threats: compare cells whose norm or eps differ, too.

    Returns:
        One :class:`Change` for each attack that both have, and one for the worst case, for each pair of cells.

    Raises:
        UsageError: cells that do not fit together, different datasets (naming the field), another norm or eps, or no
            attack in common.
    """
    ours, theirs = read(a), read(b)
    pairs = _pairs(ours, theirs, cell_a, cell_b)
    for one, two in pairs:
        if not across_threats:
            _check_threats(one, two)
    return [change for one, two in pairs for change in _changes(ours, one, theirs, two)]


def _check_threats(one: CellResult, two: CellResult) -> None:
    mine, other = (cell.cell.threat.threat for cell in (one, two))
    if (mine.norm, mine.eps) != (other.norm, other.eps):
        raise UsageError(
            f"{one.cell.name!r} of A was attacked in {mine}, {two.cell.name!r} of B in {other}, and which is harder is "
            "no matter of the model; compare cells of one threat model, or say --across-threats."
        )


def _changes(ours: RunResult, one: CellResult, theirs: RunResult, two: CellResult) -> list[Change]:
    """One pair of cells."""
    common, left, right = np.intersect1d(one.samples, two.samples, return_indices=True)
    if (one.labels[left] != two.labels[right]).any():
        raise UsageError(f"{one.cell.name!r} and {two.cell.name!r} have other labels for the same image numbers.")
    mine, other = rows_of(one), rows_of(two)
    worst = in_common(one, two)
    judged = [InCommon(row.attack, row.attacked, [row], [other[key]]) for key, row in mine.items() if key in other]
    judged.append(replace(worst, notes=(*worst.notes, *unlike(ours, one, theirs, two))))
    threats = (str(one.cell.threat.threat), str(two.cell.threat.threat))
    withheld = _withheld(one, two)
    changes = []
    for row in judged:
        in_a, in_b = standing(one, row.a)[left], standing(two, row.b)[right]
        counts = (len(common), int((in_a & in_b).sum()), int((~in_a & ~in_b).sum()))
        moved = (tuple(common[in_a & ~in_b].tolist()), tuple(common[in_b & ~in_a].tolist()))
        names = (one.cell.name, two.cell.name, row.attack, row.attacked)
        changes.append(Change(*names, *counts, *moved, threats, row.notes, withheld))
    return changes


def _withheld(one: CellResult, two: CellResult) -> str:
    return " ".join(dict.fromkeys(filter(None, (one.withheld, two.withheld))))


def standing(cell: CellResult, rows: Sequence[Row] | None) -> NDArray[np.bool_]:
    """(n,) right on the clean image and in these rows of the cell's evaluation, on every seed; None takes all."""
    evaluation = cell.evaluation
    right = np.concatenate(
        [evaluation.clean.correct, *(row.correct for row in (evaluation.rows if rows is None else rows))]
    )
    return np.asarray(right.all(axis=0))


def _pairs(a: RunResult, b: RunResult, cell_a: str | None, cell_b: str | None) -> list[tuple[CellResult, CellResult]]:
    ours, theirs = _chosen(a, cell_a), _chosen(b, cell_b)
    pairs = [(ours[0], theirs[0])] if len(ours) == len(theirs) == 1 else _matched(ours, theirs)
    if not pairs:
        raise UsageError(
            f"no cell of {str(a.folder)!r} goes with one of {str(b.folder)!r} by its name, or by its data set and "
            f"threat model where these say which; say which to compare with --cell-a ({_few(ours)}) and --cell-b "
            f"({_few(theirs)})."
        )
    for one, two in pairs:
        keys = tuple(key for key in SAME_IMAGES if key not in ("images", "ids_sha256", "labels_sha256"))
        contents = [run.facts["contents"][cell.cell.dataset.label] for run, cell in ((a, one), (b, two))]
        facts = [{"dataset": {key: content[key] for key in ("name", *keys)}} for content in contents]
        check_same(facts[0], facts[1], f"the cell {one.cell.name!r} of {str(a.folder)!r}")
        if not np.intersect1d(one.samples, two.samples).size:
            raise UsageError(f"{one.cell.name!r} and {two.cell.name!r} have no image in common.")
    return pairs


def _matched(ours: Sequence[CellResult], theirs: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    """Cells that have the same labels: all of them, or else as many as say, in both runs, which cell is meant."""
    for labels in _ALIKE:
        mine, other = _by(ours, labels), _by(theirs, labels)
        if pairs := [(cell, other[key]) for key, cell in mine.items() if key in other]:
            return pairs
    return []


def _by(cells: Sequence[CellResult], labels: tuple[str, ...]) -> dict[tuple[str, ...], CellResult]:
    """The cells by these labels, without those that share them."""
    keys = [tuple(str(getattr(cell.cell, label).label) for label in labels) for cell in cells]
    count = Counter(keys)
    return {key: cell for key, cell in zip(keys, cells) if count[key] == 1}


def _few(cells: Sequence[CellResult], shown: int = 6) -> str:
    """Their names, and how many more there are."""
    more = f" and {len(cells) - shown} more" if len(cells) > shown else ""
    return ", ".join(repr(cell.cell.name) for cell in cells[:shown]) + more


def _chosen(run: RunResult, name: str | None) -> list[CellResult]:
    names = {cell.cell.name: cell for cell in run.cells}
    if not names:
        raise UsageError(f"the run in {str(run.folder)!r} has no verdicts yet; let it finish a work unit first.")
    if name is None:
        return list(names.values())
    if name not in names:
        raise unknown_name(f"cell of {str(run.folder)!r}", name, names)
    return [names[name]]


def transfer(
    a: str | Path,
    b: str | Path,
    *,
    cell_a: str | None = None,
    cell_b: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> list[Transferred]:
    """Run A's perturbations tried on run B's model: what they break there, B's own attacks have missed.

    The threat models may differ: a perturbation counts where it is within B's.

    Args:
        a: a run made with ``save_adv``; b: the run whose model (and defence) is attacked.
        cell_a, cell_b: as :func:`compare`.
        device: where.
        batch_size: images a forward, at least 1; when not given, the fewest with which B's run itself went on. Halved,
            with a warning, whenever memory does not suffice.

    Raises:
        UsageError: cells that do not fit together, or different datasets (naming the field); A kept no perturbations;
            B's model is not at hand; memory does not suffice for one image at a time.
    """
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    ours, theirs = read(a), read(b)
    pairs = _pairs(ours, theirs, cell_a, cell_b)
    check_kept(ours, [one for one, _ in pairs])
    builder = Builder(theirs.config, choose_device(device))
    check_images_same(builder, theirs)
    asker = Asker(builder.device, sufficed(theirs.cells) if batch_size is None else batch_size)
    return [_Transfer(ours, one, theirs, two, builder, asker).tried() for one, two in pairs]


class _Transfer:
    """One cell's perturbations on another cell's model."""

    def __init__(
        self, ours: RunResult, one: CellResult, theirs: RunResult, two: CellResult, builder: Builder, asker: Asker
    ) -> None:
        self.ours, self.one, self.theirs, self.two = ours, one, theirs, two
        self.builder, self.ask, self.subject = builder, asker, builder.subject(two.cell)
        check_subject(self.subject, two.facts, two.cell.name)
        robust = standing(two, None)
        self.labels = dict(zip(two.samples[robust].tolist(), two.labels[robust].tolist()))

    def tried(self) -> Transferred:
        inside: set[int] = set()
        outside: set[int] = set()
        broken: set[int] = set()
        with Decoder() as decoder:
            images = Images(self.builder, self.two.cell.dataset.label, decoder)
            here = Pixels(images, self.theirs, self.two)
            same = same_images(self.ours, self.one, self.theirs, self.two)
            made_on = Pixels(images, self.ours, self.one) if same else None
            for unit in self.one.banks:
                used = False
                for ids, delta in read_bank(bank_file(self.ours.folder, self.one.cell.number, unit)).values():
                    rows = [row for row, name in enumerate(ids.tolist()) if name in self.labels]
                    if rows:
                        x, tried = here.images(ids[rows]), ids[rows]
                        y = tried.new_tensor([self.labels[name] for name in tried.tolist()])
                        subject = self.subject
                        within, answers = self.ask(
                            subject, self.two.cell.name, x, x + delta[rows], y, tried, subject.seeds
                        )
                        fallen = (answers.predicted != y.numpy()).any(axis=0) & within
                        inside.update(tried[within].tolist())
                        outside.update(tried[~within].tolist())
                        broken.update(tried[fallen].tolist())
                        used = True
                if used and made_on is not None:
                    made_on.unit(unit)
        return Transferred(
            self.one.cell.name,
            self.two.cell.name,
            tried=len(inside),
            broken=tuple(sorted(broken)),
            over_budget=len(outside - inside),
            units=len(here.seen),
            other_pixels=len(here.other),
            units_a=len(made_on.seen) if made_on else 0,
            other_pixels_a=len(made_on.other) if made_on else 0,
            withheld=_withheld(self.one, self.two),
        )
