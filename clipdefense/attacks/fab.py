"""FAB, the fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044), towards a target class.

It looks for the nearest misclassified point: linearise the decision boundary at the current point, project onto it
within the box, step a little over it, with a pull towards the original image. Symbols as in the paper: ``eta`` the
overshoot, ``beta`` the backward step, ``alpha_max`` the largest pull.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.context import sent
from clipdefense.attacks.norms import BALLS, l2_norm, per_image, project
from clipdefense.attacks.objectives import targeted_margin
from clipdefense.attacks.options import attack, checks_at_zero, parameter_free
from clipdefense.attacks.targets import over_targets
from clipdefense.errors import check_number, check_whole
from clipdefense.threat import Norm, ThreatModel

_TINY = 1e-38


def to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """``argmin ||d||_p`` subject to ``<w, d> = gap`` and ``0 <= x + d <= 1`` (problem 4 of the paper), exactly.

    Both norms have the solution ``d_j = s_j min(t a_j, room_j)`` with ``s_j = sign(gap w_j)``, ``room_j`` the distance
    to the box in that direction, and ``a_j = 1`` for Linf, ``|w_j|`` for L2. ``<w, d>`` is piecewise linear and rising
    in t, ever less steeply, with a kink where a coordinate meets the box. Where the plane cannot be reached inside the
    box, d goes to the box corner nearest to it.

    Args:
        x: (N, D) in [0, 1]; w: (N, D); gap: (N,).
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        (N, D).
    """
    s = w.sign() * gap.sign()[:, None]
    size = w.abs()
    room = torch.where(s > 0, 1 - x, x) * (s != 0)
    kink, rate = (room, size) if norm == "linf" else (room / size.clamp_min(_TINY), size.square())
    # a sort makes no host wait for a device; on a CPU it takes ten times what Newton's steps take
    reach = by_sorting if x.is_cuda else by_newton
    t = reach(kink, size * room, rate, gap.abs()[:, None]).clamp_max(1 / _TINY)  # finite, for weights of zero
    return (t if norm == "linf" else t * size).minimum(room).mul_(s)


def by_sorting(kink: Tensor, area: Tensor, rate: Tensor, need: Tensor) -> Tensor:
    """The t at which ``sum_j area_j min(t / kink_j, 1)`` is ``need``: the kinks in order show between which two.

    Args:
        kink: (N, D), where a coordinate stops to contribute; area: (N, D), what it has contributed by then.
        rate: (N, D), what it contributes until then as t grows by 1.
        need: (N, 1).

    Returns:
        (N, 1), infinite where the sum stays below.
    """
    kink, order = kink.sort(dim=1)
    # by the number of kinks passed, 0 .. D; the rates summed from the far end, where a difference would leave rounding
    filled = F.pad(area.gather(1, order).cumsum(dim=1), (1, 0))
    rest = F.pad(rate.gather(1, order).flip(1).cumsum(dim=1).flip(1), (0, 1))
    passed = torch.searchsorted(filled[:, 1:] + kink * rest[:, 1:], need)
    t = (need - filled.gather(1, passed)) / rest.gather(1, passed)
    return torch.where(passed >= kink.shape[1], math.inf, t)


def by_newton(kink: Tensor, area: Tensor, rate: Tensor, need: Tensor) -> Tensor:
    """As :func:`by_sorting`: on a rising concave function, Newton's steps from 0 never overshoot.

    Each ends on the tangent's crossing, so that it is exact once no further kink lies before it.
    """
    t, passed = torch.zeros_like(need), -1
    while True:
        full = (kink <= t).to(kink.dtype)
        if passed == (passed := int(full.sum(dtype=torch.float64))):
            return t
        filled = torch.linalg.vecdot(full, area)[:, None]
        rest = torch.linalg.vecdot(1 - full, rate)[:, None]
        t = torch.where(rest > 0, (need - filled) / rest, math.inf).maximum(t)


class _FAB:
    """Algorithm 1 towards one class, an image a row.

    Evaluations alternate: at an iterate, with its gradient, and at the point its step leads to, which is only
    classified. Where a step led over the boundary the next iterate is on the way back, else it is that point.
    """

    uses_gradient = True

    def __init__(self, norm: Norm, eps: float, steps: int, alpha_max: float, eta: float, beta: float) -> None:
        check_whole("steps", steps, 0)
        check_number("alpha_max", alpha_max, 0, 1)
        check_number("eta", eta, 0, math.inf, open_low=True)
        check_number("beta", beta, 0, 1)
        self.norm, self.eps, self.steps = norm, eps, steps
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        self.evaluations = 2 * steps

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        delta = (x_adv - x).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "linf" else l2_norm(delta)[:, 0]

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        return {
            "x": x,
            "x_adv": x.clone(),
            "best": x.clone(),
            "norm": x.new_full((len(x),), math.inf),
        }

    def inside(self, s: engine.State) -> Tensor:
        return self.distance(s["x"], s["x_adv"]) <= self.eps

    def gradient_at(self, age: Tensor) -> Tensor:
        return age % 2 == 0

    def advance(self, s: engine.State, seen: engine.Evaluation, age: Tensor) -> engine.State:
        x, x_adv = s["x"], s["x_adv"]
        distance = self.distance(x, x_adv)
        nearer = seen.wrong & (distance < s["norm"])
        s["best"] = torch.where(per_image(nearer, x), x_adv, s["best"])
        s["norm"] = torch.where(nearer, distance, s["norm"])
        following = torch.where(per_image(seen.wrong, x), x + self.beta * (x_adv - x), x_adv)
        steep = self.gradient_at(age)
        if steep.any():
            rows = sent(steep.nonzero()[:, 0], x.device)
            stepped = self._forward(x[rows], x_adv[rows], seen.loss[rows].to(x.dtype), seen.gradient[rows])
            following = following.index_copy(0, rows, stepped)
        s["x_adv"] = following
        return s

    def _forward(self, x: Tensor, x_adv: Tensor, gap: Tensor, gradient: Tensor) -> Tensor:
        """Equation 9: between the projections of the current point and of the original onto the linearised boundary."""
        w, here, origin = gradient.flatten(1), x_adv.flatten(1), x.flatten(1)
        from_here = to_hyperplane(here, w, -gap, self.norm)
        from_origin = to_hyperplane(origin, w, (w * (here - origin)).sum(dim=1) - gap, self.norm)
        near = self.distance(torch.zeros_like(from_here), from_here)
        far = self.distance(torch.zeros_like(from_origin), from_origin)
        alpha = (near / (near + far).clamp_min(1e-12)).clamp(0, self.alpha_max)[:, None]
        point = (1 - alpha) * (here + self.eta * from_here) + alpha * (origin + self.eta * from_origin)
        return point.clamp(0, 1).view_as(x)

    def result(self, s: engine.State) -> Tensor:
        found = torch.isfinite(s["norm"])
        return project(BALLS[self.norm], s["x"], torch.where(per_image(found, s["x"]), s["best"], s["x_adv"]), self.eps)


@checks_at_zero
@parameter_free
@attack
def fab_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    targets: int = 9,
    steps: int = 100,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    **options: Any,
) -> Tensor:
    """Targeted FAB: towards each of the most likely wrong classes, from the image itself (no random start).

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps; a point counts once it is misclassified within eps.
        targets: how many target classes (AutoAttack: 9).
        steps: iterations a target (AutoAttack: 100).
        alpha_max, eta, beta: published 0.1, 1.05, 0.9.
        options: see :class:`clipdefense.attacks.options.Options`; nothing is random.

    Returns:
        (N, C, H, W): the point that broke the image, or the nearest one found, projected. Within eps and in [0, 1].
    """
    task = engine.Task.of(model, x, y, threat, options)
    check_whole("targets", targets, 1)
    method = _FAB(threat.norm, threat.eps, steps, alpha_max, eta, beta)
    if threat.eps == 0 or steps == 0:
        return task.x.clone()

    def towards(rank: int, standing: engine.Task, target: Tensor) -> engine.Outcome:
        return engine.run(standing, method, targeted_margin, keys=(target,))

    return over_targets(task, targets, towards)
