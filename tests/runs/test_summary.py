"""Summaries of a grid: what is not finished says so everywhere, and sums are the same in every file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import clipdefense as cd
import clipdefense.runs.page as page_module
from clipdefense.evaluation.report import Page, percent
from clipdefense.evaluation.statistics import macro, mcnemar
from clipdefense.files import write_json
from clipdefense.runs.compare import standing
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.grids import mean_text
from clipdefense.runs.joint import joined
from clipdefense.runs.merge import merge
from clipdefense.runs.page import page_of, write_page
from clipdefense.runs.results import CellResult, RunResult, audit_file, read
from clipdefense.runs.robustbench import entry
from clipdefense.runs.run import run
from clipdefense.runs.summary import write
from clipdefense.runs.sums import against, glance, means
from clipdefense.runs.terminal import tables
from clipdefense.runs.units import Shard

MakeConfig = Callable[..., RunConfig]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def text_of(folder: Path, page: Path | None = None) -> str:
    console = Console(width=250, file=io.StringIO(), no_color=True)
    tables(console, folder, page)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def section(page: Page, title: str) -> Any:
    return next((part for part in (*page.before, *page.after) if part.title == title), None)


@pytest.fixture
def unfinished(make_config: MakeConfig, tmp_path: Path) -> Path:
    """Three radii in nine work units, of which four are done: one cell whole, one in part, one not begun."""
    config = make_config(threats=[{"eps": eps, "steps": 1} for eps in ("1/255", "2/255", "4/255")], exhibits=False)
    for index in range(4):
        run(config, tmp_path / "parts", shard=Shard(index, 9), device="cpu")
    return tmp_path / "parts"


def test_a_number_of_an_unfinished_cell_says_over_how_many_images(unfinished: Path, tmp_path: Path) -> None:
    result = read(unfinished, shards=True)
    whole, part = result.cells
    (absent,) = result.unjudged
    assert (whole.mark, part.mark, absent.missing) == ("", "(16 of 40)", 3)
    (line,) = glance(joined(result))
    assert line.clean == f"{percent(whole.evaluation.clean)} (all 40)"  # the number beside it is over 16
    worst = percent(part.evaluation.worst_case())
    assert line.robust == (percent(whole.evaluation.worst_case()), f"{worst} (16 of 40)", "NOT FINISHED")

    joint = write(result, tmp_path / "files")
    lines = rows_of(tmp_path / "files" / "summary.csv")
    assert [(row["units_done"], row["units_missing"]) for row in lines] == [("3", "0")] * 3 + [("1", "2")] * 3 + [
        ("0", "3")
    ]
    assert (lines[-1]["eps"], lines[-1]["attack"], lines[-1]["accuracy"]) == (str(4 / 255), "", "NOT FINISHED")
    markdown = (tmp_path / "files" / "summary.md").read_text()
    never = "tiny | none | images | linf 4/255: NOT FINISHED, none of 3 work units is done."
    assert never.replace("|", r"\|") in markdown
    own = markdown.split("linf 2/255\n")[1]
    assert own.count("(16 of 40)") == 3 and f"**{worst} (16 of 40)**" in own
    stored = json.loads((tmp_path / "files" / "summary.json").read_text())
    assert [one["cell"] for one in stored["without_verdicts"]] == [absent.cell.name]
    assert stored["results"][1]["footnote"].startswith("NOT FINISHED: every number is of 16 of 40 images")
    table = (tmp_path / "files" / "summary.tex").read_text()
    assert r"(all 40)" in table and r"(16 of 40) & NOT FINISHED \\" in table

    page = page_of(joint.runs)
    assert section(page, "Without verdicts").points == [never]
    html = write_page(unfinished, tmp_path / "page.html").read_text()
    main = html[html.index('id="accuracy"') :]
    assert main.count("(16 of 40)</td>") == 3 and "NOT FINISHED" in html
    terminal = text_of(unfinished)
    assert terminal.count("(16 of 40)") == 3 and never in terminal
    assert "NOT FINISHED: 2 of 3 work units are missing." in terminal


def test_shards_are_read_as_they_stand_and_not_changed(unfinished: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    write(read(unfinished, shards=True), tmp_path / "read")
    assert {file.name: file.read_bytes() for file in unfinished.iterdir()} == before
    merge([unfinished], tmp_path / "merged")
    for name in ("summary.json", "summary.md", "summary.csv", "means.csv", "summary.tex"):
        assert (tmp_path / "read" / name).read_text() == (tmp_path / "merged" / name).read_text(), name
    with pytest.raises(cd.UsageError, match="holds 4 shards"):
        read(unfinished)


def test_what_is_not_finished_is_in_no_mean_and_no_curve(make_config: MakeConfig, specs: Any, tmp_path: Path) -> None:
    datasets = [
        {"spec": specs[1], "name": "a"},
        {"spec": specs[1], "name": "b", "n": 20},
        {"spec": specs[1], "name": "c"},
    ]
    config = make_config(datasets=datasets, threats=[{"eps": "1/255", "steps": 1}, {"eps": "4/255", "steps": 1}])
    # 3 + 3 units of a, 2 + 2 of b, 3 + 3 of c, of which the last is missing
    for index in range(15):
        run(config, tmp_path / "parts", shard=Shard(index, 16), device="cpu")
    joint = joined(read(tmp_path / "parts", shards=True))
    found = {(mean.threat, mean.attack): mean for mean in means(joint)}
    small, large = (found[f"linf {eps}", "worst case per image"] for eps in ("1/255", "4/255"))
    assert (small.counted, large.counted) == ("3", "2 of 3") and large.missing == ("c",)
    cells = [cell for cell in joint.cells if cell.cell.threat.label == "linf 4/255"]
    shares = [(cell.evaluation.worst_case().accuracy, cell.evaluation.n) for cell in cells if not cell.missing]
    assert (large.accuracy, large.interval) == macro(shares) and len(shares) == 2
    page = page_of(joint.runs)
    assert "(2 of 3 data sets)" in section(page, "At a glance").grid.rows[-1][-1]
    assert "left out of the means (c)" in section(page, "Mean over data sets").note
    curves = section(page, "Accuracy against eps")
    assert "not finished: 1 of 6 combinations" in curves.note
    assert [chart.caption.partition(",")[0] for chart in curves.charts] == ["a", "b"]


@pytest.fixture(scope="module")
def grid(specs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, two defences, two radii; labels that markup and spreadsheets would mangle."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    config = read_config(
        {
            "models": [{"spec": specs[0], "name": "=tiny_*<b>"}],
            "datasets": [{"spec": specs[1], "name": "one"}, {"spec": specs[1], "name": "two & more", "n": 20}],
            "defenses": ["none", {"spec": "random-noise", "eot": 2, "options": {"eps": "2/255"}}],
            "threats": [{"eps": "2/255", "steps": 3}, {"eps": "4/255", "steps": 3}],
            "attacks": ["pgd,step_size=1/255"],
            "verdict_seeds": 2,
            "exhibits": False,
        }
    )
    run(config, folder, device="cpu")
    return folder


def test_means_and_tests_are_the_same_in_every_file(grid: Path, tmp_path: Path) -> None:
    result = read(grid)
    write(result, tmp_path)
    stored = json.loads((tmp_path / "summary.json").read_text())
    mean = next(
        one
        for one in stored["means"]
        if (one["defense"], one["threat"], one["attack"]) == ("random-noise", "linf 4/255", "worst case, adaptive")
    )
    cells = [
        cell
        for cell in result.cells
        if (cell.cell.defense.label, cell.cell.threat.label) == ("random-noise", "linf 4/255")
    ]
    rows = [cell.evaluation.compared()[1] for cell in cells]
    share, interval = macro([(row.accuracy, row.correct.shape[1]) for row in rows])
    assert (mean["accuracy"], mean["interval_95"], mean["datasets"]) == (share, list(interval), ["one", "two & more"])
    text = f"{100 * share:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    markdown = (tmp_path / "summary.md").read_text()
    part = markdown.split("## Mean over data sets")[1].split("## ")[0]
    assert f"| **worst case, adaptive** | **all its attacks** | **2** | **{text}** |" in part
    assert "**worst case, transfer**" in part
    in_csv = [row for row in rows_of(tmp_path / "means.csv") if row["attack"] == "worst case, adaptive"]
    assert float(in_csv[-1]["accuracy"]) == share and in_csv[-1]["threat"] == "linf 4/255"
    shown = section(page_of(result), "Mean over data sets").grid.rows
    assert ("worst case, adaptive", "all its attacks", "2", text) in shown

    cell, other = cells[0], result.cells[1]
    pair = next(one for one in stored["against_baseline"] if one["cell"] == cell.cell.name and one["what"] != "clean")
    ours, theirs = standing(cell, None), standing(other, None)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    assert (pair["baseline"], pair["gained"], pair["lost"]) == (other.cell.name, gained, lost)
    assert pair["p_value"] == mcnemar(gained, lost) and pair["n"] == 40
    assert f"| +{gained} | -{lost} | {mcnemar(gained, lost):.3g} |" in markdown.split("## Against a baseline")[1]
    assert len(against(joined(result))) == len(stored["against_baseline"]) == 8


def test_a_withheld_number_is_in_no_file(grid: Path, tmp_path: Path) -> None:
    result = read(grid)
    bad = result.cells[3]  # random-noise, one, 4/255
    plain = text_of(grid)
    folder = tmp_path / "run"
    folder.mkdir()
    for file in grid.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    write_json(audit_file(folder, bad.cell.number), {"verdict": "INVALID", "withheld": "planted.", "findings": []})
    write(read(folder), folder)
    stored = json.loads((folder / "summary.json").read_text())
    hidden = [one for one in stored["means"] if one["accuracy"] is None]
    assert {(one["defense"], one["threat"]) for one in hidden} == {("random-noise", "linf 4/255")}
    assert all(one["interval_95"] is None and one["withheld"] and one["attack"] != "clean" for one in hidden)
    (pair,) = [one for one in stored["against_baseline"] if one["withheld"]]
    assert pair["cell"] == bad.cell.name and pair["gained"] is pair["lost"] is pair["p_value"] is None
    assert "withheld: INVALID" in (folder / "summary.tex").read_text()
    assert "withheld: INVALID" in (folder / "means.csv").read_text() and "withheld" not in plain


def test_labels_are_text_in_every_file(grid: Path, tmp_path: Path) -> None:
    write(read(grid), tmp_path)
    lines = rows_of(tmp_path / "summary.csv")
    assert {row["model"] for row in lines} == {"'=tiny_*<b>"} and all(float(row["accuracy"]) >= 0 for row in lines)
    assert {row["model"] for row in rows_of(tmp_path / "means.csv")} == {"'=tiny_*<b>"}
    stored = f"pgd,step_size={1 / 255}"
    assert stored in {row["attack"] for row in lines}  # the name as it was given stays in what programs read
    markdown = (tmp_path / "summary.md").read_text()
    assert r"## =tiny\_\*\<b\> \| none \| one \| linf 2/255" in markdown and "<b>" not in markdown
    assert r"pgd,step\_size=1/255" in markdown and str(1 / 255) not in markdown
    table = (tmp_path / "summary.tex").read_text()
    assert r"\multicolumn{3}{c}{two \& more}" in table and r"=tiny\_*\textless{}b\textgreater{} & none & " in table
    body = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert r"\multicolumn{3}{c}{mean over data sets}" in table
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body[1:]}) == 1 and len(body) == 2 + 2
    html = write_page(grid, tmp_path / "page.html").read_text()
    assert "step_size=1/255" in html and str(1 / 255) not in html.split('id="facts"')[0]


def test_a_large_run_is_short_in_the_terminal(grid: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    short, full = text_of(grid, page), text_of(grid)
    assert "At a glance" in short and len(short.splitlines()) < 25
    mean = next(one for one in reversed(means(joined(read(grid)))) if one.attack == "worst case per image")
    assert mean_text(mean) in short.split("mean over data sets")[1]
    last = short.strip().splitlines()[-1]
    assert str(page) in last and str(grid / "summary.md") in last and "8 combinations" in last
    assert "At a glance" not in full and full.count("Accuracy in %") == 8  # without a page nothing else has them
    assert percent(read(grid).cells[0].evaluation.worst_case()) in short


def test_a_part_of_the_combinations_says_so(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The first" not in section(page_of(read(grid)), "Worst classes").note
    monkeypatch.setattr(page_module, "SHOWN_CELLS", 3)
    assert "The first 3 of 8 combinations." in section(page_of(read(grid)), "Worst classes").note


def changed(cell: CellResult, *attacks: tuple[str, str], **more: Any) -> CellResult:
    """The cell with its attacks called otherwise: (attack, kind)."""
    named = tuple((attack, kind, kind, 1) for attack, kind in attacks)
    return replace(cell, attacks=named, adversarial=cell.adversarial[[0] * len(named)], **more)


@pytest.mark.parametrize(
    ("attacks", "filled", "footnote"),
    [
        ([("autoattack", "itself")], True, ""),
        ([("+ autoattack", "itself")], True, "counts what the attacks before it left standing"),
        ([("autoattack", "transfer"), ("autoattack", "view")], True, "autoattack_acc is under the view"),
        ([("autoattack", "transfer")], False, "it ran on the undefended model alone"),
        ([("autoattack,version=rand", "itself")], False, "version 'rand', without apgd-t, fab-t and square"),
        ([("autoattack,steps=10", "itself")], False, "with steps of its own"),
        ([("pgd", "itself")], False, "no AutoAttack ran"),
    ],
)
def test_robustbench_gets_the_published_autoattack_or_none(
    grid: Path, attacks: list[tuple[str, str]], filled: bool, footnote: str
) -> None:
    cell = changed(read(grid).cells[0], *attacks)
    fields = entry(cell)
    assert (fields["autoattack_acc"] is not None) is filled and footnote in fields["footnote"]
    if filled:
        assert fields["autoattack_acc"] == f"{100 * cell.evaluation.rows[0].accuracy:.2f}"
    assert entry(replace(cell, missing=1))["autoattack_acc"] is None
    assert entry(replace(cell, audit={"verdict": "INVALID", "withheld": "planted."}))["autoattack_acc"] is None


def test_facts_say_what_differs_from_data_set_to_data_set(grid: Path) -> None:
    result = read(grid)
    facts = page_of(result).facts
    digest = result.cells[0].facts["weights_sha256"]
    assert facts["model =tiny_*<b>"].endswith(f"weights {digest}")
    assert "batch_size" not in facts["defence random-noise"] and f"eps={2 / 255}" in facts["defence random-noise"]

    def other(cell: CellResult) -> CellResult:
        facts = {**cell.facts, "templates": ["a {}.", "b {}.", "c {}.", "d {}."], "templates_sha256": "abc"}
        return replace(cell, facts={**facts, "weights_sha256": cell.cell.dataset.label})

    contents = {label: dict(content) for label, content in result.facts["contents"].items()}
    contents["one"]["said"] = {"resize": "shorter side to 224", "names": "tecoa/1", "names_sha256": "def"}
    run_facts = {**result.facts, "contents": contents}
    changed = RunResult(result.folder, result.config, run_facts, tuple(map(other, result.cells)))
    facts = page_of(changed).facts
    assert facts["model =tiny_*<b> on one"].endswith("weights one")
    assert facts["model =tiny_*<b> on two & more"].endswith("weights two & more")
    assert "model =tiny_*<b>" not in facts
    assert "; resized by shorter side to 224; class names tecoa/1; their table def;" in facts["data set one"]
    assert facts["data set two & more"].startswith("20 images of 3 classes, attacked at 16 x 16 px; labels ")
    assert facts["prompts of =tiny_*<b>"] == '4 templates: "a {}.", "b {}.", "c {}.", ...; hash abc'
