"""The examples: both scripts run at smoke size, and the plugin template is installed for real and keeps its tests."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import clipdefense as cd
from clipdefense.runs.results import read

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TEMPLATE = EXAMPLES / "plugin-template"


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_a_pipeline_of_art_takes_each_classifier(
    digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(digits_cache))
    small = ("--n", "16", "--steps", "3", "--train", "100", "--epochs", "1")
    run("art_pipeline.py", *small, monkeypatch=monkeypatch)
    lines = re.findall(r"^(as it is|with TTC|after TeCoA) +(\{.*\})$", capsys.readouterr().out, re.MULTILINE)
    found = {name: ast.literal_eval(text) for name, text in lines}
    assert list(found) == ["as it is", "with TTC", "after TeCoA"]
    plain, defended = found["as it is"], found["with TTC"]
    assert plain["clean"] > 0.9 and plain["PGD"] < plain["clean"]
    assert defended["PGD"] > plain["PGD"]  # ART's gradient through TTC is a weak guide


def test_a_row_of_a_table_is_the_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("paper_row.py", "--smoke", "--defense", "random-noise", "--n", "3", "--run", "row", monkeypatch=monkeypatch)
    result = read(tmp_path / "row")
    protocol = cd.data.get_protocol("ttc-224")
    assert result.config.protocol == "ttc-224"
    undefended, defended = (cell.evaluation for cell in result.cells)
    assert undefended.n == 3 and undefended.threat.eps == pytest.approx(1 / 255)
    names = [attack.partition(",")[0] for attack in protocol.attacks]
    assert [row.attack.partition(",")[0] for row in undefended.rows] == names
    attacked = ["transfer from the undefended model", "adaptive view eot"]
    assert [row.attacked.partition(",")[0] for row in defended.rows] == [what for what in attacked for _ in names]


def test_the_template_is_installed_and_its_own_tests_pass(tmp_path: Path) -> None:
    copy, target = tmp_path / "copy", tmp_path / "site"
    shutil.copytree(TEMPLATE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(copy)], check=True, timeout=300)
    shutil.rmtree(copy / "clipdefense_smoothing")  # what the tests find is what was installed
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("CLIPDEFENSE_", "PYTEST_"))}
    path = os.pathsep.join([str(target), *filter(None, [inherited.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy), "tests"],
        env={**inherited, "PYTHONPATH": path},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    wanted = (TEMPLATE / "tests" / "test_smoothing.py").read_text(encoding="utf-8").count("\ndef test_")
    assert f"{wanted} passed" in done.stdout


def test_the_template_asks_for_what_it_says() -> None:
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dependencies"] == ["clipdefense"]
    assert project["project"]["entry-points"]["clipdefense"] == {"smoothing": "clipdefense_smoothing"}
    hooks = ast.parse((TEMPLATE / "clipdefense_smoothing" / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(hooks) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"pluggy"} and not any(isinstance(node, ast.ImportFrom) for node in ast.walk(hooks))
