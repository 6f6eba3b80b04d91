"""The page of a run: every part from the run's own verdicts, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipdefense.runs.exhibits as exhibits
from clipdefense import UsageError
from clipdefense.attacks.context import predict
from clipdefense.evaluation.report import Page
from clipdefense.evaluation.statistics import macro, mcnemar, wilson
from clipdefense.files import write_json
from clipdefense.runs.build import Builder
from clipdefense.runs.config import read_config
from clipdefense.runs.page import page_of, write_page
from clipdefense.runs.results import audit_file, read
from clipdefense.runs.run import run
from clipdefense.runs.summary import write
from clipdefense.runs.units import cells

INVALID = {
    "verdict": "INVALID",
    "withheld": "planted: the gradient is zero.",
    "findings": [
        {"number": 1, "name": "gradients", "verdict": "INVALID", "evidence": "All are zero.", "advice": "Mend it."},
        {"number": 2, "name": "differences", "verdict": "PASS", "evidence": "Fine.", "advice": ""},
    ],
}


@pytest.fixture(scope="module")
def finished(specs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two data sets, two defences, two radii."""
    folder = tmp_path_factory.mktemp("page") / "run"
    config = read_config(
        {
            "models": [{"spec": specs[0], "name": "tiny <&>"}],
            "datasets": [{"spec": specs[1], "name": "one"}, {"spec": specs[1], "name": "two", "n": 20}],
            "defenses": ["none", {"spec": "random-noise", "eot": 2, "options": {"eps": "2/255"}}],
            "threats": [{"eps": "2/255", "steps": 3}, {"eps": "4/255", "steps": 3}],
            "attacks": ["pgd"],
            "verdict_seeds": 2,
        }
    )
    run(config, folder, device="cpu")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def grid(page: Page, title: str) -> dict[str, list[tuple[str, ...]]]:
    """A section's rows by the heading over them."""
    (section,) = (part for part in (*page.before, *page.after) if part.title == title)
    assert section.grid is not None
    found: dict[str, list[tuple[str, ...]]] = {}
    for row in section.grid.rows:
        if len(row) == 1:
            rows = found[row[0]] = []
        else:
            assert len(row) == len(section.grid.header)
            rows.append(row)
    return found


def text(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def test_the_tables_say_what_the_verdicts_say(folder: Path) -> None:
    result = read(folder)
    page = page_of(result)
    by_name = {cell.cell.name: cell for cell in result.cells}
    plain = {name: by_name[f"tiny <&> | none | {name} | linf 4/255"] for name in ("one", "two")}
    noisy = by_name["tiny <&> | random-noise | one | linf 4/255"]
    shares = [(cell.evaluation.worst_case().accuracy, cell.evaluation.n) for cell in plain.values()]
    assert {n for _, n in shares} == {40, 20}
    rows = grid(page, "Mean over data sets")["tiny <&> | none | linf 4/255"]
    assert rows[-1] == ("worst case per image", "all its attacks", "2", text(*macro(shares)))
    assert [row[0] for row in rows] == ["clean", "pgd", "worst case per image"]

    ours = (noisy.adversarial == noisy.labels).all(axis=(0, 1)) & (noisy.clean == noisy.labels).all(axis=0)
    theirs = ((plain["one"].adversarial == noisy.labels) & (plain["one"].clean == noisy.labels)).all(axis=(0, 1))
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    rows = grid(page, "Against a baseline")[f"{noisy.cell.name}, against defence none"]
    assert rows[1] == ("worst case per image", "40", f"+{gained}", f"-{lost}", f"{mcnemar(gained, lost):.3g}")
    assert len(grid(page, "Against a baseline")) == 4
    assert len(grid(page_of(result, "random-noise"), "Against a baseline")) == 4
    with pytest.raises(UsageError, match="baseline 'nonesuch' is unknown"):
        page_of(result, "nonesuch")

    worst = grid(page, "Worst classes")[plain["one"].cell.name]
    kept = []
    for label, name in enumerate(("cat", "dog", "fish")):
        here = plain["one"].labels == label
        if here.any():
            kept.append((float(theirs[here].mean()), name, str(here.sum())))
    least = min(kept)
    assert worst[0][3] == text(least[0], wilson(least[0], int(least[2]))) and len(worst) == len(kept)
    glance = grid(page, "At a glance")["one"]
    assert glance[0][:2] == ("tiny <&>", "none")
    assert glance[0][4] == text(shares[0][0], plain["one"].evaluation.worst_case().interval)


def test_the_words_fit_the_run(folder: Path) -> None:
    page = page_of(read(folder))
    parts = {part.title: part for part in (*page.before, *page.after)}
    radii = parts["The threat model"].points
    assert len(radii) == 2 and "at most 2 of its 255 levels" in radii[0] and "16 x 16" in radii[0]
    tried = " ".join(parts["What was tried"].points)
    assert "The attacker has the model itself" in tried and "adaptive views" in tried and "Attacks: pgd." in tried
    untried = " ".join(parts["What was not tried"].points)
    for what in ("AutoAttack", "L2 perturbations", "without gradients", "patches"):
        assert what in untried
    assert "An attacker who knows the defence" not in untried
    assert len(parts["Accuracy against eps"].charts) == 2 and len(parts["The attack's loss"].charts) == 8
    assert "Audit" not in parts


def test_an_invalid_audit_withholds_every_robust_number(folder: Path) -> None:
    result = read(folder)
    bad = next(cell for cell in result.cells if cell.cell.name == "tiny <&> | random-noise | one | linf 4/255")
    write_json(audit_file(folder, bad.cell.number), INVALID)
    write_json(audit_file(folder, 0), {"verdict": "PASS", "withheld": None, "findings": []})
    result = read(folder)
    write(result, folder)
    entry = next(e for e in json.loads((folder / "summary.json").read_text())["results"] if e["cell"] == bad.cell.name)
    assert entry["unreliable"] is True and entry["withheld"] == INVALID["withheld"]
    assert [row["accuracy"] is None for row in entry["rows"]] == [row["attack"] != "clean" for row in entry["rows"]]
    lines = [
        line for line in (folder / "summary.csv").read_text().splitlines() if ",random-noise,one,linf,0.0156" in line
    ]
    assert ["withheld: INVALID" in line for line in lines] == [",clean," not in line for line in lines]
    name = bad.cell.name.replace("<", "&lt;").replace(">", "&gt;").replace("<&", "<&amp;")
    heading = r"## tiny \<&\> \| random-noise \| one \| linf 4/255"
    markdown = (folder / "summary.md").read_text().split(heading)[1].split("## ")[0]
    assert markdown.count("withheld: INVALID") == len(lines) - 1 and "planted" in markdown

    worst = text(bad.evaluation.worst_case().accuracy, bad.evaluation.worst_case().interval)
    page = write_page(folder).read_text()
    table = re.split(r'<tr class="group">', page[page.index('id="accuracy"') :])
    (own,) = [part for part in table if name.split("&")[-1].split(" | ", 1)[1] in part and "/255</th>" in part][:1]
    assert "withheld: INVALID" in own and own.count('class="bar"') == 1 and worst not in own.split("</tbody>")[0]
    parts = page_of(result)
    audits = grid(parts, "Audit")
    assert audits[f"{bad.cell.name}: INVALID"] == [("INVALID", "1 gradients", "All are zero. Mend it.")]
    assert audits[f"{result.cells[0].cell.name}: PASS"] == []
    assert grid(parts, "Mean over data sets")["tiny <&> | random-noise | linf 4/255"][-1][-1] == "withheld: INVALID"
    assert grid(parts, "Against a baseline")[f"{bad.cell.name}, against defence none"][1][1] == "withheld: INVALID"
    assert all(row[3] == "withheld: INVALID" for row in grid(parts, "Worst classes")[bad.cell.name])
    (glance,) = (row for row in grid(parts, "At a glance")["one"] if row[1] == "random-noise")
    assert glance[4] == "withheld: INVALID" and glance[3] != "withheld: INVALID"


def exhibit_of(folder: Path, number: int) -> exhibits.Exhibit | None:
    """What is kept of the cell of that number."""
    (cell,) = (cell for cell in read(folder).cells if cell.cell.number == number)
    return exhibits.read(exhibits.exhibit_file(folder, number), exhibits.identity(cell.cell, cell.facts))


def test_losses_and_pictures_are_the_attacks_own(folder: Path) -> None:
    result = read(folder)
    builder = Builder(result.config, "cpu")
    cell = cells(result.config)[1]  # no defence, 4/255
    subject = builder.subject(cell)
    exhibit = exhibit_of(folder, cell.number)
    assert exhibit is not None and exhibit.attack == "pgd" and exhibit.images == exhibits.TRACED
    (trace,) = exhibit.traces
    assert trace.label == "the model itself" and len(trace.middle) == 3  # a gradient a step
    dataset = builder.datasets["one"].select(range(exhibits.LOOKED_AT))
    x, y = dataset.tensors()
    right = (predict(subject.model, x).argmax(dim=1) == y).nonzero()[: exhibits.TRACED, 0]
    clean = torch.nn.functional.cross_entropy(predict(subject.model, x[right]), y[right], reduction="none")
    # the first gradient is at the random start, within eps of the clean image; then the attack climbs
    assert abs(trace.middle[0] - float(clean.median())) < 0.5 and trace.middle[-1] > trace.middle[0]
    assert all(low <= middle <= high for low, middle, high in zip(trace.low, trace.middle, trace.high))
    strip = exhibit.strips[0]
    captions = [caption for caption, _ in strip.pictures]
    assert captions[:3] == [captions[0], "perturbation, x10 around grey", captions[2]] and len(captions) == 5
    assert captions[3].startswith("attention for") and captions[2].startswith("attacked: says")
    number = int(strip.title.split()[1].strip(","))
    original = (dataset.tensors([number])[0][0] * 255).round().to(torch.uint8)
    assert torch.equal(strip.pictures[0][1], original)
    shown = strip.pictures[1][1].float() / 255 - 0.5
    delta = strip.pictures[2][1].float() / 255 - original.float() / 255
    assert shown.abs().max() <= 10 * 4 / 255 + 1 / 255
    assert (shown / 10 - delta).abs().max() < 1 / 255  # rounded to 8 bits, both
    defended = exhibit_of(folder, 3)
    assert defended is not None and defended.traces[0].label.startswith("transfer")
    assert "adaptive view eot, 2 EOT draws" in [trace.label for trace in defended.traces]
    assert any(caption.startswith("random-noise adds") for caption, _ in defended.strips[0].pictures)


def test_an_attention_map_is_the_formula() -> None:
    """Two channels, four tokens; the label's text is the first channel."""

    class Head:
        embeddings = torch.tensor([[2.0, 0.0], [0.0, 1.0]])

    class Tokens(torch.nn.Module):
        head = Head()

        def embed_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([[1.0, 1.0]]), torch.tensor([[[0.0, 3.0], [4.0, 1.0], [2.0, 1.0], [2.0, 5.0]]])

    class Bare(torch.nn.Module):
        pass

    x = torch.zeros(1, 3, 2, 2)
    heat = exhibits.attention(Tokens(), x, torch.tensor([0]))
    assert heat is not None and heat.shape == (1, 3, 2, 2)
    from matplotlib import colormaps

    colours = colormaps["inferno"].resampled(256)
    for place, value in zip(((0, 0), (0, 1), (1, 0), (1, 1)), (0.0, 1.0, 0.5, 0.5)):  # 0, 4, 2, 2 scaled to [0, 1]
        wanted = 0.6 * torch.tensor(colours(round(value * 255))[:3], dtype=torch.float32)
        assert torch.allclose(heat[0, :, place[0], place[1]], wanted, atol=1e-6)
    assert exhibits.attention(Bare(), x, torch.tensor([0])) is None


def test_a_page_of_a_run_under_way_says_so(make_config: Callable[..., Any], tmp_path: Path) -> None:
    from clipdefense.runs.units import Shard

    run(make_config(exhibits=False), tmp_path / "run", shard=Shard(0, 2), device="cpu")
    write_page(tmp_path / "run")
    assert "NOT FINISHED: 1 of 3 work units are missing" in (tmp_path / "run" / "report.html").read_text()
    from clipdefense.runs.merge import merge

    merge([tmp_path / "run"], tmp_path / "merged")
    page = page_of(read(tmp_path / "merged"))
    assert any("NOT FINISHED: 1 of 3 work units are missing" in line for line in page.summary)
    assert {"The attack's loss", "What it looks like"}.isdisjoint(part.title for part in page.after)
    write_page(tmp_path / "merged", tmp_path / "elsewhere.html")
    assert "NOT FINISHED" in (tmp_path / "elsewhere.html").read_text()


class Loaded(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        names = ("src", "href", "xlink:href", "srcset", "data")
        self.wanted += [value for name, value in attributes if name in names and value]


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    page = write_page(folder).read_text()
    wanted = Loaded(page).wanted
    assert wanted and all(value.startswith(("#", "data:image/png;base64,")) for value in wanted)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))  # figures do not take each other's parts
    assert {value[1:] for value in wanted if value[0] == "#"} <= set(names)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (480, True)])
def test_in_a_real_browser(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here; `apt-get install chromium` brings one")
    page = write_page(folder)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    shot = tmp_path / "shot.png"
    ended = subprocess.run(
        [*command, f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shot.is_file(), ended.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    ground = pixels[2, 2]
    assert (ground < 60).all() if dark else (ground > 240).all()
    differing = (abs(pixels - ground).sum(axis=2) > 60).mean()
    assert 0.01 < differing < 0.6  # there is something on it, and it is legible against the ground
    # what the browser makes of it: every section there, no picture broken, nothing wider than the window
    script = page.with_name("probe.html")
    probe = (
        "<script>addEventListener('load', () => { const wide = document.documentElement.scrollWidth > innerWidth + 1;"
        "const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "document.title = JSON.stringify({wide, broken, images: document.images.length,"
        "sections: document.querySelectorAll('section').length, "
        "svg: document.querySelectorAll('svg').length}) })</script>"
    )
    script.write_text(page.read_text() + probe)
    ended = subprocess.run(
        [*command, f"--window-size={width},1600", "--dump-dom", script.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r"<title>(.*?)</title>", ended.stdout)
    assert found, ended.stderr
    seen = json.loads(found[1])
    assert seen["wide"] is False and seen["broken"] == 0 and seen["images"] > 50
    assert seen["svg"] == 10 and seen["sections"] >= 10
