"""One work unit: attacked and judged by the evaluation's own runner, and written down as rows of the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clipdefense.attacks.options import Status
from clipdefense.evaluation.answers import Answers, ask
from clipdefense.evaluation.fingerprint import hashed_once
from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.evaluation.runner import evaluate
from clipdefense.evaluation.targets import TRANSFER
from clipdefense.runs.bank import Broken
from clipdefense.runs.build import Subject
from clipdefense.runs.config import RunConfig
from clipdefense.runs.decode import Batch
from clipdefense.runs.results import NEAR
from clipdefense.runs.store import Finished, Named, Verdict
from clipdefense.runs.units import Cell


class Say(Protocol):
    """Told what begins, and how far it is where that is known."""

    def __call__(self, what: str, status: Status | None = None) -> None: ...


class _Unit:
    """The images of a work unit on the device, and what the attacks leave of them besides their rows."""

    def __init__(self, subject: Subject, batch: Batch, device: str, bucket: int, keep: bool, doubt: bool) -> None:
        """
        Args:
            subject: what is judged.
            batch: the images.
            device: where to compute.
            bucket: images a forward.
            keep: keep the perturbations that break an image on any draw.
            doubt: show the model some images twice: does it say the same?
        """
        self.x, self.y, self.ids = (tensor.to(device) for tensor in (batch.x, batch.y, batch.ids))
        self.subject, self.label, self.bucket = subject, batch.y.numpy(), bucket
        self.keep, self.doubt = keep, doubt
        self.broken: dict[int, Broken] = {}
        self.attacks: list[Named] = []
        self.unrepeatable = 0

    def add(self, row: Row, x_adv: Tensor) -> None:
        """One attack on one target."""
        answers, number, kind = _answers(row), len(self.attacks), (row.attacked, row.kind)
        if self.subject.defense is not None and row.kind == "itself":
            # on these images the defence changed nothing; on those of another unit it may
            kind = (TRANSFER, "transfer")
        self.attacks.append((row.attack, *kind, row.draws))
        if self.doubt:
            self.unrepeatable += self.changed(answers, x_adv)
        if self.keep:
            delta = x_adv - self.x
            fallen = torch.from_numpy((answers.predicted != self.label).any(axis=0)).to(delta.device)
            worth = (fallen & delta.flatten(1).any(dim=1)).nonzero()[:, 0]
            if len(worth):
                self.broken[number] = self.ids[worth].cpu(), delta[worth].float().cpu()

    def changed(self, answers: Answers, x_adv: Tensor) -> int:
        """Images of the first batch of which the model says another thing when it is shown that batch once more."""
        few = slice(self.bucket)
        again = ask(self.subject.judge, x_adv[few], self.y[few], self.ids[few], self.subject.seeds, self.bucket)
        moved = np.abs(again.margin - answers.margin[:, few]) > NEAR
        return int((moved | (again.predicted != answers.predicted[:, few])).any(axis=0).sum())

    def verdicts(self, evaluation: Evaluation) -> list[Verdict]:
        """What was said of each image, clean and attacked; in a cumulative run too of each attack's own images."""
        clean, ids, label = _answers(evaluation.clean).predicted, self.ids.tolist(), self.label.tolist()
        found: list[Verdict] = []
        for number, row in enumerate(evaluation.rows):
            said = _answers(row)
            steps = [None] * len(ids) if row.steps is None else row.steps.tolist()
            for index, seed in enumerate(self.subject.seeds):
                columns = (clean[index].tolist(), said.predicted[index].tolist(), said.margin[index].tolist(), steps)
                found += [(number, seed, *values, self.bucket) for values in zip(ids, label, *columns)]
        return found


def _answers(row: Row) -> Answers:
    assert row.answers is not None, "an evaluation's own rows have them"
    return row.answers


def _evaluated(unit: _Unit, cell: Cell, config: RunConfig, progress: Say, first: bool) -> Evaluation:
    subject = unit.subject
    title = cell.model.label if subject.defense is None else cell.defense.label
    restart: Callable[[], None] = getattr(subject.defense, "reset", lambda: None)
    restart()  # a unit's draws do not depend on the units before it, whoever did them
    return evaluate(
        subject.model,
        unit.x,
        unit.y,
        subject.threat,
        attacks=subject.attacks,
        defense=subject.defense,
        adaptive=config.adaptive,
        cumulative=config.cumulative,
        views=cell.defense.views,
        eot=cell.defense.eot,
        batch_size=unit.bucket,
        verdict_seeds=config.verdict_seeds,
        seed=config.seed,
        ids=unit.ids,
        on_row=unit.add,
        progress=progress,
        watch=(lambda status: progress(f"{title}: {status.stage}", status)) if first else None,
        name=title,
    )


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
        first: of this process in the cell. It tells how long a unit will take and how far each attack is, and has the
            model answer a batch twice, which cost a few passes.

    Returns:
        What goes into the store, and the perturbations that broke images.
    """
    began = time.monotonic()
    unit = _Unit(subject, batch, device, bucket, config.save_adv, doubt=first)
    with hashed_once(subject.hashes):
        evaluation = _evaluated(unit, cell, config, progress, first) if len(batch.x) else None
    finished = Finished(
        verdicts=[] if evaluation is None else unit.verdicts(evaluation),
        attacks=unit.attacks,
        left_out=() if evaluation is None else evaluation.left_out,
        corrupt=batch.corrupt,
        images=len(batch.x),
        pixels_sha256=batch.sha256,
        unrepeatable=unit.unrepeatable,
        bank=bool(unit.broken),
        device=str(device),
        threads=torch.get_num_threads(),
        bucket=bucket,
        seconds=time.monotonic() - began,
    )
    return finished, unit.broken
