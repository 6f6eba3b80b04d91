"""A run's clean images once more, a work unit at a time, and whether they are the pixels that the run saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipdefense.errors import UsageError
from clipdefense.runs.build import Builder
from clipdefense.runs.decode import Batch, Decoder
from clipdefense.runs.results import CellResult, RunResult, single_store
from clipdefense.runs.store import reading
from clipdefense.runs.units import cells, jobs


def unit_hashes(folder: Path, cell: int) -> dict[int, str]:
    """The sha256 of each finished work unit's pixels, by its number.

    Raises:
        UsageError: the folder holds no run in one piece, or the store cannot be read.
    """
    with reading(single_store(folder)) as connection:
        return dict(connection.execute("SELECT unit, pixels_sha256 FROM units WHERE cell = ?", (cell,)))


def unfinished(result: RunResult) -> int:
    """How many work units the run has not done yet, those of cells without a verdict included."""
    sizes = {label: content["images"] for label, content in result.facts["contents"].items()}
    with reading(single_store(result.folder)) as connection:
        (done,) = connection.execute("SELECT count(*) FROM units").fetchone()
    return len(jobs(cells(result.config), sizes, result.config.unit)) - int(done)


def same_images(ours: RunResult, one: CellResult, theirs: RunResult, two: CellResult) -> bool:
    """Whether two cells are over the same numbers of a dataset in the same order."""
    contents = [run.facts["contents"][cell.cell.dataset.label] for run, cell in ((ours, one), (theirs, two))]
    return bool(contents[0]["ids_sha256"] == contents[1]["ids_sha256"])


def unlike_units(ours: RunResult, one: CellResult, theirs: RunResult, two: CellResult) -> tuple[int, int]:
    """(work units whose pixels differ between two runs, work units that can be compared).

    None can where the runs are cut otherwise, or over other images.
    """
    if ours.config.unit != theirs.config.unit or not same_images(ours, one, theirs, two):
        return 0, 0
    left, right = unit_hashes(ours.folder, one.cell.number), unit_hashes(theirs.folder, two.cell.number)
    both = left.keys() & right.keys()
    return sum(left[unit] != right[unit] for unit in both), len(both)


class Images:
    """A dataset's images; the latest batch is kept, since what comes next is often in it, and no other."""

    def __init__(self, builder: Builder, label: str, decoder: Decoder) -> None:
        """
        Args:
            builder: has the dataset.
            label: the dataset's.
            decoder: its threads decode.
        """
        self.dataset, self._shape, self._decoder = builder.datasets[label], builder.shapes[label], decoder
        self._latest: tuple[list[int], Batch] | None = None

    def batch(self, indices: list[int]) -> Batch:
        """The images at these places of the dataset."""
        if self._latest is None or self._latest[0] != indices:
            self._latest = None  # its memory goes before the next one's is taken
            self._latest = indices, self._decoder.begin(self.dataset, indices, self._shape).result()
        return self._latest[1]


class Pixels:
    """Clean images of a run's cell, decoded in the run's own work units, so that their hashes can be compared.

    Attributes:
        seen: work units decoded.
        other: those of them that hold other pixels here than in the run.
    """

    def __init__(self, images: Images, result: RunResult, cell: CellResult) -> None:
        """
        Args:
            images: of the cell's dataset, the same numbers in the same order as the run's.
            result: the run; ``cell`` one of its cells.
        """
        self._images, self._unit = images, result.config.unit
        self._ids: list[int] = images.dataset.ids.tolist()
        self._index = {sample: index for index, sample in enumerate(self._ids)}
        self._hashes = unit_hashes(result.folder, cell.cell.number)
        self._corrupt = {sample for sample, _ in cell.corrupt}
        self.seen: set[int] = set()
        self.other: set[int] = set()

    def units(self, samples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the work units in which images of these numbers are."""
        return np.array([self._index[int(sample)] // self._unit for sample in samples], dtype=np.int64)

    def unit(self, number: int) -> Batch:
        """A whole work unit, without the images that the run could not decode."""
        indices = range(number * self._unit, min((number + 1) * self._unit, len(self._ids)))
        batch = self._images.batch([index for index in indices if self._ids[index] not in self._corrupt])
        self.seen.add(number)
        if batch.sha256 != self._hashes.get(number):
            self.other.add(number)
        return batch

    def images(self, ids: Tensor) -> Tensor:
        """(k, C, H, W), on the CPU: images by their number.

        Raises:
            UsageError: one that the run has verdicts on cannot be decoded here.
        """
        x: Tensor | None = None
        units = self.units(ids.tolist())
        for number in np.unique(units):
            batch = self.unit(int(number))
            damaged, place = dict(batch.corrupt), {sample: row for row, sample in enumerate(batch.ids.tolist())}
            rows = torch.from_numpy((units == number).nonzero()[0])
            for sample in ids[rows].tolist():
                if sample in damaged:
                    raise UsageError(f"an image that the run has verdicts on cannot be decoded here: {damaged[sample]}")
            x = batch.x.new_empty(len(ids), *batch.x.shape[1:]) if x is None else x
            x[rows] = batch.x[[place[sample] for sample in ids[rows].tolist()]]
        assert x is not None, "no image was asked for"
        return x
