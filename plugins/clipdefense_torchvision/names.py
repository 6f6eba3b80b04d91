"""Class names as prompts want them: versioned tables in ``names/``, a file a data set, and the rules they apply.

A table has styles: ``plain`` is this library's own; ``tecoa`` (TeCoA, PMG-AFT, TGA-ZSR) and ``ttc`` follow what was
published. A style is a list of rules, or names one by one, or both: the names first, then the rules on the others.
Whatever a data set has as its own names comes from its own files; no table holds a list that these files hold.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clipdefense.data.protocols import sha256_of
from clipdefense.errors import UsageError, unknown_name

TABLES = Path(__file__).parent / "names"
DEFAULT_STYLE = "plain"

RULES: Mapping[str, Callable[[str], str]] = {
    "lower": str.lower,
    "underscores": lambda name: name.replace("_", " "),  # aquarium_fish -> aquarium fish
    "hyphens": lambda name: name.replace("-", " "),  # t-shirt -> t shirt
    "separators": lambda name: re.sub("[-_/]", " ", name),  # a/b_c-d -> a b c d
    "slashes": lambda name: name.replace("/", " "),  # apartment_building/outdoor
    "first synonym": lambda name: name.partition(",")[0].strip(),  # goldfish, Carassius auratus -> goldfish
    "no number before": lambda name: re.sub(r"^\d+\.", "", name),  # 001.ak47 -> ak47
    "no 101 behind": lambda name: name.removesuffix("-101"),  # airplanes-101 -> airplanes
    "no year behind": lambda name: re.sub(r" \d{4}$", "", name),  # Acura TL Sedan 2012 -> Acura TL Sedan
    "boeing": lambda name: f"Boeing {name}" if name.startswith("7") else name,  # 747-400 -> Boeing 747-400
    "no question mark": lambda name: name.rstrip("?"),  # pink-yellow dahlia?
}


@dataclass(frozen=True)
class Style:
    """One way to write a data set's class names.

    Attributes:
        names: the data set's own name -> the name.
        rules: keys of :data:`RULES`, applied in order to the names that are not in ``names``.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()

    def write(self, own: Sequence[str]) -> list[str]:
        """Names for prompts; where the rules make two alike, each of these keeps the data set's own name."""
        written = [self.names.get(name) or self._cleaned(name) for name in own]
        count = Counter(written)
        return [new if count[new] == 1 else old for new, old in zip(written, own)]

    def _cleaned(self, name: str) -> str:
        for rule in self.rules:
            name = RULES[rule](name)
        return name


@dataclass(frozen=True)
class Table:
    """The content of a file in ``names/``.

    Attributes:
        dataset: its key.
        version: goes up whenever any name changes.
        source: where names and rules come from.
        styles: by name.
        sha256: of the content.
    """

    dataset: str
    version: int
    source: str
    styles: Mapping[str, Style]
    sha256: str

    def style(self, wanted: str | None) -> tuple[str, Style]:
        """A style by ``"name"`` or ``"name/version"``.

        Raises:
            UsageError: no such style, or another version.
        """
        name, slash, version = (wanted or DEFAULT_STYLE).partition("/")
        if name not in self.styles:
            raise unknown_name(f"style of the class names of {self.dataset}", name, self.styles)
        if slash and version != str(self.version):
            raise UsageError(
                f"names is {wanted!r}, but the class names of {self.dataset} are of version {self.version} here; "
                "install the clipdefense that the protocol was written for."
            )
        return f"{name}/{self.version}", self.styles[name]

    def write(self, own: Sequence[str], wanted: str | None) -> tuple[list[str], dict[str, Any]]:
        """The data set's own names in a style, and what a result should say of it."""
        label, style = self.style(wanted)
        return style.write(own), {"names": label, "names_sha256": self.sha256}


@cache
def table(dataset: str) -> Table:
    """The table of a data set."""
    content = json.loads((TABLES / f"{dataset}.json").read_text(encoding="utf-8"))
    shared = content.get("names", {})
    styles = {
        name: Style({**shared, **style.get("names", {})}, tuple(style.get("rules", ())))
        for name, style in content["styles"].items()
    }
    return Table(dataset, content["version"], content["source"], styles, sha256_of(content))
