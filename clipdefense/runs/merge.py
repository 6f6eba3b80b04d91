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
from clipdefense.runs.results import AUDITS, RunResult, read
from clipdefense.runs.shards import check_shards
from clipdefense.runs.store import SCHEMA, reading, stores_in, writing
from clipdefense.runs.summary import write
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
    check_shards(stores)
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
            write([read(temporary)], temporary)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read(out)


def _copy(source: Path, target: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    write_atomically(target, write)


def _stores(source: Path) -> list[Path]:
    found = [source] if source.is_file() else stores_in(source)
    if not found:
        raise UsageError(f"{str(source)!r} holds no shard; a folder given to `clipdefense evaluate --run` is expected.")
    return found


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
