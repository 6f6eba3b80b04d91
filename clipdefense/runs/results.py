"""What a store says: the verdicts of each cell as an evaluation, also while the run is under way or in shards."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from clipdefense.errors import UsageError
from clipdefense.evaluation.counts import counted
from clipdefense.evaluation.ensemble import AFTER
from clipdefense.evaluation.results import Evaluation, Kind, Row, still_standing
from clipdefense.runs.build import Facts
from clipdefense.runs.config import RunConfig
from clipdefense.runs.shards import check_shards
from clipdefense.runs.store import Named, attacks_of, facts_of, in_shards, reading, settings_of, stores_in
from clipdefense.runs.units import Cell, cells, jobs

AUDITS = "audits"
"""The folder of a run in which the audit of cell N is ``cell-N.json``."""

NEAR = 1e-3
"""A verdict whose fp32 margin is smaller may differ on another device, thread count or batch size."""

NOT_FINISHED, NO_IMAGES = "NOT FINISHED", "NO IMAGES"
"""What stands in the place of the numbers of a cell without verdicts."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """A cell's verdicts.

    Attributes:
        cell: what was judged and attacked.
        folder: of its run: banks, exhibits and audits are there.
        images: of its data set, those included that could not be decoded or are not done yet.
        facts: its fingerprint.
        attacks: attack, view, kind and EOT draws, by number.
        left_out: attacks that did not run, each with its reason.
        seeds: of the defence.
        samples: (n,) image numbers, rising; labels (n,).
        clean: (seeds, n) predictions on clean images.
        adversarial: (attacks, seeds, n) predictions; margin likewise.
        corrupt: (image, why) of those that could not be decoded; they are in no count.
        unrepeatable: images on which the model, shown a batch again, said another thing (the first batch of each attack
            in the first work unit of a session).
        units, missing: work units done and not done.
        made_on: device, threads and bucket size of the work units.
        banks: work units with a file of perturbations.
        audit: what :meth:`clipdefense.audit.Audit.to_dict` gave for it; empty where it was not audited.
    """

    cell: Cell
    folder: Path
    images: int
    facts: Facts
    attacks: tuple[Named, ...]
    left_out: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    clean: NDArray[np.int64]
    adversarial: NDArray[np.int64]
    margin: NDArray[np.float64]
    corrupt: tuple[tuple[int, str], ...]
    unrepeatable: int
    units: int
    missing: int
    made_on: tuple[tuple[str, int, int], ...]
    banks: tuple[int, ...]
    audit: Facts

    @cached_property
    def evaluation(self) -> Evaluation:
        """The same as :func:`clipdefense.evaluate` returns, for tables, pages and statistics."""
        clean = Row("none", "nothing", self.clean == self.labels, kind="clean")
        rows: list[Row] = []
        for number, (attack, view, kind, draws) in enumerate(self.attacks):
            correct = self.adversarial[number] == self.labels
            if self.facts.get("cumulative"):
                correct = still_standing(correct, rows[-1].correct if attack.startswith(AFTER) else clean.correct)
            rows.append(Row(attack, view, correct, None, cast(Kind, kind), draws))
        # an adaptive evaluation comes back to the model itself at its end; people read target by target
        targets = list(dict.fromkeys(row.attacked for row in rows))
        rows.sort(key=lambda row: targets.index(row.attacked))
        what = (
            self.cell.name,
            self.cell.threat.threat,
            clean,
            tuple(rows),
            bool(self.facts["attacker_knows"]),
            self.facts,
        )
        return Evaluation(*what, tuple(self.samples.tolist()), self.left_out, self.withheld)

    @property
    def withheld(self) -> str:
        """Why an audit withholds the robust accuracies; empty where none does."""
        return str(self.audit.get("withheld") or "")

    @property
    def near(self) -> int:
        """Verdicts with a margin below :data:`NEAR`."""
        return int((np.abs(self.margin) < NEAR).sum())

    @property
    def mark(self) -> str:
        """What stands beside every number while work units are missing, such as ``"(24 of 40)"`` images; else empty."""
        return self.count if self.missing else ""

    @property
    def count(self) -> str:
        """``"(24 of 40)"``: images with a verdict, and images of the data set."""
        return f"({len(self.samples)} of {self.images})"


@dataclass(frozen=True)
class Unjudged:
    """A cell without any verdict.

    Attributes:
        cell: what is to be judged.
        units, missing: work units done (none of their images could be decoded) and not done.
    """

    cell: Cell
    units: int
    missing: int

    @property
    def said(self) -> str:
        """What stands in the place of its numbers."""
        return NOT_FINISHED if self.missing else NO_IMAGES

    @property
    def why(self) -> str:
        """The same as a sentence, with the cell's name."""
        if not self.missing:
            return f"{self.cell.name}: {NO_IMAGES}, none could be decoded."
        total = self.units + self.missing
        done = f"{self.units} of {total} work units are done, without a verdict" if self.units else f"none of {total} "
        done += "" if self.units else "work units is done"
        return f"{self.cell.name}: {NOT_FINISHED}, {done}."


@dataclass(frozen=True)
class RunResult:
    """A whole run as read from its folder: its configuration, its fingerprint, its cells with verdicts and without."""

    folder: Path
    config: RunConfig
    facts: Facts
    cells: tuple[CellResult, ...]
    unjudged: tuple[Unjudged, ...] = ()


def config_of(connection: sqlite3.Connection) -> RunConfig:
    """What the run was asked for, with the places and the batch size with which it was last worked on."""
    stored = {**facts_of(connection), **settings_of(connection)}
    return RunConfig.model_validate({key: value for key, value in stored.items() if key in RunConfig.model_fields})


def single_store(folder: Path) -> Path:
    """The store of a run that is in one piece.

    Raises:
        UsageError: there is none, or there are shards, to be merged first.
    """
    found = stores_in(folder)
    if not found:
        raise UsageError(f"{str(folder)!r} holds no run; the folder given to `clipdefense evaluate --run` is expected.")
    if in_shards(folder):
        raise UsageError(
            f"{str(folder)!r} holds {len(found)} shards, such as {found[0].name}; join them with "
            f"`clipdefense merge {folder} --out MERGED` first."
        )
    return found[0]


def read(folder: str | Path, *, shards: bool = False) -> RunResult:
    """A run's verdicts, also while it is under way.

    Args:
        folder: of the run.
        shards: take a folder of shards as they stand, too; what they lack counts as not done. Nothing is written.

    Raises:
        UsageError: there is no run in the folder, it is in shards that were not asked for, or it is damaged.
    """
    folder = Path(folder)
    stores = stores_in(folder) if shards else []
    if len(stores) > 1:
        check_shards(stores)
    with ExitStack() as stack:
        opened = [stack.enter_context(reading(store)) for store in stores or [single_store(folder)]]
        facts = facts_of(opened[0])
        config = config_of(opened[0])
        sizes = {label: content["images"] for label, content in facts["contents"].items()}
        judged: list[CellResult] = []
        unjudged: list[Unjudged] = []
        for cell in cells(config):
            units = len(jobs([cell], sizes, config.unit))
            with _at_once(opened):
                found = _cell(opened, cell, units, folder, sizes[cell.dataset.label])
            if isinstance(found, CellResult):
                judged.append(found)
            else:
                unjudged.append(found)
        return RunResult(folder, config, facts, tuple(judged), tuple(unjudged))


@contextmanager
def _at_once(opened: Sequence[sqlite3.Connection]) -> Iterator[None]:
    """What is read inside is of one moment; a process that commits a work unit meanwhile waits."""
    for connection in opened:
        connection.execute("BEGIN")
    try:
        yield
    finally:
        for connection in opened:
            connection.rollback()


def audit_file(folder: Path, cell: int) -> Path:
    """Where a cell's audit is."""
    return folder / AUDITS / f"cell-{cell}.json"


def _audit(path: Path) -> Facts:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"audit {str(path)!r} cannot be read ({error}); delete it and audit again.") from error


def _cell(
    opened: Sequence[sqlite3.Connection], cell: Cell, units: int, folder: Path, images: int
) -> CellResult | Unjudged:
    def ask(query: str, *more: int) -> list[Any]:
        return [row for connection in opened for row in connection.execute(query, (cell.number, *more))]

    done = ask("SELECT device, threads, bucket, unrepeatable FROM units WHERE cell = ?")
    ran = (attacks_of(connection, cell.number) for connection in opened)
    attacks = next(filter(None, ran), [])  # the same in every shard
    if not attacks:
        return Unjudged(cell, len(done), units - len(done))
    tables = [
        np.array(
            sorted(
                ask(
                    "SELECT seed, sample, label, clean, adversarial, margin FROM verdicts WHERE cell = ? "
                    "AND number = ?",
                    number,
                )
            ),
            dtype=np.float64,  # whole numbers up to 2^53 and fp32 margins both fit
        )
        for number in range(len(attacks))
    ]
    seeds = tuple(sorted({int(seed) for (seed,) in ask("SELECT DISTINCT seed FROM verdicts WHERE cell = ?")}))
    shaped = np.stack(tables).reshape(len(attacks), len(seeds), -1, 6)
    whole = shaped[..., :5].astype(np.int64)
    (facts,) = ask("SELECT fingerprint FROM cells WHERE cell = ?")[0]
    return CellResult(
        cell=cell,
        folder=folder,
        images=images,
        facts=json.loads(facts),
        attacks=tuple(attacks),
        left_out=tuple(sorted({reason for (reason,) in ask("SELECT reason FROM left_out WHERE cell = ?")})),
        seeds=seeds,
        samples=whole[0, 0, :, 1],
        labels=whole[0, 0, :, 2],
        clean=whole[0, :, :, 3],
        adversarial=whole[..., 4],
        margin=shaped[..., 5],
        corrupt=tuple(sorted(ask("SELECT sample, reason FROM corrupt WHERE cell = ?"))),
        unrepeatable=sum(row[3] for row in done),
        units=len(done),
        missing=units - len(done),
        made_on=tuple(sorted({row[:3] for row in done})),
        banks=tuple(sorted(unit for (unit,) in ask("SELECT unit FROM units WHERE cell = ? AND bank"))),
        audit=_audit(audit_file(folder, cell.number)),
    )


def notes(cell: CellResult) -> list[str]:
    """What a reader of the numbers has to know besides them."""
    found = []
    if cell.audit and not cell.withheld:
        found.append(f"Audit: {cell.audit.get('verdict')}.")
    if cell.missing:
        found.append(f"NOT FINISHED: {cell.missing} of {cell.units + cell.missing} work units are missing.")
    if cell.corrupt:
        found.append(
            f"{counted(len(cell.corrupt), 'image')} could not be decoded, in no count, and listed in summary.json."
        )
    if cell.near:
        near = counted(cell.near, "margin")
        found.append(f"{near} below {NEAR:g}: another machine may call such a verdict otherwise.")
    if cell.unrepeatable:
        changed = counted(cell.unrepeatable, "verdict")
        found.append(
            f"{changed} CHANGED when the model was asked again (of the first batch of each attack): it is not what it "
            "declares."
        )
    if len(cell.made_on) > 1:
        places = "; ".join(
            f"{device}, {threads} threads, {bucket} a forward" for device, threads, bucket in cell.made_on
        )
        found.append(f"Computed in several ways ({places}).")
    return found
