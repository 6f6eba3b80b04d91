"""Decoding and resizing of one image: the only rules by which a file becomes pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
# what these hold beyond 8 bits, Pillow opens as mode "I" (PNG in its older versions) and scales to 16 bits
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def decode(encoded: bytes | Path) -> Image.Image:
    """An encoded image (bytes or file) as an RGB image, fully decoded; grey is repeated and alpha is dropped.

    Raises:
        OSError, ValueError, ...: whatever Pillow raises for what it cannot decode.
    """
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image of 8 or 16 bits a channel as 8-bit RGB.

    White is the largest value that the format can hold: 255, or 65,535 for grey of 16 bits (modes ``I;16...``, and
    ``I`` from a PNG or PNM file). What of the 2^32 values of a 32-bit image is white, no file says, and looking at the
    values would judge a dark image by another rule than its neighbours; such an image is refused, as one of floating
    point is.

    Raises:
        ValueError: pixels of 32-bit integers or of floating point.
    """
    if image.mode == "RGB":
        return image
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        # Pillow clips 16-bit grey to 255 instead of scaling it
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError(
            "the pixels are 32-bit integers, and the file does not say which value is white; save it with 8 or 16 bits"
        )
    elif image.mode == "F":
        raise ValueError("the pixels are floating point of unknown range")
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize_image(
    image: Image.Image, size: int, crop: int | None = None, *, interpolation: str = "bicubic", squash: bool = False
) -> Image.Image:
    """Shorter side to ``size`` (Pillow's filters, which anti-alias), then the central (crop, crop) square.

    Args:
        image: RGB.
        size: the shorter side, or under ``squash`` both sides, whatever becomes of the proportions.
        crop: at most ``size``; None is ``size``.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        squash: no crop.
    """
    height, width = (size, size) if squash else _scaled(image.height, image.width, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    top, left, crop = _corner(height, width, size if crop is None or squash else crop)
    return image.crop((left, top, left + crop, top + crop))


def resize_tensor(
    pixels: Tensor, size: int, crop: int | None = None, *, interpolation: str = "bicubic", squash: bool = False
) -> Tensor:
    """:func:`resize_image` for float pixels (3, H, W) in [0, 1], clamped; up to rounding to 8 bits the same."""
    height, width = (size, size) if squash else _scaled(pixels.shape[-2], pixels.shape[-1], size)
    if (height, width) != tuple(pixels.shape[-2:]):
        scaled = F.interpolate(pixels[None], (height, width), mode=interpolation, align_corners=False, antialias=True)
        pixels = scaled[0].clamp(0, 1)
    top, left, crop = _corner(height, width, size if crop is None or squash else crop)
    return pixels[:, top : top + crop, left : left + crop]


def _corner(height: int, width: int, crop: int) -> tuple[int, int, int]:
    return round((height - crop) / 2), round((width - crop) / 2), crop


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
