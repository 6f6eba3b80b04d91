"""How a run is cut: cells, work units in them, and the shard that owns which."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clipdefense.errors import UsageError
from clipdefense.runs.config import DatasetTable, DefenseTable, ModelTable, RunConfig, ThreatTable


@dataclass(frozen=True)
class Cell:
    """One model, one defence, one dataset, one threat model."""

    number: int
    model: ModelTable
    defense: DefenseTable
    dataset: DatasetTable
    threat: ThreatTable

    @property
    def name(self) -> str:
        return " | ".join(part.label for part in (self.model, self.defense, self.dataset, self.threat))


def cells(config: RunConfig) -> tuple[Cell, ...]:
    """Every combination, those of one model on one dataset together, since they share what is loaded."""
    combinations = [
        (model, defense, dataset, threat)
        for dataset in config.datasets
        for model in config.models
        for defense in config.defenses
        for threat in config.threats
    ]
    return tuple(Cell(number, *parts) for number, parts in enumerate(combinations))


class Job(NamedTuple):
    """A work unit of a cell: the images at [start, stop) of its dataset."""

    cell: Cell
    unit: int
    start: int
    stop: int


def jobs(listed: Sequence[Cell], sizes: Mapping[str, int], unit: int) -> list[Job]:
    """Every work unit, cell after cell.

    Args:
        listed: the cells.
        sizes: images by dataset label.
        unit: images a unit.
    """
    return [
        Job(cell, number, number * unit, min((number + 1) * unit, sizes[cell.dataset.label]))
        for cell in listed
        for number in range(math.ceil(sizes[cell.dataset.label] / unit))
    ]


@dataclass(frozen=True)
class Shard:
    """Which work units a process owns: every ``count``-th, from ``index``.

    Attributes:
        index: from 0.
        count: shards in all.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"shard is {self.index}/{self.count}; 0/n to n-1/n is expected, counted from 0.")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """
        Raises:
            UsageError: it is not ``i/n`` with i from 0 to n - 1.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.strip().isdecimal() or not count.strip().isdecimal():
            raise UsageError(f"shard is {text!r}; i/n is expected, i from 0 to n-1, such as 0/4.")
        return cls(int(index), int(count))

    def launched(self) -> Shard:
        """This shard's part for one process of ``accelerate launch`` or ``torchrun``, by their RANK and WORLD_SIZE.

        Nothing is exchanged between the processes, so no process group is made.
        """
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError:
            raise UsageError("RANK or WORLD_SIZE is set to something that is not a whole number; unset both.") from None
        return Shard(self.index * world + rank, self.count * world)

    def owned(self, listed: Sequence[Job]) -> list[Job]:
        """Its work units."""
        return list(listed[self.index :: self.count])

    @property
    def stem(self) -> str:
        return f"verdicts-{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
