"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.context import predict
from clipdefense.attacks.norms import BALLS, Ball, project
from clipdefense.attacks.objectives import Objective, get_objective
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

    def advance(self, state: engine.State, seen: engine.Evaluation) -> engine.State:
        x_adv = torch.add(state["x_adv"], self.ball.direction(seen.gradient), alpha=self.alpha)
        state["x_adv"] = project(self.ball, state["x"], x_adv, self.eps)
        return state

    def result(self, state: engine.State) -> Tensor:
        return state["x_adv"]


class _FromInit(_PGD):
    """PGD from given perturbations instead of random ones; the image's position stands in for its id."""

    def __init__(self, init: Tensor, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.init = init

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        return {"x": x, "x_adv": project(self.ball, x, x + self.init[ids], self.eps)}


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    objective: str | Objective = "ce",
    init: Tensor | None = None,
    random_start: bool = True,
    eot: int = 1,
    early_stop: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    generator: torch.Generator | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on the objective, ``threat.steps`` steps of size ``threat.alpha``.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm, eps, step size, steps and restarts.
        objective: ``"ce"``, ``"margin"`` or ``(logits, y) -> (N,)``.
        init: (N, C, H, W) perturbations to start from instead of random ones (one restart only).
        random_start: start at a uniform point of the ball; False starts at x.
        eot: gradient draws a step, for randomised models.
        early_stop: stop an image as soon as it is misclassified (see :func:`clipdefense.attacks.engine.run`).
        batch_size: images a forward.
        seed, generator, ids: key the random draws; ids default to 0 .. N-1.

    Returns:
        (N, C, H, W): the iterate that broke the image, or the last one. Within eps of x and in [0, 1].
    """
    seed, names = engine.prepare(model, x, y, seed, generator, ids)
    if init is not None and (init.shape != x.shape or threat.restarts > 1):
        raise UsageError(
            f"init has shape {tuple(init.shape)} with {threat.restarts} restarts; "
            f"x's shape {tuple(x.shape)} and one restart are expected."
        )
    if threat.eps == 0 or threat.steps == 0:
        return x.detach().clone()
    ball, loss = BALLS[threat.norm], get_objective(objective)
    result, left = x.detach().clone(), torch.arange(len(x), device=x.device)
    for restart in range(threat.restarts):
        settings = (ball, threat.eps, threat.alpha, threat.steps, seed, restart, random_start)
        if init is None:
            method, keys = _PGD(*settings), names[left]
        else:
            method, keys = _FromInit(init.to(x), *settings), left
        outcome = engine.run(
            model, x[left], y[left], method, loss, ids=keys, eot=eot, early_stop=early_stop, batch_size=batch_size
        )
        result[left] = outcome.x_adv
        if restart + 1 < threat.restarts:
            left = left[~outcome.broken]
            if len(left):  # their last iterates have not been judged yet
                left = left[predict(model, result[left], batch_size=batch_size).argmax(dim=1) == y[left]]
            if not len(left):
                break
    return result
