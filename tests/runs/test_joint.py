"""Several runs in one report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdefense.cli import main
from clipdefense.errors import UsageError
from clipdefense.runs.config import RunConfig
from clipdefense.runs.joint import joined
from clipdefense.runs.page import page_of
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.units import Shard

MakeConfig = Callable[..., RunConfig]
Report = Callable[..., tuple[int, str]]
NOISE = {"spec": "random-noise", "eot": 1, "options": {"eps": "2/255"}}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """``clipdefense report ...``: (exit code, what it printed)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["clipdefense", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            main()
        return int(str(leave.value.code)), "".join(capsys.readouterr())

    return call


@pytest.fixture
def made(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **changes: Any) -> Path:
        run(make_config(verdict_seeds=2, **changes), tmp_path / name, device="cpu")
        return tmp_path / name

    return make


def test_a_method_of_ones_own_beside_a_finished_grid(made: Callable[..., Path], report: Report, tmp_path: Path) -> None:
    grid, mine = made("grid"), made("mine", defenses=[NOISE])
    before = {file.name: file.read_bytes() for file in grid.iterdir() if file.is_file()}
    code, said = report(grid, mine, "--out", tmp_path / "both")
    assert code == 0, said
    assert {file.name: file.read_bytes() for file in grid.iterdir() if file.is_file()} == before
    names = {file.name for file in (tmp_path / "both").iterdir()}
    assert names == {"summary.json", "summary.csv", "means.csv", "summary.md", "summary.tex", "report.html"}
    stored = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert [(one["defense"], one["run"]) for one in stored["results"]] == [
        ("none", str(grid)),
        ("random-noise", str(mine)),
    ]
    assert [run["fingerprint"]["defenses"][0]["spec"] for run in stored["runs"]] == ["none", "random-noise"]
    assert {pair["baseline"] for pair in stored["against_baseline"]} == {stored["results"][0]["cell"]}
    page = page_of([read(grid), read(mine)])
    titles = {part.title: part for part in page.after}
    assert len(titles["The attack's loss"].charts) == 2  # each from its own folder
    captions = [strip.title for strip in titles["What it looks like"].strips]
    assert any("| none |" in text for text in captions) and any("| random-noise |" in text for text in captions)


def test_shards_stand_beside_a_finished_run(
    made: Callable[..., Path], make_config: MakeConfig, report: Report, tmp_path: Path
) -> None:
    grid = made("grid")
    run(make_config(verdict_seeds=2, defenses=[NOISE]), tmp_path / "parts", shard=Shard(1, 2), device="cpu")
    code, said = report(grid, tmp_path / "parts", "--out", tmp_path / "both")
    assert code == 0, said
    assert "(16 of 40)" in (tmp_path / "both" / "summary.md").read_text()


def test_what_does_not_belong_together_is_refused(
    made: Callable[..., Path], specs: tuple[str, str], tmp_path: Path
) -> None:
    grid = read(made("grid"))
    fewer = read(made("fewer", defenses=[NOISE], datasets=[{"spec": specs[1], "name": "images", "n": 20}]))
    with pytest.raises(UsageError, match=r"^contents.images.ids_sha256 is .* but the run in '.*grid' was made with"):
        joined([grid, fewer])
    steps = read(made("steps", defenses=[NOISE], threats=[{"eps": "4/255", "steps": 2}]))
    with pytest.raises(UsageError, match=r"^threats.linf 4/255.steps is 2, but the run in '.*grid' was made with 3"):
        joined([grid, steps])
    with pytest.raises(UsageError, match=r"^the cell 'tiny \| none \| images \| linf 4/255' is in '.*grid' and in"):
        joined([grid, read(made("again"))])
    with pytest.raises(UsageError, match="runs is empty"):
        joined([])
    weights = grid.cells[0].facts["weights_sha256"]
    other = read(made("other", defenses=[NOISE]))
    other.cells[0].facts["weights_sha256"] = "another"
    with pytest.raises(UsageError, match=rf"^models.tiny.images.weights_sha256 is 'another', but .* with '{weights}'"):
        joined([grid, other])


def test_other_attacks_are_said(made: Callable[..., Path]) -> None:
    runs = [read(made("grid")), read(made("mine", defenses=[NOISE], attacks=["apgd-ce,steps=2"]))]
    assert joined(runs).differing == ("attacks",)
    page = page_of(runs)
    for section in (page.before[0], next(part for part in page.after if part.title == "Against a baseline")):
        assert "The runs differ in attacks: each number is over what its own run tried" in section.note, section.title


def test_several_runs_need_a_place(made: Callable[..., Path], report: Report) -> None:
    grid = made("grid")
    code, said = report(grid, grid)
    assert code == 2 and said.startswith(
        "error: 2 runs are to stand together; name a folder for their files with --out"
    )


def test_the_files_of_a_run_are_not_overwritten_by_those_of_others(
    made: Callable[..., Path], report: Report, tmp_path: Path
) -> None:
    grid, mine = made("grid", exhibits=False), made("mine", defenses=[NOISE], exhibits=False)
    before = {file: file.read_bytes() for folder in (grid, mine) for file in folder.iterdir() if file.is_file()}
    for folders, out in (((grid, mine), grid), ((grid, mine), mine), ((grid,), mine), ((grid, mine), grid / ".")):
        code, said = report(*folders, "--out", out)
        assert code == 2 and said.startswith(f"error: --out '{out}' holds a run, whose own summaries would be"), said
    assert {file: file.read_bytes() for folder in (grid, mine) for file in folder.iterdir() if file.is_file()} == before
    assert report(grid, "--out", grid / ".." / "grid")[0] == 0  # its own
    assert report(grid, mine, "--out", tmp_path / "both")[0] == 0
    assert report(grid, mine, "--out", tmp_path / "both")[0] == 0  # again, when the runs have gone on
