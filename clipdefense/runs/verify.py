"""Re-proving: every "not robust" of a run, with one forward an image and seed, on any machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipdefense.attacks.foreign import within_budget
from clipdefense.attacks.norms import per_image
from clipdefense.errors import UsageError, check_whole
from clipdefense.evaluation.answers import Answers, ask
from clipdefense.evaluation.statistics import Interval, wilson
from clipdefense.files import write_json
from clipdefense.runs.bank import Broken, bank_file, check_banks, read_bank
from clipdefense.runs.build import Builder, Facts, Subject, choose_device
from clipdefense.runs.config import RunConfig
from clipdefense.runs.decode import Decoder
from clipdefense.runs.memory import halved, sufficed
from clipdefense.runs.pixels import Images, Pixels, unfinished
from clipdefense.runs.results import NEAR, CellResult, RunResult, read
from clipdefense.runs.store import check_same

# What a verdict depends on wherever it is looked at; paths, versions and the machine may be others.
SAME_MODEL = ("weights_sha256", "class_names_sha256", "image_size", "mean", "std", "dtype", "defense")
SAME_IMAGES = ("images", "ids_sha256", "labels_sha256", "classes", "attacked_at")


@dataclass
class Proof:
    """What became of one attack's claims.

    Attributes:
        cell, attack, attacked: whose claims.
        claims: (image, seed) pairs that the run calls not robust, on the seeds that are asked.
        proved: of the claims, those misclassified again.
        near: not misclassified again, but with a margin below 1e-3.
        failed: not misclassified again, and by more than that.
        over_budget: with a perturbation outside the threat model, and so never proved.
        images: claimed on any seed of the run.
        seeds: how many the defence was asked on.
        asked: (image, seed) pairs of those images and seeds, claimed or not.
        wrong: of the asked, those misclassified within the budget.
        broken_share: wrong of asked; its Wilson interval on the images.
        failures: numbers of the first images that failed or were over budget.
        units: work units of the cell that were decoded.
        other_pixels: of them, those that hold other pixels here than in the run. Decoders differ by a grey level from
            version to version; images that were replaced differ by more. Either may be why a claim fails.
        failed_on_other_pixels: claims failed or over budget in those.
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
    units: int = 0
    other_pixels: int = 0
    failed_on_other_pixels: int = 0

    @property
    def broken_share(self) -> float:
        return self.wrong / self.asked if self.asked else 0.0

    @property
    def interval(self) -> Interval | None:
        return wilson(self.broken_share, self.images) if self.images else None

    @property
    def share_in_words(self) -> str:
        """The broken share of a randomised defence with its interval; empty where one draw says it all."""
        if self.seeds == 1 or self.interval is None:
            return ""
        low, high = self.interval
        share = f"{100 * self.broken_share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{self.attack} ({self.attacked}) breaks on {share} of {self.seeds} draws of its {self.images} images"

    @property
    def holds(self) -> bool:
        return self.failed == 0 and self.over_budget == 0

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Claims, and what became of them: proved, near, failed, over budget, which add up to the claims."""
        return self.claims, self.proved, self.near, self.failed, self.over_budget

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "broken_share": self.broken_share, "interval_95": self.interval}


def closing(found: Sequence[Proof]) -> list[str]:
    """What all the proofs come to, in a few sentences: the counts, and other pixels than the run's."""
    claims, proved, near, failed, over = (sum(counts) for counts in zip((0,) * 5, *(proof.counts for proof in found)))
    said = [f"{claims} claims: {proved} proved again, {near} within 1e-3, {failed} failed, {over} over budget"]
    cells = {proof.cell: (proof.other_pixels, proof.units) for proof in found}
    other, units = (sum(counts) for counts in zip((0, 0), *cells.values()))
    if other:
        unlike = sum(proof.failed_on_other_pixels for proof in found)
        said.append(
            f"{other} of {units} work units hold other pixels here than in the run: what fails in them may be the "
            f"images, not the attack ({unlike} of the {failed + over} claims that fail are in them)"
        )
    return said


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
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Proof]:
    """Classify every image that a run calls not robust again, with the perturbation it keeps.

    The images' pixels are compared with the run's, a work unit at a time. Where they differ that is counted and no
    refusal, since decoders differ. An unfinished run is warned of; what it has is proved.

    Args:
        folder: a run made with ``save_adv``. It may be read-only.
        device: where; a GPU when there is one.
        batch_size: images a forward, at least 1; when not given, the fewest with which the run itself went on. Halved,
            with a warning, whenever memory does not suffice.
        seeds: draws on which a randomised defence is asked, at least 1; those of the run when not given.
        model, data: where the run's model or dataset lies on this machine.
        out: the JSON file for the proofs; ``verify.json`` in the folder when not given. Where it cannot be written,
            a warning says so and the proofs are returned all the same.
        progress: told what begins.

    Returns:
        One :class:`Proof` for each attack on each target.

    Raises:
        UsageError: a run without verdicts or perturbations, or another model, defence or dataset than its own (naming
            the field); memory does not suffice for one image at a time.
    """
    for name, value in (("seeds", seeds), ("batch_size", batch_size)):
        if value is not None:
            check_whole(name, value, 1)
    result = read(folder)
    check_kept(result, result.cells)
    config = relocated(result.config, model, data)
    builder = Builder(config, choose_device(device))
    check_images_same(builder, result)
    missing = unfinished(result)
    if missing:
        said = f"the run in {str(folder)!r} is NOT FINISHED: {missing} work units are missing; what is there is proved."
        warnings.warn(said, stacklevel=2)
    proofs: list[Proof] = []
    asker = Asker(builder.device, sufficed(result.cells) if batch_size is None else batch_size)
    for cell in result.cells:
        (progress or (lambda _: None))(cell.cell.name)
        own = replace(cell, cell=replace(cell.cell, model=_found(config.models, cell.cell.model.label)))
        subject = builder.subject(own.cell)
        check_subject(subject, own.facts, cell.cell.name)
        proofs += _Verifier(result, own, subject, builder, asker, seeds).proofs()
    _write(result.folder / "verify.json" if out is None else Path(out), missing, proofs)
    return proofs


def _write(place: Path, missing: int, proofs: Sequence[Proof]) -> None:
    try:
        write_json(place, {"missing_units": missing, "proofs": [proof.to_dict() for proof in proofs]})
    except OSError as error:  # such as a published archive, whose proofs are worth no less
        said = f"{str(place)!r} was not written ({error.strerror or error}); --out FILE writes it elsewhere."
        warnings.warn(said, stacklevel=3)


def check_kept(result: RunResult, cells: Sequence[CellResult]) -> None:
    """
    Raises:
        UsageError: the run has no verdicts, kept no perturbations, or a file of these cells' is missing (naming it).
    """
    if not result.config.save_adv:
        raise UsageError(f"the run in {str(result.folder)!r} kept no perturbations; make it again with --save-adv.")
    if not result.cells:
        raise UsageError(f"the run in {str(result.folder)!r} has no verdicts yet; let it finish a work unit first.")
    check_banks(bank_file(result.folder, cell.cell.number, unit) for cell in cells for unit in cell.banks)


def _found(tables: Any, label: str) -> Any:
    return next(table for table in tables if table.label == label)


def check_images_same(builder: Builder, result: RunResult) -> None:
    """
    Raises:
        UsageError: a dataset holds other images, labels or classes than the run's.
    """
    here = builder.facts()["contents"]  # hashes every dataset's numbers and labels
    for label, theirs in result.facts["contents"].items():
        check_same(_only(theirs, SAME_IMAGES), _only(here[label], SAME_IMAGES), f"the run's dataset {label!r}")


def check_subject(subject: Subject, stored: Facts, name: str) -> None:
    """
    Raises:
        UsageError: the model or the defence is another than the stored one.
    """
    check_same(_only(stored, SAME_MODEL), _only(subject.facts, SAME_MODEL), f"the cell {name!r}")


def _only(facts: Mapping[str, Any], keys: tuple[str, ...]) -> Facts:
    return {key: facts.get(key) for key in keys}


class Asker:
    """Asks judged models about perturbed images; where memory does not suffice, with fewer a forward from there on."""

    def __init__(self, device: str, size: int) -> None:
        """
        Args:
            device: where.
            size: images a forward to begin with.
        """
        self.device, self.size = device, size

    def __call__(
        self, subject: Subject, name: str, x: Tensor, x_adv: Tensor, y: Tensor, ids: Tensor, seeds: range
    ) -> tuple[NDArray[np.bool_], Answers]:
        """
        Args:
            subject: whose judged model is asked, under whose threat model; ``name`` its cell's, for messages.
            x, x_adv: (n, C, H, W) clean and perturbed; y: (n,) labels; ids: (n,); all on the CPU.
            seeds: of the draws.

        Returns:
            (n,) which are within the budget, and what was said; of those that are not, it was said of the clean image.
        """
        inside = within_budget(subject.threat, x, x_adv)
        asked, judge = (torch.where(per_image(inside, x), x_adv, x), y, ids), subject.judge

        def task(size: int) -> Answers:
            shown, labels, numbers = (tensor.to(self.device) for tensor in asked)
            return ask(judge, shown, labels, numbers, seeds, size)

        answers, self.size = halved(task, self.size, repr(name))
        return inside.numpy(), answers


class _Verifier:
    """One cell's claims."""

    def __init__(
        self,
        result: RunResult,
        cell: CellResult,
        subject: Subject,
        builder: Builder,
        asker: Asker,
        seeds: int | None,
    ) -> None:
        self.result, self.cell, self.subject, self.builder = result, cell, subject, builder
        self.ask = asker
        count = len(cell.seeds) if seeds is None or not subject.randomized else seeds
        self.seeds = range(subject.seeds.start, subject.seeds.start + count)
        self.claimed = cell.adversarial != cell.labels  # (attacks, seeds, n)

    def proofs(self) -> list[Proof]:
        name = self.cell.cell.name
        proofs = [Proof(name, *named[:2], seeds=len(self.seeds)) for named in self.cell.attacks]
        with Decoder() as decoder:
            images = Images(self.builder, self.cell.cell.dataset.label, decoder)
            pixels = Pixels(images, self.result, self.cell)
            units = pixels.units(self.cell.samples)
            for unit in np.unique(units[self.claimed.any(axis=(0, 1))]):
                self._unit(proofs, int(unit), units == unit, pixels)
        for proof in proofs:
            proof.units, proof.other_pixels = len(pixels.seen), len(pixels.other)
        return proofs

    def _unit(self, proofs: Sequence[Proof], unit: int, here: NDArray[np.bool_], pixels: Pixels) -> None:
        """The claims in one work unit, attack by attack."""
        path = bank_file(self.result.folder, self.cell.cell.number, unit)
        broken = read_bank(path) if unit in self.cell.banks else {}
        for number, proof in enumerate(proofs):
            rows = (here & self.claimed[number].any(axis=0)).nonzero()[0]
            if not len(rows):
                continue
            x = pixels.images(torch.from_numpy(self.cell.samples[rows]))
            failed = self._check(proof, x, self._delta(x, rows, broken.get(number), path), rows, number)
            if unit in pixels.other:
                proof.failed_on_other_pixels += failed

    def _delta(self, x: Tensor, rows: NDArray[np.int64], broken: Broken | None, path: Path) -> Tensor:
        """(k, C, H, W) what was added to each image; where nothing was, the clean image itself is the proof."""
        delta = torch.zeros_like(x)
        if broken is not None:
            if broken[1].shape[1:] != x.shape[1:]:
                sizes = f"{tuple(broken[1].shape[1:])}, and images {tuple(x.shape[1:])}"
                raise UsageError(f"perturbations {str(path)!r} have the shape {sizes}; they belong to another run.")
            row = {int(sample): index for index, sample in enumerate(self.cell.samples[rows])}
            # what a file holds of other images proves nothing
            for sample, kept in zip(broken[0].tolist(), broken[1]):
                if sample in row:
                    delta[row[sample]] = kept
        return delta

    def _check(self, proof: Proof, x: Tensor, delta: Tensor, rows: NDArray[np.int64], number: int) -> int:
        """x clean, and what was added to it; returns how many claims fail."""
        x_adv = x + delta
        ids, y = (torch.from_numpy(values[rows]) for values in (self.cell.samples, self.cell.labels))
        inside, answers = self.ask(self.subject, self.cell.cell.name, x, x_adv, y, ids, self.seeds)
        wrong = (answers.predicted != y.numpy()) & inside
        stored = self.claimed[number][:, rows][: len(self.seeds)]
        again, margin = wrong[: len(stored)], answers.margin[: len(stored)]
        lost = stored & ~again & inside
        near = lost & (np.abs(margin) < NEAR)
        bad = (lost & ~near) | (stored & ~inside)
        proof.claims += int(stored.sum())
        proof.proved += int((stored & again).sum())
        proof.near += int(near.sum())
        proof.failed += int((lost & ~near).sum())
        proof.over_budget += int((stored & ~inside).sum())
        proof.images += len(ids)
        proof.asked += wrong.size
        proof.wrong += int(wrong.sum())
        proof.failures = [*proof.failures, *ids.numpy()[bad.any(axis=0)].tolist()][:20]
        return int(bad.sum())
