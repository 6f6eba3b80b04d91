"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.context import predict
from clipdefense.attacks.forward import Embedder
from clipdefense.attacks.norms import BALLS, Ball, project
from clipdefense.attacks.objectives import Objective, drift, get_objective
from clipdefense.attacks.options import attack, checks_at_zero
from clipdefense.attacks.targets import over_restarts
from clipdefense.checks import check_labels
from clipdefense.errors import UsageError
from clipdefense.threat import ThreatModel


class _PGD:
    """``x_{k+1} = P(x_k + alpha * direction(gradient))``."""

    def __init__(self, ball: Ball, eps: float, alpha: float, steps: int, seed: int, stream: int, random: bool) -> None:
        self.evaluations, self.uses_gradient = steps, True
        self.ball, self.eps, self.alpha = ball, eps, alpha
        self.seed, self.stream, self.random = seed, stream, random

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        if not self.random:
            return {"x": x, "x_adv": x.clone()}
        noise = self.ball.uniform(x, ids, self.eps, seed=self.seed, stream=self.stream)
        return {"x": x, "x_adv": (x + noise).clamp_(0.0, 1.0)}

    def advance(self, state: engine.State, seen: engine.Evaluation, age: Tensor) -> engine.State:
        step = self.ball.direction(seen.gradient)
        x_adv = torch.add(state["x_adv"], step, alpha=self.alpha, out=step)
        state["x_adv"] = project(self.ball, state["x"], x_adv, self.eps)
        return state

    def result(self, state: engine.State) -> Tensor:
        return state["x_adv"]


class _FromInit(_PGD):
    """PGD from given perturbations instead of random ones, found by the images' ids."""

    def __init__(self, init: Tensor, ids: Tensor, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.ids, order = ids.sort()
        self.init = init.detach()[order]

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        return {"x": x, "x_adv": project(self.ball, x, x + self.init[torch.searchsorted(self.ids, ids)], self.eps)}


@dataclass(frozen=True)
class _Search:
    """What is attacked, and towards what."""

    task: engine.Task
    loss: Objective
    keys: tuple[Tensor, ...] = ()
    goal: Tensor | None = None
    labels: bool = True

    def run(self, method: _PGD, rows: Tensor) -> engine.Outcome:
        task = self.task.rows(rows, self.task.options.progress)
        goal = None if self.goal is None else self.goal[rows]
        keys = tuple(key[rows] for key in self.keys)
        return engine.run(task, method, self.loss, keys=keys, goal=goal, labels=self.labels)


def _search(task: engine.Task, objective: str | Objective, target: Tensor | None) -> _Search:
    if objective != "drift":
        loss = get_objective(objective, targeted=target is not None)
        if target is None:
            return _Search(task, loss, labels=not callable(objective))
        check_labels(target, len(task.x), argument="target")
        target = target.to(task.x.device, torch.int64)
        return _Search(task, loss, (target,), target)
    if target is not None or not callable(getattr(task.model, "embed", None)):
        got = "a target" if target is not None else f"a {type(task.model).__name__} without embed(images)"
        raise UsageError(f"objective 'drift' was given {got}; it has no target, and needs a ZeroShotClassifier.")
    embedder = Embedder(task.model)
    clean = predict(embedder, task.x, batch_size=task.options.batch_size)
    # embeddings are no verdicts: nothing may leave on them
    return _Search(
        replace(task, model=embedder, options=replace(task.options, early_stop=False)), drift, (clean,), labels=False
    )


@checks_at_zero
@attack
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    objective: str | Objective = "ce",
    target: Tensor | None = None,
    init: Tensor | None = None,
    random_start: bool = True,
    **options: Any,
) -> Tensor:
    """Projected gradient ascent on the objective, ``threat.steps`` steps of size ``threat.alpha``.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm, eps, step size, steps and restarts.
        objective: ``"ce"``, ``"margin"``, ``"dlr"`` or ``(logits, y) -> (N,)``; ``"drift"``, which needs no labels,
            moves the model's ``embed`` away from the clean image's, every image through all steps.
        target: (N,) classes to move towards; the objective is then the targeted one of that name (or takes the
            target as a third argument), and an image stops once it is classified as its target.
        init: (N, C, H, W) perturbations to start from instead of random ones (one restart only).
        random_start: start at a uniform point of the ball; False starts at x.
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): the iterate that broke the image, or the last one. Within eps of x and in [0, 1].

    Raises:
        UsageError: bad images, labels or options.
    """
    task = engine.Task.of(model, x, y, threat, options)
    if init is not None and (init.shape != x.shape or threat.restarts > 1):
        raise UsageError(
            f"init has shape {tuple(init.shape)} with {threat.restarts} restarts; "
            f"x's shape {tuple(x.shape)} and one restart are expected."
        )
    if objective == "drift" and init is None and not random_start:
        raise UsageError("objective 'drift' has no gradient at x itself; leave random_start on, or give init.")
    search = _search(task, objective, target)
    if threat.eps == 0 or threat.steps == 0:
        return task.x.clone()

    def once(restart: int, rows: Tensor) -> engine.Outcome:
        settings = (BALLS[threat.norm], threat.eps, threat.alpha, threat.steps, task.seed, restart, random_start)
        return search.run(_PGD(*settings) if init is None else _FromInit(init.to(task.x), task.ids, *settings), rows)

    return over_restarts(task, threat.restarts, once, search.goal)
