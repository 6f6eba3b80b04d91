"""A model or a defence under PGD-10, PGD-100 and AutoAttack, through the runs, beside published numbers.

    pytest benchmarks/test_defense.py --size full --model open_clip:ViT-B-32-quickgelu@openai \
        --protocol ttc-224 --root /data --data cifar10 --defense ttc --runs results/ttc

What draws is attacked with AutoAttack's ``rand`` and, as every test-time defence, through its adaptive views too; the
undefended model with ``standard``. Under a protocol its own attacks, radii, prompts and resolution come first, and one
table has ours beside what was published under it. Without ``--model`` the smallest size takes the demo's digits; the
others skip.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from beside import Beside, Measured, join, radii, table
from clipdefense.data.protocols import get_protocol
from clipdefense.evaluation import report
from clipdefense.plugins import get_defense
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.page import write_page
from clipdefense.runs.results import CellResult, notes, read
from clipdefense.runs.robustbench import entry
from clipdefense.runs.run import run
from clipdefense.threat import format_eps, parse_eps

PUBLISHED = Path(__file__).parent / "published.json"
PGD = ["pgd,steps=10", "pgd,steps=100"]
DEMO = {"model": "demo:digits", "data": ["digits:test"], "eps": ["6/255"], "n": 8, "eot": 1}


@pytest.fixture
def asked(request: pytest.FixtureRequest, size: str) -> dict[str, Any]:
    """The options of the command line; for the smallest size the demo stands in for what is not given."""
    names = ("model", "data", "defense", "protocol", "root", "n", "eps", "eot")
    given = {name: request.config.getoption(f"--{name}") for name in names}
    if not given["model"]:
        if size != "smoke":
            pytest.skip("no --model: pytest benchmarks/test_defense.py --size full --model M --data D --defense T")
        given = {**DEMO, **{name: value for name, value in given.items() if value}}
    if not given.get("data") and not given.get("protocol"):
        pytest.fail("--model needs --data (plugin:name), or --protocol")
    return given


def configuration(asked: dict[str, Any], defense: str | None, device: str) -> RunConfig:
    """One model, with or without the defence, as a run."""
    draws = defense is not None and get_defense(defense).traits.randomized
    ensemble = "autoattack,version=rand" if draws else "autoattack"
    if draws and asked.get("eot"):
        ensemble += f",eot={asked['eot']}"
    table: dict[str, Any] = {"spec": defense or "none"}
    table |= {"eot": asked["eot"]} if defense and asked.get("eot") else {}
    protocol = asked.get("protocol")
    more = {"n": asked["n"]} if asked.get("n") else {}
    data = asked.get("data")
    content: dict[str, Any] = {
        "models": [asked["model"]],
        "defenses": [table],
        "datasets": None if data is None else [{"spec": spec, **more} for spec in data],
        "threats": [{"eps": eps} for eps in asked["eps"]] if asked.get("eps") else None,
        "protocol": protocol,
        "root": asked.get("root"),
        "also" if protocol else "attacks": [*PGD, ensemble],
        "save_adv": True,
        "batch_size": 128 if device == "cpu" else 512,
    }
    return read_config({key: value for key, value in content.items() if value is not None})


def published(protocol: str | None, datasets: list[str], eps: list[str] | None = None) -> list[dict[str, Any]]:
    """What was published under the protocol on these data sets or as a mean, clean or at these radii (None: at any)."""
    entries = json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"]
    wanted, known = [*datasets, "mean"], None if eps is None else {format_eps(parse_eps(given)) for given in eps}
    rows = []
    for each in entries:
        found = {name: each["accuracy"][name] for name in wanted if name in each["accuracy"]}
        if each["protocol"] == protocol and found and (known is None or set(radii(each["eps"])) <= known):
            rows.append({**each, "accuracy": found})
    return rows


def show(console: Console, cells: list[CellResult], joined: list[Beside], asked: dict[str, Any]) -> None:
    """Each evaluation with its notes, then ours beside theirs."""
    for cell in cells:
        console.print(report.table([cell.evaluation]))
        for note in notes(cell):
            console.print(note, markup=False)
    if asked.get("protocol"):
        console.print(table(joined, asked["protocol"]) if joined else "nothing of this was published under it")
    if asked.get("protocol") and asked.get("n"):
        console.print(
            f"--n {asked['n']}: these are {asked['n']} images a data set, another subset than the published one"
        )


def test_under_pgd_and_autoattack(
    asked: dict[str, Any],
    device: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(request.config.getoption("--runs") or tmp_path)
    cells: list[CellResult] = []
    for name, defense in {"undefended": None, "defended": asked.get("defense")}.items():
        if name == "defended" and defense is None:
            continue
        run(configuration(asked, defense, device), folder / name, device=device)
        write_page(folder / name)
        cells += read(folder / name).cells
    datasets = list(dict.fromkeys(cell.cell.dataset.spec for cell in cells))
    beside = published(asked.get("protocol"), datasets, asked.get("eps"))
    protocol = asked.get("protocol")
    joined = join([*map(Measured.of, cells)], beside, get_protocol(protocol)) if protocol else []
    with capsys.disabled():
        show(Console(width=180), cells, joined, asked)
        print(f"runs, with their pages and what broke every image: {folder}")
    for cell in cells:
        attacks = {row.attack.partition(",")[0].removeprefix("+ ") for row in cell.evaluation.rows}
        assert {"pgd", "autoattack"} <= attacks and cell.missing == 0
        if cell.cell.defense.spec != "none":
            assert {row.kind for row in cell.evaluation.rows} >= {"transfer", "view"} or cell.evaluation.caveat
    figures = {"results": [*map(entry, cells)], "published": beside, "beside": [*map(asdict, joined)]}
    record("defense", figures, quiet=True)
