"""ART's evasion attacks by name here, and the native attacks as an ART class there.

Their attacks run wherever an attack is named, on any module with logits::

    clipdefense.attacks.run("art:ProjectedGradientDescentPyTorch", model, x, y, threat)

The native ones run wherever ART takes an ``EvasionAttack`` (see :class:`clipdefense_art.native.NativeAttack`)::

    from clipdefense_art import NativeAttack

    x_adv = NativeAttack(classifier, "apgd-ce", threat=ThreatModel("linf", eps=4 / 255)).generate(x, y)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from clipdefense_art.native import NativeAttack as NativeAttack

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_attacks(register: Any) -> None:
    register("art:", "clipdefense_art.bridge:load", summary="any evasion attack class of ART, as art:ClassName")


def __getattr__(name: str) -> Any:
    if name == "NativeAttack":
        return importlib.import_module("clipdefense_art.native").NativeAttack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
