"""What an attack's name says that it ran: the parts of AutoAttack, and whether it ran as it was published."""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clipdefense.attacks.autoattack import VERSIONS, Stages, stages_of
from clipdefense.errors import UsageError
from clipdefense.plugins import get_attack

STANDARD: tuple[str, ...] = tuple(name for name, _, _ in VERSIONS["standard"])
"""The attacks of AutoAttack's standard version."""

AFTER = "+ "
"""How a row is marked that counts what the attacks above it left standing."""

_HARMLESS = {"version", "seed", "batch_size", "compile"}
_OPTION = re.compile(r"(?:^|,)(\w+)=(\{.*\}|[^,]*)")  # an option may be a mapping, which has commas of its own
_EFFORT = ("steps", "targets", "restarts", "queries")

Effort = Mapping[str, int]
"""``{"steps": 100, "targets": 9}``: how much an attack does, by the names of its options."""


def _effort(settings: Mapping[str, Any]) -> dict[str, int]:
    return {key: settings[key] for key in _EFFORT if isinstance(settings.get(key), int)}


_PUBLISHED = {name: _effort(settings) for stages in VERSIONS.values() for name, _, settings in stages}


def ran(attack: str) -> dict[str, Effort]:
    """The attacks that one runs, by their names in this library, each with the effort that it was given.

    Args:
        attack: as a row has it, such as ``"+ autoattack,version=rand"``. Of a plugin's, such as ``"plugin:Name"``,
            the plugin says what it runs: its attack function has an attribute ``ran``, a function from the options as
            written (text by name) to what this one returns. What calls itself AutoAttack may be made of anything.

    Returns:
        Of AutoAttack its stages, without those whose budget ``stages=`` sets to 0; of another attack, and of a
        plugin's that does not say, itself. The effort is empty where it is not known, or no stage's of AutoAttack.
    """
    family, name, options = _read(attack)
    if family:
        found = _told(attack.removeprefix(AFTER).partition(",")[0].strip(), options)
        found = {"square" if name == "squareattack" else name: {}} if found is None else found
    elif name == "autoattack":
        found = _autoattack(options)
    else:
        found = {name: _given(_PUBLISHED.get(name, {}), options)}
    return {stage: effort for stage, effort in found.items() if 0 not in effort.values()}


def parts(attack: str) -> frozenset[str]:
    """The names alone of what :func:`ran` finds."""
    return frozenset(ran(attack))


def shortfall(stage: str, effort: Effort) -> str:
    """What a stage's effort lacks of the published one: ``"2 of 100 steps"``; empty where it lacks nothing.

    Args:
        stage: of one of AutoAttack's versions.
        effort: from :func:`ran`.
    """
    published = _PUBLISHED[stage]
    if not set(published) <= set(effort):
        return f"a number of {listed(list(published))} that is not known"
    return listed([f"{effort[key]} of {full} {key}" for key, full in published.items() if effort[key] < full])


def share(stage: str, effort: Effort) -> float:
    """How much of a stage's published effort was made, from 0 (also where it is not known) to 1."""
    return math.prod(min(1.0, effort.get(key, 0) / full) for key, full in _PUBLISHED[stage].items())


def is_autoattack(attack: str) -> bool:
    """Whether the ensemble itself ran, in whichever version."""
    return _read(attack)[1] == "autoattack"


def as_published(attack: str) -> str:
    """Why AutoAttack is not the standard one at its published budgets; empty where it is."""
    _, _, options = _read(attack)
    version = options.get("version", "standard")
    if version != "standard":
        return (
            f"it ran as version {version!r}, without {listed([name for name in STANDARD if name not in parts(attack)])}"
        )
    own = [key for key in options if key not in _HARMLESS]
    return f"it ran with {', '.join(own)} of its own" if own else ""


def _read(attack: str) -> tuple[str, str, dict[str, str]]:
    """The plugin's name (empty for this library's own attacks), the attack's in lower case, and its options."""
    name, _, options = attack.removeprefix(AFTER).partition(",")
    family, _, own = name.rpartition(":")
    return family.strip(), own.strip().lower(), dict(_OPTION.findall(options))


def _told(name: str, options: Mapping[str, str]) -> dict[str, Effort] | None:
    """What a plugin says that its attack runs; None where it says nothing, or is not installed here."""
    with contextlib.suppress(UsageError):
        tell = getattr(get_attack(name), "ran", None)
        return None if tell is None else dict(tell(options))
    return None


def _autoattack(options: Mapping[str, str]) -> dict[str, Effort]:
    """The stages of the ensemble with what each was given."""
    stages = _stages(options)
    own = stages if isinstance(stages, Mapping) else {}
    with contextlib.suppress(UsageError):  # what it does not know is not known to have run
        known = stages_of(options.get("version", "standard"), stages)
        return {
            name: _effort({**_given(_effort(settings), options), **own.get(name, {})}) for name, _, settings in known
        }
    return {}


def _given(usual: Effort, options: Mapping[str, str]) -> dict[str, int]:
    """The usual effort, with what the options say of it."""
    said = {key: int(options[key]) for key in usual if options.get(key, "").isdecimal()}
    return {**usual, **said}


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


def listed(names: Sequence[str]) -> str:
    """``"apgd-t, fab-t and square"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
