"""torchattacks' attacks by name here, and the native attacks as a torchattacks class there.

Their attacks run wherever an attack is named, on any module with logits::

    clipdefense.attacks.run("torchattacks:PGD", model, x, y, threat)

The native ones are called as torchattacks' are (see :class:`clipdefense_torchattacks.native.NativeAttack`)::

    from clipdefense_torchattacks import NativeAttack

    adv_images = NativeAttack(model, "apgd-ce", eps=4 / 255)(images, labels)

torchattacks is optional: ``pip install 'clipdefense[torchattacks]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from clipdefense_torchattacks.native import NativeAttack as NativeAttack

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_attacks(register: Any) -> None:
    register(
        "torchattacks:",
        "clipdefense_torchattacks.bridge:load",
        summary="any attack class of torchattacks, as torchattacks:ClassName",
        requires=("torchattacks",),
        install="clipdefense[torchattacks]",
    )


def __getattr__(name: str) -> Any:
    if name == "NativeAttack":
        return importlib.import_module("clipdefense_torchattacks.native").NativeAttack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
