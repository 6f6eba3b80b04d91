"""torchattacks' attacks under the signature of the native ones."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from clipdefense.attacks import foreign
from clipdefense.attacks.options import checks_at_zero
from clipdefense.errors import UsageError, check_known, unknown_name
from clipdefense.threat import Norm, ThreatModel

_L2 = ("PGDL2", "PGDRSL2")
_PARAMETER_FREE = ("APGD", "APGDT", "FAB")
_INSTEAD: dict[Norm, str] = {"linf": "torchattacks:PGD", "l2": "torchattacks:PGDL2"}
_NORMS = {"linf": "Linf", "l2": "L2"}


def load(name: str) -> Callable[..., Tensor]:
    """The attack function that ``torchattacks:NAME`` stands for: :func:`run` on that class.

    Raises:
        UsageError: an unknown name (the nearest are shown), or a class that wraps other attacks.
    """
    if name in torchattacks.__wrapper__:
        raise UsageError(f"'torchattacks:{name}' wraps other attacks and is no attack by itself; name those instead.")
    if name not in torchattacks.__all__:
        raise unknown_name("torchattacks attack", name, set(torchattacks.__all__) - set(torchattacks.__wrapper__))
    function = functools.partial(run, getattr(torchattacks, name))
    if name in _RUNS:
        function.ran = _RUNS[name]  # type: ignore[attr-defined]
    return function


_STAGES = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def _autoattack_ran(options: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """What torchattacks makes its AutoAttack of, with the steps that :func:`run` gives it, towards every class."""
    steps, stages = {"steps": int(options.get("steps", "100"))}, _STAGES.get(options.get("version", "standard"), ())
    more: dict[str, dict[str, int]] = {"apgd-t": {"targets": 9}, "fab-t": {"targets": 9}}
    return {name: {"queries": 5000} if name == "square" else steps | more.get(name, {}) for name in stages}


def _square_ran(options: Mapping[str, str]) -> dict[str, dict[str, int]]:
    usual = inspect.signature(torchattacks.Square).parameters["n_queries"].default
    return {"square": {"queries": int(options.get("n_queries", usual))}}


_RUNS = {"AutoAttack": _autoattack_ran, "Square": _square_ran}
"""What is counted as this library's own attacks, see :func:`clipdefense.evaluation.ensemble.ran`."""


@checks_at_zero
def run(
    attack: type,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int = 128,
    keep_outside: bool = False,
    **options: Any,
) -> Tensor:
    """Run a torchattacks class, with the threat model put into the parameters that the class has.

    ``eps``, ``norm`` and ``restarts`` come from the threat model. Attacks with a fixed step (PGD, BIM, MIFGSM, ...)
    take its ``steps`` and step size too. APGD, APGDT, FAB, and AutoAttack, which is made of them, run the published
    100 steps instead of torchattacks' 10 (``steps=`` overrides), on all of the model's classes; the others keep
    torchattacks' own numbers. Every attack is untargeted.

    Args:
        attack: a class of ``torchattacks``.
        model: images in [0, 1] -> logits; one without parameters is fine.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: the attacker's budget.
        seed: of Python's, NumPy's and torch's global generators while torchattacks draws from them, and of classes
            that take one; the generators are restored.
        ids: checked, and of no effect: torchattacks' draws depend on the order of the images.
        batch_size: images a call.
        keep_outside: return what torchattacks returned also where it lies outside of the budget. CW, DeepFool,
            SparseFool, JSMA, OnePixel, Pixle, EADL1, EADEN and GN have no eps: unless it is True, an image that they
            moved further than the threat model allows comes back clean, so that it does not count as broken.
        options: parameters of the class, which override the ones above.

    Returns:
        (N, C, H, W) adversarial images, detached, on x's device and in its dtype.

    Raises:
        UsageError: bad images, labels or options, or a norm or number of classes the attack cannot work with.
    """
    name = f"torchattacks:{attack.__name__}"
    settings, steps = _settings(name, attack, threat, seed, options)
    y, classes = foreign.prepare(model, x, y, seed, ids)
    _check_classes(name, classes, settings)
    if threat.eps == 0:  # what torchattacks would refuse is to be told all the same
        with foreign.lent(model, seed):
            tried, steps = _settings(name, attack, replace(threat, eps=1 / 255), seed, options)
            make(attack, model, x.device, tried | {"n_classes": classes}, steps)
        return x.detach().clone()
    with foreign.lent(model, seed):
        made = make(attack, model, x.device, settings | {"n_classes": classes}, steps)
        pairs = zip(x.detach().split(batch_size), y.split(batch_size))
        x_adv = torch.cat([made(images, labels).detach() for images, labels in pairs])
    x_adv = x_adv.to(x.device, x.dtype)
    return x_adv if keep_outside else foreign.clean_unless_within(threat, x.detach(), x_adv)


def make(
    attack: type, model: nn.Module, device: torch.device, settings: dict[str, Any], steps: int | None = None
) -> torchattacks.attack.Attack:
    """The torchattacks object.

    Args:
        attack: its class.
        model: to attack.
        device: of the images; torchattacks cannot find it for a model without parameters.
        settings: constructor arguments; those that the class does not have are dropped.
        steps: of AutoAttack's parts, which its constructor cannot set; None for other classes.

    Raises:
        UsageError: a value that torchattacks refuses.
    """
    known = foreign.constructor_options(attack, "model")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when a model has no parameters
            made = attack(model, **{key: value for key, value in settings.items() if key in known})
    except (TypeError, ValueError) as error:
        raise UsageError(f"'torchattacks:{attack.__name__}' refuses its options: {error}") from error
    made.set_device(device)
    if steps is not None:
        for part in made._autoattack.attacks:
            if hasattr(part, "steps"):
                part.steps = steps
    return made


def _settings(
    name: str, attack: type, threat: ThreatModel, seed: int, options: dict[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """Constructor arguments, and the steps of AutoAttack's parts (None for other classes)."""
    known = foreign.constructor_options(attack, "model")
    ensemble = attack is torchattacks.AutoAttack
    check_known(f"option of attack {name!r}", options, known | {"steps"} if ensemble else known)
    if "norm" not in known and known & {"eps", "max_epsilon"}:
        foreign.check_norm(name, threat, "l2" if attack.__name__ in _L2 else "linf", _INSTEAD)
    settings: dict[str, Any] = {"eps": threat.eps, "max_epsilon": threat.eps, "norm": _NORMS[threat.norm]}
    settings |= {"seed": seed, "n_restarts": threat.restarts}
    if {"alpha", "steps"} <= known:
        settings |= {"alpha": threat.alpha, "steps": threat.steps}
    elif attack.__name__ in _PARAMETER_FREE:
        settings["steps"] = 100
    return {key: value for key, value in settings.items() if key in known} | options, (
        options.get("steps", 100) if ensemble else None
    )


def _check_classes(name: str, classes: int, settings: dict[str, Any]) -> None:
    """torchattacks indexes past the last class where there are too few."""
    least = 2
    if name == "torchattacks:APGDT" or (name == "torchattacks:AutoAttack" and settings.get("version") != "rand"):
        least = 4
    elif name == "torchattacks:AutoAttack" or settings.get("loss") == "dlr":
        least = 3
    if classes < least:
        raise UsageError(
            f"{name!r} needs {least} classes with these options, and the model has {classes}; torchattacks:APGD with "
            "loss='ce', torchattacks:FAB and apgd-ce work on any number."
        )
