"""FAB: the projection onto a hyperplane in the box against solvers, and the nearest point of a linear model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from clipdefense import ThreatModel, attacks
from clipdefense.attacks.fab import by_newton, by_sorting, to_hyperplane
from clipdefense.threat import NORMS, Norm

DIMENSION = 6


def nearest_linf(x: NDArray[np.float64], w: NDArray[np.float64], gap: float) -> float:
    """min t subject to <w, d> = gap, |d_j| <= t, 0 <= x + d <= 1, as a linear programme in (d, t)."""
    n = len(x)
    eye, ones = np.eye(n), np.ones((n, 1))
    result = linprog(
        [0.0] * n + [1.0],
        A_ub=np.block([[eye, -ones], [-eye, -ones]]),
        b_ub=np.zeros(2 * n),
        A_eq=[[*w, 0.0]],
        b_eq=[gap],
        bounds=[*zip(-x, 1 - x), (0, None)],
    )
    assert result.success
    return float(result.x[-1])


def nearest_l2(x: NDArray[np.float64], w: NDArray[np.float64], gap: float) -> float:
    result = minimize(
        lambda d: d @ d,
        np.zeros(len(x)),
        jac=lambda d: 2 * d,
        bounds=list(zip(-x, 1 - x)),
        constraints={"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda d: w},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert result.success
    return float(np.linalg.norm(result.x))


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """64 planes that the box reaches at random depth, some with zero weights, some through the point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, DIMENSION, generator=generator, dtype=torch.float64)
    x[::5, 0], x[::7, 1] = 0.0, 1.0
    w = torch.randn(64, DIMENSION, generator=generator, dtype=torch.float64)
    w[::3, 2] = 0.0
    # inside what can be reached: between the box's extremes of <w, d>
    sign = torch.where(torch.rand(64, generator=generator) < 0.5, 1.0, -1.0).double()
    extreme = torch.where(w * sign[:, None] > 0, 1 - x, -x)
    gap = torch.rand(64, generator=generator, dtype=torch.float64) * (w * extreme).sum(1) * 0.999
    gap[-1] = 0.0
    return x, w, gap


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_feasible_and_as_near_as_the_solver_gets(norm: Norm) -> None:
    x, w, gap = problems()
    d = to_hyperplane(x, w, gap, norm)
    torch.testing.assert_close((w * d).sum(1), gap, atol=1e-9, rtol=0)
    assert (x + d).min() >= -1e-12 and (x + d).max() <= 1 + 1e-12
    solver = nearest_linf if norm == "linf" else nearest_l2
    best = torch.tensor([solver(a.numpy(), b.numpy(), float(c)) for a, b, c in zip(x, w, gap)])
    ours = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    torch.testing.assert_close(ours, best.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_out_of_reach_gives_the_nearest_corner(norm: Norm) -> None:
    x = torch.tensor([[0.25, 0.75, 0.5]])
    d = to_hyperplane(x, torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([100.0]), norm)
    torch.testing.assert_close(d, torch.tensor([[0.75, -0.75, 0.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_stays_where_it_is(norm: Norm) -> None:
    d = to_hyperplane(torch.full((2, 3), 0.5), torch.zeros(2, 3), torch.tensor([1.0, 0.0]), norm)
    assert torch.equal(d, torch.zeros(2, 3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [0.0, 0.01, 0.5, 0.95, 1.5])
def test_sorting_and_newton_find_the_same(norm: Norm, depth: float) -> None:
    """A GPU sorts, a CPU does not; half of the pixels lie at an end of the range, as in drawings."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(8, 3000, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)
    w = torch.randn(8, 3000, generator=generator, dtype=torch.float64) ** 3
    size, room = w.abs(), torch.where(w > 0, 1 - x, x)
    kink, rate = (room, size) if norm == "linf" else (room / size, size.square())
    need = depth * (size * room).sum(dim=1, keepdim=True)
    sorting, newton = (reach(kink, size * room, rate, need) for reach in (by_sorting, by_newton))
    torch.testing.assert_close(newton, sorting, rtol=1e-9, atol=1e-12)
    assert newton.isinf().all() if depth > 1 else newton.isfinite().all()


class Plane(nn.Module):
    """Two classes whose boundary is <w, x> = b."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize(("norm", "distance"), [("linf", 0.3 / 5), ("l2", 0.3 / 7**0.5)])
def test_a_linear_model_breaks_at_its_distance_and_not_before(norm: Norm, distance: float) -> None:
    # x = 1/2: score 5 / 2 - 2.8 = -0.3, so the boundary is 0.3 / |w|_1 away in Linf, 0.3 / |w|_2 in L2
    model, x = Plane(torch.tensor([1.0, 1.0, 2.0, 1.0]), 2.8), torch.full((1, 1, 2, 2), 0.5)
    y = torch.zeros(1, dtype=torch.long)
    near = attacks.fab_t(model, x, y, ThreatModel(norm, distance * 1.06), steps=3)
    assert model(near).argmax(1) == 1
    far = attacks.fab_t(model, x, y, ThreatModel(norm, distance * 0.99), steps=20)
    assert model(far).argmax(1) == 0


@pytest.mark.parametrize(("norm", "distance"), [("linf", 0.3 / 5), ("l2", 0.3 / 7**0.5)])
def test_without_early_stop_the_nearest_point_is_returned(norm: Norm, distance: float) -> None:
    # an overshoot of 5 %, and a step back of a tenth: the nearest point found lies within that of the boundary
    model, x = Plane(torch.tensor([1.0, 1.0, 2.0, 1.0]), 2.8), torch.full((1, 1, 2, 2), 0.5)
    y = torch.zeros(1, dtype=torch.long)
    x_adv = attacks.fab_t(model, x, y, ThreatModel(norm, 1.0), steps=30, early_stop=False)
    delta = (x_adv - x).flatten()
    reached = float(delta.abs().max() if norm == "linf" else delta.norm())
    assert distance <= reached <= distance * 1.02
    assert model(x_adv).argmax(1) == 1
