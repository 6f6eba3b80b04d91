"""Shards joined into one run, exactly as one process would have written it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import clipdefense.runs.exhibits as exhibits
from clipdefense.errors import UsageError
from clipdefense.files import write_atomically
from clipdefense.runs.bank import bank_file
from clipdefense.runs.build import Facts
from clipdefense.runs.results import AUDITS, RunResult, write_summary
from clipdefense.runs.store import SCHEMA, check_same, facts_of, reading, stores_in, writing
from clipdefense.runs.units import Shard

TABLES = ("sessions", "cells", "attacks", "left_out", "units", "verdicts", "corrupt")


def merge(sources: Sequence[str | Path], out: str | Path) -> RunResult:
    """Join shards of one run.

    Args:
        sources: folders of shards, or their store files.
        out: the new folder; it must not be there yet, and appears complete or not at all.

    Returns:
        The joined run. Work units may still be missing (its cells say how many): the same command
        with ``--run`` this folder does them.

    Raises:
        UsageError: nothing to join, work units that two shards did, or shards of different runs (naming the field).
    """
    stores = [store for source in sources for store in _stores(Path(source))]
    out = Path(out)
    if out.exists():
        raise UsageError(f"{str(out)!r} exists already; name a new folder for the joined run.")
    _check(stores)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        with writing(out.parent):
            temporary.mkdir(parents=True)
            _join(stores, temporary)
            for store in stores:
                with reading(store) as connection:
                    for unit in connection.execute("SELECT cell, unit FROM units WHERE bank"):
                        _copy(bank_file(store.parent, *unit), bank_file(temporary, *unit))
            for store in stores:
                for kind in (exhibits.FOLDER, AUDITS):
                    for file in sorted((store.parent / kind).glob("cell-*")):
                        _copy(file, temporary / kind / file.name)
            write_summary(temporary)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return write_summary(out)


def _copy(source: Path, target: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    write_atomically(target, write)


def _stores(source: Path) -> list[Path]:
    found = [source] if source.is_file() else stores_in(source)
    if not found:
        raise UsageError(f"{str(source)!r} holds no shard; a folder given to `clipdefense evaluate --run` is expected.")
    return found


def _check(stores: Sequence[Path]) -> None:
    """The shards are of one run, cell by cell, and none did what another did."""
    first: Facts | None = None
    first_cells: dict[int, tuple[Facts, Path]] = {}
    owner: dict[tuple[int, int], Path] = {}
    for store in stores:
        with reading(store) as connection:
            facts = facts_of(connection)
            if first is None:
                first = facts
            check_same(first, facts, f"the shard {str(stores[0])!r}")
            for cell, name, text in connection.execute("SELECT cell, name, fingerprint FROM cells"):
                known = first_cells.setdefault(cell, (json.loads(text), store))
                check_same(known[0], json.loads(text), f"the cell {name!r} in the shard {str(known[1])!r}")
            for unit in connection.execute("SELECT cell, unit FROM units"):
                if unit in owner:
                    raise UsageError(
                        f"{str(store)!r} and {str(owner[unit])!r} both did work unit {unit[1]} of cell {unit[0]}; "
                        "shards must not overlap: leave one of them out."
                    )
                owner[unit] = store


def _join(stores: Sequence[Path], folder: Path) -> None:
    whole = Shard()
    with closing(sqlite3.connect(folder / f"{whole.stem}.sqlite", isolation_level=None)) as connection:
        for statement in filter(str.strip, SCHEMA.split(";")):
            connection.execute(statement)
        for number, store in enumerate(stores):
            connection.execute("ATTACH ? AS part", (str(store),))
            connection.execute("BEGIN IMMEDIATE")
            if number == 0:
                connection.execute("INSERT INTO meta SELECT * FROM part.meta")
                connection.execute("UPDATE meta SET value = ? WHERE key = 'shard'", (json.dumps(str(whole)),))
            for table in TABLES:
                connection.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM part.{table}")
            connection.execute("COMMIT")
            connection.execute("DETACH part")
