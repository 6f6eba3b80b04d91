"""Bicubic resizing: ``F.interpolate``, or where repetition is asked for, the same as two matrix products.

The backward of ``F.interpolate`` on CUDA uses atomic additions, so that the same training run gives other weights each
time (and is refused under ``torch.use_deterministic_algorithms``). A matrix product repeats bit for bit. It is not the
only form because other arithmetic, equal within 1e-6 a pixel, moves an embedding by up to 1e-4, and published weights
and numbers were made with ``F.interpolate``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_A = -0.75  # the cubic kernel's parameter, torch's and OpenCV's


def bicubic_matrix(source: int, target: int, *, like: Tensor) -> Tensor:
    """(target, source) weights along one axis: ``mode="bicubic"``, ``align_corners=False``, no antialias.

    Beyond the border the outermost pixel repeats. Positions are rounded as ``F.interpolate`` rounds them: in float32
    its result lies up to 1e-5 from the exact one.

    Args:
        source, target: lengths in pixels, at least 1.
        like: its dtype and device are the result's.
    """
    places = torch.arange(target, dtype=torch.float64, device=like.device)
    scale = torch.tensor(source, dtype=like.dtype) / target
    # its multiplication and addition are fused: one rounding
    centre = (scale.to(places) * (places + 0.5) - 0.5).to(like.dtype)
    first = centre.floor()
    t = (centre - first)[:, None].double()
    # distances from the centre to the four pixels around it
    d = torch.cat([t + 1, t, 1 - t, 2 - t], dim=1)
    near = ((_A + 2) * d - (_A + 3)) * d * d + 1
    far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    taps = torch.where(d <= 1, near, far)
    index = (first.long()[:, None] + torch.arange(-1, 3, device=like.device)).clamp(0, source - 1)
    weights = torch.zeros(target, source, dtype=torch.float64, device=like.device)
    # one tap at a time, since two taps may meet in a border pixel and scatter adds in any order
    cells = torch.arange(source, device=like.device)
    for tap in range(4):
        weights += torch.where(index[:, tap, None] == cells, taps[:, tap, None], 0.0)
    return weights.to(like.dtype)


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), bicubic without antialias and without a clamp: it may leave the range of x."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    return by_matrices(x, size)


def by_matrices(x: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`bicubic` with a deterministic backward pass on every device."""
    rows, columns = (bicubic_matrix(side, target, like=x) for side, target in zip(x.shape[-2:], size))
    return rows @ x @ columns.T
