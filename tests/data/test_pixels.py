"""Which value of a file is white: by its mode and its format, never by what the image happens to hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipdefense import load_dataset
from clipdefense.data.pixels import decode, to_rgb
from clipdefense.errors import UsageError

LEVELS = np.array([[0, 100, 255]])


def written(pixels: NDArray[np.generic], kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def grey(image: Image.Image) -> list[list[int]]:
    """The levels of an RGB image that is grey."""
    assert image.mode == "RGB"
    red, green, blue = (np.asarray(image)[..., channel] for channel in range(3))
    assert np.array_equal(red, green) and np.array_equal(red, blue)
    levels: list[list[int]] = red.tolist()
    return levels


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    assert grey(decode(written((LEVELS * 257).astype(np.uint16), kind))) == LEVELS.tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "BMP"])
def test_grey_of_8_bits_stays(kind: str) -> None:
    assert grey(decode(written(LEVELS.astype(np.uint8), kind))) == LEVELS.tolist()


def test_a_dark_image_of_16_bits_is_dark() -> None:
    """Nothing in it is above 255, and it is scaled as its neighbours are."""
    assert grey(decode(written(LEVELS.astype(np.uint16), "PNG"))) == [[0, 0, 1]]


def test_16_bits_that_pillow_opens_as_32() -> None:
    """A PGM with its own white, and a PNG as Pillow before version 11 gives it."""
    file = b"P5 3 1 4095\n" + np.array([0, 1606, 4095], ">u2").tobytes()
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode == "I"
    assert grey(decode(file)) == LEVELS.tolist()
    image = Image.fromarray((LEVELS * 257).astype(np.int32))
    image.format = "PNG"
    assert image.mode == "I" and grey(to_rgb(image)) == LEVELS.tolist()


@pytest.mark.parametrize("scale", [1, 257, 2**20])
def test_32_bits_are_refused_whatever_they_hold(scale: int) -> None:
    pixels = (LEVELS * scale).astype(np.int32)
    with Image.open(io.BytesIO(written(pixels, "TIFF"))) as image:
        assert image.mode == "I" and np.array_equal(np.asarray(image), pixels)
    with pytest.raises(ValueError, match=r"the pixels are 32-bit integers, .* which value is white; save it with 8 or"):
        decode(written(pixels, "TIFF"))
    with pytest.raises(ValueError, match="32-bit integers"):
        to_rgb(Image.fromarray(pixels))
    with pytest.raises(ValueError, match="floating point of unknown range"):
        to_rgb(Image.fromarray(pixels.astype(np.float32)))


def test_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "deep.tiff").write_bytes(written(LEVELS.astype(np.int32), "TIFF"))
    with pytest.raises(UsageError, match=r"deep\.tiff.*32-bit integers"):
        load_dataset(f"folder:{tmp_path}")[0]
