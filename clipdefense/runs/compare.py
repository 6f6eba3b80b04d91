"""Two runs image by image: which verdicts changed, and whether one's perturbations break the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipdefense.attacks.foreign import clean_unless_within, within_budget
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.answers import ask
from clipdefense.evaluation.results import Row
from clipdefense.evaluation.statistics import mcnemar
from clipdefense.runs.build import Builder, choose_device
from clipdefense.runs.decode import Decoder
from clipdefense.runs.results import CellResult, RunResult, read
from clipdefense.runs.store import check_same
from clipdefense.runs.verify import SAME_IMAGES, Pieces, banks, check_images_same, check_subject

WORST = "worst case per image"


@dataclass(frozen=True)
class Change:
    """The same attack in two runs, on the images that both have verdicts on.

    Attributes:
        a, b: the cells.
        attack, attacked: the row; the worst case per image takes all rows that a run has.
        n: images in common.
        both, neither: right in both runs, wrong in both.
        only_a, only_b: numbers of the images that are right in one run alone. An image is right where it is on every
            verdict seed.
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

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided; 1 where nothing changed."""
        return mcnemar(len(self.only_a), len(self.only_b))

    def to_dict(self) -> dict[str, Any]:
        counts = {"only_a": len(self.only_a), "only_b": len(self.only_b), "p_value": self.p_value}
        return {**self.__dict__, "images_only_a": self.only_a, "images_only_b": self.only_b, **counts}


@dataclass(frozen=True)
class Transferred:
    """One run's perturbations tried on another's model.

    Attributes:
        a, b: the cell that made them, the cell that is attacked.
        tried: images that A has a perturbation for and that B calls robust.
        broken: numbers of those that one of them breaks, on any verdict seed.
    """

    a: str
    b: str
    tried: int
    broken: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compare(a: str | Path, b: str | Path, *, cell_a: str | None = None, cell_b: str | None = None) -> list[Change]:
    """Which images changed verdict from run A to run B.

    Args:
        a, b: their folders.
        cell_a, cell_b: cells by name, where it cannot be told which belong together.

    Returns:
        One :class:`Change` for each attack that both have, and one for the worst case, for each pair of cells.

    Raises:
        UsageError: cells that do not fit together, or different datasets (naming the field).
    """
    changes = []
    for one, two in _pairs(read(a), read(b), cell_a, cell_b):
        common, left, right = np.intersect1d(one.samples, two.samples, return_indices=True)
        if (one.labels[left] != two.labels[right]).any():
            raise UsageError(f"{one.cell.name!r} and {two.cell.name!r} have other labels for the same image numbers.")
        theirs_by_name = {(row.attack, row.attacked): row for row in two.evaluation.rows}
        judged = [
            (*name, standing(one, [row]), standing(two, [theirs_by_name[name]]))
            for row in one.evaluation.rows
            if (name := (row.attack, row.attacked)) in theirs_by_name
        ]
        judged.append((WORST, "all attacks", standing(one, None), standing(two, None)))
        for attack, attacked, ours, theirs in judged:
            in_a, in_b = ours[left], theirs[right]
            counts = (len(common), int((in_a & in_b).sum()), int((~in_a & ~in_b).sum()))
            moved = (tuple(common[in_a & ~in_b].tolist()), tuple(common[in_b & ~in_a].tolist()))
            changes.append(Change(one.cell.name, two.cell.name, attack, attacked, *counts, *moved))
    return changes


def standing(cell: CellResult, rows: Sequence[Row] | None) -> NDArray[np.bool_]:
    """(n,) right on the clean image and in these rows of the cell's evaluation, on every seed; None takes all."""
    evaluation = cell.evaluation
    right = np.concatenate(
        [evaluation.clean.correct, *(row.correct for row in (evaluation.rows if rows is None else rows))]
    )
    return np.asarray(right.all(axis=0))


def _pairs(a: RunResult, b: RunResult, cell_a: str | None, cell_b: str | None) -> list[tuple[CellResult, CellResult]]:
    ours, theirs = _chosen(a, cell_a), _chosen(b, cell_b)
    if len(ours) == len(theirs) == 1:
        pairs = [(ours[0], theirs[0])]
    else:
        named = {cell.cell.name: cell for cell in theirs}
        pairs = [(cell, named[cell.cell.name]) for cell in ours if cell.cell.name in named]
    if not pairs:
        raise UsageError(
            f"no cell of {str(a.folder)!r} has the name of one of {str(b.folder)!r}; say which to compare "
            f"with --cell-a ({', '.join(repr(cell.cell.name) for cell in ours)}) and --cell-b "
            f"({', '.join(repr(cell.cell.name) for cell in theirs)})."
        )
    for one, two in pairs:
        keys = tuple(key for key in SAME_IMAGES if key not in ("images", "ids_sha256", "labels_sha256"))
        contents = [run.facts["contents"][cell.cell.dataset.label] for run, cell in ((a, one), (b, two))]
        facts = [{"dataset": {key: content[key] for key in ("name", *keys)}} for content in contents]
        check_same(facts[0], facts[1], f"the cell {one.cell.name!r} of {str(a.folder)!r}")
        if not np.intersect1d(one.samples, two.samples).size:
            raise UsageError(f"{one.cell.name!r} and {two.cell.name!r} have no image in common.")
    return pairs


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

    Args:
        a: a run made with ``save_adv``; b: the run whose model (and defence) is attacked.
        cell_a, cell_b: as :func:`compare`.
        device: where.
        batch_size: images a forward; B's when not given.

    Raises:
        UsageError: as :func:`compare`; A kept no perturbations; B's model is not at hand.
    """
    ours, theirs = read(a), read(b)
    if not ours.config.save_adv:
        raise UsageError(f"the run in {str(a)!r} kept no perturbations; make it again with --save-adv.")
    pairs = _pairs(ours, theirs, cell_a, cell_b)
    builder = Builder(theirs.config, choose_device(device))
    check_images_same(builder, theirs)
    size = batch_size or theirs.config.batch_size
    return [_transfer(ours, one, two, builder, size) for one, two in pairs]


def _transfer(ours: RunResult, one: CellResult, two: CellResult, builder: Builder, size: int) -> Transferred:
    subject = builder.subject(two.cell)
    check_subject(subject, two.facts, two.cell.name)
    robust = standing(two, None)
    labels = dict(zip(two.samples[robust].tolist(), two.labels[robust].tolist()))
    tried: set[int] = set()
    broken: set[int] = set()
    with Decoder() as decoder:
        pieces = Pieces(builder, two, decoder)
        for bank in banks(ours, one):
            for ids, delta in bank.values():
                rows = [row for row, name in enumerate(ids.tolist()) if name in labels]
                if not rows:
                    continue
                ids, x = ids[rows], pieces.images(ids[rows])
                x_adv = x + delta[rows]
                inside = within_budget(subject.threat, x, x_adv)
                y = ids.new_tensor([labels[name] for name in ids.tolist()])
                where = builder.device
                x_adv = clean_unless_within(subject.threat, x, x_adv)
                answers = ask(subject.judge, x_adv.to(where), y.to(where), ids.to(where), subject.seeds, size)
                fallen = torch.from_numpy((answers.predicted != y.numpy()).any(axis=0)) & inside
                tried.update(ids[inside].tolist())
                broken.update(ids[fallen].tolist())
    return Transferred(one.cell.name, two.cell.name, len(tried), tuple(sorted(broken)))
