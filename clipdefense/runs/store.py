"""The verdict store: one SQLite file a process, a unit committed at a time, a lock for whoever works on it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from clipdefense.errors import UsageError
from clipdefense.runs.build import Facts, difference
from clipdefense.runs.units import Cell, Job, Shard

FORMAT = 1

# A row's margin is z_label - max z_other of the adversarial image, negative where it is misclassified. `number` stands
# for (attack, view) in the order they ran; `steps` are the evaluations that the attack spent on the image, null where
# it does not tell.
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (started TEXT, process INTEGER, host TEXT, machine TEXT);
CREATE TABLE cells (cell INTEGER PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT NOT NULL);
CREATE TABLE attacks (
    cell INTEGER, number INTEGER, attack TEXT, view TEXT, kind TEXT, draws INTEGER, PRIMARY KEY (cell, number)
);
CREATE TABLE left_out (cell INTEGER, reason TEXT, PRIMARY KEY (cell, reason));
CREATE TABLE units (
    cell INTEGER, unit INTEGER, images INTEGER, pixels_sha256 TEXT, unrepeatable INTEGER, bank INTEGER,
    device TEXT, threads INTEGER, bucket INTEGER, seconds REAL, PRIMARY KEY (cell, unit)
);
CREATE TABLE verdicts (
    cell INTEGER, number INTEGER, seed INTEGER, sample INTEGER, unit INTEGER, label INTEGER,
    clean INTEGER, adversarial INTEGER, margin REAL, steps INTEGER, bucket INTEGER,
    PRIMARY KEY (cell, number, seed, sample)
) WITHOUT ROWID;
CREATE TABLE corrupt (cell INTEGER, unit INTEGER, sample INTEGER, reason TEXT, PRIMARY KEY (cell, sample));
"""

Verdict = tuple[int, int, int, int, int, int, float, int | None, int]
"""number, seed, sample, label, clean, adversarial, margin, steps, bucket"""


Named = tuple[str, str, str, int]
"""attack, view, kind, draws, as in :class:`clipdefense.evaluation.Row`"""


@dataclass(frozen=True)
class Finished:
    """What one work unit leaves in the store."""

    verdicts: list[Verdict]
    attacks: list[Named]
    left_out: tuple[str, ...]
    corrupt: tuple[tuple[int, str], ...]
    images: int
    pixels_sha256: str
    unrepeatable: int
    bank: bool
    device: str
    threads: int
    bucket: int
    seconds: float


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system refuses inside is said in one sentence; what is committed stays."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise UsageError(
            f"run folder {str(folder)!r} cannot be written ({error}); every finished work unit is safe there: free "
            "space or give the permission, and the same command goes on."
        ) from error
    except sqlite3.DatabaseError as error:
        raise UsageError(
            f"run folder {str(folder)!r} holds a damaged file ({error}); move the folder away and start again."
        ) from error


class Store:
    """A process's own file, open for writing; nobody else's until it is closed or the process ends, however it ends.

    The journal is SQLite's rollback journal and the lock is held with SQLite's own locks, so that both work wherever
    the other does, network file systems included.
    """

    def __init__(self, folder: Path, shard: Shard, facts: Facts, machine: Facts, settings: Facts | None = None) -> None:
        """
        Args:
            folder: the run's; made if missing.
            shard: names the file.
            facts: the run's fingerprint; an existing file's must be the same.
            machine: versions and hardware of this process.
            settings: of the configuration what is not compared, see :meth:`RunConfig.settings`; kept for a resume.

        Raises:
            UsageError: the folder cannot be written, another process works on the file, it belongs to another run
                (naming the field), or the folder holds another division into shards.
        """
        self.folder, self.path = folder, folder / f"{shard.stem}.sqlite"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _check_division(folder, shard)
            self._lock = self._locked(folder / f"{shard.stem}.lock")
            try:
                self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=60)
                self._open(shard, facts, machine, settings or {})
            except BaseException:
                self.close()
                raise

    def _locked(self, path: Path) -> sqlite3.Connection:
        lock = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            if "locked" not in str(error):
                raise
            raise UsageError(
                f"another process{_owner(self.path)} is working on {str(self.path)!r}; wait for it or end it, or give "
                "this one another --run or --shard."
            ) from None
        return lock

    def _open(self, shard: Shard, facts: Facts, machine: Facts, settings: Facts) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode = DELETE")
        run("PRAGMA synchronous = EXTRA")
        with self._transaction():
            if not run("SELECT 1 FROM sqlite_master").fetchone():
                for statement in filter(str.strip, SCHEMA.split(";")):
                    run(statement)
            if not run("SELECT 1 FROM units").fetchone():  # nothing is kept yet, so nothing has to fit
                run("DELETE FROM cells")
                meta = {"format": FORMAT, "shard": str(shard), "fingerprint": facts}
                for key, value in meta.items():
                    run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
            check_same(_meta(self._connection, self.path)["fingerprint"], facts, f"the run in {str(self.folder)!r}")
            run("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (json.dumps(settings),))
            who = (datetime.now(UTC).isoformat(timespec="seconds"), os.getpid(), socket.gethostname())
            run("INSERT INTO sessions VALUES (?, ?, ?, ?)", (*who, json.dumps(machine)))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for connection in (getattr(self, "_connection", None), self._lock):
            if connection is not None:
                connection.close()

    def done(self) -> dict[tuple[int, int], str]:
        """(cell, unit) of every finished work unit, with the hash of its pixels."""
        rows = self._connection.execute("SELECT cell, unit, pixels_sha256 FROM units")
        return {(cell, unit): pixels for cell, unit, pixels in rows}

    def enter(self, cell: Cell, facts: Facts) -> None:
        """Begin or go on with a cell.

        Raises:
            UsageError: it was begun with another model or defence; names the field.
        """
        with writing(self.folder), self._transaction():
            run = self._connection.execute
            run("INSERT OR IGNORE INTO cells VALUES (?, ?, ?)", (cell.number, cell.name, json.dumps(facts)))
            (stored,) = run("SELECT fingerprint FROM cells WHERE cell = ?", (cell.number,)).fetchone()
            check_same(
                placeless(json.loads(stored)), placeless(facts), f"the cell {cell.name!r} in {str(self.folder)!r}"
            )

    def commit(self, job: Job, unit: Finished) -> None:
        """A work unit, whole or not at all."""
        cell = job.cell.number
        facts = (unit.images, unit.pixels_sha256, unit.unrepeatable, unit.bank)
        where = (unit.device, unit.threads, unit.bucket, unit.seconds)
        with writing(self.folder), self._transaction():
            run, many = self._connection.execute, self._connection.executemany
            run("INSERT INTO units VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (cell, job.unit, *facts, *where))
            rows = ((cell, *row[:3], job.unit, *row[3:]) for row in unit.verdicts)
            many("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            names = ((cell, number, *named) for number, named in enumerate(unit.attacks))
            many("INSERT OR IGNORE INTO attacks VALUES (?, ?, ?, ?, ?, ?)", names)
            if unit.attacks:  # the numbers mean what they meant in the sessions before
                stored = [list(named) for named in attacks_of(self._connection, cell)]
                where_from = f"the cell {job.cell.name!r} in {str(self.folder)!r}"
                check_same({"attacks": stored}, {"attacks": unit.attacks}, where_from)
            many("INSERT OR IGNORE INTO left_out VALUES (?, ?)", ((cell, reason) for reason in unit.left_out))
            many("INSERT INTO corrupt VALUES (?, ?, ?, ?)", ((cell, job.unit, *bad) for bad in unit.corrupt))


def placeless(facts: Facts) -> Facts:
    """A cell's fingerprint without where its model came from: the hash of its weights says which it is."""
    return {key: value for key, value in facts.items() if key != "model"}


def check_same(stored: Any, ours: Any, what: str) -> None:
    """
    Raises:
        UsageError: two fingerprints differ; names the first field that does, and both values.
    """
    found = difference(json.loads(json.dumps(ours)), stored)
    if found is not None:
        path, here, there = found
        raise UsageError(
            f"{path} is {_short(here)}, but {what} was made with {_short(there)}; what they hold does not belong "
            "together: make it the same, or keep the two apart."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_division(folder: Path, shard: Shard) -> None:
    for other in stores_in(folder):
        count = other.stem.rpartition("-")[2]
        if count != str(shard.count):
            raise UsageError(
                f"run folder {str(folder)!r} holds {other.name}, a part of {count}, and this process is to do "
                f"{shard}; work would be done twice: give --shard i/{count}, or another --run."
            )


def stores_in(folder: Path) -> list[Path]:
    """The store files of a run's folder."""
    return sorted(folder.glob("verdicts-*-of-*.sqlite"))


def in_shards(folder: Path) -> bool:
    """Whether a run's folder holds parts of it."""
    return any(not store.stem.endswith("-of-1") for store in stores_in(folder))


def _owner(path: Path) -> str:
    """Who holds the lock, as far as the store says."""
    with contextlib.suppress(sqlite3.Error, UsageError, OSError), reading(path) as connection:
        rows = connection.execute("SELECT process, host, started FROM sessions ORDER BY rowid DESC LIMIT 1").fetchall()
        return "".join(f" (number {process} on {host}, since {started})" for process, host, started in rows)
    return ""


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A store opened to read, also while its process works.

    Of a process that was killed while it committed, the half-written unit is rolled back first, as SQLite does where it
    may write; where it may not, nothing is written.

    Raises:
        UsageError: it is no store of this format, or is to be rolled back and cannot be written.
    """
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=60)
        ) as connection:
            _meta(connection, path)
            connection.execute("PRAGMA query_only = ON")
            yield connection
    except sqlite3.Error as error:
        left = path.with_name(f"{path.name}-journal").exists()
        advice = (
            "; its process was killed while it committed: copy the folder to where it can be written" if left else ""
        )
        raise UsageError(f"verdict store {str(path)!r} cannot be read ({error}){advice}.") from error


def _meta(connection: sqlite3.Connection, path: Path) -> Facts:
    meta = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    if meta.get("format") != FORMAT:
        raise UsageError(f"verdict store {str(path)!r} has format {meta.get('format')!r}; {FORMAT} is known.")
    return meta


def attacks_of(connection: sqlite3.Connection, cell: int) -> list[Named]:
    """A cell's attacks in the order of their numbers."""
    query = "SELECT attack, view, kind, draws FROM attacks WHERE cell = ? ORDER BY number"
    return connection.execute(query, (cell,)).fetchall()


def settings_of(connection: sqlite3.Connection) -> Facts:
    """What :meth:`RunConfig.settings` was when the run was last worked on."""
    found = connection.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()
    return {} if found is None else dict(json.loads(found[0]))


def facts_of(connection: sqlite3.Connection) -> Facts:
    """The run's fingerprint."""
    (text,) = connection.execute("SELECT value FROM meta WHERE key = 'fingerprint'").fetchone()
    return dict(json.loads(text))
