"""Run ``clipdefense demo`` and keep its results for the README: ``python benchmarks/demo.py``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from clipdefense.files import write_json
from clipdefense_demo.run import run
from common import heading


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), quiet=True)
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    write_json(Path("benchmarks/results/demo.json"), results | heading("demo", "clipdefense demo"))


if __name__ == "__main__":
    main()
