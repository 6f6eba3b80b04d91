"""Where batches come from. Arrays and map-style datasets have an order of ours, and repeat exactly; loaders do not."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipdefense import randomness
from clipdefense.checks import check_images
from clipdefense.errors import UsageError
from clipdefense.training.items import Batch, as_images, as_labels, checked_batch, collate, pair
from clipdefense.training.runtime import derive_seed, seed_torch


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
            collate_fn=collate,
            num_workers=self.workers,
        )
        for found in loader:
            if isinstance(found, UsageError):
                raise found  # one that a worker raises arrives with its traceback in the message
            ids, images, labels = found
            yield checked_batch(ids, images, labels, self.classes, self.needs_labels)


class _Items:
    """The dataset under keys (epoch, row), with the generators seeded for each item; gives (id, item)."""

    def __init__(self, dataset: Any, ids: list[int], seed: int) -> None:
        self.dataset, self.ids, self.seed = dataset, ids, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, row = key
        seed = derive_seed(self.seed, "item", epoch, self.ids[row])
        seed_torch(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (the generator that augmentations use)
        return self.ids[row], self.dataset[row]


class Batches(Source):
    """Any iterable of (images, labels) batches, or of images alone; iterated afresh every epoch.

    Sample ids are positions within the epoch. The order is the iterable's own, so that a resume cannot be exact. Every
    process iterates over all of it and takes its rows; what they do not divide evenly is left out.
    """

    exact = False

    def __init__(self, loader: Iterable[Any], classes: int, needs_labels: bool) -> None:
        """
        Raises:
            UsageError: not an iterable of batches, or one that is empty.
        """
        _check_gives_batches(loader)
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
            images, labels = pair(item, f"batch {step + 1} of the loader")
            images = as_images(images, "a batch of the loader")
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


class HeldOutBatches(Batches):
    """A loader whose images are all held out: validation data that come in batches."""

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        return self.batches(0, 0, Share())


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


def gives_batches(data: Any) -> bool:
    """Whether data are a loader: they can be iterated, but not indexed."""
    return isinstance(data, Iterable) and (isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"))


def _check_gives_batches(loader: Any) -> None:
    kind = type(loader).__name__
    if isinstance(loader, (Tensor, np.ndarray)):
        raise UsageError(f"loader is a {kind}; fit(x, y) takes arrays, fit_loader an iterable of batches.")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise UsageError(
            f"loader is a {kind}, which gives one image at a time; pass it to fit(dataset), or as "
            "DataLoader(dataset, batch_size=...)."
        )
    if not isinstance(loader, Iterable):
        raise UsageError(f"loader is a {kind}; an iterable of (images, labels) batches is expected.")
