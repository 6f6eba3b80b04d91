"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search, no gradients.

A candidate changes one square window (two, for L2) of the perturbation and is kept if the margin grew. Symbols as in
the paper: ``h`` the window's side, ``p`` the share of pixels in it, ``nu`` the perturbation so far.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense import randomness
from clipdefense.attacks import engine
from clipdefense.attacks.context import sent
from clipdefense.attacks.norms import BALLS, l2_norm, per_image, project
from clipdefense.attacks.objectives import Objective, get_objective
from clipdefense.attacks.options import attack, checks_at_zero, parameter_free
from clipdefense.errors import check_number, check_whole
from clipdefense.threat import ThreatModel

BLOCK = 64  # queries whose draws are made at once; the numbers are the same for any block
# p is halved when so many of 10,000 queries are spent (section 3.1 of the paper and its supplement)
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def window_sides(p: float, queries: int, height: int, width: int, least: int = 1) -> list[int]:
    """``h`` at query 1 .. queries: the whole number nearest to ``sqrt(p H W)``, p halved on the published schedule."""
    sides, most = [], max(min(height, width) - 1, 1)
    for query in range(queries):
        position = int(query / queries * 10_000)
        halved = p / 2 ** sum(position > limit for limit in _HALVINGS)
        sides.append(min(max(round(math.sqrt(halved * height * width)), least), most))
    return sides


class _Square:
    """What both norms share: a candidate is kept when the objective grew."""

    uses_gradient = False
    least_side = 1

    def __init__(self, eps: float, queries: int, p: float, seed: int, shape: tuple[int, ...]) -> None:
        self.evaluations = queries
        self.eps, self.seed = eps, seed
        self.sides = torch.tensor(window_sides(p, queries, shape[-2], shape[-1], self.least_side))

    def start(self, x: Tensor, ids: Tensor) -> engine.State:
        self.to(x)
        x_adv = self.initial(x, ids)
        return {
            "x": x,
            "x_adv": x_adv,
            "best": x.clone(),
            "loss": x.new_full((len(x),), -math.inf),
            "ids": ids.to(torch.int64),
            "u": x.new_zeros(len(x), BLOCK, self.numbers(x)),
        }

    def to(self, like: Tensor) -> None:
        """The tables to the images' device, once."""
        self.sides = self.sides.to(like.device)

    def advance(self, s: engine.State, seen: engine.Evaluation, age: Tensor) -> engine.State:
        loss = seen.loss.to(s["loss"].dtype)
        better = loss > s["loss"]
        s["best"] = torch.where(per_image(better, s["best"]), s["x_adv"], s["best"])
        s["loss"] = torch.where(better, loss, s["loss"])
        query = (age + 1).clamp_max(len(self.sides) - 1)
        u = self.draws(s, query)
        s["x_adv"] = self.propose(s, self.sides[sent(query, loss.device)], u)
        return s

    def result(self, s: engine.State) -> Tensor:
        return s["best"]

    def initial(self, x: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def propose(self, s: engine.State, side: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError

    def numbers(self, x: Tensor) -> int:
        """How many uniform numbers a query takes."""
        raise NotImplementedError

    def draws(self, s: engine.State, query: Tensor) -> Tensor:
        """(N, numbers) uniform numbers of each image at its query, (N,) on the CPU; a block of queries at a time."""
        place = query % BLOCK
        stale = ((place == 0) | (query == 1)).nonzero()[:, 0]
        if len(stale):
            rows = sent(stale, s["ids"].device)
            first = sent(query[stale] - place[stale], rows.device)
            streams = first[:, None] + torch.arange(BLOCK, device=rows.device)
            ids = s["ids"][rows, None].expand_as(streams)
            shape, dtype = s["u"].shape[2:], s["x"].dtype
            u = randomness.uniform(shape, ids.flatten(), seed=self.seed, stream=streams.flatten(), dtype=dtype)
            s["u"] = s["u"].index_copy(0, rows, u.view(len(rows), BLOCK, -1))
        return s["u"][torch.arange(len(place), device=s["u"].device), sent(place, s["u"].device)]


def _corner(u: Tensor, length: int, side: Tensor) -> Tensor:
    """A uniform first row (or column) of a window, (N,)."""
    room = (length - side + 1).to(u.dtype)
    return torch.minimum((u * room).long(), length - side)


def _window(top: Tensor, left: Tensor, side: Tensor, like: Tensor) -> Tensor:
    """(N, 1, H, W) bool, True inside each image's window."""
    rows = torch.arange(like.shape[-2], device=like.device)[None]
    columns = torch.arange(like.shape[-1], device=like.device)[None]
    tall = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    wide = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


class _SquareLInf(_Square):
    """Algorithm 2: windows of constant sign, +-eps a channel, from vertical stripes."""

    def initial(self, x: Tensor, ids: Tensor) -> Tensor:
        u = randomness.uniform((x.shape[1], 1, x.shape[3]), ids, seed=self.seed, stream=0, dtype=x.dtype)
        return (x + self.eps * _signs(u)).clamp(0, 1)

    def numbers(self, x: Tensor) -> int:
        return 2 + x.shape[1]

    def propose(self, s: engine.State, side: Tensor, u: Tensor) -> Tensor:
        x, best = s["x"], s["best"]
        window = _window(_corner(u[:, 0], x.shape[2], side), _corner(u[:, 1], x.shape[3], side), side, x)
        step = 2 * self.eps * _signs(u[:, 2:])[:, :, None, None]
        return torch.where(window, project(BALLS["linf"], x, best + step, self.eps), best)


def pyramid(side: int) -> Tensor:
    """eta (section 3.3): two adjacent heaps of opposite sign that fill a square, L2 norm 1; (side, side).

    A heap over h1 x h2 pixels has ``sum_{k=0}^{M} 1 / (n + 1 - k)^2`` at (r, s), with n = floor(h1 / 2) and
    ``M = n - max(|r - floor(h1/2) - 1|, |s - floor(h2/2) - 1|)``, r and s counted from 1.
    """

    def heap(h1: int, h2: int) -> Tensor:
        n = h1 // 2
        r, s = torch.arange(1, h1 + 1), torch.arange(1, h2 + 1)
        off = torch.maximum((r - h1 // 2 - 1).abs()[:, None], (s - h2 // 2 - 1).abs()[None])
        steps = torch.tensor([0.0] + [1 / (n + 1 - k) ** 2 for k in range(n + 1)]).cumsum(0)
        return steps[(n - off + 1).clamp(0, n + 1)]

    half = side // 2
    eta = torch.cat([heap(side, half), -heap(side, side - half)], dim=1) if half else torch.ones(1, 1)
    return eta / eta.norm()


class _SquareL2(_Square):
    """Algorithm 3: move the budget of one window (and what is unused) into another, in the shape of eta."""

    least_side = 3  # a heap of a pixel or two often cancels what it is laid over, and the query is lost

    def __init__(self, eps: float, queries: int, p: float, seed: int, shape: tuple[int, ...]) -> None:
        super().__init__(eps, queries, p, seed, shape)
        known = sorted(set(self.sides.tolist()))
        self.row_of = {side: row for row, side in enumerate(known)}
        largest = known[-1]
        # every pattern in one table, so that images at different window sizes are handled together
        self.patterns = torch.zeros(len(known), largest, largest)
        for side, row in self.row_of.items():
            self.patterns[row, :side, :side] = pyramid(side)
        lookup = torch.zeros(largest + 1, dtype=torch.long)
        lookup[known] = torch.arange(len(known))
        self.lookup = lookup

    def to(self, like: Tensor) -> None:
        super().to(like)
        self.patterns, self.lookup = self.patterns.to(like), self.lookup.to(like.device)

    def initial(self, x: Tensor, ids: Tensor) -> Tensor:
        """A grid of 5 x 5 tiles, each in the shape of eta with random signs and orientation, scaled to eps."""
        n, channels, height, width = x.shape
        tile = max(min(height, width) // 5, 1)
        eta = pyramid(tile).to(x)
        rows, columns = height // tile, width // tile
        u = randomness.uniform((rows, columns, channels + 1), ids, seed=self.seed, stream=0, dtype=x.dtype)
        turned = u[..., -1, None, None, None] < 0.5
        tiles = torch.where(turned, eta.T, eta) * _signs(u[..., :-1, None, None])  # (N, rows, columns, C, tile, tile)
        grid = tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * tile, columns * tile)
        delta = torch.zeros_like(x)
        delta[:, :, : rows * tile, : columns * tile] = grid
        return project(BALLS["l2"], x, x + delta * (self.eps / l2_norm(delta).clamp_min(1e-12)), self.eps)

    def numbers(self, x: Tensor) -> int:
        return 5 + x.shape[1]

    def propose(self, s: engine.State, side: Tensor, u: Tensor) -> Tensor:
        x, nu = s["x"], s["best"] - s["x"]
        height, width, channels = x.shape[2], x.shape[3], x.shape[1]
        corners = [_corner(u[:, i], (height, width)[i % 2], side) for i in range(4)]
        first, second = _window(corners[0], corners[1], side, x), _window(corners[2], corners[3], side, x)

        def part(mask: Tensor) -> Tensor:
            """L2 norm of nu inside the mask, a channel: (N, C, 1, 1)."""
            return (nu * mask).flatten(2).norm(dim=2)[:, :, None, None]

        unused = (self.eps**2 - nu.flatten(1).square().sum(dim=1)).clamp_min(0)
        available = (part(first | second).square() + per_image(unused, x) / channels).sqrt()
        eta = self._placed(side, corners[0], corners[1], u[:, 4] < 0.5, x)
        fresh = _signs(u[:, 5:])[:, :, None, None] * eta + nu * first / part(first).clamp_min(1e-12)
        norm = fresh.flatten(2).norm(dim=2)[:, :, None, None].clamp_min(1e-12)
        moved = torch.where(first, fresh / norm * available, torch.where(second, 0.0, nu))
        return project(BALLS["l2"], x, x + moved, self.eps)

    def _placed(self, side: Tensor, top: Tensor, left: Tensor, turned: Tensor, x: Tensor) -> Tensor:
        """eta at each image's window, zero elsewhere: (N, 1, H, W)."""
        row = self.lookup[side][:, None, None]
        r = torch.arange(x.shape[2], device=x.device)[None, :, None] - top[:, None, None]
        c = torch.arange(x.shape[3], device=x.device)[None, None, :] - left[:, None, None]
        inside = (r >= 0) & (r < side[:, None, None]) & (c >= 0) & (c < side[:, None, None])
        r, c = (torch.where(inside, index, 0) for index in torch.broadcast_tensors(r, c))
        turn = turned[:, None, None]
        return torch.where(inside, self.patterns[row, torch.where(turn, c, r), torch.where(turn, r, c)], 0.0)[:, None]


@checks_at_zero
@parameter_free
@attack
def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    queries: int = 5000,
    p: float = 0.8,
    objective: str | Objective = "margin",
    **options: Any,
) -> Tensor:
    """Square Attack: black-box random search.

    Args:
        model: images in [0, 1] -> logits; only its outputs are used.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps.
        queries: forwards an image (AutoAttack: 5,000).
        p: share of the pixels that the first windows cover (AutoAttack: 0.8).
        objective: what a candidate must raise to be kept; the margin as published.
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): the candidate that broke the image, or the best one. Within eps of x and in [0, 1].
    """
    task, loss = engine.Task.of(model, x, y, threat, options), get_objective(objective)
    check_whole("queries", queries, 0)
    check_number("p", p, 0, 1, open_low=True)
    if threat.eps == 0 or queries == 0:
        return task.x.clone()
    kind = {"linf": _SquareLInf, "l2": _SquareL2}[threat.norm]
    method = kind(threat.eps, queries, p, task.seed, tuple(x.shape))
    return engine.run(task, method, loss, labels=not callable(objective)).x_adv
