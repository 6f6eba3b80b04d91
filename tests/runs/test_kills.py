"""Real SIGKILLs, real shards, a file size limit: each run a process of its own, the rows those of an unbroken one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kills


def test_killed_runs_and_shards_leave_the_same_rows(tmp_path: Path) -> None:
    points = ["inside_the_perturbations", "inside_the_transaction"]
    command = [sys.executable, kills.__file__, "--kills", "1", "--results", str(tmp_path / "kills.json")]
    ended = subprocess.run([*command, "--points", *points], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["fine_tunes_identical"] == "1 of 1"
    assert result["identical"] == "1 of 1" and result["identical_at_the_worst_moments"] == "2 of 2"
    for kill in result["worst_kills"]:
        assert kill["units_before"] == 2 and kill["units_after"] == 4  # the unit that was under way, and the rest
    assert result["shards"] == {"shards": 4, "identical": True}
    assert result["full_disk"]["identical"] and "is safe there" in result["full_disk"]["said"]
