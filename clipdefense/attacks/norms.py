"""The geometry of a norm ball: steepest ascent, projection, random points. Everything else in an attack is shared."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from clipdefense import randomness
from clipdefense.threat import Norm


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) values shaped to broadcast over (N, C, H, W)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def l2_norm(x: Tensor) -> Tensor:
    """(N, ...) -> L2 norm of each image, shaped to broadcast; summed in float64, for 1e-7 at 150,000 pixels."""
    return per_image(torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).to(x.dtype), x)


class Ball(Protocol):
    """One norm; all methods act on (N, C, H, W) tensors image by image."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent, in new memory; zero where the gradient is zero."""

    def shrink_(self, delta: Tensor, eps: float) -> Tensor:
        """Projection of delta onto the ball of radius eps, in place."""

    def uniform(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        """A random point of the ball."""

    def surface(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        """A random point of the ball's surface (APGD's start)."""


class LInf:
    """max |d| <= eps."""

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def shrink_(self, delta: Tensor, eps: float) -> Tensor:
        return delta.clamp_(-eps, eps)

    def uniform(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        u = randomness.uniform(tuple(x.shape[1:]), ids, seed=seed, stream=stream, dtype=x.dtype)
        return u.mul_(2 * eps).sub_(eps)

    def surface(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        t = self.uniform(x, ids, 1.0, seed=seed, stream=stream)
        return t * (eps / per_image(t.abs().flatten(1).amax(dim=1), t).clamp_min(1e-12))


class L2:
    """sqrt(sum d^2) <= eps."""

    def direction(self, gradient: Tensor) -> Tensor:
        # scaled by the largest entry first: the square of a small float32 gradient underflows
        scaled = gradient / per_image(gradient.abs().flatten(1).amax(dim=1), gradient).clamp_min(1e-38)
        return scaled.div_(l2_norm(scaled).clamp_min(1e-12))

    def shrink_(self, delta: Tensor, eps: float) -> Tensor:
        return delta.mul_((eps / l2_norm(delta).clamp_min(1e-12)).clamp_max(1.0))

    def uniform(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        radius = randomness.uniform((1,), ids, seed=seed, stream=~stream, dtype=x.dtype)[:, 0]
        dimension = x[0].numel()
        return self.surface(x, ids, eps, seed=seed, stream=stream) * per_image(radius ** (1 / dimension), x)

    def surface(self, x: Tensor, ids: Tensor, eps: float, *, seed: int, stream: int) -> Tensor:
        t = randomness.normal(tuple(x.shape[1:]), ids, seed=seed, stream=stream, dtype=x.dtype)
        return t * (eps / l2_norm(t).clamp_min(1e-12))


BALLS: dict[Norm, Ball] = {"linf": LInf(), "l2": L2()}


def project(ball: Ball, x: Tensor, x_adv: Tensor, eps: float) -> Tensor:
    """Into the ball around x, then into the box [0, 1]: the box cannot lead out again, since x lies in it."""
    # one new tensor: at 150,000 pixels an image, memory is what a step costs besides the model
    return ball.shrink_(x_adv - x, eps).add_(x).clamp_(0.0, 1.0)


def box(x: Tensor, delta: Tensor) -> Tensor:
    """The perturbation clipped so that x + delta lies in [0, 1]."""
    return torch.maximum(torch.minimum(delta, 1 - x), -x)
