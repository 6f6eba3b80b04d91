"""Several runs shown as one: a method of one's own beside a finished grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdefense.data.protocols import Protocol, get_protocol
from clipdefense.errors import UsageError
from clipdefense.runs.build import Facts
from clipdefense.runs.results import CellResult, RunResult, Unjudged
from clipdefense.runs.store import check_same

SAME_CONTENTS = ("ids_sha256", "labels_sha256", "classes", "attacked_at")
"""What a data set's label must stand for in every run."""

OF_THE_MACHINE = ("batch_size", "device", "threads")
"""Options of a defence that say where and how it is computed, not what it does."""

_TRIED = ("attacks", "also", "adaptive", "cumulative", "verdict_seeds", "seed")

_WAYS = ("views", "eot")
"""Keys of a defence that say how it is attacked, not what it is."""


@dataclass(frozen=True)
class Joint:
    """Runs whose numbers may stand in one table; made by :func:`joined`."""

    runs: tuple[RunResult, ...]

    @cached_property
    def cells(self) -> tuple[CellResult, ...]:
        """Cells with verdicts."""
        return tuple(cell for run in self.runs for cell in run.cells)

    @cached_property
    def unjudged(self) -> tuple[Unjudged, ...]:
        """Cells without any."""
        return tuple(cell for run in self.runs for cell in run.unjudged)

    @cached_property
    def everything(self) -> tuple[CellResult | Unjudged, ...]:
        """Both, run by run in the order of their cells."""
        found: list[CellResult | Unjudged] = []
        for run in self.runs:
            both: list[CellResult | Unjudged] = [*run.cells, *run.unjudged]
            found += sorted(both, key=lambda one: one.cell.number)
        return tuple(found)

    @cached_property
    def contents(self) -> dict[str, Facts]:
        """What is known of each data set, by its label."""
        return {label: content for run in self.runs for label, content in run.facts["contents"].items()}

    @cached_property
    def protocol(self) -> Protocol | None:
        """The protocol that all runs follow."""
        names = {run.config.protocol for run in self.runs}
        (name,) = names if len(names) == 1 else (None,)
        return None if name is None else get_protocol(name)

    @cached_property
    def differing(self) -> tuple[str, ...]:
        """Keys in which the runs asked for other attacks, so that their worst cases are not over the same."""
        first = self.runs[0].config
        found = [key for key in _TRIED if any(getattr(run.config, key) != getattr(first, key) for run in self.runs)]
        threats: dict[str, list[str] | None] = {}
        rows = [row for run in self.runs for row in run.config.threats]
        if any(threats.setdefault(row.label, row.attacks) != row.attacks for row in rows):
            found.append("threats.attacks")
        ways: dict[tuple[str, str], Any] = {}
        for key in _WAYS:
            for row in (row for run in self.runs for row in run.config.defenses):
                way = _way(getattr(row, key))
                if ways.setdefault((row.label, key), way) != way and f"defenses.{key}" not in found:
                    found.append(f"defenses.{key}")
        return tuple(found)


def _way(value: list[str] | int | None) -> Any:
    """How a defence is attacked, the same for views in any order."""
    return sorted(value) if isinstance(value, list) else value


def joined(runs: RunResult | Sequence[RunResult]) -> Joint:
    """Runs that may be shown together.

    Raises:
        UsageError: none; two cells of one name; or the same label for other images, labels, classes or resolution,
            another radius, other options of a defence, or other weights (naming the field).
    """
    several = (runs,) if isinstance(runs, RunResult) else tuple(runs)
    if not several:
        raise UsageError("runs is empty; at least one run is expected.")
    seen: dict[tuple[str, ...], tuple[Any, Path]] = {}
    for run in several:
        for path, value in _named(run):
            known, folder = seen.setdefault(path, (value, run.folder))
            check_same(_nested(path, known), _nested(path, value), f"the run in {str(folder)!r}")
    owners: dict[str, Path] = {}
    for run in several:
        for name in [one.cell.name for one in run.cells] + [one.cell.name for one in run.unjudged]:
            if name in owners:
                raise UsageError(
                    f"the cell {name!r} is in {str(owners[name])!r} and in {str(run.folder)!r}; leave one of the runs "
                    "out, give its model or defence another name=, or, where they are shards of one run, join them "
                    "with `clipdefense merge`."
                )
            owners[name] = run.folder
    return Joint(several)


def options_of(defense: Mapping[str, Any]) -> dict[str, Any]:
    """What a defence does: its options as found on it, without its class and what is a matter of the machine."""
    return {key: value for key, value in defense.items() if key not in ("class", *OF_THE_MACHINE)}


def _named(run: RunResult) -> list[tuple[tuple[str, ...], Any]]:
    """What each label of a run stands for, by the path under which a difference is named."""
    named: list[tuple[tuple[str, ...], Any]] = []
    for label, content in run.facts["contents"].items():
        named.append((("contents", label), {key: content[key] for key in SAME_CONTENTS}))
    for threat in run.config.threats:
        named.append((("threats", threat.label), threat.model_dump(mode="json", exclude={"name", "attacks"})))
    for defense in run.config.defenses:
        named.append((("defenses", defense.label), {"spec": defense.spec, "options": options_of(defense.options)}))
    for cell in run.cells:  # a model's name and path say little: its weights do, which hold a data set's classes too
        where = ("models", cell.cell.model.label, cell.cell.dataset.label)
        named.append((where, {"weights_sha256": cell.facts.get("weights_sha256")}))
    return named


def _nested(path: Sequence[str], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value
