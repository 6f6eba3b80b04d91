"""ART's evasion attacks under the signature of the native ones."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import art.attacks.evasion as evasion
import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense.attacks import foreign
from clipdefense.attacks.options import checks_at_zero
from clipdefense.errors import MissingPackageError, UsageError, check_known, unknown_name
from clipdefense.threat import Norm, ThreatModel

_PATCH = "it trains one patch for all images and returns (patch, mask)"
_PROBABILITIES = "it reads probabilities, and a CLIP model gives logits; put a softmax behind the model"
_VIDEO = "it works on frames of a video, shape (N, T, H, W, C)"
_REFUSED = {
    "AdversarialPatch": _PATCH,
    "AdversarialPatchNumpy": _PATCH,
    "AdversarialPatchPyTorch": _PATCH,
    "FeatureAdversariesNumpy": "it takes guide images in place of labels",
    "FeatureAdversariesPyTorch": "it takes guide images in place of labels",
    "FrameSaliencyAttack": _VIDEO,
    "GRAPHITEBlackbox": "it takes a target image and a mask",
    "GRAPHITEWhiteboxPyTorch": "it takes a target image and a mask",
    "GeoDA": "it calls np.mat, which NumPy 2 removed, and waits for a fix in ART; art:HopSkipJump is near it",
    "LaserAttack": "it takes images with the channels last, and calls np.asfarray, which NumPy 2 removed",
    "LowProFool": "it works on tables",
    "OverTheAirFlickeringPyTorch": _VIDEO,
    "OverloadPyTorch": "it works on object detectors",
    "SNAL": "it works on object detectors",
    "ShadowAttack": "it takes one image at a time and reads its label as the target",
    "SimBA": _PROBABILITIES,
    "TargetedUniversalPerturbation": "it reads labels as targets",
    "VirtualAdversarialMethod": _PROBABILITIES,
}
_NEEDS = {"BrendelBethgeAttack": "numba", "CompositeAdversarialAttackPyTorch": "kornia", "ThresholdAttack": "cma"}
_PARAMETER_FREE = (
    "AutoAttack",
    "AutoConjugateGradient",
    "AutoProjectedGradientDescent",
    "RescalingAutoConjugateGradient",
)
_INSTEAD: dict[Norm, str] = dict.fromkeys(("linf", "l2"), "art:ProjectedGradientDescentPyTorch")
_NORMS = {"linf": np.inf, "l2": 2}


def load(name: str) -> Callable[..., Tensor]:
    """The attack function that ``art:NAME`` stands for: :func:`run` on that class.

    Raises:
        UsageError: an unknown name (the nearest are shown), or a class that cannot work on a classifier of images
            with logits, with the reason.
        MissingPackageError: the class needs a package that is not installed.
    """
    package = _NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"'art:{name}' needs {package}, which is not installed: pip install '{package}'")
    attack = getattr(evasion, name, None)
    if not (inspect.isclass(attack) and issubclass(attack, EvasionAttack)):
        raise unknown_name("ART attack", name, _usable())
    reason = _refusal(attack)
    if reason:
        raise UsageError(f"'art:{name}' cannot attack images by their labels here: {reason}.")
    function = functools.partial(run, attack)
    if name in _RUNS:
        function.ran = _RUNS[name]  # type: ignore[attr-defined]
    return function


def _autoattack_ran(options: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """What ART makes its AutoAttack of; nothing is known of attacks that are put into it instead."""
    if "attacks" in options:
        return {}
    return {"apgd-ce": {"steps": 100}, "apgd-dlr": {"steps": 100}, "deepfool": {}, "square": {"queries": 5000}}


def _square_ran(options: Mapping[str, str]) -> dict[str, dict[str, int]]:
    usual = inspect.signature(evasion.SquareAttack).parameters["max_iter"].default
    return {"square": {"queries": int(options.get("max_iter", usual))}}


_RUNS = {"AutoAttack": _autoattack_ran, "SquareAttack": _square_ran}
"""What is counted as this library's own attacks, see :func:`clipdefense.evaluation.ensemble.ran`."""


def _usable() -> list[str]:
    classes = [value for value in vars(evasion).values() if inspect.isclass(value)]
    return [c.__name__ for c in classes if issubclass(c, EvasionAttack) and not _refusal(c)]


def _refusal(attack: type[EvasionAttack]) -> str:
    """Why a class cannot work here; empty where it can."""
    if attack.__name__ in _REFUSED:
        return _REFUSED[attack.__name__]
    if "TensorFlow" in attack.__name__:
        return "it works on TensorFlow estimators"
    for required in attack._estimator_requirements:
        alternatives = required if isinstance(required, tuple) else (required,)
        if not any(one in PyTorchClassifier.__mro__ for one in alternatives):
            return "it needs an estimator that is a " + " or ".join(one.__name__ for one in alternatives)
    return ""


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
    """Run an ART evasion attack class, with the threat model put into the parameters that the class has.

    ``eps`` and ``norm`` come from the threat model. Attacks with a fixed step (PGD, BIM, MIM) take its ``steps``, step
    size and ``restarts`` too (PGD starts at a random point; ``num_random_init=0`` starts at x). ART's parameter-free
    attacks (APGD, ACG, ReACG, AutoAttack) and those that count queries keep ART's own numbers, except that the first
    step is ``2 * eps`` as published, where ART has a constant 0.1. Every attack is untargeted; ``targeted=True`` is
    for AutoAttack alone, which then goes through the targets by itself.

    Args:
        attack: a class of ``art.attacks.evasion``.
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: the attacker's budget.
        seed: of Python's, NumPy's and torch's global generators while ART draws from them; they are restored.
        ids: checked, and of no effect: ART's draws depend on the order of the images.
        batch_size: passed on where the class has it (ZooAttack goes image by image).
        keep_outside: return what ART returned also where it lies outside of the budget. DeepFool, C&W, NewtonFool,
            JSMA, ZOO, HopSkipJump and others have no eps: unless it is True, an image that they moved further than
            the threat model allows comes back clean, so that it does not count as broken.
        options: parameters of the class, which override the ones above.

    Returns:
        (N, C, H, W) adversarial images, detached, on x's device and in its dtype.

    Raises:
        UsageError: bad images, labels or options, or a norm or number of classes the attack cannot work with.
    """
    name = f"art:{attack.__name__}"
    settings = _settings(name, attack, threat, batch_size, options)
    y, classes = foreign.prepare(model, x, y, seed, ids)
    _check_classes(name, classes, settings)
    if threat.eps == 0:  # ART refuses such a radius, but what else it would refuse is to be told
        with foreign.lent(model, seed):
            tried = _settings(name, attack, replace(threat, eps=1 / 255), batch_size, options)
            _make(name, attack, _estimator(model, x, classes), tried)
        return x.detach().clone()
    with foreign.lent(model, seed):
        made = _make(name, attack, _estimator(model, x, classes), settings)
        one_hot = nn.functional.one_hot(y, classes).float().cpu().numpy()
        found = made.generate(x.detach().float().cpu().numpy(), one_hot)
    x_adv = torch.as_tensor(found).to(x.device, x.dtype)
    return x_adv if keep_outside else foreign.clean_unless_within(threat, x.detach(), x_adv)


def _settings(name: str, attack: type, threat: ThreatModel, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: the threat model under ART's names, where the class has them, then the options."""
    known = foreign.constructor_options(attack, "estimator", "classifier")
    check_known(f"option of attack {name!r}", options, known)
    if options.get("targeted") and name != "art:AutoAttack":
        raise UsageError(
            f"{name!r} got targeted=True, but y are the true labels; only art:AutoAttack picks targets itself."
        )
    settings: dict[str, Any] = {"batch_size": batch_size, "verbose": False, "targeted": False}
    if name == "art:ZooAttack":
        settings["batch_size"] = 1  # its bookkeeping of pixels goes wrong on more
    if name == "art:UniversalPerturbation" and "attacker" not in options:
        settings["attacker_params"] = {"verbose": False}
    if name != "art:Wasserstein":  # its norm, eps and steps are in units of transport
        fixed: Norm | None = "linf" if "eps" in known and "norm" not in known else None
        foreign.check_norm(name, threat, fixed, _INSTEAD)
        settings |= {"eps": threat.eps, "norm": _NORMS[threat.norm], "nb_restarts": threat.restarts}
        settings["eps_step"] = 2 * threat.eps if attack.__name__ in _PARAMETER_FREE else threat.alpha
        if {"eps_step", "max_iter"} <= known and attack.__name__ not in _PARAMETER_FREE:
            settings |= {"max_iter": threat.steps, "num_random_init": threat.restarts}
    return {key: value for key, value in settings.items() if key in known} | options


def _check_classes(name: str, classes: int, settings: dict[str, Any]) -> None:
    ratio = settings.get("loss_type") == "difference_logits_ratio"
    if classes < 3 and (ratio or (name == "art:AutoAttack" and not settings.get("attacks"))):
        raise UsageError(
            f"{name!r} uses the difference of logits ratio, which needs 3 classes, and the model has {classes}; "
            "use art:AutoProjectedGradientDescent with loss_type='cross_entropy', or apgd-ce."
        )


def _estimator(model: nn.Module, x: Tensor, classes: int) -> PyTorchClassifier:
    from clipdefense.estimator import CLIPClassifier

    return CLIPClassifier(model, input_shape=tuple(x.shape[1:]), nb_classes=classes)


def _make(name: str, attack: type, estimator: PyTorchClassifier, settings: dict[str, Any]) -> Any:
    try:
        made = attack(estimator, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name!r} refuses its options: {error}") from error
    for part in getattr(made, "attacks", None) or ():
        part.verbose = False  # AutoAttack has no switch for its parts' progress bars
    return made
