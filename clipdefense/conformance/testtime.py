"""The checks of a test-time defence. Each is one function; its name is its docstring's first line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdefense.attacks.forward import takes_keys
from clipdefense.conformance.case import (
    THREAT,
    Case,
    CheckFunction,
    Failed,
    ask,
    attack_of_torchattacks,
    distance,
    generators,
    gradients,
    modes,
)
from clipdefense.conformance.sample import CLASSES, SIDE, sample
from clipdefense.defenses import AttackView, InputDefense, TestTimeDefense, Traits
from clipdefense.errors import UsageError
from clipdefense.estimator import CLIPClassifier
from clipdefense.threat import ThreatModel

SAME = 1e-4
"""Differences of logits that another batch shape may make, as a share of their spread; measured in float64."""


def contract(case: Case) -> str:
    """The interface: traits, a module with logits, weights left alone, options that are checked."""
    if not isinstance(case.cls.traits, Traits):
        raise Failed(f"traits is {case.cls.traits!r}; a clipdefense.Traits is expected.")
    model, x, _ = sample()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defense = case.build(model)
    module = defense.wrap(model)
    if not isinstance(module, nn.Module):
        raise Failed(f"wrap(model) returns a {type(module).__name__}; a torch module, images -> logits, is expected.")
    if defense.traits.randomized and not takes_keys(module):
        raise Failed("traits say randomized, but the forward of wrap(model) takes no ids and seed to key its draws.")
    logits = ask(module, x)
    if logits.shape != (len(x), CLASSES) or not logits.is_floating_point():
        raise Failed(
            f"wrap(model) gives {logits.dtype} of shape {tuple(logits.shape)} for {len(x)} images and {CLASSES} "
            f"classes; floats of shape ({len(x)}, {CLASSES}) are expected."
        )
    if not torch.isfinite(logits).all():
        raise Failed("wrap(model) gives NaN or infinite logits.")
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        raise Failed("the model's weights or buffers have changed; a test-time defence leaves them alone.")
    _pixels(defense, x)
    _unknown_option(case, model)
    face = "an ART preprocessor" if isinstance(defense, InputDefense) else "no ART preprocessor"
    declared = [name for name, value in vars(defense.traits).items() if value]
    return f"a test-time defence, {face}; declares {', '.join(declared) or 'no trait'}"


def _pixels(defense: Any, x: Tensor) -> None:
    if not isinstance(defense, InputDefense):
        return
    delta = defense.perturbation(x)
    if delta.shape != x.shape or delta.requires_grad:
        raise Failed(f"perturbation(x) has shape {tuple(delta.shape)}; x's {tuple(x.shape)}, detached, is expected.")
    low, high = (float(value) for value in (x + delta).aminmax())
    if low < -1e-6 or high > 1 + 1e-6:
        raise Failed(f"x + perturbation(x) has pixels in [{low:.4g}, {high:.4g}]; [0, 1] is expected.")


def _unknown_option(case: Case, model: nn.Module) -> None:
    try:
        case.build(model, surely_no_such_option=1)
    except UsageError:
        return
    except Exception as error:
        raise Failed(
            f"an unknown option raises {type(error).__name__}; a UsageError that names it is expected."
        ) from None
    raise Failed("an unknown option is taken without a word; a UsageError that names it is expected.")


def batch_independence(case: Case) -> str:
    """An image's logits do not depend on its neighbours."""
    model, x, _ = sample(dtype=torch.float64)
    ids = torch.arange(40, 40 + len(x))
    whole, order = case.answer(model, x, ids), torch.arange(len(x)).flip(0)
    apart = {
        "alone": torch.cat([case.answer(model, x[i : i + 1], ids[i : i + 1]) for i in range(3)]),
        "among others": case.answer(model, torch.cat([x[:3], 1 - x[3:]]), ids)[:3],
        "in another order": case.answer(model, x[order], ids[order])[order][:3],
    }
    for where, logits in apart.items():
        if (gap := distance(whole[:3], logits)) > SAME:
            raise Failed(
                f"an image's logits change by {100 * gap:.2g} % of their spread {where}, with the same ids and seed; a "
                "defence treats each image by itself."
            )
    return "an image's logits are the same alone, among other images and in another order"


def _exercise(case: Case, model: nn.Module, x: Tensor) -> None:
    """Everything that may leave something behind: a pass with a gradient, one without, every view."""
    defense = case.build(model)
    module = defense.wrap(model)
    given, leaf = x.clone(), x.clone().requires_grad_(True)
    logits = ask(module, leaf)
    if logits.requires_grad:
        torch.autograd.grad(logits.square().sum(), leaf, allow_unused=True)
    with torch.no_grad():
        ask(module, x)
    for view in defense.adaptive(model):
        logits = view.forward(leaf, torch.arange(len(x)), 0)
        if logits.requires_grad:
            torch.autograd.grad(logits.square().sum(), leaf, allow_unused=True)
    if leaf.grad is not None:
        raise Failed("a pass leaves a gradient in .grad of the images.")
    if not torch.equal(leaf.detach(), given) or not torch.equal(x, given):
        raise Failed("a pass changes the images it was given, in place.")


def no_gradient_leak(case: Case) -> str:
    """Weights and images keep their ``.grad`` and ``requires_grad``."""
    model, x, _ = sample(4)
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    before = gradients(model)
    _exercise(case, model, x)
    for (flag, gradient), (wanted, kept) in zip(gradients(model), before):
        if flag != wanted:
            raise Failed("requires_grad of the model's weights is not what it was before a pass.")
        if gradient != kept:
            raise Failed(
                "a pass leaves gradients in .grad of the model's weights, or takes away those that were there."
            )
    return "passes and views leave .grad and requires_grad of the weights, and the images, as they were"


def modes_restored(case: Case) -> str:
    """Train and eval modes are what they were, part by part."""
    model, x, _ = sample(4)
    model.train()
    next(iter(model.children())).eval()
    before = modes(model)
    _exercise(case, model, x)
    if modes(model) != before:
        raise Failed("train and eval modes of the model's parts are not what they were before a pass.")
    return "every part of the model is in the mode it was in"


def seeds(case: Case) -> str:
    """(seed, id) decides every draw, and nothing else does."""
    model, x, _ = sample()
    ids = torch.arange(len(x))
    answers = []
    with torch.random.fork_rng():
        for world in (1, 2):
            torch.manual_seed(world)
            before = generators()
            answers.append(case.answer(model, x, ids, seed=3))
            if generators() != before:
                raise Failed("a pass draws from a global generator; draws are keyed by (seed, image id).")
    first, again = answers
    if not torch.equal(first, again):
        declared = (
            "the same ids and seed" if case.cls.traits.randomized else "the same images, not declared randomized,"
        )
        raise Failed(f"{declared} give other logits the second time.")
    module = case.build(model).wrap(model)
    twice = [ask(module, x, ids, 3).detach() for _ in range(2)]
    if not torch.equal(*twice) and not case.cls.traits.stateful:
        raise Failed("a second pass of the same instance gives other logits, and traits do not say stateful.")
    if not case.cls.traits.randomized:
        return "deterministic, as declared"
    if torch.equal(first, case.answer(model, x, ids, seed=4)):
        raise Failed("traits say randomized, but another seed gives the same logits.")
    copies = case.answer(model, x[:1].expand(4, -1, -1, -1).clone(), ids[:4], seed=3)
    if torch.equal(copies[0], copies[1]) and torch.equal(copies[1], copies[2]):
        raise Failed("copies of an image under other ids get the same draw; draws are keyed by (seed, image id).")
    return "ids and seed repeat a draw; another seed, or id, draws anew"


def pickles(case: Case) -> str:
    """Copies, by pickle and ``deepcopy``, answer alike."""
    model, x, _ = sample(4)
    ids = torch.arange(4)
    expected = case.answer(model, x, ids, seed=5)
    for how, again in (("a pickle", lambda it: pickle.loads(pickle.dumps(it))), ("a deep copy", copy.deepcopy)):
        if not torch.equal(ask(again(case.build(model)).wrap(model), x, ids, 5), expected):
            raise Failed(f"{how} of the defence gives other logits.")
    return "a pickle and a deep copy of it give the same logits"


def art(case: Case) -> str:
    """ART predicts with it and takes gradients through it."""
    model, x, y = sample(4)
    defense = case.build(model)
    if isinstance(defense, InputDefense):
        how, classifier = "as a preprocessing defence", CLIPClassifier(model, preprocessing_defences=[defense])
    else:
        shape = (3, SIDE, SIDE)
        how, classifier = "wrapped", CLIPClassifier(defense.wrap(model), input_shape=shape, nb_classes=CLASSES)
    logits = classifier.predict(x.numpy())
    if logits.shape != (4, CLASSES) or not np.isfinite(logits).all():
        raise Failed(f"{how}, predict gives shape {logits.shape}; finite logits of shape (4, {CLASSES}) are expected.")
    if not defense.traits.randomized and distance(case.answer(model, x), torch.from_numpy(logits)) > SAME:
        raise Failed(f"{how}, predict gives other logits than wrap(model).")
    gradient = classifier.loss_gradient(x.numpy(), y.numpy())
    if gradient.shape != tuple(x.shape) or not np.isfinite(gradient).all():
        raise Failed(f"{how}, loss_gradient gives shape {gradient.shape}, or NaN; a finite gradient in x is expected.")
    if not gradient.any():
        raise Failed(f"{how}, loss_gradient is zero everywhere; straight through (BPDA) is the least that is expected.")
    return f"predict and loss_gradient work {how}"


def foreign_attacks(case: Case) -> str:
    """An attack of torchattacks runs on the wrapped model."""
    attack = attack_of_torchattacks()
    model, x, y = sample(4)
    attack(case.build(model).wrap(model), x, y)
    return "PGD runs on wrap(model)"


def grad_modes(case: Case) -> str:
    """The same logits in every grad mode."""
    model, x, _ = sample(4, torch.float64)
    plain = case.answer(model, x)
    with torch.no_grad():
        without = case.answer(model, x)
    with torch.inference_mode():
        inside = case.answer(model, x.clone(), torch.arange(4))
    for name, logits in (("no_grad", without), ("inference_mode", inside.clone())):
        if (gap := distance(plain, logits)) > SAME:
            raise Failed(f"under {name} the logits change by {100 * gap:.2g} % of their spread.")
    return "the same logits under both"


def views(case: Case) -> str:
    """Every view is differentiable, finite and repeatable."""
    model, x, y = sample(4)
    found = case.build(model).adaptive(model)
    if not isinstance(found, tuple) or not all(isinstance(view, AttackView) for view in found):
        raise Failed(f"adaptive(model) returns {found!r}; a tuple of clipdefense.AttackView is expected.")
    if not found:
        return "none, so its robust numbers are all labelled: transfer only"
    names = [view.name for view in found]
    if len(set(names)) < len(names):
        raise Failed(f"the views' names {names} are not distinct.")
    for view in found:
        for problem in _problems(view, x, y):
            raise Failed(f"view {view.name!r} {problem}")
    return f"{len(found)}, each with finite gradients: {', '.join(names)}"


def _problems(view: AttackView, x: Tensor, y: Tensor) -> Iterator[str]:
    """What is wrong with a view, the first thing first."""
    ids = torch.arange(len(x))
    leaf = x.clone().requires_grad_(True)
    logits = view.forward(leaf, ids, 0)
    if logits.shape != (len(x), CLASSES) or not torch.isfinite(logits).all():
        yield f"gives shape {tuple(logits.shape)}, or NaN; finite logits of shape ({len(x)}, {CLASSES}) are expected."
    if not logits.requires_grad:
        yield "has no gradient in the images: its logits are detached."
    total = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    if view.extra_loss is not None:
        term = view.extra_loss(leaf, y)
        if term.shape != y.shape or not torch.isfinite(term).all():
            yield f"has an extra loss of shape {tuple(term.shape)}, or NaN; one finite number an image is expected."
        total = total + term.sum()
    (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if gradient is None or not torch.isfinite(gradient).all():
        yield "has no gradient in the images, or one with NaN or infinite values."
    if not gradient.flatten(1).any(dim=1).all():
        yield "has a gradient of zero everywhere for some image."
    if not torch.equal(view.forward(x, ids, 0).detach(), view.forward(x, ids, 0).detach()):
        yield "gives other logits for the same ids and seed."


def sound(case: Case) -> str:
    """The audit under the declared protocol."""
    from clipdefense.audit import audit

    model, x, y, threat = _audited(case)
    defense: TestTimeDefense = case.build(model)
    return verdict(case, audit(model, x, y, threat, defense=defense))


def _audited(case: Case) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    """What was given; else, of a known unsound defence, what its class brings; else the suite's own.

    A sound defence does not choose what it is judged on.
    """
    if case.on is not None:
        return (*case.on, THREAT)
    own = getattr(case.cls, "conformance_model", None) if case.known_unsound else None
    return (*sample(16), THREAT) if own is None else own()


def verdict(case: Case, found: Any) -> str:
    """What the audit's verdict means for this defence; raises where it is not what is expected."""
    says = getattr(found.verdict, "name", str(found.verdict))
    why = getattr(found, "withheld", "")
    if case.known_unsound and says != "INVALID":
        raise Failed(f"registered as known_unsound ({case.known_unsound}), but the audit says {says}.")
    if not case.known_unsound and says == "INVALID":
        raise Failed(f"INVALID under the declared protocol{f': {why}' if why else '.'}")
    return "INVALID, as its known_unsound says" if case.known_unsound else says


CHECKS: dict[str, CheckFunction] = {
    "contract": contract,
    "batch independence": batch_independence,
    "no gradient leak": no_gradient_leak,
    "modes restored": modes_restored,
    "seeds": seeds,
    "pickles": pickles,
    "ART": art,
    "attacks of torchattacks": foreign_attacks,
    "no_grad and inference_mode": grad_modes,
    "adaptive views": views,
    "audit": sound,
}
