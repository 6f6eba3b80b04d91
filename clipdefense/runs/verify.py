"""Re-proving: every "not robust" of a run, with one forward an image and seed, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdefense.attacks.foreign import clean_unless_within, within_budget
from clipdefense.errors import UsageError
from clipdefense.evaluation.answers import ask
from clipdefense.evaluation.statistics import Interval, wilson
from clipdefense.files import write_json
from clipdefense.runs.bank import Broken, bank_file, read_bank
from clipdefense.runs.build import Builder, Facts, Subject, choose_device
from clipdefense.runs.config import RunConfig
from clipdefense.runs.decode import Decoder
from clipdefense.runs.results import NEAR, CellResult, RunResult, read
from clipdefense.runs.store import check_same, writing

# What a verdict depends on wherever it is looked at; paths, versions and the machine may be others.
SAME_MODEL = ("weights_sha256", "class_names_sha256", "image_size", "mean", "std", "dtype", "defense")
SAME_IMAGES = ("images", "ids_sha256", "labels_sha256", "classes", "attacked_at")


@dataclass
class Proof:
    """What became of one attack's claims.

    Attributes:
        cell, attack, attacked: whose claims.
        claims: (image, seed) pairs that the run calls not robust.
        proved: misclassified again.
        near: not misclassified again, but with a margin below 1e-3.
        failed: not misclassified again, and by more than that.
        over_budget: perturbations outside the threat model; none of their claims counts as proved.
        images: claimed on any seed.
        seeds: how many the defence was asked on.
        broken_share: over those images and seeds, the share misclassified; its Wilson interval on the images.
        failures: numbers of the first images that failed.
    """

    cell: str
    attack: str
    attacked: str
    claims: int = 0
    proved: int = 0
    near: int = 0
    failed: int = 0
    over_budget: int = 0
    images: int = 0
    seeds: int = 1
    asked: int = 0
    wrong: int = 0
    failures: list[int] = field(default_factory=list)

    @property
    def broken_share(self) -> float:
        return self.wrong / self.asked if self.asked else 0.0

    @property
    def interval(self) -> Interval | None:
        return wilson(self.broken_share, self.images) if self.images else None

    @property
    def holds(self) -> bool:
        return self.failed == 0 and self.over_budget == 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "broken_share": self.broken_share, "interval_95": self.interval}


def relocated(config: RunConfig, model: str | None, data: str | None) -> RunConfig:
    """The configuration with its one model, or its one dataset, found elsewhere.

    Raises:
        UsageError: there are several.
    """
    changes: dict[str, Any] = {}
    for key, spec in (("models", model), ("datasets", data)):
        tables = getattr(config, key)
        if spec is not None and len(tables) != 1:
            raise UsageError(f"the run has {len(tables)} {key}; {spec!r} can stand for one only.")
        if spec is not None:
            changes[key] = [tables[0].model_copy(update={"spec": spec, "name": tables[0].label})]
    return config.model_copy(update=changes)


def verify(
    folder: str | Path,
    *,
    device: str | None = None,
    batch_size: int | None = None,
    seeds: int | None = None,
    model: str | None = None,
    data: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Proof]:
    """Classify every image that a run calls not robust again, with the perturbation it keeps.

    Args:
        folder: a run made with ``save_adv``.
        device: where; a GPU when there is one.
        batch_size: images a forward; the run's when not given.
        seeds: draws on which a randomised defence is asked; those of the run when not given.
        model, data: where the run's model or dataset lies on this machine.
        progress: told what begins.

    Returns:
        One :class:`Proof` for each attack on each target, also written to ``verify.json`` in the folder.

    Raises:
        UsageError: a run without perturbations, or another model, defence or dataset than its own (naming the field).
    """
    result = read(folder)
    if not result.config.save_adv:
        raise UsageError(f"the run in {str(folder)!r} kept no perturbations; make it again with --save-adv.")
    if seeds is not None and seeds < 1:
        raise UsageError(f"seeds is {seeds}; a whole number of at least 1 is expected.")
    config = relocated(result.config, model, data)
    builder = Builder(config, choose_device(device))
    check_images_same(builder, result)
    proofs: list[Proof] = []
    for cell in result.cells:
        (progress or (lambda _: None))(cell.cell.name)
        own = replace(cell, cell=replace(cell.cell, model=_found(config.models, cell.cell.model.label)))
        subject = builder.subject(own.cell)
        check_subject(subject, own.facts, cell.cell.name)
        proofs += _Verifier(result, own, subject, builder, batch_size or config.batch_size, seeds).proofs()
    with writing(result.folder):
        write_json(result.folder / "verify.json", {"proofs": [proof.to_dict() for proof in proofs]})
    return proofs


def _found(tables: Any, label: str) -> Any:
    return next(table for table in tables if table.label == label)


def check_images_same(builder: Builder, result: RunResult) -> None:
    """
    Raises:
        UsageError: a dataset holds other images, labels or classes than the run's.
    """
    for label, theirs in result.facts["contents"].items():
        ours = builder.facts()["contents"][label]
        check_same(_only(theirs, SAME_IMAGES), _only(ours, SAME_IMAGES), f"the run's dataset {label!r}")


def check_subject(subject: Subject, stored: Facts, name: str) -> None:
    """
    Raises:
        UsageError: the model or the defence is another than the stored one.
    """
    check_same(_only(stored, SAME_MODEL), _only(subject.facts, SAME_MODEL), f"the cell {name!r}")


def _only(facts: Mapping[str, Any], keys: tuple[str, ...]) -> Facts:
    return {key: facts.get(key) for key in keys}


def banks(result: RunResult, cell: CellResult) -> Iterator[dict[int, Broken]]:
    """A cell's perturbations, unit by unit.

    Raises:
        UsageError: a file that the store promises is missing or damaged.
    """
    for unit in cell.banks:
        yield read_bank(bank_file(result.folder, cell.cell.number, unit))


class _Verifier:
    """One cell's claims."""

    def __init__(
        self,
        result: RunResult,
        cell: CellResult,
        subject: Subject,
        builder: Builder,
        batch_size: int,
        seeds: int | None,
    ) -> None:
        self.result, self.cell, self.subject, self.builder = result, cell, subject, builder
        self.batch_size = batch_size
        count = len(cell.seeds) if seeds is None or not subject.randomized else seeds
        self.seeds = range(subject.seeds.start, subject.seeds.start + count)
        self.place = {int(sample): place for place, sample in enumerate(cell.samples)}

    def proofs(self) -> list[Proof]:
        name = self.cell.cell.name
        proofs = [Proof(name, *named[:2], seeds=len(self.seeds)) for named in self.cell.attacks]
        claimed = self.cell.adversarial != self.cell.labels  # (attacks, seeds, n)
        waiting = claimed.any(axis=1)
        with Decoder() as decoder:
            pieces = Pieces(self.builder, self.cell, decoder)
            for broken in banks(self.result, self.cell):
                for number, (ids, delta) in broken.items():
                    self._check(proofs[number], pieces.images(ids), ids, delta, claimed[number])
                    waiting[number, [self.place[int(i)] for i in ids]] = False
            # what is left fell without a perturbation: the clean image itself is the proof
            for number in waiting.any(axis=1).nonzero()[0]:
                for ids in torch.from_numpy(self.cell.samples[waiting[number]]).split(self.result.config.unit):
                    x = pieces.images(ids)
                    self._check(proofs[number], x, ids, torch.zeros_like(x), claimed[number])
        return proofs

    def _check(self, proof: Proof, x: Tensor, ids: Tensor, delta: Tensor, claimed: np.ndarray[Any, Any]) -> None:
        """One piece of a bank: x clean, and what was added to it."""
        x_adv = x + delta
        rows = [self.place[int(i)] for i in ids]
        y = torch.from_numpy(self.cell.labels[rows])
        device = self.builder.device
        inside = within_budget(self.subject.threat, x, x_adv).numpy()
        shown = clean_unless_within(self.subject.threat, x, x_adv).to(device)
        answers = ask(self.subject.judge, shown, y.to(device), ids.to(device), self.seeds, self.batch_size)
        wrong = (answers.predicted != y.numpy()) & inside
        stored = claimed[:, rows][: len(self.seeds)]
        again, margin = wrong[: len(stored)], answers.margin[: len(stored)]
        lost = stored & ~again & inside
        near = lost & (np.abs(margin) < NEAR)
        proof.claims += int(stored.sum())
        proof.proved += int((stored & again).sum())
        proof.near += int(near.sum())
        proof.failed += int((lost & ~near).sum())
        proof.over_budget += int((~inside).sum())
        proof.images += len(ids)
        proof.asked += wrong.size
        proof.wrong += int(wrong.sum())
        bad = ((lost & ~near).any(axis=0) | ~inside).nonzero()[0]
        proof.failures = [*proof.failures, *(int(ids[i]) for i in bad)][:20]


class Pieces:
    """Clean images of a cell by their number."""

    def __init__(self, builder: Builder, cell: CellResult, decoder: Decoder) -> None:
        label = cell.cell.dataset.label
        self.dataset, self.shape = builder.datasets[label], builder.shapes[label]
        self.index = {int(sample): index for index, sample in enumerate(self.dataset.ids)}
        self.decoder = decoder

    def images(self, ids: Tensor) -> Tensor:
        """(k, C, H, W), on the CPU.

        Raises:
            UsageError: one that could be decoded before cannot be now.
        """
        batch = self.decoder.begin(self.dataset, [self.index[int(i)] for i in ids], self.shape).result()
        if batch.corrupt:
            raise UsageError(f"an image that the run has verdicts on cannot be decoded here: {batch.corrupt[0][1]}")
        return batch.x
