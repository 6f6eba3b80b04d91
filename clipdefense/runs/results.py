"""What a store says: evaluations with their intervals, and the summary in JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from clipdefense.errors import UsageError
from clipdefense.evaluation.report import WITHHELD, attacker, kept, notes_of, rows_of, said
from clipdefense.evaluation.results import Evaluation, Kind, Row, still_standing
from clipdefense.files import write_json, write_text
from clipdefense.runs.build import Facts
from clipdefense.runs.config import NO_DEFENSE, RunConfig
from clipdefense.runs.store import Named, facts_of, reading, stores_in
from clipdefense.runs.units import Cell, cells, jobs
from clipdefense.threat import format_eps

AUDITS = "audits"
"""The folder of a run in which the audit of cell N is ``cell-N.json``."""

AFTER = "+ "
"""How a row is marked that counts what the attacks above it left standing."""

NEAR = 1e-3
"""A verdict whose fp32 margin is smaller may differ on another device, thread count or batch size."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """A cell's verdicts.

    Attributes:
        cell: what was judged and attacked.
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
        # the store numbers them attack by attack as they ran; people read them target by target
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: RobustBench's model-info fields, then every row with its interval."""
        evaluation = self.evaluation
        auto = [row.accuracy for row in evaluation.rows if row.attack.partition(",")[0].endswith("autoattack")]
        threat = evaluation.threat
        return {
            "name": self.cell.model.label if self.cell.defense.spec == NO_DEFENSE else self.cell.name,
            "authors": None,
            "venue": None,
            "link": None,
            "architecture": self.facts.get("model"),
            "additional_data": None,
            "number_forward_passes": None,
            "dataset": self.cell.dataset.label,
            "eps": format_eps(threat.eps),
            "clean_acc": f"{100 * evaluation.clean.accuracy:.2f}",
            "reported": None,
            "autoattack_acc": f"{100 * min(auto):.2f}" if auto and not self.withheld else None,
            "unreliable": bool(self.withheld) if self.audit else None,
            "footnote": evaluation.caveat,
            "cell": self.cell.name,
            "model": self.cell.model.label,
            "defense": self.cell.defense.label,
            "norm": threat.norm,
            "eps_value": threat.eps,
            "n": evaluation.n,
            "rows": [
                {
                    "attack": attack,
                    "attacked": row.attacked,
                    "verdict_seeds": len(row.correct),
                    "accuracy": row.accuracy if kept(evaluation, row) else None,
                    "interval_95": list(row.interval) if kept(evaluation, row) else None,
                    "worst_case": bottom,
                }
                for attack, row, bottom in rows_of(evaluation)
            ],
            "audit": self.audit.get("verdict"),
            "withheld": self.withheld or None,
            "left_out": list(self.left_out),
            "margins_below_0.001": self.near,
            "unrepeatable_verdicts": self.unrepeatable,
            "corrupt": [{"image": sample, "reason": reason} for sample, reason in self.corrupt],
            "units": {"done": self.units, "missing": self.missing},
            "made_on": [dict(zip(("device", "threads", "batch_size"), where)) for where in self.made_on],
            "fingerprint": self.facts,
        }


@dataclass(frozen=True)
class RunResult:
    """A whole run as read from its folder: its configuration, its fingerprint, its cells with any verdict."""

    folder: Path
    config: RunConfig
    facts: Facts
    cells: tuple[CellResult, ...]


def config_of(facts: Facts) -> RunConfig:
    """The configuration inside a run's fingerprint."""
    return RunConfig.model_validate({key: value for key, value in facts.items() if key in RunConfig.model_fields})


def single_store(folder: Path) -> Path:
    """The store of a run that is in one piece.

    Raises:
        UsageError: there is none, or there are shards, to be merged first.
    """
    found = stores_in(folder)
    if not found:
        raise UsageError(f"{str(folder)!r} holds no run; the folder given to `clipdefense evaluate --run` is expected.")
    if len(found) > 1 or not found[0].stem.endswith("-of-1"):
        raise UsageError(
            f"{str(folder)!r} holds {len(found)} shards, such as {found[0].name}; join them with "
            f"`clipdefense merge {folder} --out MERGED` first."
        )
    return found[0]


def read(folder: str | Path) -> RunResult:
    """A run's verdicts, also while it is under way.

    Raises:
        UsageError: there is no run in the folder, it is in shards, or it is damaged.
    """
    folder = Path(folder)
    with reading(single_store(folder)) as connection:
        facts = facts_of(connection)
        config = config_of(facts)
        sizes = {label: content["images"] for label, content in facts["contents"].items()}
        listed = cells(config)
        units = {cell.number: len(jobs([cell], sizes, config.unit)) for cell in listed}
        found = (_cell(connection, cell, units[cell.number], folder) for cell in listed)
        return RunResult(folder, config, facts, tuple(cell for cell in found if cell is not None))


def audit_file(folder: Path, cell: int) -> Path:
    """Where a cell's audit is."""
    return folder / AUDITS / f"cell-{cell}.json"


def _audit(path: Path) -> Facts:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"audit {str(path)!r} cannot be read ({error}); delete it and audit again.") from error


def _cell(connection: sqlite3.Connection, cell: Cell, units: int, folder: Path) -> CellResult | None:
    def ask(query: str, *more: int) -> list[Any]:
        return connection.execute(query, (cell.number, *more)).fetchall()

    done = ask("SELECT device, threads, bucket, unrepeatable FROM units WHERE cell = ?")
    attacks = ask("SELECT attack, view, kind, draws FROM attacks WHERE cell = ? ORDER BY number")
    if not attacks:
        return None
    tables = [
        np.array(
            ask(
                "SELECT seed, sample, label, clean, adversarial, margin FROM verdicts "
                "WHERE cell = ? AND number = ? ORDER BY seed, sample",
                number,
            ),
            dtype=np.float64,  # whole numbers up to 2^53 and fp32 margins both fit
        )
        for number in range(len(attacks))
    ]
    seeds = tuple(int(seed) for (seed,) in ask("SELECT DISTINCT seed FROM verdicts WHERE cell = ? ORDER BY seed"))
    shaped = np.stack(tables).reshape(len(attacks), len(seeds), -1, 6)
    whole = shaped[..., :5].astype(np.int64)
    (facts,) = ask("SELECT fingerprint FROM cells WHERE cell = ?")[0]
    return CellResult(
        cell=cell,
        facts=json.loads(facts),
        attacks=tuple(attacks),
        left_out=tuple(reason for (reason,) in ask("SELECT reason FROM left_out WHERE cell = ? ORDER BY reason")),
        seeds=seeds,
        samples=whole[0, 0, :, 1],
        labels=whole[0, 0, :, 2],
        clean=whole[0, :, :, 3],
        adversarial=whole[..., 4],
        margin=shaped[..., 5],
        corrupt=tuple(ask("SELECT sample, reason FROM corrupt WHERE cell = ? ORDER BY sample")),
        unrepeatable=sum(row[3] for row in done),
        units=len(done),
        missing=units - len(done),
        made_on=tuple(sorted({row[:3] for row in done})),
        banks=tuple(unit for (unit,) in ask("SELECT unit FROM units WHERE cell = ? AND bank ORDER BY unit")),
        audit=_audit(audit_file(folder, cell.number)),
    )


COLUMNS = (
    "model",
    "defense",
    "dataset",
    "norm",
    "eps",
    "attack",
    "attacked",
    "n",
    "verdict_seeds",
    "accuracy",
    "low_95",
    "high_95",
    "corrupt",
)


def write_summary(folder: str | Path) -> RunResult:
    """``summary.json``, ``summary.csv`` and ``summary.md`` in the run's folder; returns what they were made from."""
    result = read(folder)
    head = {"fingerprint": result.facts, "results": [cell.to_dict() for cell in result.cells]}
    write_json(result.folder / "summary.json", head)
    write_text(result.folder / "summary.csv", _csv(result))
    write_text(result.folder / "summary.md", markdown(result))
    return result


def _csv(result: RunResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in result.cells:
        threat = cell.evaluation.threat
        what = (cell.cell.model.label, cell.cell.defense.label, cell.cell.dataset.label, threat.norm, threat.eps)
        for attack, row, _ in rows_of(cell.evaluation):
            number = (row.accuracy, *row.interval) if kept(cell.evaluation, row) else (WITHHELD, "", "")
            counts = (cell.evaluation.n, len(row.correct), *number, len(cell.corrupt))
            writer.writerow((*what, attack, row.attacked, *counts))
    return text.getvalue()


def markdown(result: RunResult) -> str:
    """A table for each cell, with what has to be said of it."""
    parts = []
    for cell in result.cells:
        lines = [
            f"## {cell.cell.name}",
            "",
            f"Accuracy in %, 95 % Wilson interval; {cell.evaluation.threat}; {cell.evaluation.n} images.",
            "",
            "| attack | what the attacker had | accuracy |",
            "|---|---|---|",
        ]
        for attack, row, bottom in rows_of(cell.evaluation):
            texts = (attack, attacker(cell.evaluation, row, bottom), said(cell.evaluation, row))
            cells_of_row = [part.replace("|", "\\|") for part in texts]
            lines.append("| " + " | ".join(f"**{part}**" if bottom else part for part in cells_of_row) + " |")
        parts.append(
            "\n".join([*lines, "", *(f"- {note}" for note in (*notes_of([cell.evaluation]), *notes(cell)))]).rstrip()
            + "\n"
        )
    return "\n".join(parts)


def notes(cell: CellResult) -> list[str]:
    """What a reader of the numbers has to know besides them."""
    found = []
    if cell.audit and not cell.withheld:
        found.append(f"Audit: {cell.audit.get('verdict')}.")
    if cell.missing:
        found.append(f"NOT FINISHED: {cell.missing} of {cell.units + cell.missing} work units are missing.")
    if cell.corrupt:
        found.append(f"{len(cell.corrupt)} images could not be decoded and are in no count (listed in summary.json).")
    if cell.near:
        found.append(f"{cell.near} verdicts have a margin below {NEAR:g}: another machine may call them otherwise.")
    if cell.unrepeatable:
        found.append(
            f"{cell.unrepeatable} verdicts CHANGED when the model was asked again (of the first batch of each attack): "
            "it is not what it declares."
        )
    if len(cell.made_on) > 1:
        places = "; ".join(
            f"{device}, {threads} threads, {bucket} a forward" for device, threads, bucket in cell.made_on
        )
        found.append(f"Computed in several ways ({places}).")
    return found
