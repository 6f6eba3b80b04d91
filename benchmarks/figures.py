"""Any result as Markdown: what the page of figures says of a JSON file for which nobody wrote a table.

A dictionary of dictionaries becomes a table with a row each, as does a list of dictionaries; single values become a
list. Verdicts image by image, hashes and long texts stay in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDEST = 9  # columns beyond which a table no longer fits a page
LONGEST = 80  # characters beyond which a text is no figure


def figure(value: Any) -> str:
    """One value as a cell: whole numbers as they are, others to three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(figure, value)) or "-"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; a column of numbers is aligned right."""
    body = [list(row) for row in rows]
    numeric = [all(row[i][:1] in "-0123456789" for row in body) for i in range(len(head))]
    rule = "|".join("---:" if right else "---" for right in numeric)
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in body), ""]


def is_shown(value: Any) -> bool:
    """Whether a value is a figure, or a short list of them."""
    if isinstance(value, str):
        return 0 < len(value) <= LONGEST and not _is_code(value)
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= 8 and all(not isinstance(v, (dict, list, tuple)) and is_shown(v) for v in value)
    return not isinstance(value, Mapping)


def _is_code(text: str) -> bool:
    """Verdicts such as "0110...", and hashes."""
    return (len(text) > 12 and set(text) <= {"0", "1"}) or (len(text) >= 32 and set(text) <= set("0123456789abcdef"))


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is shown of nested dictionaries, keys joined by commas."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}, {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            found |= flat(value, name)
        elif is_shown(value):
            found[name] = value
    return found


def _groups(named: Mapping[str, Mapping[str, Any]], corner: str) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """(tables, what fits none or is one itself): a table for each set of columns, a row for each dictionary."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    left: dict[str, Mapping[str, Any]] = {}
    for key, value in named.items():
        row = flat(value)
        if len(row) > WIDEST or sum(isinstance(each, Mapping) for each in value.values()) > 1:
            left[key] = value
        else:
            tables.setdefault(tuple(row), []).append([key, *map(figure, row.values())])
    return [line for columns, rows in tables.items() for line in table([corner, *columns], rows)], left


def render(content: Mapping[str, Any], level: int = 3) -> list[str]:
    """Lines of Markdown for a result's content."""
    single = {key: value for key, value in content.items() if not isinstance(value, Mapping) and is_shown(value)}
    lines = [f"- {key}: {figure(value)}" for key, value in single.items()]
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping) and flat(value)}
    rows, wide = _groups(nested, "")
    lines += ["", *rows] if lines else rows
    for key, value in wide.items():
        lines += [f"{'#' * min(level, 6)} {key}", "", *render(value, level + 1)]
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            numbered = {str(i): row for i, row in enumerate(value, 1)}
            lines += [f"{'#' * min(level, 6)} {key}", ""]
            rows, wide = _groups(numbered, "#")
            lines += rows
            for number, row in wide.items():
                lines += [f"{'#' * min(level + 1, 6)} {key} {number}", "", *render(row, level + 2)]
    return lines
