"""Images of the next work unit, decoded by threads while the present one is attacked."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from clipdefense.data import ImageDataset
from clipdefense.errors import UsageError

_Decoded = tuple[Tensor | None, str]


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


@dataclass(frozen=True)
class Coming:
    """Images on their way."""

    dataset: ImageDataset
    indices: tuple[int, ...]
    futures: tuple[Future[_Decoded], ...]


class Decoder:
    """A few threads that decode; one unit is on its way at a time, so memory does not grow with the data set."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, dataset: ImageDataset, indices: range | list[int]) -> Coming:
        """Start on these images."""
        return Coming(dataset, tuple(indices), tuple(self._pool.submit(_decode, dataset, i) for i in indices))

    def finish(self, coming: Coming, shape: tuple[int, ...]) -> Batch:
        """Wait for them.

        Args:
            coming: from :meth:`begin`.
            shape: (C, H, W) that every image of the data set has.

        Raises:
            UsageError: an image of another shape, or a file that the system does not let us read.
        """
        x = torch.empty(len(coming.indices), *shape)
        good: list[int] = []
        corrupt: list[tuple[int, str]] = []
        for index, future in zip(coming.indices, coming.futures):
            image, problem = future.result()
            if image is None:
                corrupt.append((int(coming.dataset.ids[index]), problem))
                continue
            if tuple(image.shape) != shape:
                raise UsageError(
                    f"data set {coming.dataset.name!r} has images of several shapes, such as {shape} and "
                    f"{tuple(image.shape)}; give it size=, which resizes and crops to one."
                )
            x[len(good)] = image
            good.append(index)
        x = x[: len(good)]
        digest = hashlib.sha256(x.numpy().data).hexdigest()
        labels, ids = coming.dataset.labels[good], coming.dataset.ids[good]
        return Batch(x, labels, ids, tuple(corrupt), digest)


def _decode(dataset: ImageDataset, index: int) -> _Decoded:
    try:
        return dataset[index][0], ""
    except UsageError as error:
        # a file that is missing or on a disk that fails may be there again: no reason to count the image as damaged
        if getattr(error.__cause__, "errno", None) is not None:
            raise
        return None, str(error)
