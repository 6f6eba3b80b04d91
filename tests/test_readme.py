"""The README: its scripts run, and its tables say what the committed results say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages import RESULTS, ROOT
from readme_tables import filled, written

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "attacks"), [("art", 2), ("torchattacks", 2)])
def test_script_runs(name: str, attacks: int, digits_cache: Path, tmp_path: Path) -> None:
    match = re.search(rf"<!-- script: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    code = [line for line in match[1].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(code) <= 10
    environment = {**os.environ, "CLIPDEFENSE_CACHE": str(digits_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", match[1]], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^\w+ (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert len(printed) == attacks and all(0 <= float(value) < 0.95 for value in printed), done.stdout


def test_tables_are_the_committed_results() -> None:
    assert filled(README) == README, "run python benchmarks/readme_tables.py"
    assert README.count("95 % Wilson") == 3


@pytest.mark.parametrize("path", sorted(written()), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_made_from_the_results_is_as_committed(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == written()[path], "run python benchmarks/readme_tables.py"


def test_the_page_of_figures_has_every_result_with_its_origin() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in RESULTS.glob("*.json")]
    assert len(names) > 5
    for name in names:
        assert page.count(f"- file: [{name}](results/{name})") == 1
    for what in ("machine", "software", "commit", "date", "command"):
        assert page.count(f"\n- {what}: ") == len(names)


def test_both_commands_are_there() -> None:
    for name in ("demo", "test"):
        block = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert block is not None and len(block[1].strip().splitlines()) == 1
