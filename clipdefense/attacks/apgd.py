"""Auto-PGD (Croce and Hein 2020, arXiv 2003.01690, section 3 and algorithm 1)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.norms import BALLS, Ball, per_image, project
from clipdefense.attacks.objectives import Objective, get_objective
from clipdefense.attacks.options import attack, checks_at_zero, labelled, parameter_free
from clipdefense.attacks.targets import over_restarts, over_targets
from clipdefense.errors import check_number, check_whole
from clipdefense.threat import ThreatModel


def checkpoints(steps: int) -> list[int]:
    """The iterations ``w_j = ceil(p_j * steps)`` at which the step size may be halved.

    ``p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)`` (section 3.1).
    """
    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    # rounded first: 0.22 + 0.19 is 0.41000000000000003, whose ceiling at 100 steps would be 42
    return sorted({math.ceil(round(p * steps, 9)) for p in fractions if p <= 1} - {0})


class _APGD:
    """Algorithm 1, an image a row: each keeps its own iteration k, step size eta and best point."""

    def __init__(self, ball: Ball, eps: float, steps: int, seed: int, stream: int, alpha: float, rho: float) -> None:
        self.evaluations, self.uses_gradient = steps + 1, True  # the start and every iterate
        self.ball, self.eps, self.alpha, self.rho = ball, eps, alpha, rho
        self.seed, self.stream = seed, stream
        self.interval = torch.zeros(steps + 1)  # k -> iterations since the checkpoint before, 0 where k is none
        before = 0
        for w in checkpoints(steps):
            self.interval[w], before = w - before, w

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        noise = self.ball.surface(x, ids, self.eps, seed=self.seed, stream=self.stream)
        x_adv = (x + noise).clamp_(0.0, 1.0)
        n, zero = len(x), x.new_zeros(len(x))
        self.interval = self.interval.to(x.device)
        low = x.new_full((n,), -math.inf)
        return {
            "x": x,
            "x_adv": x_adv,
            "previous": x_adv.clone(),
            "best": x_adv.clone(),
            "best_gradient": torch.zeros_like(x),
            "best_loss": low,
            "loss": low.clone(),
            "checkpoint_loss": low.clone(),
            "eta": zero + 2 * self.eps,
            "increases": zero.clone(),
            "halved": torch.zeros(n, dtype=torch.bool, device=x.device),
            "k": torch.zeros(n, dtype=torch.long, device=x.device),
        }

    def advance(self, s: engine.State, seen: engine.Evaluation, age: Tensor) -> engine.State:
        loss, gradient = seen.loss.to(s["loss"].dtype), seen.gradient
        better = loss > s["best_loss"]
        torch.where(per_image(better, gradient), s["x_adv"], s["best"], out=s["best"])
        torch.where(per_image(better, gradient), gradient, s["best_gradient"], out=s["best_gradient"])
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["increases"] = s["increases"] + ((loss > s["loss"]) & (s["k"] > 0))
        s["loss"] = loss
        x_adv, gradient = self._checkpoint(s, gradient)

        momentum = torch.where(s["k"] > 0, self.alpha, 1.0).to(x_adv.dtype)
        a = per_image(momentum, x_adv)
        step = self.ball.direction(gradient).mul_(per_image(s["eta"], x_adv)).add_(x_adv)
        z = project(self.ball, s["x"], step, self.eps)
        # x_adv + a (z - x_adv) + (1 - a) (x_adv - previous), in the memory of z and of what was previous
        following = z.sub_(x_adv).mul_(a).add_(x_adv)
        following.add_(torch.sub(x_adv, s["previous"], out=s["previous"]).mul_(1 - a))
        s["previous"], s["x_adv"] = x_adv, project(self.ball, s["x"], following, self.eps)
        s["k"] = s["k"] + 1
        return s

    def _checkpoint(self, s: engine.State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Conditions 1 and 2 of section 3.1: where one holds, halve eta and go on from the best point."""
        interval = self.interval[s["k"]]
        due = interval > 0
        oscillates = s["increases"] < self.rho * interval
        stalls = ~s["halved"] & (s["checkpoint_loss"] >= s["best_loss"])
        halve = due & (oscillates | stalls)
        s["eta"] = torch.where(halve, s["eta"] / 2, s["eta"])
        s["halved"] = torch.where(due, halve, s["halved"])
        s["checkpoint_loss"] = torch.where(due, s["best_loss"], s["checkpoint_loss"])
        s["increases"] = torch.where(due, 0.0, s["increases"])
        s["loss"] = torch.where(halve, s["best_loss"], s["loss"])
        back = per_image(halve, gradient)
        return torch.where(back, s["best"], s["x_adv"]), torch.where(back, s["best_gradient"], gradient)

    def result(self, s: engine.State) -> Tensor:
        return s["best"]


def _check(steps: int, alpha: float, rho: float) -> None:
    check_whole("steps", steps, 0)
    check_number("alpha", alpha, 0, 1, open_low=True)
    check_number("rho", rho, 0, 1)


@checks_at_zero
@parameter_free
@attack
def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    objective: str | Objective = "ce",
    steps: int = 100,
    restarts: int = 1,
    alpha: float = 0.75,
    rho: float = 0.75,
    **options: Any,
) -> Tensor:
    """Auto-PGD: step size chosen by progress, first step ``2 * eps``, best point kept.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps; its steps, step size and restarts do not apply here.
        objective: what to maximise: ``"ce"`` (APGD-CE), ``"dlr"`` (APGD-DLR), ``"margin"`` or ``(logits, y) -> (N,)``.
        steps: iterations (published: 100).
        restarts: runs from fresh random starts, each on the images that those before it left standing (published: 1 in
            AutoAttack's standard version, 5 in its custom one).
        alpha: weight of the step against momentum (published: 0.75).
        rho: share of ascending steps below which the step size is halved (published: 0.75).
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): the iterate that broke the image, or the one of highest loss. Within eps of x and in [0, 1].
    """
    task, loss = engine.Task.of(model, x, y, threat, options), get_objective(objective)
    _check(steps, alpha, rho)
    check_whole("restarts", restarts, 1)
    if threat.eps == 0 or steps == 0:
        return task.x.clone()

    def once(restart: int, rows: Tensor) -> engine.Outcome:
        label = f"restart {restart + 1} of {restarts}" if restarts > 1 else ""
        standing = task.rows(rows, labelled(task.options.progress, label))
        method = _APGD(BALLS[threat.norm], threat.eps, steps, task.seed, restart, alpha, rho)
        return engine.run(standing, method, loss, labels=not callable(objective))

    return over_restarts(task, restarts, once)


apgd_ce = partial(apgd, objective="ce")
apgd_dlr = partial(apgd, objective="dlr")


@checks_at_zero
@parameter_free
@attack
def apgd_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    targets: int = 9,
    objective: str | Objective = "dlr",
    steps: int = 100,
    alpha: float = 0.75,
    rho: float = 0.75,
    **options: Any,
) -> Tensor:
    """Targeted Auto-PGD: one run towards each of the most likely wrong classes (2003.01690, section 4).

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps.
        targets: how many target classes (published: 9); at most all the wrong ones.
        objective: ``"dlr"`` (targeted DLR; the targeted margin below four classes), ``"ce"``, ``"margin"`` or
            ``(logits, y, target) -> (N,)``.
        steps, alpha, rho: as in :func:`apgd`.
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): the iterate that broke the image, or the point of largest margin that any target led to.
    """
    task, loss = engine.Task.of(model, x, y, threat, options), get_objective(objective, targeted=True)
    check_whole("targets", targets, 1)
    _check(steps, alpha, rho)
    if threat.eps == 0 or steps == 0:
        return task.x.clone()

    def towards(rank: int, standing: engine.Task, target: Tensor) -> engine.Outcome:
        method = _APGD(BALLS[threat.norm], threat.eps, steps, task.seed, rank, alpha, rho)
        return engine.run(standing, method, loss, keys=(target,))

    return over_targets(task, targets, towards)
