"""Options and fixtures of the benchmarks: ``pytest benchmarks/ --size smoke|cpu|full``.

Each benchmark prints its figures and writes one JSON file with machine, versions and commit. Nothing here asserts a
time; counts of passes are asserted, because they do not depend on the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
    """``record(name, figures)``: print the figures and write ``<name>-<size>.json``."""

    def write(name: str, figures: dict[str, Any]) -> None:
        head = heading(name, f"pytest benchmarks/ --size {size}") | {"size": size}
        folder = Path(str(request.config.getoption("--results")))
        write_json(folder / f"{name}-{size}.json", {**head, "figures": figures})
        with capsys.disabled():
            print(f"\n{name} ({size}): {json.dumps(figures, indent=1)}")

    return write
