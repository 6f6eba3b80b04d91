"""What stands between this library's attacks and another's: names, options, seeds, and an honest budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.context import attack_mode, gradients_kept, predict
from clipdefense.attacks.doubts import Doubts
from clipdefense.attacks.norms import per_image
from clipdefense.checks import check_labels
from clipdefense.errors import UsageError, check_options
from clipdefense.generators import global_seed
from clipdefense.plugins import get_attack
from clipdefense.threat import Norm, ThreatModel


@contextmanager
def lent(model: nn.Module, seed: int) -> Iterator[None]:
    """The model as attacks need it and the global generators seeded; modes, gradients and generators then restored."""
    with gradients_kept(model):
        for weight in model.parameters():
            weight.grad = None  # taken away, since an attack may zero them in place
        with attack_mode(model), global_seed(seed):
            yield


def constructor_options(attack: type, *positional: str) -> set[str]:
    """Names of the options that a class's constructor takes, without what it attacks."""
    return set(inspect.signature(attack).parameters) - {"args", "kwargs", *positional}


def check_norm(name: str, threat: ThreatModel, fixed: Norm | None, instead: Mapping[Norm, str]) -> None:
    """Require that an attack which knows one norm only is given that one.

    Args:
        name: the attack's.
        threat: the budget.
        fixed: the attack's norm; None for an attack that takes either.
        instead: an attack of each norm, to advise.
    """
    if fixed is not None and fixed != threat.norm:
        raise UsageError(
            f"attack {name!r} works in {fixed}, but the threat model's norm is {threat.norm}; "
            f"use {instead[threat.norm]!r}."
        )


def native_attack(name: str, options: Mapping[str, Any]) -> tuple[Callable[..., Tensor], set[str]]:
    """The attack registered as ``name``, options checked, and the names of the keyword arguments it declares.

    Raises:
        UsageError: an unknown attack, or an option it does not have.
    """
    attack = get_attack(name)
    check_options(attack, options, f"option of attack {name!r}", given=4)
    parameters = inspect.signature(attack).parameters.values()
    return attack, {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def prepare(model: nn.Module, x: Tensor, y: Tensor, seed: int, ids: Tensor | None) -> tuple[Tensor, int]:
    """Check an attack's arguments; returns int64 labels on x's device and the number of classes.

    Raises:
        UsageError: images, labels or ids that cannot be used.
    """
    engine.prepare(model, x, y, seed, None, ids)
    names, doubts = getattr(model, "class_names", None), Doubts()
    doubts.of_model(model)
    if names is None:
        doubts.of_outputs(logits := predict(model, x[:1]))
    classes = logits.shape[1] if names is None else len(names)
    check_labels(y, len(x), classes=classes)
    doubts.tell()
    return y.to(x.device, torch.int64), classes


def within_budget(threat: ThreatModel, x: Tensor, x_adv: Tensor) -> Tensor:
    """(N,) which adversarial images lie in the ball, up to 1e-5, and in [0, 1], up to 1e-6; NaN never does."""
    delta = (x_adv.double() - x.double()).flatten(1)
    distance = delta.abs().amax(dim=1) if threat.norm == "linf" else delta.norm(dim=1)
    overshoot = (x_adv.double() - 0.5).abs().flatten(1).amax(dim=1) - 0.5
    return (distance <= threat.eps + 1e-5) & (overshoot <= 1e-6)


def clean_unless_within(threat: ThreatModel, x: Tensor, x_adv: Tensor) -> Tensor:
    """The adversarial images, each that breaks the budget replaced by the clean one: it must not count as broken."""
    return torch.where(per_image(within_budget(threat, x, x_adv), x), x_adv, x)
