"""The loop under every iterative attack: evaluate, let broken images leave, advance the rest, refill.

An attack is a per-image state machine (:class:`Method`); since each image carries its own state, an image that is
broken leaves at once and the next of its work unit takes the place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode, non_finite, non_finite_gradient, sent
from clipdefense.attacks.forward import Forward, evaluate
from clipdefense.attacks.objectives import Objective
from clipdefense.attacks.options import Options, Progress, Status
from clipdefense.checks import check_ids, check_images, check_labels
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.randomness import draw_seed
from clipdefense.threat import ThreatModel

State = dict[str, Tensor]
"""Per-image tensors, all (N, ...), no two sharing memory; holds ``x`` (clean) and ``x_adv`` (to evaluate next)."""

UNIT = 512
REPORT = 25  # steps between two reports of progress while no image leaves


class Evaluation(NamedTuple):
    """What the model says at ``state["x_adv"]``."""

    loss: Tensor  # (N,), what the attack maximises
    gradient: Tensor  # (N, C, H, W) of the loss; zero in rows for which none was asked, empty where no row asks
    wrong: Tensor  # (N,) bool, misclassified on most draws


class Method(Protocol):
    """An attack as a state machine over images, each at its own step. It replaces ``x_adv``, never writes into it."""

    evaluations: int  # an image gets at most so many
    uses_gradient: bool

    def start(self, x: Tensor, ids: Tensor) -> State:
        """The state of images that enter."""

    def advance(self, state: State, seen: Evaluation, age: Tensor) -> State:
        """The state after one evaluation; ``age`` (N,), on the CPU, counts those that each image had before."""

    def result(self, state: State) -> Tensor:
        """What an image that was never broken returns, (N, C, H, W)."""


class MinimumNorm(Method, Protocol):
    """A method whose points may lie outside the ball, and some of which are only looked at, without a gradient."""

    def inside(self, state: State) -> Tensor:
        """(N,) whether ``x_adv`` is within the budget."""

    def gradient_at(self, age: Tensor) -> Tensor:
        """(N,) whether an image's next evaluation needs its gradient; age and answer on the CPU."""


class Outcome(NamedTuple):
    """What a run leaves."""

    x_adv: Tensor  # (N, C, H, W)
    broken: Tensor  # (N,) bool: seen misclassified, within the budget, at x_adv; all False without early stop


@dataclass(frozen=True, eq=False)
class Task:
    """An attack's arguments, checked."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    ids: Tensor
    seed: int
    options: Options

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, options: Mapping[str, Any]) -> Task:
        """
        Raises:
            UsageError: images, labels or options that cannot be used.
        """
        settings = Options.of(options)
        seed, ids = prepare(model, x, y, settings.seed, settings.generator, settings.ids)
        settings.doubts.of_model(model)
        return cls(model, x.detach(), y.to(x.device, torch.int64), threat, ids, seed, settings)

    def rows(self, index: Tensor, progress: Progress | None) -> Task:
        """The same for some of the images."""
        options = replace(self.options, progress=progress)
        return replace(self, x=self.x[index], y=self.y[index], ids=self.ids[index], options=options)


def prepare(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    generator: torch.Generator | None,
    ids: Tensor | None,
) -> tuple[int, Tensor]:
    """Check an attack's arguments; returns (seed, ids), the seed drawn from the generator where one is given."""
    check_images(x, channels=model.mean.numel() if isinstance(model, ZeroShotClassifier) else None)
    if x.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"x has dtype {x.dtype}, in which a small eps is rounded away; pass x.float().")
    classes = getattr(model, "class_names", None)
    check_labels(y, len(x), classes=None if classes is None else len(classes))
    if ids is None:
        ids = torch.arange(len(x), device=x.device)
    else:
        check_ids(ids, len(x))
    return (seed if generator is None else draw_seed(generator)), ids.to(x.device)


def run(
    task: Task,
    method: Method,
    objective: Objective,
    *,
    keys: tuple[Tensor, ...] = (),
    goal: Tensor | None = None,
    labels: bool = True,
) -> Outcome:
    """Run a method on all images, in work units of 512, at most ``batch_size`` at a time.

    Args:
        task: model, images, labels, and how.
        method: the attack.
        objective: what it maximises, ``(logits, y, *keys) -> (N,)``.
        keys: further per-image arguments of the objective, each (N, ...): target classes, clean embeddings.
        goal: (N,) classes: an image is broken once classified as its goal; None, as anything but its label.
        labels: whether y are classes, to be checked against the logits; an own objective may mean something else.

    Returns:
        Adversarial images, detached, on x's device and in its dtype, and which of them were seen broken.
    """
    with attack_mode(task.model):
        job = _Run(task, method, objective, keys, goal, labels)
        for unit in torch.arange(len(task.x)).split(UNIT):
            job.unit(unit)
        return job.outcome()


class _Claim(NamedTuple):
    """Rows that look broken, until the host can know it; on CUDA the flags travel while the next step is queued."""

    flags: Tensor  # (3, N) bool: looks broken, logits not finite, gradient not finite
    arrived: torch.cuda.Event | None
    positions: Tensor  # in the run, of each row, on the CPU
    x_adv: Tensor


def reads_late(device: torch.device) -> bool:
    """Whether waiting for a verdict would stall the device: then it is read one step later."""
    return device.type == "cuda"


class _Run:
    """One run's arguments, its results so far, and the images in flight (a row each)."""

    def __init__(
        self,
        task: Task,
        method: Method,
        objective: Objective,
        keys: tuple[Tensor, ...],
        goal: Tensor | None,
        labels: bool,
    ) -> None:
        self.task, self.method, self.objective = task, method, objective
        self.options, self.keys, self.goal = task.options, keys, goal
        self.forward = Forward(task.model, task.ids, task.seed, task.options)
        self.inside: Callable[[State], Tensor] | None = getattr(method, "inside", None)
        # no method of its own: an object that refers to itself keeps a unit's tensors until the collector runs
        self.gradient_at: Callable[[Tensor], Tensor] = getattr(method, "gradient_at", partial(_always, method))
        self.late = reads_late(task.x.device)
        self.x_adv = task.x.clone()
        self.broken = torch.zeros(len(task.x), dtype=torch.bool)
        # evaluations, those with a gradient, and those in which it was exactly zero
        self.taken = torch.zeros(len(task.x), dtype=torch.int32)
        self.steep = torch.zeros_like(self.taken)
        self.flat = torch.zeros_like(self.steep, device=task.x.device)
        self.labels, self.looked = labels, False
        self.done, self.steps, self.began = 0, 0, time.monotonic()

    def outcome(self) -> Outcome:
        broken, ids, doubts = self.broken.to(self.x_adv.device), self.task.ids, self.options.doubts
        if self.steep.any():
            doubts.of_gradients(ids, self.steep, self.flat)
        doubts.of_steps(ids, self.taken)
        doubts.fell(ids[broken])
        return Outcome(self.x_adv, broken)

    def unit(self, waiting: Tensor) -> None:
        """One work unit: images enter while there is room, and leave broken or done."""
        self.positions, self.waiting = waiting.tensor_split([self.options.batch_size])
        self._place()
        self.age = torch.zeros(len(self.positions), dtype=torch.long)
        self.state = self._start(self.rows)
        claim: _Claim | None = None
        while len(self.positions):
            seen, latest = self._evaluate()
            gone = self._leave(claim if self.late else latest)
            claim = latest
            self.state = self.method.advance(self.state, seen, self.age)
            self.age += 1
            done = self._finished() & ~gone
            if done.any():
                if self.late:  # their last verdict must be read before others take their places
                    gone = gone | self._leave(claim)
                    claim, done = None, done & ~gone
                self._release(done)
            self.steps += 1
            if gone.any() or done.any():
                self._replace(gone | done)
                self._report(int((gone | done).sum()))
            elif self.steps % REPORT == 0:
                self._report(0)

    def _start(self, rows: Tensor) -> State:
        return self.method.start(self.task.x[rows], self.task.ids[rows])

    def _place(self) -> None:
        """The rows' images on the device, renewed only when they change."""
        self.rows = self.positions.to(self.task.x.device)
        self.y = self.task.y[self.rows]
        self.arguments = tuple(key[self.rows] for key in self.keys)

    def _evaluate(self) -> tuple[Evaluation, _Claim]:
        x_adv = self.state["x_adv"]
        steep = self.gradient_at(self.age)
        order = torch.cat([steep.nonzero()[:, 0], (~steep).nonzero()[:, 0]])
        some, rest = sent(order, self.rows.device).tensor_split([count := int(steep.sum())])
        if not len(some) or not len(rest):
            loss, gradient, logits = self._pass(slice(None), self.age, bool(len(some)))
            steepest = gradient
        else:
            ages = self.age[order].tensor_split([count])
            parts = self._pass(some, ages[0], True), self._pass(rest, ages[1], False)
            back = sent(order.argsort(), self.rows.device)
            loss = torch.cat([part[0] for part in parts])[back]
            logits = torch.cat([part[2] for part in parts], dim=1)[:, back]
            steepest = parts[0][1]
            gradient = torch.zeros_like(x_adv).index_copy(0, some, steepest)
        missed = self._missed(logits, self.rows)
        wrong = missed[0] if len(missed) == 1 else missed.float().mean(dim=0) > 0.5
        self.taken[self.positions] += 1
        self.steep[self.positions] += steep
        usable = self._usable(steepest, some, wrong)
        return Evaluation(loss, gradient, wrong), self._claim(wrong, logits, x_adv, usable)

    def _usable(self, gradient: Tensor, rows: Tensor, wrong: Tensor) -> Tensor:
        """(N,) whether those rows' gradients are finite; zero ones are counted, where the image still stands."""
        usable = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        if not len(rows):
            return usable
        pixels = gradient.flatten(1)
        low, high = pixels.amin(dim=1), pixels.amax(dim=1)  # aminmax along a dimension is twenty times slower
        zero = (low == 0) & (high == 0) & ~wrong[rows]
        self.flat.index_add_(0, self.rows[rows], zero.to(self.flat.dtype))
        return usable.index_copy_(0, rows, torch.isfinite(low) & torch.isfinite(high))

    def _pass(self, rows: slice | Tensor, age: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Those rows through the model: loss (n,), gradient (n, C, H, W) or empty, logits (draws, n, classes)."""
        extra: Callable[..., Tensor | None] = getattr(self.task.model, "extra_loss", lambda x, y: None)
        y, arguments = self.y[rows], [key[rows] for key in self.arguments]
        return evaluate(
            self.forward.bound(self.rows[rows], age, self.options.eot),
            self.state["x_adv"][rows],
            lambda logits: self._loss(logits, y, *arguments),
            eot=self.options.eot,
            gradient=gradient,
            dtype=self.options.gradient_dtype,
            extra=lambda x: extra(x, y),
        )

    def _loss(self, logits: Tensor, y: Tensor, *arguments: Tensor) -> Tensor:
        if not self.looked:
            self.looked = True
            if self.labels:
                self.options.doubts.of_outputs(logits.detach())
            if self.labels and (most := int(self.task.y.max())) >= logits.shape[1]:
                raise UsageError(
                    f"y has labels up to {most}, but the model gives {logits.shape[1]} logits; labels in "
                    f"[0, {logits.shape[1] - 1}] are expected."
                )
        loss = self.objective(logits, y, *arguments)
        if loss.shape != y.shape:
            raise UsageError(f"objective returned shape {tuple(loss.shape)}; one loss an image, {tuple(y.shape)}.")
        return loss

    def _claim(self, wrong: Tensor, logits: Tensor, x_adv: Tensor, usable: Tensor) -> _Claim:
        if not self.options.early_stop:
            wrong = torch.zeros_like(wrong)
        elif self.inside is not None:
            wrong = wrong & self.inside(self.state)
        flags, arrived = torch.stack([wrong, ~torch.isfinite(logits).all(dim=2).all(dim=0), ~usable]), None
        if not flags.is_cuda:
            flags = flags.cpu()
        else:
            flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(flags.device))
        return _Claim(flags, arrived, self.positions, x_adv)

    def _leave(self, claim: _Claim | None) -> Tensor:
        """Record the images that a claim breaks; returns which of the present rows they are, on the CPU."""
        gone = torch.zeros(len(self.positions), dtype=torch.bool)
        if claim is None:
            return gone
        if claim.arrived is not None:
            claim.arrived.synchronize()
        wrong, *bad = claim.flags
        for rows, error in zip(bad, (non_finite, non_finite_gradient)):
            if rows.any():
                raise error(self.task.ids[claim.positions[rows].to(self.task.ids.device)])
        rows = (wrong & ~self.broken[claim.positions]).nonzero()[:, 0]
        rows = rows[self._confirmed(claim, rows)] if len(rows) else rows
        if not len(rows):
            return gone
        index = claim.positions[rows]
        self.x_adv[index.to(self.x_adv.device)] = claim.x_adv[rows.to(self.x_adv.device)]
        self.broken[index] = True
        return torch.isin(self.positions, index)

    def _confirmed(self, claim: _Claim, rows: Tensor) -> Tensor:
        """(n,) which of those rows fp32 calls broken too, where it was not fp32 that said so."""
        if self.options.gradient_dtype == "fp32" and not self.options.compile:
            return torch.ones(len(rows), dtype=torch.bool)
        x_adv, index = claim.x_adv[rows.to(claim.x_adv.device)], claim.positions[rows].to(claim.x_adv.device)
        with torch.no_grad():
            missed = self._missed(self.forward.plain(x_adv, index, self.options.eot), index)
        return (missed.float().mean(dim=0) > 0.5).cpu()

    def _missed(self, logits: Tensor, rows: Tensor) -> Tensor:
        """(..., N) whether logits (..., N, classes) of these rows are what the attack is after."""
        predicted = logits.argmax(dim=-1)
        return predicted != self.task.y[rows] if self.goal is None else predicted == self.goal[rows]

    def _finished(self) -> Tensor:
        """(N,) rows that had all their evaluations; ages are on the CPU, so that nothing waits for the device."""
        return self.age >= self.method.evaluations

    def _release(self, done: Tensor) -> None:
        rows = done.nonzero()[:, 0].to(self.rows.device)
        self.x_adv[self.rows[rows]] = self.method.result({key: value[rows] for key, value in self.state.items()})

    def _replace(self, leaving: Tensor) -> None:
        """Waiting images take the places of those that leave; when none waits, the batch shrinks."""
        slots = leaving.nonzero()[:, 0]
        entering, self.waiting = self.waiting.tensor_split([len(slots)])
        self.positions = self.positions.clone()  # a claim under way keeps the old one
        if len(entering):
            slots, places = slots[len(entering) :], slots[: len(entering)]
            there = places.to(self.rows.device)
            for key, value in self._start(entering.to(self.rows.device)).items():
                self.state[key][there] = value
            self.positions[places], self.age[places] = entering, 0
        if len(slots):
            stay = torch.ones(len(self.positions), dtype=torch.bool)
            stay[slots] = False
            kept = stay.nonzero()[:, 0].to(self.rows.device)
            self.state = {key: value[kept] for key, value in self.state.items()}
            self.positions, self.age = self.positions[stay], self.age[stay]
        self._place()

    def _report(self, left: int) -> None:
        self.done += left
        if self.options.progress is not None:
            total, passed = len(self.x_adv), time.monotonic() - self.began
            robust = total - int(self.broken.sum())
            # images in flight count by the evaluations that they have had
            share = (self.done + float(self.age.sum()) / self.method.evaluations) / total
            self.options.progress(Status("", self.done, total, robust, passed * (1 - share) / max(share, 1e-9)))


def _always(method: Method, age: Tensor) -> Tensor:
    return torch.full(age.shape, method.uses_gradient)
