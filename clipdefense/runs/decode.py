"""Images of the next work unit, decoded by threads while the present one is attacked."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from clipdefense.data import ImageDataset
from clipdefense.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """The images of one work unit.

    Attributes:
        x: (n, C, H, W) in [0, 1], on the CPU; those that could be decoded.
        y: (n,) labels.
        ids: (n,) their numbers in the data set.
        corrupt: (number, why) of each that could not be.
        sha256: of x, so that another machine can tell whether it sees the same pixels.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    corrupt: tuple[tuple[int, str], ...]
    sha256: str


class Decoder:
    """A few threads that decode; one unit is on its way at a time, so memory does not grow with the data set."""

    def __init__(self, threads: int | None = None, pinned: bool = False) -> None:
        """
        Args:
            threads: that decode; a few when not given.
            pinned: put the images where a CUDA device fetches them fastest.
        """
        self._threads, self._pinned = threads or min(8, os.cpu_count() or 1), pinned
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._pool, self._gatherer):
            pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, dataset: ImageDataset, indices: Sequence[int], shape: tuple[int, ...]) -> Future[Batch]:
        """Start on these images.

        Args:
            dataset: theirs.
            indices: which.
            shape: (C, H, W) that every image of the data set has.

        Returns:
            What is to come; its ``result()`` raises a UsageError for an image of another shape, or a file that the
            system does not let us read.
        """
        x = torch.empty(len(indices), *shape, pin_memory=self._pinned)
        # tasks small enough that all threads end together, and not so small that handing them out costs
        step = math.ceil(len(indices) / (8 * self._threads))
        parts = [slice(start, start + step) for start in range(0, len(indices), step)]
        tasks = [self._pool.submit(_decode, dataset, indices[part], x[part]) for part in parts]
        return self._gatherer.submit(_gather, dataset, indices, x, tasks)


def _gather(dataset: ImageDataset, indices: Sequence[int], x: Tensor, tasks: list[Future[list[str | None]]]) -> Batch:
    problems = [problem for task in tasks for problem in task.result()]
    good = [place for place, problem in enumerate(problems) if problem is None]
    bad = [(int(dataset.ids[index]), problem) for index, problem in zip(indices, problems) if problem is not None]
    if bad:
        x = x[good]
    rows = torch.tensor([indices[place] for place in good], dtype=torch.int64)
    digest = hashlib.sha256(x.numpy().data).hexdigest()
    return Batch(x, dataset.labels[rows], dataset.ids[rows], tuple(bad), digest)


def _decode(dataset: ImageDataset, indices: Sequence[int], x: Tensor) -> list[str | None]:
    """Images into x; of each, why it cannot be decoded, or None."""
    return [_decode_one(dataset, index, row) for index, row in zip(indices, x)]


def _decode_one(dataset: ImageDataset, index: int, row: Tensor) -> str | None:
    try:
        image = dataset[index][0]
    except UsageError as error:
        # a file that is missing or on a disk that fails may be there again: no reason to count the image as damaged
        if getattr(error.__cause__, "errno", None) is not None:
            raise
        return str(error)
    if image.shape != row.shape:
        raise UsageError(
            f"data set {dataset.name!r} has images of several shapes, such as {tuple(row.shape)} and "
            f"{tuple(image.shape)}; give it size=, which resizes and crops to one."
        )
    row.copy_(image)
    return None
