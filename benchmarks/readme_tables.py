"""Write the README's tables from the committed results: ``python benchmarks/readme_tables.py``.

Every published figure comes from a JSON file under benchmarks/results/; a test checks that the README says the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def accuracy(entry: dict[str, Any]) -> str:
    low, high = entry["interval_95"]
    return f"{100 * entry['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def machine_line(content: dict[str, Any]) -> str:
    machine = content["machine"]
    place = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread(s)"
    return f"`{content['command']}`, {content['date']}, commit {content['commit']}, {place}."


def evaluations_table(content: dict[str, Any]) -> str:
    """One block an evaluation: clean, every attack with what was attacked, the worst case."""
    lines = ["| judged | attack | what the attacker had | n | accuracy, % [95 % Wilson] |", "|---|---|---|---:|---:|"]
    for evaluation in content["evaluations"]:
        rows = [("clean", evaluation["clean"])]
        rows += [(row["attack"], row) for row in evaluation["attacks"]]
        rows.append((f"**{evaluation['worst_case']['attack']}**", evaluation["worst_case"]))
        for index, (attack, row) in enumerate(rows):
            seeds = row["verdict_seeds"]
            n = f"{row['n']}" + (f" x {seeds} draws" if seeds > 1 else "")
            title = f"**{evaluation['name']}**" if index == 0 else ""
            lines.append(f"| {title} | {attack} | {row['attacked']} | {n} | {accuracy(row)} |")
    return "\n".join([*lines, "", machine_line(content)])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo": evaluations_table, "real_data": evaluations_table}


def filled(readme: str) -> str:
    """The README with every ``<!-- table: NAME -->`` block made anew from ``results/NAME.json``."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {name} -->\n{TABLES[name](content)}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", block, readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
