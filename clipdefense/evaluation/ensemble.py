"""What an attack's name says that it ran: the parts of AutoAttack, and whether it ran as it was published."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clipdefense.attacks.autoattack import VERSIONS, Stages, stages_of
from clipdefense.errors import UsageError

STANDARD: tuple[str, ...] = tuple(name for name, _, _ in VERSIONS["standard"])
"""The attacks of AutoAttack's standard version."""

AFTER = "+ "
"""How a row is marked that counts what the attacks above it left standing."""

_HARMLESS = {"version", "seed", "batch_size", "compile"}
_OPTION = re.compile(r"(?:^|,)(\w+)=(\{.*\}|[^,]*)")  # an option may be a mapping, which has commas of its own


def parts(attack: str) -> frozenset[str]:
    """The attacks that one runs, by their names in this library.

    Args:
        attack: as a row has it, such as ``"+ autoattack,version=rand"``; ``"plugin:Name"`` counts as its name.

    Returns:
        Of AutoAttack its stages, without those whose budget ``stages=`` sets to 0; of another attack itself.
    """
    name, options = _read(attack)
    if name == "squareattack":
        return frozenset({"square"})
    if name != "autoattack":
        return frozenset({name})
    stages = _stages(options)
    own = stages if isinstance(stages, Mapping) else {}
    with contextlib.suppress(UsageError):  # what it does not know is not known to have run
        known = stages_of(options.get("version", "standard"), stages)
        return frozenset(stage for stage, _, _ in known if _works(own.get(stage, {})))
    return frozenset()


def is_autoattack(attack: str) -> bool:
    """Whether the ensemble itself ran, in whichever version."""
    return _read(attack)[0] == "autoattack"


def as_published(attack: str) -> str:
    """Why AutoAttack is not the standard one at its published budgets; empty where it is."""
    _, options = _read(attack)
    version = options.get("version", "standard")
    if version != "standard":
        return (
            f"it ran as version {version!r}, without {listed([name for name in STANDARD if name not in parts(attack)])}"
        )
    own = [key for key in options if key not in _HARMLESS]
    return f"it ran with {', '.join(own)} of its own" if own else ""


def _read(attack: str) -> tuple[str, dict[str, str]]:
    name, _, options = attack.removeprefix(AFTER).partition(",")
    return name.rpartition(":")[2].strip().lower(), dict(_OPTION.findall(options))


def _stages(options: Mapping[str, str]) -> Stages:
    """What ``stages=`` says: names joined by +, or a mapping."""
    text = options.get("stages")
    if text is None or not text.startswith("{"):
        return text
    with contextlib.suppress(ValueError, SyntaxError):
        found = ast.literal_eval(text)
        if isinstance(found, Mapping):
            return found
    return text


def _works(options: Mapping[str, Any]) -> bool:
    return all(options.get(key) != 0 for key in ("steps", "queries", "targets"))


def listed(names: Sequence[str]) -> str:
    """``"apgd-t, fab-t and square"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
