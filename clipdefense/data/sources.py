"""Where an image comes from: encoded bytes, files or arrays, each a sequence that decodes what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipdefense.data.pixels import decode
from clipdefense.errors import UsageError


class ImageSource(Protocol):
    """Images by row, to be pickled to the worker processes of a ``DataLoader``."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Image.Image | Tensor:
        """An RGB image, or a float tensor (3, H, W) in [0, 1]; any exception means that it cannot be decoded."""

    def where(self, row: int) -> str:
        """What to call the image in a message: its path, or ``""``."""


class EncodedImages:
    """Image files end to end in one array: file i is ``blob[offsets[i]:offsets[i + 1]]``."""

    def __init__(self, blob: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], paths: Sequence[str] = ()) -> None:
        """
        Args:
            blob: uint8, the files' bytes.
            offsets: (n + 1,), rising from 0 to len(blob).
            paths: n names for messages, or none.
        """
        self.blob, self.offsets, self.paths = blob, offsets, tuple(paths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Image.Image:
        return decode(self.blob[int(self.offsets[row]) : int(self.offsets[row + 1])].tobytes())

    def where(self, row: int) -> str:
        return self.paths[row] if self.paths else ""


class FileImages:
    """One image file a row."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Image.Image:
        return decode(self.files[row])

    def where(self, row: int) -> str:
        return str(self.files[row])


class ArrayImages:
    """Pixels in one array: uint8, or floating point in [0, 1]; NCHW or NHWC; 1, 3 or 4 channels, or none (N, H, W)."""

    def __init__(self, pixels: np.ndarray[Any, Any], layout: str | None = None, argument: str = "x") -> None:
        """
        Args:
            pixels: the images; memory-mapped is fine, uint8 is read image by image.
            layout: ``"NCHW"`` or ``"NHWC"``; None tells by where the 1, 3 or 4 channels are.
            argument: the array's name in messages.

        Raises:
            UsageError: another rank, dtype or range, or a layout that cannot be told.
        """
        if pixels.ndim == 3:
            pixels, layout = pixels[:, None], "NCHW"
        if pixels.ndim != 4 or 0 in pixels.shape:
            raise UsageError(
                f"{argument} has shape {pixels.shape}; (N, C, H, W), (N, H, W, C) or (N, H, W) is expected."
            )
        if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
            raise UsageError(f"{argument} has dtype {pixels.dtype}; uint8, or floating point in [0, 1], is expected.")
        self.channels_last = _channels_last(pixels.shape, layout, argument)
        if pixels.dtype != np.uint8:
            _check_range(pixels, argument)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> Image.Image | Tensor:
        image = np.asarray(self.pixels[row])
        image = image if self.channels_last else image.transpose(1, 2, 0)
        image = image.repeat(3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
        if image.dtype == np.uint8:
            return Image.fromarray(np.ascontiguousarray(image))
        return torch.from_numpy(np.array(image.transpose(2, 0, 1), dtype=np.float32)).clamp_(0, 1)

    def where(self, row: int) -> str:
        return ""


def _channels_last(shape: tuple[int, ...], layout: str | None, argument: str) -> bool:
    if layout not in (None, "NCHW", "NHWC"):
        raise UsageError(f"layout is {layout!r}; 'NCHW' or 'NHWC' is expected.")
    if layout is None:
        # 4 channels are rarer than images of 4 pixels beside a 1 or a 3
        for counts in ((1, 3), (4,)):
            first, last = shape[1] in counts, shape[3] in counts
            if first and last:
                raise UsageError(f"{argument} has shape {shape}, which may be NCHW or NHWC; say which with layout=.")
            if first or last:
                return last
        raise UsageError(f"{argument} has shape {shape}, without a dimension of 1, 3 or 4 channels.")
    if shape[3 if layout == "NHWC" else 1] not in (1, 3, 4):
        raise UsageError(f"{argument} has shape {shape}, without 1, 3 or 4 channels at the place that {layout} says.")
    return layout == "NHWC"


def _check_range(pixels: np.ndarray[Any, Any], argument: str) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise UsageError(f"{argument} contains NaN or infinite values; finite pixels in [0, 1] are expected.")
    if low < -1e-6 or high > 1 + 1e-6:
        advice = "divide by 255" if low >= 0 and high > 2 else "normalisation belongs inside the model"
        raise UsageError(f"{argument} has values in [{low:.4g}, {high:.4g}]; [0, 1] is expected; {advice}.")
