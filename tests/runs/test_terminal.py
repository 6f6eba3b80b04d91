"""A large run in a terminal of any width: numbers stay whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clipdefense.evaluation.counts import counted
from clipdefense.runs.config import RunConfig
from clipdefense.runs.joint import joined
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.summary import write
from clipdefense.runs.sums import glance
from clipdefense.runs.terminal import tables
from clipdefense.runs.units import Shard

MakeConfig = Callable[..., RunConfig]


def shown(folder: Path, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    tables(console, folder, folder / "report.html")
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def parts(make_config: MakeConfig, specs: tuple[str, str], tmp_path: Path) -> Path:
    """Two data sets, three radii, long names; work units of every kind of cell: whole, in part, not begun."""
    config = make_config(
        models=[{"spec": specs[0], "name": "a-model-of-a-rather-long-name@and-its-weights"}],
        datasets=[{"spec": specs[1], "name": "one"}, {"spec": specs[1], "name": "two", "n": 20}],
        defenses=[{"spec": "random-noise", "name": "a-defence-without-views", "views": []}],
        threats=[{"eps": eps, "steps": 1} for eps in ("1/255", "2/255", "4/255")],
        verdict_seeds=1,
        exhibits=False,
    )
    for index in range(4):  # of 3 + 3 + 3 units of the one, 2 + 2 + 2 of the two
        run(config, tmp_path / "parts", shard=Shard(index, 15), device="cpu")
    run(config, tmp_path / "parts", shard=Shard(9, 15), device="cpu")
    return tmp_path / "parts"


@pytest.mark.parametrize("width", [50, 80, 120, 250])
def test_no_interval_is_broken_at_any_width(parts: Path, width: int) -> None:
    text = shown(parts, width)
    table = text[: text.index("In %, with")]
    assert max(map(len, table.splitlines())) <= width
    numbers = [number for line in glance(joined(read(parts, shards=True))) for number in (line.clean, *line.robust)]
    assert any("(16 of 40)" in number and "transfer only" in number for number in numbers)
    for number in numbers:
        interval, bracket, behind = number.partition("]")
        assert interval + bracket in table and behind.strip() in table, number
    assert ("further columns" in table) is (width < 120)
    assert ("a-model-of-a-rather-long-name@and-its-weights" in table) is (width == 250)  # names fold instead


def test_a_finished_number_beside_an_unfinished_one_does_not_read_like_one(parts: Path) -> None:
    one, two = glance(joined(read(parts, shards=True)))
    assert one.clean.endswith("] (all 40)") and "(" not in one.robust[0].replace("(transfer only)", "")
    assert one.robust[1].endswith("transfer only (16 of 40)") and one.robust[2] == "NOT FINISHED"
    assert two.clean.endswith("] (16 of 20)")  # nothing of it is finished
    assert "(40 of 40)" not in shown(parts, 250)


def test_the_images_of_the_data_set_stand_beside_those_judged(parts: Path, tmp_path: Path) -> None:
    write(read(parts, shards=True), tmp_path / "files")
    with (tmp_path / "files" / "summary.csv").open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    counts = {(line["dataset"], line["eps"]): (line["images"], line["n"], line["units_missing"]) for line in lines}
    assert list(counts.values()) == [
        ("40", "40", "0"),
        ("40", "16", "2"),
        ("40", "0", "3"),
        ("20", "16", "1"),
        ("20", "0", "2"),
        ("20", "0", "2"),
    ]


def test_one_is_singular() -> None:
    assert [counted(n, "work unit") for n in (0, 1, 2)] == ["0 work units", "1 work unit", "2 work units"]
