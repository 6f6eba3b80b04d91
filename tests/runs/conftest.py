"""A tiny model and images on disk, and runs over them that take a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdefense.runs.config import RunConfig, read_config
from kills import make_files


@pytest.fixture(scope="session")
def specs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model spec, dataset spec): 3 classes, 40 images at 16 px of which every tenth is wrong from the start."""
    return make_files(tmp_path_factory.mktemp("files"), 40)


@pytest.fixture
def tables(specs: tuple[str, str]) -> dict[str, Any]:
    """The tables of a run of one cell in three work units."""
    return {
        "models": [{"spec": specs[0], "name": "tiny"}],
        "datasets": [{"spec": specs[1], "name": "images"}],
        "threats": [{"eps": "4/255", "steps": 3}],
        "attacks": ["pgd"],
        "unit": 16,
        "batch_size": 8,
    }


@pytest.fixture
def make_config(tables: dict[str, Any]) -> Callable[..., RunConfig]:
    """``make_config(attacks=[...], ...)``: those tables with changes, checked."""
    return lambda **changes: read_config({**tables, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
