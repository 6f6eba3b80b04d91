"""Attacks: pure functions ``attack(model, x, y, threat, *, seed=0, ids=None, ...) -> x_adv`` on modules with logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipdefense.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from clipdefense.attacks.autoattack import autoattack
from clipdefense.attacks.context import check_target, predict
from clipdefense.attacks.doubts import AttackWarning
from clipdefense.attacks.fab import fab_t
from clipdefense.attacks.objectives import cross_entropy, margin
from clipdefense.attacks.options import Options, Status, progress_bar
from clipdefense.attacks.pgd import pgd
from clipdefense.attacks.square import square
from clipdefense.errors import check_options
from clipdefense.plugins import get_attack
from clipdefense.threat import ThreatModel

__all__ = [
    "AttackWarning",
    "Options",
    "Status",
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "autoattack",
    "cross_entropy",
    "fab_t",
    "margin",
    "pgd",
    "predict",
    "progress_bar",
    "run",
    "square",
]


def run(name: str, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, **options: Any) -> Tensor:
    """Run an attack by name: ``"pgd"``, ``"apgd-ce"``, ``"art:DeepFool"``, ``"torchattacks:PGD"``, a plugin's.

    Args:
        name: as `clipdefense plugins` lists it.
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1]; y: (N,) integer labels.
        threat: the attacker's budget.
        options: keyword arguments of the attack (``seed``, ``ids``, ``batch_size``, ``objective``, ...).

    Returns:
        (N, C, H, W) adversarial images.

    Raises:
        UsageError: an unknown attack or option, or bad images or labels.
    """
    check_target(model, threat)
    attack = get_attack(name)
    check_options(attack, options, f"option of attack {name!r}", given=4)
    return attack(model, x, y, threat, **options)
