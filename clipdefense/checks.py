"""Checks of what callers pass in, made before any work: each error names the argument, what was got, what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clipdefense.errors import UsageError


def check_batch(x: Tensor, argument: str = "x", channels: int | None = None) -> None:
    """Require a float tensor of shape (N, C, H, W), N >= 1; the values are not looked at, which costs nothing.

    Args:
        x: the images.
        argument: the name used in the message.
        channels: the number of channels the model takes; None accepts any.
    """
    if not isinstance(x, Tensor):
        raise UsageError(f"{argument} is a {type(x).__name__}; a torch tensor is expected (torch.from_numpy converts).")
    if not x.is_floating_point():
        advice = "divide by 255: x.float() / 255" if x.dtype == torch.uint8 else "convert with x.float()"
        raise UsageError(f"{argument} has dtype {x.dtype}; floating point in [0, 1] is expected; {advice}.")
    if x.dim() != 4:
        advice = "; add the batch dimension with x[None]" if x.dim() == 3 else ""
        raise UsageError(f"{argument} has shape {tuple(x.shape)}; (N, C, H, W) is expected{advice}.")
    if x.shape[0] == 0:
        raise UsageError(f"{argument} is an empty batch, shape {tuple(x.shape)}; at least one image is expected.")
    if channels is not None and x.shape[1] != channels:
        advice = "; it looks like NHWC, permute with x.permute(0, 3, 1, 2)" if x.shape[3] == channels else ""
        raise UsageError(
            f"{argument} has {x.shape[1]} channels, shape {tuple(x.shape)}; {channels} are expected{advice}."
        )


def check_images(x: Tensor, argument: str = "x", channels: int | None = None) -> None:
    """Require float images, shape (N, C, H, W), N >= 1, finite, in [0, 1]; arguments as :func:`check_batch`."""
    check_batch(x, argument, channels)
    low, high = (float(value) for value in x.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UsageError(f"{argument} contains NaN or infinite values; finite pixels in [0, 1] are expected.")
    if low < -1e-6 or high > 1 + 1e-6:
        advice = "divide by 255" if low >= 0 and high > 2 else "normalisation belongs inside the model"
        raise UsageError(f"{argument} has values in [{low:.4g}, {high:.4g}]; [0, 1] is expected; {advice}.")


def check_labels(y: Tensor, n: int, classes: int | None = None, argument: str = "y") -> None:
    """Require integer labels of shape (n,), each in [0, classes)."""
    if not isinstance(y, Tensor):
        raise UsageError(f"{argument} is a {type(y).__name__}; a torch tensor of integer labels is expected.")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise UsageError(f"{argument} has dtype {y.dtype}; integer class labels are expected (y.long()).")
    if y.dim() != 1:
        advice = "; one-hot labels convert with y.argmax(1)" if y.dim() == 2 else ""
        raise UsageError(f"{argument} has shape {tuple(y.shape)}; one integer a sample, ({n},), is expected{advice}.")
    if y.shape[0] != n:
        raise UsageError(f"{argument} has {y.shape[0]} labels for {n} images; one label an image is expected.")
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        top = f"{classes - 1}" if classes is not None else "classes - 1"
        raise UsageError(f"{argument} has labels in [{low}, {high}]; [0, {top}] is expected.")


def check_ids(ids: Tensor, n: int) -> None:
    """Distinct whole numbers from 0 on, one an image: two images of one id would get the same draws."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = f"dtype {ids.dtype}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
        raise UsageError(f"ids has {got}; a tensor of whole numbers, one an image, is expected (ids.long()).")
    if ids.shape != (n,):
        raise UsageError(f"ids has shape {tuple(ids.shape)}; one whole number an image, ({n},), is expected.")
    ordered = ids.sort().values
    if ordered[0] < 0:
        raise UsageError(f"ids contains {int(ordered[0])}; whole numbers of at least 0 are expected.")
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise UsageError(
            f"ids contains {int(repeated[0])} more than once; ids name the images in the random draws and must differ."
        )


def check_class_names(names: Sequence[str], argument: str = "classes") -> tuple[str, ...]:
    """Require at least two distinct, non-empty names; returns them as a tuple."""
    if isinstance(names, str):
        raise UsageError(f"{argument} is the string {names!r}; a list of names is expected, such as ['cat', 'dog'].")
    listed = tuple(names)
    for name in listed:
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"{argument} contains {name!r}; every class name must be a non-empty string.")
    if len(listed) < 2:
        got = "is empty" if not listed else f"has the one class {listed[0]!r}"
        raise UsageError(f"{argument} {got}; a classifier needs at least two.")
    repeated = [name for name, count in Counter(listed).items() if count > 1]
    if repeated:
        raise UsageError(f"{argument} contains {repeated[0]!r} more than once; class names must be distinct.")
    return listed
