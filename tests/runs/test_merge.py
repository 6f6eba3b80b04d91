"""Merging: shards become the run that one process would have written, and nothing else is joined."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from clipdefense.cli import main
from clipdefense.errors import UsageError
from clipdefense.runs.config import RunConfig
from clipdefense.runs.merge import merge
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.units import Shard
from clipdefense.runs.verify import verify
from kills import rows

MakeConfig = Callable[..., RunConfig]


def test_shards_of_one_folder_and_of_several(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(save_adv=True, unit=12)
    run(config, tmp_path / "whole", device="cpu")
    for index in range(3):
        run(config, tmp_path / "one", shard=Shard(index, 3), device="cpu")
        run(config, tmp_path / f"part-{index}", shard=Shard(index, 3), device="cpu")
    with pytest.raises(UsageError, match=r"holds 3 shards.*join them with `clipdefense merge"):
        read(tmp_path / "one")
    merge([tmp_path / "one"], tmp_path / "from-one")
    merge([tmp_path / f"part-{index}" for index in (2, 0, 1)], tmp_path / "from-three")
    assert rows(tmp_path / "from-one") == rows(tmp_path / "from-three") == rows(tmp_path / "whole")
    assert (tmp_path / "from-one" / "summary.md").read_text() == (tmp_path / "whole" / "summary.md").read_text()
    assert all(proof.holds for proof in verify(tmp_path / "from-three", device="cpu"))
    with pytest.raises(UsageError, match="exists already"):
        merge([tmp_path / "one"], tmp_path / "from-one")


def test_what_is_missing_is_said_and_can_be_done(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    run(config, tmp_path / "parts", shard=Shard(1, 2), device="cpu")
    assert merge([tmp_path / "parts"], tmp_path / "merged").cells[0].missing == 2
    assert "NOT FINISHED: 2 of 3 work units" in (tmp_path / "merged" / "summary.md").read_text()
    assert run(config, tmp_path / "merged", device="cpu") == 2
    run(config, tmp_path / "whole", device="cpu")
    assert rows(tmp_path / "merged") == rows(tmp_path / "whole")


def test_overlaps_and_other_runs_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config(), tmp_path / "a", shard=Shard(0, 2), device="cpu")
    run(make_config(), tmp_path / "b", shard=Shard(0, 3), device="cpu")
    run(make_config(seed=1), tmp_path / "c", shard=Shard(1, 2), device="cpu")
    with pytest.raises(UsageError, match="both did work unit 0 of cell 0; shards must not overlap"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"^seed is 1, but the shard .* was made with 0"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(UsageError, match="holds no shard"):
        merge([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_command_says_where_the_page_is(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_config(exhibits=False), tmp_path / "parts", shard=Shard(0, 2), device="cpu")
    out = tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["clipdefense", "merge", str(tmp_path / "parts"), "--out", str(out)])
    with pytest.raises(SystemExit) as leave:
        main()
    assert leave.value.code == 0 and (out / "report.html").is_file()
    assert f"verdicts and summaries are in {out}, the page is {out / 'report.html'}" in capsys.readouterr().out


def test_shards_of_other_attacks_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """A row's number says which attack it is of, and means the same in every shard."""
    for index in range(2):
        run(make_config(exhibits=False), tmp_path / "parts", shard=Shard(index, 2), device="cpu")
    (store,) = (tmp_path / "parts").glob("verdicts-1-of-2.sqlite")
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE attacks SET attack = 'another'")
    with pytest.raises(UsageError, match=r"^attacks\[0\]\[0\] is 'another', but the cell 'tiny \| none"):
        merge([tmp_path / "parts"], tmp_path / "out")


def test_a_shard_at_work_is_read_and_never_stalled(make_config: MakeConfig, tmp_path: Path) -> None:
    for index in range(2):
        run(make_config(exhibits=False), tmp_path / "parts", shard=Shard(index, 2), device="cpu")
    with ExitStack() as stack:
        for store in sorted((tmp_path / "parts").glob("*.sqlite")):  # each is in the middle of a work unit's commit
            live = stack.enter_context(closing(sqlite3.connect(store, isolation_level=None, timeout=0)))
            live.execute("BEGIN IMMEDIATE")
            live.execute("INSERT INTO units VALUES (0, 99, 1, '', 0, 1, '', 1, 1, 1.0)")
        assert [cell.missing for cell in merge([tmp_path / "parts"], tmp_path / "merged").cells] == [0]
        with closing(sqlite3.connect(tmp_path / "merged" / "verdicts-0-of-1.sqlite")) as connection:
            units = connection.execute("SELECT unit FROM units ORDER BY unit").fetchall()
        assert units == [(0,), (1,), (2,)]  # as it was before that commit


def test_a_shard_that_cannot_be_read_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    for index in range(2):
        run(make_config(exhibits=False), tmp_path / "parts", shard=Shard(index, 2), device="cpu")
    store = tmp_path / "parts" / "verdicts-1-of-2.sqlite"
    with closing(sqlite3.connect(store)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'verdicts'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with store.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(UsageError, match=rf"^verdict store '{store}' cannot be read \(.*malformed\)"):
        merge([tmp_path / "parts"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
