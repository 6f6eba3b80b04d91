"""The errors a user can cause, each one clear sentence; everything else that is raised is a bug."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any


class UsageError(ValueError):
    """Something the caller gave cannot be used; the message says what was got, what is expected, what to do."""


class MissingPackageError(UsageError, ImportError):
    """An optional package is not installed; the message names the ``pip install`` that brings it."""


def unknown_name(argument: str, got: str, known: Iterable[str], advice: str = "") -> UsageError:
    """The error for a name that is in no list, with the nearest names that are.

    Args:
        argument: what the name stands for, e.g. ``"attack"``.
        got: the name as given.
        known: every name that would have been accepted.
        advice: a closing sentence, e.g. where the full list is shown.
    """
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    near = [folded[key] for key in difflib.get_close_matches(got.lower(), folded, n=3, cutoff=0.5)]
    near += [name for name in names if got and name.lower().startswith(got.lower()) and name not in near][:3]
    if near:
        hint = "did you mean " + " or ".join(map(repr, near)) + "?"
    elif names:
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        hint = f"known: {shown}."
    else:
        hint = "none is registered."
    return UsageError(f"{argument} {got!r} is unknown; {hint}{' ' + advice if advice else ''}")


def check_known(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    """Require each name to be one of those that are known; arguments as :func:`unknown_name`."""
    for name in names:
        if name not in known:
            raise unknown_name(argument, name, known)


def check_options(function: Callable[..., Any], options: Iterable[str], argument: str, given: int = 0) -> None:
    """Require each option to be a keyword that the function has; one with ``**keywords`` looks after its own.

    Args:
        function: what gets the options.
        options: their names.
        argument: what an option is, for the message, e.g. ``"option of model 'timm'"``.
        given: how many of the function's first parameters are given by position, and so are no options.
    """
    parameters = list(inspect.signature(function).parameters.values())[given:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    check_known(argument, options, [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)])


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Require a whole number, of at least ``least`` where that is given; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise UsageError(f"{name} is {value!r}; a whole number{bound} is expected.")


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Require a finite number in [low, high], without an end that is open."""
    outside = not is_number(value) or value < low or value > high
    if outside or (open_low and value == low) or (open_high and value == high):
        least = f"{'above' if open_low else 'of at least'} {low:g}"
        most = "" if math.isinf(high) else f" and {'below' if open_high else 'at most'} {high:g}"
        raise UsageError(f"{name} is {value!r}; a number {least}{most} is expected.")
