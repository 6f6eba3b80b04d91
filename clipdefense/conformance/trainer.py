"""The checks of a trainer defence: a small fit, and what it leaves."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from art.defences.trainer import Trainer
from torch import Tensor

from clipdefense.conformance.case import (
    THREAT,
    Case,
    CheckFunction,
    Failed,
    attack_of_torchattacks,
    distance,
    gradients,
    modes,
)
from clipdefense.conformance.sample import CLASSES, sample
from clipdefense.conformance.testtime import SAME, verdict
from clipdefense.errors import UsageError
from clipdefense.threat import ThreatModel
from clipdefense.training.config import TrainingConfig

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0, "device": "cpu"}
SHORT: dict[str, Any] = {**QUIET, "epochs": 1, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0}


def build(case: Case, model: Any, **more: Any) -> Any:
    """A trainer whose fits are short: one epoch of two batches, an inner attack of two steps."""
    trainer = case.build(model, **{**SHORT, **more})
    trainer.threat = replace(trainer.threat, steps=min(2, trainer.threat.steps), step_size=None)
    return trainer


def fitted(case: Case, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A trainer after its fit on eight images, and the images with their labels."""
    model, x, y = sample()
    trainer = build(case, model, seed=seed)
    trainer.fit(x, y)
    return trainer, x, y


def contract(case: Case) -> str:
    """The interface: an ART trainer with a name, variants, defaults, options that are checked."""
    if not issubclass(case.cls, Trainer):
        raise Failed("the class is no ART trainer (art.defences.trainer.Trainer).")
    if not isinstance(case.cls.name, str) or not case.cls.name:
        raise Failed(f"name is {case.cls.name!r}; the registered name is expected, since it is written to model files.")
    if "default" not in case.cls.variants:
        raise Failed(f"variants is {case.cls.variants!r}; 'default' is expected among them.")
    model, _, _ = sample()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = case.build(model)
    if not isinstance(trainer.default_threat(), ThreatModel) or not isinstance(
        trainer.default_config(), TrainingConfig
    ):
        raise Failed("default_threat() and default_config() give a ThreatModel and a TrainingConfig; these do not.")
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        raise Failed("making the trainer changes the model; only a fit may.")
    for wrong in ({"variant": "surely-no-such-variant"}, {"surely_no_such_option": 1}):
        try:
            case.build(model, **wrong)
        except UsageError:
            continue
        raise Failed(f"{wrong} is taken without a word; a UsageError that names it is expected.")
    return f"an ART trainer {case.cls.name!r}, variants {', '.join(case.cls.variants)}"


def fit(case: Case) -> str:
    """A fit on a few images moves weights and records finite loss terms."""
    before = {name: value.clone() for name, value in sample().model.named_parameters()}
    trainer, _, _ = fitted(case)
    steps = trainer.history.steps if trainer.history is not None else []
    if len(steps) != 2:
        raise Failed(f"a fit of two batches records {len(steps)} updates in history.")
    if not all(np.isfinite(value) for record in steps for value in record.values()):
        raise Failed("history holds NaN or infinite values.")
    moved = [
        name for name, value in trainer.model.named_parameters() if not torch.equal(value, before.get(name, value))
    ]
    if not moved:
        raise Failed("a fit changes no weight.")
    if not all(torch.isfinite(value).all() for value in trainer.model.parameters()):
        raise Failed("a fit leaves weights that are NaN or infinite.")
    json.dumps(trainer.record())
    terms = sorted(set(steps[0]) - {"step", "epoch", "lr", "loss", "gradient_norm"})
    return f"two updates of {len(moved)} weights; loss terms {', '.join(terms)}"


def batch_independence(case: Case) -> str:
    """The trained model classifies each image by itself."""
    trainer, x, _ = fitted(case)
    model, x = trainer.model.double().eval(), x.double()
    with torch.no_grad():
        whole, alone = model(x), torch.cat([model(part) for part in x.split(1)])
    if (gap := distance(whole, alone)) > SAME:
        raise Failed(f"the trained model's logits change by {100 * gap:.2g} % of their spread for an image alone.")
    return "the trained model's logits are the same for an image alone"


def no_gradient_leak(case: Case) -> str:
    """The inner attack leaves the weights' ``.grad`` alone, and the fit leaves nothing behind."""
    model, x, y = sample()
    next(model.parameters()).requires_grad_(False)
    flags = [flag for flag, _ in gradients(model)]
    trainer = build(case, model)
    original, seen = trainer.inner_attack, []

    def watched(batch: Any, *, seed: int) -> Any:
        before = [gradient for _, gradient in gradients(trainer.model)]
        added = original(batch, seed=seed)
        seen.append(before == [gradient for _, gradient in gradients(trainer.model)])
        return added

    trainer.inner_attack = watched
    trainer.fit(x, y)
    if not all(seen):
        raise Failed("the inner attack leaves gradients in .grad of the weights.")
    if any(gradient is not None for _, gradient in gradients(model)):
        raise Failed("a fit leaves gradients in .grad of the weights.")
    if [flag for flag, _ in gradients(model)] != flags:
        raise Failed("requires_grad of the weights is not what it was before the fit.")
    return f"none in {len(seen)} inner attacks, none after the fit; requires_grad is as it was"


def modes_restored(case: Case) -> str:
    """Train and eval modes are what they were, part by part."""
    model, x, y = sample()
    model.train()
    next(iter(model.children())).eval()
    before = modes(model)
    build(case, model).fit(x, y)
    if modes(model)[: len(before)] != before:  # a fit may add parts, such as a head's transform
        raise Failed("train and eval modes of the model's parts are not what they were before the fit.")
    return "every part of the model is in the mode it was in"


def _weights(case: Case, seed: int) -> Tensor:
    trainer, _, _ = fitted(case, seed)
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def seeds(case: Case) -> str:
    """A seed repeats a fit to the last bit, whatever the global generator; another seed gives another."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = _weights(case, 3)
        torch.manual_seed(2)
        again = _weights(case, 3)
    if not torch.equal(first, again):
        raise Failed("a fit with the same seed ends with other weights.")
    if torch.equal(first, _weights(case, 4)):
        raise Failed("another seed ends with the same weights; order and draws are keyed by the seed.")
    return "a seed repeats a fit to the last bit; another gives other weights"


def pickles(case: Case) -> str:
    """A pickle of the trainer keeps what was trained."""
    trainer, x, _ = fitted(case)
    again = pickle.loads(pickle.dumps(trainer))
    if again.record() != trainer.record():
        raise Failed("a pickle of the trainer has another record().")
    with torch.no_grad():
        if not torch.equal(again.model(x), trainer.model(x)):
            raise Failed("the model in a pickle of the trainer gives other logits.")
    return "a pickle keeps the record and the model"


def art(case: Case) -> str:
    """ART's names for it: arrays in, one-hot labels, ``nb_epochs``, the classifier out."""
    from clipdefense.estimator import CLIPClassifier

    model, x, y = sample()
    estimator = CLIPClassifier(model)
    trainer = build(case, estimator)
    trainer.fit(x.numpy(), np.eye(CLASSES, dtype=np.float32)[y.numpy()], nb_epochs=1)
    if trainer.get_classifier() is not estimator:
        raise Failed("get_classifier() is not the estimator that was given.")
    logits = estimator.predict(x.numpy())
    if logits.shape != (len(x), CLASSES) or not np.isfinite(logits).all():
        raise Failed(f"after the fit, predict gives shape {logits.shape}, or NaN.")
    if not estimator.loss_gradient(x.numpy(), y.numpy()).any():
        raise Failed("after the fit, loss_gradient is zero everywhere.")
    return "fits arrays and one-hot labels; the estimator predicts and has gradients"


def foreign_attacks(case: Case) -> str:
    """An attack of torchattacks runs on the trained model."""
    attack = attack_of_torchattacks()
    trainer, x, y = fitted(case)
    attack(trainer.model.eval(), x, y)
    return "PGD runs on the trained model"


def sound(case: Case) -> str:
    """The audit of the model that a fit leaves, or of one that was trained elsewhere."""
    from clipdefense.audit import audit

    if case.on is None:
        trainer, _, _ = fitted(case)
        model, x = trainer.model.eval(), sample(16).x
        with torch.no_grad():
            y = model(x).argmax(dim=1)
    else:
        model, x, y = case.on
    return verdict(case, audit(model, x, y, THREAT))


CHECKS: dict[str, CheckFunction] = {
    "contract": contract,
    "fit": fit,
    "batch independence": batch_independence,
    "no gradient leak": no_gradient_leak,
    "modes restored": modes_restored,
    "seeds": seeds,
    "pickles": pickles,
    "ART": art,
    "attacks of torchattacks": foreign_attacks,
    "audit": sound,
}
