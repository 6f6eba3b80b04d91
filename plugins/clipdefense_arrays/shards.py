"""``webdataset:``: a folder of WebDataset tar shards, read by index.

The format is plain tar: the members of a sample share the name up to the first dot of their file name. A first pass
reads the headers and the labels, 24 bytes a sample stay in memory, and an image is then one seek and one read, so that
any part of a data set can be evaluated, in any order, from any worker process. No package is needed for it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clipdefense.data import ImageDataset, find_file
from clipdefense.data.pixels import decode
from clipdefense.errors import UsageError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


class _Sample(NamedTuple):
    """What the headers of one sample say: the image's first byte and length, and its label."""

    start: int
    length: int
    label: int


class ShardImages:
    """Images by row, in the order of the shards and of the samples in them."""

    def __init__(self, shards: Sequence[Path], places: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        """
        Args:
            shards: the tar files.
            places: (n, 3) int64: number of the shard, first byte and length of each image.
            labels: (n,) int64.
        """
        self.shards, self.places, self.labels = list(shards), places, labels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Image.Image:
        shard, start, length = (int(value) for value in self.places[row])
        with self.shards[shard].open("rb") as file:
            file.seek(start)
            return decode(file.read(length))

    def where(self, row: int) -> str:
        shard, start, _ = (int(value) for value in self.places[row])
        return f"{self.shards[shard]} at byte {start}"


def load_shards(
    path: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> ImageDataset:
    """``webdataset:path``: a folder with ``*.tar`` shards, or with a folder of them for each split.

    A sample is an image (``KEY.jpg``, ``.png``, ``.webp``, ...) and its label, a whole number in ``KEY.cls``. Shards
    are uncompressed and read in the natural order of their names (``2.tar`` before ``10.tar``).

    Args:
        path: absolute, or relative to the working folder or to ``CLIPDEFENSE_DATA``.
        split: a folder inside, such as ``"test"``; None where path holds the shards.
        classes: names; else the lines of ``classnames.txt`` in path.
        n: take so many images, evenly over the classes.
        seed: of that choice.
        size: side to resize and crop to; None keeps each image as it is.

    Returns:
        A dataset; ``meta["templates"]`` are the lines of ``zeroshot_classification_templates.txt``, if it is there,
        with ``{}`` for ``{c}``, the layout of CLIP_benchmark's data sets.

    Raises:
        UsageError: no such folder, shards or split, no class names, or a shard that is damaged, compressed or holds
            a sample without an image or a label.
    """
    root = find_file(path, "folder of shards")
    folder = root if split is None else root / split
    shards = sorted(folder.glob("*.tar"), key=_natural) if folder.is_dir() else []
    if not shards:
        inside = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) if root.is_dir() else ""
        advice = f"; {root} holds the splits {inside}, name one with split=" if inside else ""
        raise UsageError(f"{folder} holds no .tar shards{advice}.")
    names = _lines(root / CLASSES) if classes is None else list(classes)
    if not names:
        raise UsageError(f"{root} brings no class names; write them into {CLASSES}, a line each, or pass classes=.")
    images = _index(shards)
    if int(images.labels.max()) >= len(names) or int(images.labels.min()) < 0:
        raise UsageError(
            f"{folder} has labels in [{images.labels.min()}, {images.labels.max()}] for {len(names)} class names."
        )
    templates = [line.replace("{c}", "{}") for line in _lines(root / TEMPLATES)]
    meta = {"templates": templates} if templates else {}
    name = root.name if split is None else f"{root.name}/{split}"
    dataset = ImageDataset(images, images.labels, names, name=name, size=size, meta=meta)
    return dataset if n is None else dataset.sample(n, seed)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _index(shards: Sequence[Path]) -> ShardImages:
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        try:
            for sample in _samples(shard):
                places.append((number, sample.start, sample.length))
                labels.append(sample.label)
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(f"shard {shard} is truncated, compressed or no tar file ({error}).") from error
    if not places:
        raise UsageError(f"the {len(shards)} shards in {shards[0].parent} hold no sample.")
    return ShardImages(shards, np.array(places, dtype=np.int64), np.array(labels, dtype=np.int64))


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of one shard, in order; a sample's members stand together, as WebDataset writes them."""
    size = shard.stat().st_size
    with tarfile.open(shard, "r:") as archive:
        key = ""
        parts: dict[str, tarfile.TarInfo] = {}
        for member in archive:
            if not member.isfile():
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            new = f"{folder}/{stem}" if folder else stem
            if new != key and parts:
                yield _sample(shard, archive, key, parts)
                parts = {}
            key = new
            parts[extension.lower()] = member
        if parts:
            yield _sample(shard, archive, key, parts)


def _sample(shard: Path, archive: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> _Sample:
    pictures = [extension for extension in parts if extension in PICTURES]
    if len(pictures) != 1 or "cls" not in parts:
        raise UsageError(
            f"sample {key!r} of {shard} has the parts {', '.join(sorted(parts))}; one image "
            f"({', '.join(PICTURES[:4])}, ...) and its label (cls) are expected."
        )
    file = archive.extractfile(parts["cls"])
    text = b"" if file is None else file.read().strip()
    if not text.isdigit():
        raise UsageError(f"sample {key!r} of {shard} has the label {text[:20]!r}; a whole number is expected.")
    picture = parts[pictures[0]]
    return _Sample(picture.offset_data, picture.size, int(text))
