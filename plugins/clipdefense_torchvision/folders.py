"""Data sets that are folders of images: one sub-folder a class, ImageNet, and Tiny-ImageNet with its odd val folder.

Listings are sorted, so that an image has the same number on every file system.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipdefense.data import FileImages, ImageSource
from clipdefense.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png")
WORDS, SYNSETS, ANNOTATIONS = "words.txt", "wnids.txt", "val_annotations.txt"


class Content(NamedTuple):
    """A data set as read: images, a label each, and the data set's own class names in label order."""

    images: ImageSource
    labels: Sequence[int]
    names: Sequence[str]


def sub_folders(folder: Path, without: Sequence[str] = ()) -> list[Path]:
    """The class folders, sorted by name."""
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [entry for entry in found if entry.name not in without]


def images_in(folder: Path) -> list[Path]:
    """The images of one folder, sorted."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)


def class_folders(folder: Path, without: Sequence[str] = ()) -> Content:
    """One sub-folder a class, named after it.

    Raises:
        UsageError: no folder, or one without images.
    """
    classes = sub_folders(folder, without)
    files = [images_in(entry) for entry in classes]
    empty = [entry.name for entry, found in zip(classes, files) if not found]
    if not classes or empty:
        what = f"no image in its class folder {empty[0]!r}" if empty else "no class folders"
        raise UsageError(f"{folder} has {what} ({' '.join(EXTENSIONS)} are read); unpack the data set afresh.")
    labels = [label for label, found in enumerate(files) for _ in found]
    return Content(FileImages([file for found in files for file in found]), labels, [c.name for c in classes])


def imagenet(folder: Path) -> Content:
    """ImageNet-1k's ``val`` or ``train``: a folder a synset.

    Raises:
        UsageError: val as it comes out of the archive (50,000 files in one folder), or synsets missing.
    """
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    classes = [entry.name for entry in sub_folders(folder)]
    if not classes and any(folder.glob("ILSVRC2012_val_*")):
        raise UsageError(
            f"{folder} holds the validation images in one folder, as they come out of the archive; one folder a "
            "synset is expected: torchvision.datasets.ImageNet(ROOT, split='val') with the devkit's archive beside "
            "the images' sorts them."
        )
    absent, unknown = sorted(set(synsets) - set(classes)), sorted(set(classes) - set(synsets))
    if absent or unknown:
        raise UsageError(
            f"{folder} should hold ImageNet-1k's {len(synsets)} synset folders; missing: "
            f"{_some(absent)}; unknown: {_some(unknown)}. A part of it loads as an image folder of your own."
        )
    content = class_folders(folder)
    return content._replace(names=imagenet_names())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def imagenet_names() -> list[str]:
    """1,000 distinct names in the order of the sorted synsets.

    open_clip's curated list; the few that repeat in it ("missile", "sunglasses") are torchvision's instead.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from torchvision.models import ResNet18_Weights

    count = Counter(IMAGENET_CLASSNAMES)
    others: list[str] = ResNet18_Weights.DEFAULT.meta["categories"]
    return [name if count[name] == 1 else other for name, other in zip(IMAGENET_CLASSNAMES, others)]


def tiny_imagenet(folder: Path, split: str) -> Content:
    """``tiny-imagenet-200``: classes in the order of the sorted synsets, names from ``words.txt``.

    ``train`` is ``train/SYNSET/images/*.JPEG``. ``val`` may be as it came (``val/images/*.JPEG`` with the labels in
    ``val/val_annotations.txt``) or sorted into folders (``val/SYNSET/*.JPEG`` or ``val/SYNSET/images/*.JPEG``): an
    image has the same number and label in all three.

    Raises:
        UsageError: a file or folder that is missing, or an image without a label.
    """
    synsets = sorted(line.strip() for line in _text(folder / SYNSETS).splitlines() if line.strip())
    label = {synset: number for number, synset in enumerate(synsets)}
    words = dict(line.rstrip().split("\t", 1) for line in _text(folder / WORDS).splitlines() if "\t" in line)
    unnamed = [synset for synset in synsets if synset not in words]
    if unnamed:
        raise UsageError(f"{folder / WORDS} has no entry for {_some(unnamed)} of {SYNSETS}; unpack it afresh.")
    part = folder / split
    if split == "val" and (part / "images").is_dir() and any((part / "images").iterdir()):
        found = _annotated(part, label)
    else:
        found = _sorted_into_folders(part, label)
    found.sort(key=_number)
    return Content(FileImages([f for f, _ in found]), [y for _, y in found], [words[synset] for synset in synsets])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); unpack the data set afresh.") from error


def _annotated(part: Path, label: dict[str, int]) -> list[tuple[Path, int]]:
    lines = [line.split("\t") for line in _text(part / ANNOTATIONS).splitlines() if line.strip()]
    strange = [line for line in lines if len(line) < 2 or line[1] not in label]
    if strange:
        raise UsageError(
            f"{part / ANNOTATIONS} has the line {strange[0]!r}; FILE<tab>SYNSET, a synset of {SYNSETS}, is expected."
        )
    files = {file.name: file for file in images_in(part / "images")}
    labelled = {line[0]: label[line[1]] for line in lines}
    if files.keys() != labelled.keys():
        odd = sorted(files.keys() ^ labelled.keys())
        raise UsageError(f"{part / 'images'} and {ANNOTATIONS} differ in {_some(odd)}; unpack the data set afresh.")
    return [(files[name], y) for name, y in labelled.items()]


def _sorted_into_folders(part: Path, label: dict[str, int]) -> list[tuple[Path, int]]:
    if not part.is_dir():
        raise UsageError(f"{part} does not exist; unpack the data set afresh.")
    found = []
    for entry in sub_folders(part, without=("images",)):
        if entry.name not in label:
            raise UsageError(f"{part} has the folder {entry.name!r}, which is no synset of {SYNSETS}.")
        inner = entry / "images"
        found += [(file, label[entry.name]) for file in images_in(inner if inner.is_dir() else entry)]
    if not found:
        raise UsageError(f"{part} holds no images; unpack the data set afresh.")
    return found


def _number(entry: tuple[Path, int]) -> tuple[Any, ...]:
    """val_2 before val_10, and n01443537_0 before n01443537_1, whatever folder they are in."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry[0].name))
