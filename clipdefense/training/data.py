"""Where batches come from. Arrays and map-style datasets have an order of ours, and repeat exactly; loaders do not."""

from __future__ import annotations

import abc
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipdefense import randomness
from clipdefense.checks import check_images, check_labels
from clipdefense.errors import UsageError
from clipdefense.plugins import registry
from clipdefense.training.runtime import derive_seed

Batch = dict[str, Tensor]
"""``ids`` (N,) sample ids, ``x`` (N, C, H, W), and ``y`` (N,) where there are labels."""


class Share(NamedTuple):
    """Which rows of every batch are this process's: ``rank``, ``rank + world``, ..."""

    rank: int = 0
    world: int = 1

    def of(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.world]


class Source(abc.ABC):
    """Training images, epoch by epoch.

    Attributes:
        exact: whether an epoch can be entered anywhere and gives the same batches again.
        size: number of images that train, or None.
        steps: batches an epoch, or None where only the end of the data tells.
    """

    exact: bool = True
    size: int | None = None
    steps: int | None = None

    @abc.abstractmethod
    def batches(self, epoch: int, first: int, share: Share) -> Iterator[Batch]:
        """This process's rows of the batches ``first``, ``first + 1``, ... of an epoch."""

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """The images that :attr:`TrainingConfig.validation` keeps from training, in a fixed order."""
        return iter(())


class Indexed(Source):
    """Images with ids of their own: order is a function of (seed, epoch, id) alone.

    Attributes:
        ids: (n,) sample ids; an image is read by its row, 0 .. n-1.
        training, kept_out: rows that train, and rows that are held out.
    """

    def __init__(self, ids: Tensor, batch_size: int, seed: int, validation: float = 0.0) -> None:
        """
        Args:
            ids: (n,) distinct.
            batch_size: an update's, over all processes.
            seed: of order and of the choice of held-out images.
            validation: share held out.

        Raises:
            UsageError: fewer images than one batch.
        """
        self.ids, self.batch_size, self.seed = ids, batch_size, seed
        shuffled = self._shuffled(torch.arange(len(ids)), derive_seed(seed, "validation"))
        count = max(round(validation * len(ids)), 1) if validation else 0
        self.kept_out, self.training = shuffled[:count].sort().values, shuffled[count:].sort().values
        self.size = len(self.training)
        self.steps = self.size // batch_size
        if not self.steps:
            held = f" ({count} more are held out)" if count else ""
            raise UsageError(
                f"there are {self.size} training images{held}, fewer than one batch of {batch_size}; pass "
                f"batch_size={max(self.size, 1)} or less, or more images."
            )

    def batches(self, epoch: int, first: int, share: Share) -> Iterator[Batch]:
        assert self.steps is not None
        order = self._shuffled(self.training, derive_seed(self.seed, "order", epoch))
        rows = order[: self.steps * self.batch_size].split(self.batch_size)[first:]
        return self.read([share.of(part) for part in rows], epoch)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        return self.read(self.kept_out.split(batch_size) if len(self.kept_out) else (), 0)

    def _shuffled(self, rows: Tensor, seed: int) -> Tensor:
        """The rows in an order that depends on (seed, id) alone; 48 bits a key, ties in the order they came."""
        words = randomness.uniform((2,), self.ids[rows], seed=seed, dtype=torch.float64)
        return rows[(words[:, 0] + words[:, 1] * 2.0**-24).argsort(stable=True)]

    @abc.abstractmethod
    def read(self, rows: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """The images of these rows, batch by batch."""


class Arrays(Indexed):
    """Images and labels in memory (or memory-mapped)."""

    def __init__(
        self, x: Any, y: Any, classes: int, needs_labels: bool, *, batch_size: int, seed: int, validation: float = 0.0
    ) -> None:
        self.x = as_images(x)
        check_images(self.x)
        self.y = as_labels(y, len(self.x), classes, needs_labels)
        super().__init__(torch.arange(len(self.x)), batch_size, seed, validation)

    def read(self, rows: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        for part in rows:
            batch = {"ids": self.ids[part], "x": self.x[part.to(self.x.device)]}
            if self.y is not None:
                batch["y"] = self.y[part.to(self.y.device)]
            yield batch


class MapStyle(Indexed):
    """A dataset with ``len(dataset)`` and ``dataset[i] -> (image (C, H, W) in [0, 1], label)``, or the image alone.

    Its ``ids`` are the sample ids where it has them (:class:`clipdefense.data.ImageDataset` does), else i. Python's,
    NumPy's and torch's generators are seeded by (seed, epoch, id) before each item is read, so that random
    augmentation repeats too, whatever process reads it.
    """

    def __init__(
        self,
        dataset: Any,
        classes: int,
        needs_labels: bool,
        *,
        batch_size: int,
        seed: int,
        validation: float = 0.0,
        workers: int = 0,
    ) -> None:
        ids = getattr(dataset, "ids", None)
        own = isinstance(ids, Tensor) and ids.shape == (len(dataset),) and len(ids.unique()) == len(ids)
        super().__init__(ids if own else torch.arange(len(dataset)), batch_size, seed, validation)  # type: ignore[arg-type]
        self.classes, self.needs_labels, self.workers = classes, needs_labels, workers
        self.items = _Items(dataset, self.ids.tolist(), seed)

    def read(self, rows: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        keys = [[(epoch, row) for row in part.tolist()] for part in rows]
        loader: DataLoader[Any] = DataLoader(
            self.items,  # type: ignore[arg-type]
            batch_sampler=keys,
            collate_fn=_collate,
            num_workers=self.workers,
        )
        for numbers, images, labels in loader:
            yield checked_batch(torch.tensor(numbers), images, labels, self.classes, self.needs_labels)


class _Items:
    """The dataset under keys (epoch, row), with the generators seeded for each item; gives (id, item)."""

    def __init__(self, dataset: Any, ids: list[int], seed: int) -> None:
        self.dataset, self.ids, self.seed = dataset, ids, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, row = key
        seed = derive_seed(self.seed, "item", epoch, self.ids[row])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (the generator that augmentations use)
        return self.ids[row], self.dataset[row]


def _collate(items: list[tuple[int, Any]]) -> tuple[list[int], Tensor, Tensor | None]:
    numbers, images, labels = [], [], []
    for number, item in items:
        image, label = item if isinstance(item, (tuple, list)) else (item, None)
        if not isinstance(image, (Tensor, np.ndarray)):
            raise UsageError(
                f"item {number} of the dataset holds a {type(image).__name__}; a (C, H, W) tensor in [0, 1] is "
                "expected (torchvision's ToTensor makes one of a PIL image)."
            )
        numbers.append(number)
        images.append(torch.as_tensor(image))
        labels.append(label)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UsageError(f"images of the dataset differ in shape: {sorted(shapes)[:3]}; resize them to one shape.")
    without = [number for number, label in zip(numbers, labels) if label is None]
    if without and len(without) < len(labels):
        raise UsageError(f"item {without[0]} of the dataset has no label, others do; all or none are expected.")
    return numbers, torch.stack(images), None if without else torch.tensor([int(label) for label in labels])


class Batches(Source):
    """Any iterable of (images, labels) batches, or of images alone; iterated afresh every epoch.

    Sample ids are positions within the epoch. The order is the iterable's own, so that a resume cannot be exact. Every
    process iterates over all of it and takes its rows; what they do not divide evenly is left out.
    """

    exact = False

    def __init__(self, loader: Iterable[Any], classes: int, needs_labels: bool) -> None:
        self.loader, self.classes, self.needs_labels = loader, classes, needs_labels
        try:
            self.steps = len(loader) if isinstance(loader, Sized) else None
        except TypeError:  # a DataLoader has __len__ whether or not its dataset has
            self.steps = None
        if self.steps == 0:
            raise UsageError("the loader has no batches; at least one is expected (drop_last drops a short one).")

    def batches(self, epoch: int, first: int, share: Share) -> Iterator[Batch]:
        seen, step = 0, -1
        for step, item in enumerate(self.loader):
            images, labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
            images = as_images(images[0] if isinstance(images, (tuple, list)) else images)
            ids = torch.arange(seen, seen + len(images))
            seen += len(images)
            if step >= first:
                batch = checked_batch(ids, images, labels, self.classes, self.needs_labels)
                even = len(images) // share.world * share.world
                if not even:
                    raise UsageError(f"a batch has {len(images)} images for {share.world} processes; each needs one.")
                yield {name: share.of(values[:even]) for name, values in batch.items()}
        if step < 0:
            raise UsageError(
                f"the loader gave no batches in epoch {epoch + 1}; one that can be iterated again is expected, such as "
                "a DataLoader or a list, not a generator."
            )


class GeneratorEpochs:
    """An ART ``DataGenerator``, which never ends, as an iterable of epochs of ``size // batch_size`` batches."""

    def __init__(self, generator: Any) -> None:
        """
        Raises:
            UsageError: not an ART generator, or one that does not know its size.
        """
        size, batch = getattr(generator, "size", None), getattr(generator, "batch_size", None)
        if not callable(getattr(generator, "get_batch", None)) or not size or not batch:
            raise UsageError(
                f"generator is a {type(generator).__name__} without get_batch(), size and batch_size; an "
                "art.data_generators.DataGenerator is expected (fit_loader takes any iterable of batches)."
            )
        self.generator, self.steps = generator, size // batch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            yield self.generator.get_batch()


def checked_batch(ids: Tensor, images: Tensor, labels: Any, classes: int, needs_labels: bool) -> Batch:
    """A batch of what a dataset or loader gave, checked."""
    check_images(images)
    batch = {"ids": ids, "x": images}
    y = as_labels(labels, len(images), classes, needs_labels)
    return batch if y is None else batch | {"y": y}


def as_images(x: Any, argument: str = "x") -> Tensor:
    """An array or tensor as a tensor, without a copy where there can be none."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise UsageError(
            f"{argument} is a {type(x).__name__}; an array or tensor (N, C, H, W) in [0, 1], or a dataset with "
            "len() and [i], is expected."
        )
    return x


def as_labels(y: Any, n: int, classes: int, required: bool) -> Tensor | None:
    """Integer labels (n,) of integer or one-hot ones.

    Args:
        y: (n,) integers or (n, classes) one-hot, array, tensor or list; None for no labels.
        n: images.
        classes: of the model's head.
        required: whether the method needs labels.

    Raises:
        UsageError: labels that are missing, do not fit the head, or are neither integer nor one-hot.
    """
    if y is None:
        if required:
            others = _methods_without_labels()
            advice = f", or use a method that needs none: {', '.join(others)}" if others else ""
            raise UsageError(f"y is None, but this method learns from labels; pass integer or one-hot ones{advice}.")
        return None
    labels = torch.as_tensor(y)
    if labels.dim() == 2:
        if labels.shape[1] != classes:
            raise UsageError(
                f"y is one-hot over {labels.shape[1]} classes, but the model's head has {classes}; load the model with "
                "the class list that the labels belong to."
            )
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
            raise UsageError("y has rows that are not one-hot; integer or one-hot labels are expected, not soft ones.")
        labels = labels.argmax(dim=1)
    if labels.numel() and not labels.is_floating_point() and int(labels.max()) >= classes:
        raise UsageError(
            f"y has labels in [{int(labels.min())}, {int(labels.max())}]; [0, {classes - 1}] is expected, since the "
            f"model's head has {classes} classes; load the model with the class list that the labels belong to."
        )
    check_labels(labels, n, classes)
    return labels.long()


def _methods_without_labels() -> list[str]:
    """The registered trainer defences that can do without."""
    found = []
    for name in registry().names("defenses"):
        with suppress(UsageError):  # a plugin that cannot be used is no advice
            if not getattr(registry().find("defenses", name).load(), "needs_labels", True):
                found.append(name)
    return found


def check_same_classes(data: Any, names: Sequence[str]) -> None:
    """Require that the class list which the data bring is the head's.

    Args:
        data: a dataset, or a loader of one; its ``classes`` are compared where it has them.
        names: of the model's head, in label order.

    Raises:
        UsageError: another number of classes, or a name that the head has at another label. A name that the head
            does not have at all may be another word for the same class; a warning says so where that is all of them.
    """
    theirs = getattr(data, "classes", None) or getattr(getattr(data, "dataset", None), "classes", None)
    if not isinstance(theirs, (list, tuple)):
        return
    advice = "give the model the dataset's list: model.with_classes(dataset.classes)."
    if len(theirs) != len(names):
        raise UsageError(f"the dataset has {len(theirs)} classes, but the model's head has {len(names)}; {advice}")
    for label, name in enumerate(theirs):
        if name in names and names[label] != name:
            raise UsageError(
                f"class {name!r} has label {label} in the dataset, {names.index(name)} in the model's head; {advice}"
            )
    if theirs and not {_plain(name) for name in theirs} & {_plain(name) for name in names}:
        warnings.warn(
            f"none of the dataset's {len(theirs)} class names ({theirs[0]!r}, ...) is one of the model's "
            f"({names[0]!r}, ...); labels are taken by position. Unless they are other words for the same, {advice}",
            stacklevel=2,
        )


def _plain(name: Any) -> str:
    """A class name without what data sets write differently."""
    return " ".join(str(name).casefold().replace("_", " ").replace("-", " ").split())
