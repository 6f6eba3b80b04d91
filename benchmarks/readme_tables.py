"""Write all that is published of the committed results: ``python benchmarks/readme_tables.py``.

That is the README's tables and its picture, and the page of figures, as benchmarks/README.md and in the documentation.
Every published figure comes from a JSON file under benchmarks/results/; a test checks that these files say the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import RESULTS, ROOT, page
from picture import picture
from summaries import adaptive_table, attacks_table, evaluations_table, robustness_table

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo", evaluations_table),
    "real_data": ("real_data", evaluations_table),
    "robustness": ("robustness-cpu", robustness_table),
    "adaptive": ("adaptive-cpu", adaptive_table),
    "attacks": ("attacks_verdicts-cpu", attacks_table),
}


def filled(readme: str) -> str:
    """The README with every ``<!-- table: NAME -->`` block made anew from its file under results/."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        file, table = TABLES[name]
        content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {name} -->\n{table(content)}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", block, readme, flags=re.DOTALL)


def written() -> dict[Path, str]:
    """Every file that is made from the results, with what it has to hold."""
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    return {
        readme: filled(readme.read_text(encoding="utf-8")),
        ROOT / "benchmarks" / "README.md": page("[{0}](results/{0})"),
        ROOT / "docs" / "benchmarks.md": page("`benchmarks/results/{0}`"),
        ROOT / "docs" / "assets" / "demo.svg": picture(demo),
    }


def main() -> None:
    for path, content in written().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
