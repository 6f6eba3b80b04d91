"""One work unit: attacked by the evaluation's own runner, then judged once more for the record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clipdefense.attacks.context import predict
from clipdefense.attacks.objectives import margin
from clipdefense.attacks.options import Status
from clipdefense.evaluation.fingerprint import hashed_once
from clipdefense.evaluation.results import Row, still_standing
from clipdefense.evaluation.runner import evaluate
from clipdefense.evaluation.targets import TRANSFER
from clipdefense.runs.bank import Broken
from clipdefense.runs.build import Subject
from clipdefense.runs.config import RunConfig
from clipdefense.runs.decode import Batch
from clipdefense.runs.results import AFTER
from clipdefense.runs.store import Finished, Named, Verdict
from clipdefense.runs.units import Cell


class Say(Protocol):
    """Told what begins, and how far it is where that is known."""

    def __call__(self, what: str, status: Status | None = None) -> None: ...


@dataclass(frozen=True)
class Seen:
    """What the judged model says.

    Attributes:
        predicted: (seeds, n) classes.
        margin: (seeds, n) ``z_label - max z_other``, negative where misclassified.
    """

    predicted: Tensor
    margin: Tensor


def look(subject: Subject, x: Tensor, y: Tensor, ids: Tensor, seeds: range, batch_size: int) -> Seen:
    """One fp32 forward an image and seed, on x's device; the answers are on the CPU."""
    judge, predicted, margins = subject.judge, [], []
    for seed in seeds:
        keys = {"ids": ids, "seed": seed} if subject.randomized else {}
        logits = predict(judge, x, batch_size=batch_size, **keys)
        predicted.append(logits.argmax(dim=1))
        margins.append(-margin(logits, y))
    return Seen(torch.stack(predicted).cpu(), torch.stack(margins).double().cpu())


class _Record:
    """A unit's verdicts, attack after attack."""

    def __init__(self, subject: Subject, x: Tensor, y: Tensor, ids: Tensor, bucket: int, cumulative: bool) -> None:
        self.cumulative, self.left = cumulative, np.ones((0, 0), bool)
        self.subject, self.x, self.y, self.ids, self.bucket = subject, x, y, ids, bucket
        self.clean = self.look(x).predicted
        self.verdicts: list[Verdict] = []
        self.attacks: list[Named] = []
        self.left_out: tuple[str, ...] = ()
        self.broken: dict[int, Broken] = {}
        self.unrepeatable = 0

    def look(self, x: Tensor) -> Seen:
        return look(self.subject, x, self.y, self.ids, self.subject.seeds, self.bucket)

    def add(self, row: Row) -> None:
        """One attack on one target; of a cumulative row the store gets what was said of its own images."""
        assert row.adversarial is not None
        number = len(self.attacks)
        named = (row.attack, row.attacked, row.kind, row.draws)
        if self.subject.defense is not None and row.kind == "itself":
            # on these images the defence changed nothing; on those of another unit it may
            named = (row.attack, TRANSFER, "transfer", row.draws)
        self.attacks.append(named)
        # the image that is judged is the one that x and the perturbation in the bank give again
        delta = row.adversarial.to(self.x.device) - self.x
        seen = self.look(self.x + delta)
        right, label = seen.predicted == self.y.cpu(), self.y.tolist()
        if self.cumulative:
            before = self.left if row.attack.startswith(AFTER) else (self.clean == self.y.cpu()).numpy()
            self.left = still_standing(right.numpy(), before)
        expected = self.left if self.cumulative else right.numpy()
        self.unrepeatable += int((expected != row.correct).any(axis=0).sum())
        moved = delta.flatten(1).any(dim=1).cpu()
        tried = (self.clean == self.y.cpu()).any(dim=0)
        steps = [None if known else 0 for known in tried.tolist()]
        for index, seed in enumerate(self.subject.seeds):
            columns = (
                self.ids.tolist(),
                label,
                self.clean[index].tolist(),
                seen.predicted[index].tolist(),
                seen.margin[index].tolist(),
                steps,
            )
            self.verdicts += [(number, seed, *values, self.bucket) for values in zip(*columns)]
        worth = (~right.all(dim=0) & moved).nonzero()[:, 0]
        if len(worth):
            there = worth.to(delta.device)
            self.broken[number] = self.ids[there].cpu(), delta[there].float().cpu()


def _attacked(
    cell: Cell,
    subject: Subject,
    images: tuple[Tensor, Tensor, Tensor],
    config: RunConfig,
    bucket: int,
    progress: Say,
    first: bool,
) -> _Record:
    x, y, ids = images
    record = _Record(subject, x, y, ids, bucket, config.cumulative)
    title = cell.model.label if subject.defense is None else cell.defense.label
    restart: Callable[[], None] = getattr(subject.defense, "reset", lambda: None)
    # one at a time, since the images that an attack leaves are as large as the unit; but what an adaptive evaluation
    # adds of its own is to run once, and a cumulative one looks at all of them
    together = config.adaptive or config.cumulative
    for specs in [subject.attacks] if together else [[spec] for spec in subject.attacks]:
        restart()  # a unit's draws do not depend on the units before it, whoever did them
        evaluation = evaluate(
            subject.model,
            x,
            y,
            subject.threat,
            attacks=specs,
            defense=subject.defense,
            adaptive=config.adaptive,
            cumulative=config.cumulative,
            views=cell.defense.views,
            eot=cell.defense.eot,
            batch_size=bucket,
            verdict_seeds=config.verdict_seeds,
            seed=config.seed,
            ids=ids,
            keep_adversarial=True,
            progress=progress,
            watch=(lambda status: progress(f"{title}: {status.stage}", status)) if first else None,
            name=title,
        )
        record.left_out = evaluation.left_out
        for row in evaluation.rows:
            record.add(row)
    return record


def judge_unit(
    cell: Cell,
    subject: Subject,
    batch: Batch,
    config: RunConfig,
    device: str,
    bucket: int,
    progress: Say,
    first: bool = False,
) -> tuple[Finished, dict[int, Broken]]:
    """Attack and judge a work unit's images.

    Args:
        cell: what they belong to.
        subject: what is judged.
        batch: the images.
        config: the run.
        device: where to compute.
        bucket: images a forward.
        progress: told what begins.
        first: tell how long a unit will take, which costs a few passes, and how far each attack is.

    Returns:
        What goes into the store, and the perturbations that broke images.
    """
    began = time.monotonic()
    x, y, ids = (tensor.to(device) for tensor in (batch.x, batch.y, batch.ids))
    with hashed_once(subject.hashes):
        record = _attacked(cell, subject, (x, y, ids), config, bucket, progress, first) if len(x) else None
    finished = Finished(
        verdicts=[] if record is None else record.verdicts,
        attacks=[] if record is None else record.attacks,
        left_out=() if record is None else record.left_out,
        corrupt=batch.corrupt,
        images=len(x),
        pixels_sha256=batch.sha256,
        unrepeatable=0 if record is None else record.unrepeatable,
        bank=config.save_adv and record is not None and bool(record.broken),
        device=str(device),
        threads=torch.get_num_threads(),
        bucket=bucket,
        seconds=time.monotonic() - began,
    )
    return finished, {} if record is None else record.broken
