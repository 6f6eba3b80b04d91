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

AT_ONCE = 10_000
"""Rows that are held in memory at a time."""


def merge(sources: Sequence[str | Path], out: str | Path) -> RunResult:
    """Join shards of one run.

    Args:
        sources: folders of shards, or their store files.
        out: the new folder; it must not be there yet, and appears complete or not at all.

    Returns:
        The joined run. Work units may still be missing (its cells say how many): the same command
        with ``--run`` this folder does them.

    Raises:
        UsageError: nothing to join, work units that two shards did, shards of different runs (naming the field), a
            shard that cannot be read (naming its file), or a place that cannot be written.
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
            for store, cell, unit in _join(stores, temporary):
                _copy(bank_file(store.parent, cell, unit), bank_file(temporary, cell, unit))
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


def _join(stores: Sequence[Path], folder: Path) -> list[tuple[Path, int, int]]:
    """Every store in one file; (store, cell, unit) of each work unit in it that has a bank.

    A shard may go on meanwhile: its store is read, at one moment, and let go before the new file is committed.
    """
    whole, banks = Shard(), list[tuple[Path, int, int]]()
    with closing(sqlite3.connect(folder / f"{whole.stem}.sqlite", isolation_level=None)) as target:
        for statement in filter(str.strip, SCHEMA.split(";")):
            target.execute(statement)
        for number, store in enumerate(stores):
            target.execute("BEGIN")
            with reading(store) as source:
                source.execute("BEGIN")
                for table in TABLES if number else ("meta", *TABLES):
                    _pour(source.execute(f"SELECT * FROM {table}"), target, table, folder)
                banks += [(store, *unit) for unit in source.execute("SELECT cell, unit FROM units WHERE bank")]
                source.rollback()
            if number == 0:
                target.execute("UPDATE meta SET value = ? WHERE key = 'shard'", (json.dumps(str(whole)),))
            target.execute("COMMIT")
    return banks


def _pour(rows: sqlite3.Cursor, target: sqlite3.Connection, table: str, folder: Path) -> None:
    """Rows into a table; only what the new file refuses is said of its folder."""
    places = ", ".join("?" for _ in rows.description)
    while some := rows.fetchmany(AT_ONCE):
        with writing(folder.parent):
            target.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({places})", some)
