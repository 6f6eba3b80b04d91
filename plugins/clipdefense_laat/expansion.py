"""The expansion of text anchors in LAAT (Li et al., CVPR 2024, arXiv 2301.13096): a closed form of its rotations.

Text embeddings of class names lie close together (mean pairwise cosine 0.76 over the classes of CIFAR-FS). The
expansion moves them apart along great circles through their mean direction, until the outermost one stands at a right
angle to it:

    a = n(t),  m = n(mean_k a_k),  c = <a, m>,  theta = arccos c,  k = (pi / 2) / theta_max,
    a' = cos(k theta) m + [sin(k theta) / sin(theta)] (a - c m)

with ``t`` a text embedding, ``n`` the L2 normalisation, and m and theta_max (the largest theta) those of the training
classes, which novel classes go through too. The released code rotates m to the first axis by a product of D - 1 plane
rotations, stretches the polar angle there and rotates back; since the direction away from m stays, no rotation is
needed, and none of its divisions by zero occurs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError

RIGHT_ANGLE = math.pi / 2
_TINY = 1e-6  # radians, and lengths of means of unit vectors: below is rounding of float32 embeddings


def mean_direction(embeddings: Tensor) -> Tensor:
    """``m = n(mean_k n(t_k))``; (K, D) -> (D,), in float64.

    Raises:
        UsageError: embeddings that cancel: their mean has no direction.
    """
    mean = F.normalize(embeddings.double(), dim=1).mean(dim=0)
    if float(mean.norm()) < _TINY:
        raise UsageError(
            f"expansion fitted on {len(embeddings)} embeddings whose mean is zero and has no direction; they are "
            "spread out already, so leave the expansion off."
        )
    return F.normalize(mean, dim=0)


def polar(embeddings: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Angle from m and the rest: ``theta`` (K,) in [0, pi] and ``a - <a, m> m`` (K, D), of length sin(theta); float64.

    The angle is taken as ``atan2(sin, cos)``: arccos loses half the digits near m, and its gradient is infinite there.
    """
    a = F.normalize(embeddings.double(), dim=1)
    c = a @ m
    across = a - c[:, None] * m
    return torch.atan2(across.norm(dim=1), c), across


def dilate(embeddings: Tensor, m: Tensor, theta_max: Tensor, limit: Tensor) -> Tensor:
    """The expansion as a function of its state; (K, D) -> (K, D) unit vectors, float64.

    Args:
        embeddings: text embeddings, of any length above 0.
        m: (D,) unit vector, float64.
        theta_max: the angle, in radians, that goes to a right angle.
        limit: largest new angle, in radians; infinite for none.
    """
    theta, across = polar(embeddings, m)
    widened = torch.minimum(theta * (RIGHT_ANGLE / theta_max), limit)
    # sin(k theta) / sin(theta) -> k at m itself, value and gradient; sinc(x) = sin(pi x) / (pi x)
    at_centre = theta < torch.finfo(theta.dtype).eps
    apart = torch.where(at_centre, torch.ones_like(theta), theta)
    factor = torch.where(at_centre, RIGHT_ANGLE / theta_max, widened / apart)
    ratio = factor * torch.sinc(widened / math.pi) / torch.sinc(theta / math.pi)
    return widened.cos()[:, None] * m + ratio[:, None] * across


class AnchorExpansion(nn.Module):
    """The map, with the state that it was fitted to: a transform for a class head.

    The state is float64, whatever dtype the model around it is cast to, and lies in the head's state dict, so that
    novel class names (``with_classes``) and saved models go through the training classes' map.

    The published map has no bound: a novel class further from m than theta_max goes beyond the right angle, and one
    further than ``2 theta_max`` comes back towards m from the other side.

    Attributes:
        m: (D,) unit mean direction of the training classes.
        theta_max: scalar, in radians: what goes to a right angle.
        limit: scalar, in radians: the largest new angle; infinite unless fitted with a quantile below 1.
    """

    m: Tensor
    theta_max: Tensor
    limit: Tensor

    def __init__(self, m: Tensor, theta_max: float, limit: float = math.inf) -> None:
        """
        Args:
            m: (D,), normalised here.
            theta_max: in (0, pi].
            limit: above 0.

        Raises:
            UsageError: another shape, a zero m, an angle outside its range.
        """
        super().__init__()
        if m.dim() != 1 or not bool(torch.isfinite(m).all()) or not float(m.double().norm()) > 0:
            raise UsageError(f"m has shape {tuple(m.shape)}; a finite, non-zero direction (D,) is expected.")
        if not 0 < theta_max <= math.pi:
            raise UsageError(f"theta_max is {theta_max}; an angle in (0, pi], in radians, is expected.")
        if not limit > 0:
            raise UsageError(f"limit is {limit}; an angle above 0, in radians, or infinity is expected.")
        self.register_buffer("m", F.normalize(m.detach().double(), dim=0))
        self.register_buffer("theta_max", torch.tensor(theta_max, dtype=torch.float64, device=m.device))
        self.register_buffer("limit", torch.tensor(limit, dtype=torch.float64, device=m.device))

    @classmethod
    def fit(cls, train_embeddings: Tensor, *, quantile: float = 1.0) -> AnchorExpansion:
        """The expansion of the training classes.

        Args:
            train_embeddings: (K, D) text embeddings of the training classes alone, normalised here.
            quantile: which quantile of the training classes' angles is theta_max. 1 is the published maximum, which
                one odd class name decides alone; below 1, angles that would pass the right angle stop there.

        Raises:
            UsageError: fewer than two distinct directions, embeddings that cancel, values that are not finite, zero
                rows, another shape, a quantile outside (0, 1].
        """
        t = train_embeddings
        _check_embeddings(t, "train_embeddings")
        if not 0 < quantile <= 1:
            raise UsageError(f"quantile is {quantile!r}; a number above 0 and at most 1 is expected.")
        a = F.normalize(t.detach().double(), dim=1)
        if not len(t) or float((a - a[0]).abs().max()) < _TINY:
            raise UsageError(
                f"expansion fitted on fewer than two distinct embeddings: {len(t)} of one direction leave nothing to "
                "spread out; give those of at least two classes."
            )
        m = mean_direction(t.detach())
        theta, _ = polar(t.detach(), m)
        theta_max = float(theta.max() if quantile == 1 else torch.quantile(theta, quantile))
        if theta_max < _TINY:
            raise UsageError(
                f"quantile is {quantile}, but so many of the {len(t)} embeddings equal their mean direction that its "
                "angle is 0; take a larger one."
            )
        return cls(m, theta_max, math.inf if quantile == 1 else RIGHT_ANGLE).eval()

    @classmethod
    def identity(cls, dim: int) -> AnchorExpansion:
        """The map that changes nothing but lengths, of dimension ``dim``: takes a saved model's state."""
        return cls(torch.eye(1, dim, dtype=torch.float64)[0], RIGHT_ANGLE).eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """(M, D) embeddings of any classes -> (M, D) unit anchors, in the embeddings' dtype (float32 for a half).

        Raises:
            UsageError: another dimension; zero or infinite rows; a row opposite to m, which has no direction to go.
        """
        _check_embeddings(embeddings, "embeddings", len(self.m))
        theta, across = polar(embeddings.detach(), self.m)
        if bool(((theta > RIGHT_ANGLE) & (across.norm(dim=1) < 1e-12)).any()):
            raise UsageError(
                "embeddings has a row opposite to the mean direction of the training classes, where the expansion is "
                "undefined; are they of the same text tower?"
            )
        expanded = dilate(embeddings, self.m, self.theta_max, self.limit)
        return expanded.to(torch.promote_types(embeddings.dtype, torch.float32))

    def _apply(self, *args: Any, **kwargs: Any) -> AnchorExpansion:
        state = dict(self.named_buffers())
        super()._apply(*args, **kwargs)
        for name, value in state.items():  # a cast of the model around it is about its weights
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"dim={len(self.m)}, theta_max={math.degrees(float(self.theta_max)):.2f} degrees"


def _check_embeddings(embeddings: Tensor, argument: str, dim: int | None = None) -> None:
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point() or embeddings.dim() != 2:
        got = getattr(embeddings, "shape", None)
        raise UsageError(
            f"{argument} is a {type(embeddings).__name__}{'' if got is None else f' of shape {tuple(got)}'}; "
            "a float tensor (K, D), a row a class, is expected."
        )
    if dim is not None and embeddings.shape[1] != dim:
        raise UsageError(
            f"{argument} has dimension {embeddings.shape[1]}, but the expansion was fitted on {dim}; take them from "
            "the same text tower."
        )
    if not bool(torch.isfinite(embeddings).all()) or bool((embeddings == 0).all(dim=1).any()):
        raise UsageError(f"{argument} contains NaN, infinite or zero rows; finite non-zero ones are expected.")


def check_dimension(model: ZeroShotClassifier) -> None:
    """Require anchors of the tower's dimension; costs a forward pass of one image.

    Raises:
        UsageError: they have another.
    """
    side = model.image_size
    with attack_mode(model), torch.no_grad():
        found = model.embed(torch.full((1, model.mean.numel(), side, side), 0.5, device=model.device)).shape[1]
    if found != model.head.anchors.shape[1]:
        raise another_dimension(model.head.anchors.shape[1], found, f"the tower {type(model.tower).__name__}")


def another_dimension(anchors: int, tower: int, what: str) -> UsageError:
    """The error for class embeddings that are not of the tower's dimension."""
    return UsageError(
        f"class embeddings have dimension {anchors}, but {what} gives {tower}; take embeddings of dimension {tower}, "
        "or build the tower for these."
    )
