"""What an evaluation is given: each object where it belongs."""

from __future__ import annotations

from typing import Any

from clipdefense.attacks.context import check_target
from clipdefense.defenses import TestTimeDefense
from clipdefense.errors import UsageError, check_whole


def check_roles(model: Any, threat: Any, defense: Any, views: Any, eot: Any) -> None:
    """Each object is where it belongs, and what only a defence has is asked of a defence only."""
    check_target(model, threat)
    if defense is not None and not isinstance(defense, TestTimeDefense):
        got = defense.__name__ if isinstance(defense, type) else repr(defense)
        raise UsageError(f"defense is {got}; an object is expected, such as get_defense('NAME')(model).")
    if defense is None and not callable(getattr(model, "adaptive", None)):
        for name, value in (("views", views), ("eot", eot)):
            if value is not None:
                raise UsageError(f"{name} is {value!r}, but no defence is judged, and it is for adaptive views only.")


def check_counts(**counts: Any) -> None:
    """Each is a whole number of at least 1."""
    for name, value in counts.items():
        check_whole(name, value, 1)
