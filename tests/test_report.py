"""Results on paper: the table, the JSON file, the page."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from clipdefense.evaluation import charts, report
from clipdefense.evaluation.fingerprint import fingerprint, hashed_once
from clipdefense.evaluation.runner import Evaluation, Row
from clipdefense.evaluation.statistics import wilson
from clipdefense.files import write_json
from clipdefense.threat import ThreatModel
from clipdefense.weights import sha256_of_weights


def correct(*seeds: str) -> np.ndarray:
    return np.array([[bit == "1" for bit in seed] for seed in seeds])


@pytest.fixture
def evaluation() -> Evaluation:
    """Ten images, two verdict seeds; names that markup would mangle."""
    clean = Row("none", "nothing", correct("1111111110", "1111111111"))
    rows = (
        Row("pgd,steps=10", "transfer from <the> model", correct("1111100000", "1111111000")),
        Row("x[bold]:y", "adaptive view [a]", correct("1100000000", "0100000011")),
    )
    return Evaluation(
        "ttc & [red]", ThreatModel("linf", 4 / 255), clean, rows, True, {"seed": 3, "machine": {"gpu": None}}
    )


class Cells(html.parser.HTMLParser):
    """The text of every table cell, row by row; every attribute and tag on the way."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def expected_rows() -> list[list[str]]:
    """Worked out by hand: 19, 12 and 5 of 20 verdicts, and the one image right in all six, the second."""

    def accuracy(share: float) -> str:
        low, high = wilson(share, 10)
        return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return [
        ["ttc & [red]", "clean", "nothing", "10", accuracy(0.95)],
        ["", "pgd,steps=10", "transfer from <the> model", "10", accuracy(0.6)],
        ["", "x[bold]:y", "adaptive view [a]", "10", accuracy(0.25)],
        ["", "worst case per image", "2 attacks", "10", accuracy(0.1)],
    ]


def test_the_table_shows_every_number_and_no_markup_is_lost(evaluation: Evaluation) -> None:
    console = Console(width=200, file=io.StringIO(), no_color=True)
    console.print(report.table([evaluation]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "linf, eps 4/255" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    for line, (*names, n, accuracy) in zip(lines, expected_rows(), strict=True):
        seeds = "" if names[1].startswith("worst") else " x 2 seeds"
        assert line == [*names, n + seeds, accuracy]


def test_percent_of_none_and_all() -> None:
    assert report.percent(Row("a", "b", correct("0" * 300))) == "0.0 [0.0, 1.3]"
    assert report.percent(Row("a", "b", correct("1" * 300))) == "100.0 [98.7, 100.0]"


def test_json_round_trip_keeps_every_verdict(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "result.json"
    write_json(path, evaluation.to_dict())
    read = json.loads(path.read_text())
    assert read == evaluation.to_dict()
    assert read["eps"] == 4 / 255 and read["fingerprint"] == {"seed": 3, "machine": {"gpu": None}}
    for row, entry in zip((evaluation.clean, *evaluation.rows), (read["clean"], *read["attacks"]), strict=True):
        assert np.array_equal(correct(*entry["correct"]), row.correct)
        assert entry["accuracy"] == row.accuracy and tuple(entry["interval_95"]) == row.interval
        assert (entry["n"], entry["verdict_seeds"]) == (10, 2)
    assert read["worst_case"]["correct"] == ["0100000000"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    with pytest.raises(TypeError):
        write_json(path, {"not": {"json"}})
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    monkeypatch.undo()
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_results_are_as_readable_as_any_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "result.json", {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "result.json")}
    assert len(modes) == 1


@pytest.fixture
def page(evaluation: Evaluation, tmp_path: Path) -> str:
    picture = torch.zeros(3, 4, 5)
    picture[0, 1, 2], picture[1], picture[2] = 1.0, 0.5, torch.linspace(-1, 2, 5)
    curves = (
        report.Curve("<script>alert(1)</script>", ((0.0, 0.9, 0.8, 0.95), (4 / 255, 0.2, 0.1, 0.3))),
        report.Curve("ttc", ((0.0, 0.85, 0.8, 0.9), (4 / 255, 0.5, 0.4, 0.6))),
    )
    content = report.Page(
        title="a <title> & more",
        summary=["first line", "<b>second</b>"],
        evaluations=[evaluation, evaluation],
        curves=curves,
        curve_caption="curves",
        strips=[report.Strip((("clean", picture), ("perturbation", picture)))],
        strip_caption="strip",
        facts={"weights": "abc & def"},
    )
    path = tmp_path / "page.html"
    report.write_html(path, content)
    return path.read_text(encoding="utf-8")


def test_the_page_holds_everything_in_itself(page: str) -> None:
    parsed = Cells(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    loading = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster") and value
    ]
    assert loading and all(value.startswith(("data:image/png;base64,", "#")) for value in loading)
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "<svg" in page and not page.count("<?xml")


def test_the_page_shows_the_rows_of_every_evaluation(page: str) -> None:
    parsed = Cells(page)
    header, *rows = parsed.rows
    assert header[:4] == ["attack", "what the attacker had", "n", "accuracy"]
    assert [row for row in rows if len(row) == 1] == [["ttc & [red]"]] * 2
    lines = [row for row in rows if len(row) > 1]
    for shown, (_, *names, n, accuracy) in zip(lines, expected_rows() * 2, strict=True):
        draws = "" if names[0].startswith("worst") else " \u00d7 2 draws"
        assert shown[:4] == [*names, n + draws, accuracy]
    bars = [attributes["style"] for tag, attributes in parsed.tags if attributes.get("class") == "bar"]
    assert bars == [f"width: {6 * share:.1f}rem" for share in (0.95, 0.6, 0.25, 0.1)] * 2


def test_text_on_the_page_is_text(page: str) -> None:
    assert "<title>a &lt;title&gt; &amp; more</title>" in page
    assert "&lt;b&gt;second&lt;/b&gt;" in page and "<b>second" not in page
    assert "abc &amp; def" in page
    assert "<script" not in page


def test_pictures_on_the_page_are_the_pictures(page: str) -> None:
    sources = [attributes["src"] for tag, attributes in Cells(page).tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2])))
        assert image.size == (5, 4) and image.mode == "RGB"
        pixels = np.asarray(image)
        assert pixels[1, 2].tolist() == [255, 128, 128] and pixels[0, 2].tolist() == [0, 128, 128]
        assert pixels[0, :, 2].tolist() == [0, 0, 128, 255, 255]  # clipped, rounded to the nearest level


def test_the_curves_are_drawn_from_their_points() -> None:
    curves = [report.Curve("a", ((0.0, 1.0, 0.9, 1.0), (1 / 255, 0.5, 0.4, 0.6), (2 / 255, 0.0, 0.0, 0.1)))]
    figure = charts.draw_curves(curves)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert np.allclose(line.get_xydata(), [[0, 100], [1 / 255, 50], [2 / 255, 0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1/255", "2/255"]
    (label,) = figure.legends[0].get_texts()
    assert label.get_text() == "a"


def test_a_page_without_curves_or_pictures_has_no_empty_sections(evaluation: Evaluation, tmp_path: Path) -> None:
    report.write_html(tmp_path / "page.html", report.Page("title", ["line"], [evaluation]))
    page = (tmp_path / "page.html").read_text()
    assert "<svg" not in page and "<img" not in page and page.count("<h2>") == 1


def test_a_fingerprint_changes_with_what_a_verdict_depends_on() -> None:
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    first = sha256_of_weights(model)
    assert sha256_of_weights(model) == first and len(first) == 64
    assert sha256_of_weights(model.float()) != first  # the same values in another dtype
    with torch.no_grad():
        model.weight[0, 0].add_(1e-3)
    second = sha256_of_weights(model)
    model.register_buffer("more", torch.zeros(1))
    assert len({first, second, sha256_of_weights(model)}) == 3


def test_a_fingerprint_says_which_model_on_which_machine() -> None:
    from clipdefense.classifier import ZeroShotClassifier

    def make(**options: object) -> ZeroShotClassifier:
        torch.manual_seed(1)
        return ZeroShotClassifier(
            torch.nn.Flatten(), torch.randn(2, 12), image_size=2, source="here", **options  # type: ignore[arg-type]
        )  # fmt: skip

    facts = fingerprint(make(class_names=["a", "b"]), seed=5)
    assert facts["model"] == "here" and facts["classes"] == 2 and facts["image_size"] == 2 and facts["seed"] == 5
    assert facts["machine"]["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert json.loads(json.dumps(facts)) == facts
    renamed, shifted = (
        fingerprint(make(class_names=["b", "a"]), seed=5),
        fingerprint(make(mean=(0.5, 0.5, 0.5)), seed=5),
    )
    assert renamed["class_names_sha256"] != facts["class_names_sha256"]
    assert shifted["mean"] == [0.5, 0.5, 0.5] != facts["mean"]


def test_weights_are_hashed_once_for_who_judges_them_often(monkeypatch: pytest.MonkeyPatch) -> None:
    models, counted = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], [0]

    def counting(model: torch.nn.Module) -> str:
        counted[0] += 1
        return sha256_of_weights(model)

    monkeypatch.setattr("clipdefense.evaluation.fingerprint.sha256_of_weights", counting)
    known: dict[int, str] = {}
    with hashed_once(known):
        seen = [fingerprint(model)["weights_sha256"] for model in (*models, *models)]
    assert counted == [2] and seen[:2] == seen[2:] == [sha256_of_weights(model) for model in models]
    with torch.no_grad():
        models[0].weight.add_(1)
    assert fingerprint(models[0])["weights_sha256"] == sha256_of_weights(models[0]) != seen[0]  # outside: always anew
