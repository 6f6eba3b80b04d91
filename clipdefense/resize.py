"""Resizing as two matrix products: what ``F.interpolate`` computes, with a backward pass that adds in one order.

The backward of ``F.interpolate`` on CUDA uses atomic additions, so that the same training run gives other weights each
time. A matrix product repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_A = -0.75  # the cubic kernel's parameter, torch's and OpenCV's


def bicubic_matrix(source: int, target: int, *, like: Tensor) -> Tensor:
    """(target, source) weights along one axis: ``mode="bicubic"``, ``align_corners=False``, no antialias.

    Beyond the border the outermost pixel repeats. Weights are computed in float64.

    Args:
        source, target: lengths in pixels, at least 1.
        like: its dtype and device are the result's.
    """
    places = torch.arange(target, dtype=torch.float64, device=like.device)
    centre = (places + 0.5) * (source / target) - 0.5
    first = centre.floor()
    t = (centre - first)[:, None]
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
    rows, columns = (bicubic_matrix(side, target, like=x) for side, target in zip(x.shape[-2:], size))
    return rows @ x @ columns.T
