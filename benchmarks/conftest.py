"""Options and fixtures of the benchmarks: ``pytest benchmarks/ --size smoke|cpu|full``.

Each benchmark prints its figures and writes one JSON file with machine, versions and commit. Nothing here asserts a
time; counts of passes are asserted, because they do not depend on the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdefense.files import write_json
from common import heading

SIZES = "smoke: a minute or two on a CPU; cpu: the published CPU figures, an hour; full: a GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=["smoke", "cpu", "full"], default="smoke", help=SIZES)
    parser.addoption("--results", default="benchmarks/results", help="folder for the JSON files")
    own = parser.getgroup("a model or a defence of one's own (benchmarks/test_defense.py)")
    own.addoption("--model", help="plugin:name@weights")
    own.addoption("--data", action="append", help="plugin:name, or under --protocol its own name of it; repeatable")
    own.addoption("--defense", help="a test-time defence, attacked by transfer and through its adaptive views")
    own.addoption("--protocol", help="a preset, whose published numbers stand beside the measured ones")
    own.addoption("--root", help="the folder that holds the protocol's data sets")
    own.addoption("--n", type=int, help="images, evenly over the classes; all otherwise")
    own.addoption("--eps", action="append", help="radius such as 1/255; repeatable")
    own.addoption("--runs", help="the folder that keeps the runs: a call that was broken off goes on from it")
    own.addoption("--eot", type=int, help="gradient draws a step on what draws; each view's own number otherwise")


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--size"))


@pytest.fixture(scope="session")
def device(size: str) -> str:
    if size == "full" and not torch.cuda.is_available():
        pytest.skip("--size full needs a GPU; --size smoke runs on a CPU")
    return "cuda" if size == "full" else "cpu"


@pytest.fixture
def record(request: pytest.FixtureRequest, size: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """``record(name, figures)``: print the figures, unless quiet, and write ``<name>-<size>.json``."""

    def write(name: str, figures: dict[str, Any], *, quiet: bool = False) -> None:
        given = " ".join(request.config.invocation_params.args) if quiet else f"benchmarks/ --size {size}"
        head = heading(name, f"pytest {given}") | {"size": size}
        folder = Path(str(request.config.getoption("--results")))
        write_json(folder / f"{name}-{size}.json", {**head, "figures": figures})
        with nullcontext() if quiet else capsys.disabled():
            print(f"\n{name} ({size}): {json.dumps(figures, indent=1)}")

    return write
