"""Published robust checkpoints by name: ``open_clip:ViT-L-14-quickgelu@fare2``, as in ``published.json``.

A name stands for a repository on the Hugging Face hub and the one architecture with the right activation. The
architecture is open_clip's own, not the repository's configuration, which does not say QuickGELU where it should.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clipdefense.errors import UsageError
from clipdefense_openclip.activation import SUFFIX, Evidence

TABLE = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class Published:
    """One checkpoint.

    Attributes:
        name: e.g. ``"fare2"``.
        architecture: the open_clip architecture that it needs.
        quick_gelu: its activation.
        hub: ``org/name``.
        origin: what it was fine-tuned from.
        method: how.
        eps: radius of its training, such as ``"2/255"``.
        checked: the repository was seen on the hub under this name.
        data: what it was fine-tuned on.
        source: where its numbers are reported: an arXiv number, and where in it.
    """

    name: str
    architecture: str
    quick_gelu: bool
    hub: str
    origin: str
    method: str
    eps: str
    checked: bool
    data: str
    source: str

    @property
    def evidence(self) -> Evidence:
        """What is known of its activation."""
        kind = "QuickGELU" if self.quick_gelu else "plain GELU"
        spec = f"open_clip:{self.architecture}@{self.name}"
        why = f"{self.method} from {self.origin}'s weights was trained with {kind}, and {spec} loads it"
        return Evidence(self.quick_gelu, why)


@cache
def published() -> dict[str, Published]:
    """The table, by name."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))["checkpoints"]
    return {name: Published(name, origin=entry.pop("from"), **entry) for name, entry in entries.items()}


def published_for(architecture: str) -> list[str]:
    """Names of the checkpoints that this architecture, or its twin with the other activation, can be meant for."""
    base = architecture.removesuffix(SUFFIX)
    return [name for name, entry in published().items() if entry.architecture.removesuffix(SUFFIX) == base]


def published_at(hub: str) -> Published | None:
    """The checkpoint that a repository on the hub holds, if it is in the table."""
    return next((entry for entry in published().values() if entry.hub.lower() == hub.lower()), None)


def find_published(architecture: str, name: str) -> Published | None:
    """The checkpoint of that name; None where it is no published name.

    Raises:
        UsageError: it is one, but of another architecture (the wrong activation is found by the loader's check).
    """
    entry = published().get(name)
    if entry is not None and name not in published_for(architecture):
        raise UsageError(
            f"{name} is a {entry.architecture}, not a {architecture}; load it as open_clip:{entry.architecture}@{name}."
        )
    return entry
