"""The data sets: where each lies below the root, how it is read, where it can be got."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from clipdefense.data import FileImages
from clipdefense.data.pixels import to_rgb
from clipdefense_torchvision.folders import Content, class_folders, imagenet, tiny_imagenet

Reader = Callable[[Path, Path, str, bool], Content]
"""(root, the data set's own folder, split, download) -> content."""


@dataclass(frozen=True)
class Row:
    """How to read one data set.

    Attributes:
        folder: what it reads below the root.
        page: where a person can get it.
        splits: their names; the first is the one that evaluations use.
        read: the reader.
        also: other places below the root where people keep it.
        fetches: ``download=True`` can get it.
        requires: packages that it needs besides torchvision.
    """

    folder: str
    page: str
    splits: tuple[str, ...]
    read: Reader
    also: tuple[str, ...] = ()
    fetches: bool = True
    requires: tuple[str, ...] = ()


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


def _listed(
    cls: type[Any],
    splits: Mapping[str, Mapping[str, Any]],
    labels: Callable[[Any], Sequence[Any]],
    names: Callable[[Any], Sequence[str]] = lambda data: data.classes,
    files: Callable[[Any], Sequence[Any]] | None = None,
) -> Reader:
    """A data set that torchvision lists: its labels, its own class names, its files where it has them."""

    def read(root: Path, folder: Path, split: str, download: bool) -> Content:
        data = cls(root=str(root), download=download, **splits[split])
        y = [int(label) for label in labels(data)]
        if files is None:
            return Content(_Images(data), y, names(data))
        # torchvision lists some in whatever order the file system gives
        pairs = sorted(zip(map(Path, files(data)), y)) if cls is datasets.SUN397 else zip(map(Path, files(data)), y)
        paths, y = (list(column) for column in zip(*pairs))
        return Content(FileImages(paths), y, names(data))

    return read


def _in_folders(cls: type[Any] | None, *, without: Sequence[str] = (), below: str = "") -> Reader:
    """A folder a class; torchvision only fetches it. ``below``: the folder of classes, ``{}`` for the split."""

    def read(root: Path, folder: Path, split: str, download: bool) -> Content:
        if download and cls is not None:
            cls(root=str(root), download=True)
        return class_folders(folder / below.format(split), without)

    return read


class _PCAMImages:
    """The images of one HDF5 file, opened for each, so that worker processes can be given the source."""

    def __init__(self, file: Path, n: int) -> None:
        self.file, self.n = file, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> Image.Image:
        import h5py

        with h5py.File(self.file) as file:
            return to_rgb(Image.fromarray(file["x"][row]))

    def where(self, row: int) -> str:
        return f"{self.file}, row {row}"


def _pcam(root: Path, folder: Path, split: str, download: bool) -> Content:
    import h5py

    if download:
        datasets.PCAM(root=str(root), split=split, download=True)
    files = datasets.PCAM._FILES[split]
    with h5py.File(folder / files["targets"][0]) as file:
        labels = file["y"][:, 0, 0, 0].tolist()
    return Content(_PCAMImages(folder / files["images"][0], len(labels)), labels, ["0", "1"])


def _imagenet(root: Path, folder: Path, split: str, download: bool) -> Content:
    return imagenet(folder / split)


def _tiny_imagenet(root: Path, folder: Path, split: str, download: bool) -> Content:
    return tiny_imagenet(folder, split)


def _named(*names: str) -> Mapping[str, Mapping[str, Any]]:
    return {name: {"split": name} for name in names}


_FLAG: Mapping[str, Mapping[str, Any]] = {"test": {"train": False}, "train": {"train": True}}
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"

TABLE: Mapping[str, Row] = {
    "cifar10": Row(
        "cifar-10-batches-py", _CIFAR, ("test", "train"), _listed(datasets.CIFAR10, _FLAG, lambda data: data.targets)
    ),
    "cifar100": Row(
        "cifar-100-python", _CIFAR, ("test", "train"), _listed(datasets.CIFAR100, _FLAG, lambda data: data.targets)
    ),
    "stl10": Row(
        "stl10_binary",
        "https://cs.stanford.edu/~acoates/stl10/",
        ("test", "train"),
        _listed(datasets.STL10, _named("test", "train"), lambda data: data.labels),
    ),
    "imagenet": Row(
        "imagenet",
        "https://image-net.org/download.php (ILSVRC2012; log in first)",
        ("val", "train"),
        _imagenet,
        also=("ILSVRC2012", "ILSVRC/Data/CLS-LOC", "."),
        fetches=False,
    ),
    "tiny-imagenet": Row(
        "tiny-imagenet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ("val", "train"),
        _tiny_imagenet,
        also=("tiny-imagenet", "."),
        fetches=False,
    ),
    "caltech101": Row(
        "caltech101/101_ObjectCategories",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        ("all",),
        _in_folders(datasets.Caltech101, without=("BACKGROUND_Google",)),
    ),
    "caltech256": Row(
        "caltech256/256_ObjectCategories",
        "https://data.caltech.edu/records/nyy15-4j048",
        ("all",),
        _in_folders(datasets.Caltech256),
    ),
    "oxford-pets": Row(
        "oxford-iiit-pet",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        ("test", "trainval"),
        _listed(
            datasets.OxfordIIITPet,
            _named("test", "trainval"),
            lambda data: data._labels,
            files=lambda data: data._images,
        ),
    ),
    "flowers102": Row(
        "flowers-102",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        ("test", "val", "train"),
        _listed(
            datasets.Flowers102,
            _named("test", "val", "train"),
            lambda data: data._labels,
            files=lambda data: data._image_files,
        ),
    ),
    "fgvc-aircraft": Row(
        "fgvc-aircraft-2013b",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        ("test", "val", "train", "trainval"),
        _listed(
            datasets.FGVCAircraft,
            _named("test", "val", "train", "trainval"),
            lambda data: data._labels,
            files=lambda data: data._image_files,
        ),
    ),
    "stanford-cars": Row(
        "stanford_cars",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (gone; mirrors keep the archives and the devkit)",
        ("test", "train"),
        _listed(
            datasets.StanfordCars,
            _named("test", "train"),
            lambda data: [label for _, label in data._samples],
            files=lambda data: [path for path, _ in data._samples],
        ),
        fetches=False,
    ),
    "sun397": Row(
        "SUN397",
        "https://vision.princeton.edu/projects/2010/SUN/",
        ("all",),
        _listed(datasets.SUN397, {"all": {}}, lambda data: data._labels, files=lambda data: data._image_files),
    ),
    "food101": Row(
        "food-101",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        ("test", "train"),
        _listed(
            datasets.Food101, _named("test", "train"), lambda data: data._labels, files=lambda data: data._image_files
        ),
    ),
    "eurosat": Row("eurosat/2750", "https://github.com/phelber/eurosat", ("all",), _in_folders(datasets.EuroSAT)),
    "dtd": Row(
        "dtd/dtd",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        ("test", "val", "train"),
        _listed(
            datasets.DTD,
            _named("test", "val", "train"),
            lambda data: data._labels,
            files=lambda data: data._image_files,
        ),
    ),
    "pcam": Row(
        "pcam",
        "https://github.com/basveeling/pcam",
        ("test", "val", "train"),
        _pcam,
        requires=("h5py",),
    ),
    "country211": Row(
        "country211",
        "https://github.com/openai/CLIP/blob/main/data/country211.md",
        ("test", "valid", "train"),
        _in_folders(datasets.Country211, below="{}"),
    ),
}
