"""The loop over a run's work units: decode ahead, attack, commit; whatever ends it, the same call goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import clipdefense.runs.exhibits as exhibits
from clipdefense.attacks.options import Status
from clipdefense.errors import UsageError
from clipdefense.evaluation.fingerprint import machine
from clipdefense.evaluation.runner import rehearse
from clipdefense.runs.bank import Broken, bank_file, write_bank
from clipdefense.runs.build import Builder, Subject, choose_device
from clipdefense.runs.config import RunConfig
from clipdefense.runs.decode import Batch, Decoder
from clipdefense.runs.judge import Say, judge_unit
from clipdefense.runs.memory import halved
from clipdefense.runs.results import read
from clipdefense.runs.store import Finished, Store, writing
from clipdefense.runs.summary import write
from clipdefense.runs.units import Cell, Job, Shard, cells, jobs


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done, total: work units of this shard, those of earlier sessions included.
        what: what begins now.
        status: how far the attack is that runs now, where that is known.
    """

    done: int
    total: int
    what: str
    status: Status | None = None


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    shard: Shard | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> int:
    """Do every work unit that this shard owns and that is not done yet.

    Args:
        config: from :func:`clipdefense.runs.config.read_config`.
        folder: where verdicts go; a folder in which the same run was begun is gone on with.
        shard: this process's part; under ``accelerate launch`` or ``torchrun`` that part is split over the processes.
        device: such as ``"cuda:1"``; a GPU when there is one, each local process its own.
        progress: told how far it is.

    Returns:
        The number of work units done now.

    Raises:
        UsageError: names or options that cannot be used, a folder of another run (naming the field that differs) or
            on which another process works, a disk that is full: nothing that was committed is lost.
    """
    part = (shard or Shard()).launched()
    builder = Builder(config, choose_device(device, int(os.environ.get("LOCAL_RANK", "0") or 0)))
    sizes = {label: len(dataset) for label, dataset in builder.datasets.items()}
    owned = part.owned(jobs(cells(config), sizes, config.unit))
    folder = Path(folder)
    with Store(folder, part, builder.facts(), machine(), config.settings()) as store:
        before = store.done()
        _check(builder, store, owned, before)
        pending = [job for job in owned if (job.cell.number, job.unit) not in before]
        loop = _Loop(config, builder, store, len(owned), progress or (lambda _: None))
        loop.all(pending)
    if part.count == 1:
        with writing(folder):
            write(read(folder), folder)
    return len(pending)


def _check(builder: Builder, store: Store, owned: list[Job], before: Mapping[tuple[int, int], str]) -> None:
    """What is still to be done can be done, and what was done was done with these weights, defences and pixels.

    Each model, defence and threat model once, on the data set with the fewest classes; of each data set the first and
    the last work unit that is done.

    Raises:
        UsageError: a file that is missing, an option or a view that there is not, or another model, defence or image
            than those of the finished work units.
    """
    begun = {cell for cell, _ in before}
    pending = {job.cell.number for job in owned if (job.cell.number, job.unit) not in before}
    chosen: dict[tuple[str, str, str], Cell] = {}
    for cell in {job.cell.number: job.cell for job in owned}.values():
        key = (cell.model.label, cell.defense.label, cell.threat.label)
        if key not in chosen or _cost(builder, cell, begun) < _cost(builder, chosen[key], begun):
            chosen[key] = cell
    for cell in sorted(chosen.values(), key=lambda cell: cell.number):
        subject = builder.subject(cell)
        if pending:
            image, label = (part.to(builder.device) for part in builder.samples[cell.dataset.label])
            rehearse(subject.model, image[None], label[None], subject.threat, subject.attacks)
        if cell.number in begun:
            store.enter(cell, subject.facts)
    done: dict[str, list[Job]] = {}
    for job in owned:
        if (job.cell.number, job.unit) in before:
            done.setdefault(job.cell.dataset.label, []).append(job)
    with Decoder() as decoder:
        for listed in done.values():
            for job in {id(job): job for job in (listed[0], listed[-1])}.values():
                _check_pixels(builder, decoder, job, before[job.cell.number, job.unit], store.folder)


def _check_pixels(builder: Builder, decoder: Decoder, job: Job, pixels: str, folder: Path) -> None:
    if _begun(builder, decoder, job).result().sha256 != pixels:
        raise UsageError(
            f"data set {job.cell.dataset.label!r} has other pixels in images {job.start} to {job.stop - 1} than when "
            f"the run in {str(folder)!r} judged them; bring the images back, or give this run another folder."
        )


def _cost(builder: Builder, cell: Cell, begun: set[int]) -> tuple[bool, int]:
    """What to look at first: a cell with verdicts, then one that is quick to load."""
    return cell.number not in begun, len(builder.datasets[cell.dataset.label].classes)


def _begun(builder: Builder, decoder: Decoder, job: Job) -> Future[Batch]:
    """A work unit's images, on their way."""
    label = job.cell.dataset.label
    return decoder.begin(builder.datasets[label], range(job.start, job.stop), builder.shapes[label])


def first_images(builder: Builder, cell: Cell, n: int = 64) -> tuple[Tensor, Tensor]:
    """Images of a cell's dataset for an audit, evenly over its classes, on the builder's device, with their labels."""
    dataset = builder.datasets[cell.dataset.label]
    chosen = dataset.sample(min(n, len(dataset)), seed=builder.config.seed)
    with Decoder() as decoder:
        batch = decoder.begin(chosen, range(len(chosen)), builder.shapes[cell.dataset.label]).result()
    return batch.x.to(builder.device), batch.y.to(builder.device)


class _Loop:
    def __init__(
        self, config: RunConfig, builder: Builder, store: Store, total: int, progress: Callable[[Progress], None]
    ) -> None:
        self.config, self.builder, self.store, self.progress = config, builder, store, progress
        self.total, self.bucket = total, config.batch_size
        self.told: frozenset[int] = frozenset()  # cells of which it was told how long a unit takes

    def all(self, pending: list[Job]) -> None:
        with Decoder(pinned=self.builder.device.startswith("cuda")) as decoder:
            coming: Future[Batch] | None = None
            for index, job in enumerate(pending):
                batch = (coming or _begun(self.builder, decoder, job)).result()
                after = pending[index + 1 : index + 2]
                coming = _begun(self.builder, decoder, after[0]) if after else None
                self._one(job, batch, self.total - len(pending) + index)

    def _one(self, job: Job, batch: Batch, done: int) -> None:
        subject = self.builder.subject(job.cell)
        self.store.enter(job.cell, subject.facts)
        first, self.told = job.cell.number not in self.told, self.told | {job.cell.number}

        def say(what: str, status: Status | None = None) -> None:
            self.progress(Progress(done, self.total, what, status))

        unit, broken = self._judged(job, subject, batch, say, first)
        if job.unit == 0 and self.config.exhibits and len(batch.x):
            self._exhibit(job, subject, batch)  # now the batch size is one that memory suffices for
        if unit.bank:
            with writing(self.store.folder):
                write_bank(bank_file(self.store.folder, job.cell.number, job.unit), broken)
        self.store.commit(job, unit)
        self.progress(Progress(done + 1, self.total, job.cell.name))

    def _exhibit(self, job: Job, subject: Subject, batch: Batch) -> None:
        """Losses and pictures of the cell's first images, for the page."""
        path = exhibits.exhibit_file(self.store.folder, job.cell.number)
        of = exhibits.identity(job.cell, subject.facts)
        first = slice(exhibits.LOOKED_AT)
        x, y, ids = (part[first].to(self.builder.device) for part in (batch.x, batch.y, batch.ids))
        try:
            made = exhibits.make(job.cell, subject, x, y, ids, self.bucket)
        except (RuntimeError, UsageError) as error:  # the page is without them; the verdicts are what matters
            warnings.warn(f"no loss curves or pictures of {job.cell.name!r}: {error}", stacklevel=2)
            return
        if made is not None:
            with writing(self.store.folder):
                exhibits.write(path, made, of)

    def _judged(
        self, job: Job, subject: Subject, batch: Batch, say: Say, first: bool
    ) -> tuple[Finished, dict[int, Broken]]:
        """The unit's outcome, at half the batch size whenever memory does not suffice."""

        def judged(bucket: int) -> tuple[Finished, dict[int, Broken]]:
            return judge_unit(job.cell, subject, batch, self.config, self.builder.device, bucket, say, first)

        advice = "take a smaller model or size, another device, or an attack with gradient_dtype=bf16"
        outcome, self.bucket = halved(judged, self.bucket, repr(job.cell.name), advice)
        return outcome
