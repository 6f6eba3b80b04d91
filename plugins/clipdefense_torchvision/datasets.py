"""``torchvision:NAME``: one row of :data:`TABLE` a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from clipdefense.data import ImageDataset, cache_folder
from clipdefense.data.pixels import to_rgb
from clipdefense.errors import UsageError, unknown_name

ROOT_VARIABLE = "CLIPDEFENSE_DATASETS"


@dataclass(frozen=True)
class Row:
    """How to read one data set.

    Attributes:
        cls: torchvision's class.
        folder: what it reads below the root, for messages.
        page: where a person can get it.
        splits: split -> the class's arguments.
        labels: the label of every image, without decoding any.
        names: class names as a prompt would have them, in label order.
    """

    cls: type[Any]
    folder: str
    page: str
    splits: Mapping[str, Mapping[str, Any]]
    labels: Callable[[Any], Sequence[int]]
    names: Callable[[Any], Sequence[str]]


def _readable(dataset: Any) -> list[str]:
    return [name.replace("_", " ") for name in dataset.classes]


_TRAIN_TEST: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

TABLE: Mapping[str, Row] = {
    "cifar10": Row(
        datasets.CIFAR10,
        "cifar-10-batches-py",
        _CIFAR_PAGE,
        _TRAIN_TEST,
        lambda data: data.targets,
        _readable,
    ),
    "cifar100": Row(
        datasets.CIFAR100, "cifar-100-python", _CIFAR_PAGE, _TRAIN_TEST, lambda data: data.targets, _readable
    ),
}


class _Images:
    """A torchvision data set without its labels."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Image.Image:
        return to_rgb(self.dataset[row][0])

    def where(self, row: int) -> str:
        return ""


def default_root() -> Path:
    """``CLIPDEFENSE_DATASETS``, or ``datasets`` in :func:`clipdefense.data.cache_folder`."""
    folder = os.environ.get(ROOT_VARIABLE)
    return Path(folder).expanduser() if folder else cache_folder("datasets")


def load(
    name: str,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
    n: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> ImageDataset:
    """``torchvision:NAME``, as torchvision lays it out on disk.

    Args:
        name: a key of :data:`TABLE`.
        split: ``"train"`` or ``"test"`` (the default).
        root: the folder that torchvision calls root; None is :func:`default_root`.
        download: fetch it when it is not there; nothing is downloaded otherwise.
        n: take so many images, evenly over the classes.
        seed: of that choice.
        size: side to resize and crop to; None keeps the native one.

    Raises:
        UsageError: an unknown name or split, or a data set that is not there, damaged, or cannot be downloaded.
    """
    row = TABLE.get(name)
    if row is None:
        raise unknown_name("torchvision data set", name, TABLE)
    split = "test" if split is None else split
    if split not in row.splits:
        raise unknown_name(f"split of {name}", split, row.splits)
    folder = default_root() if root is None else Path(root).expanduser()
    if not download and not (folder / row.folder).exists():
        raise UsageError(
            f"{name} is not there: {folder / row.folder} does not exist. Unpack it from {row.page} into {folder}, "
            f"name the folder that holds {row.folder} with root= or {ROOT_VARIABLE}, or fetch it with download=True."
        )
    dataset = ImageDataset(*_read(row, name, folder, split, download), name=f"{name}/{split}", size=size)
    return dataset if n is None else dataset.sample(n, seed)


def _read(row: Row, name: str, root: Path, split: str, download: bool) -> tuple[_Images, Sequence[int], Sequence[str]]:
    try:
        data = row.cls(root=str(root), download=download, **row.splits[split])
    except (RuntimeError, OSError) as error:
        if download:
            advice = f"could not be downloaded ({error}); get it from {row.page} by hand and unpack it into {root}"
        else:
            advice = (
                f"in {root / row.folder} is incomplete or damaged (its checksums differ); delete it and unpack it "
                f"afresh from {row.page}, or pass download=True"
            )
        raise UsageError(f"{name} {advice}.") from error
    return _Images(data), row.labels(data), row.names(data)
