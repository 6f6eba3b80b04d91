"""The same attacks in other libraries, set to the published hyper-parameters, and what they are all run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torchattacks
from art.attacks.evasion import AutoAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense_demo.digits import load
from clipdefense_demo.hardened import hardened_digits_clip
from clipdefense_demo.model import digits_clip
from common import make_images, make_model

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
PUBLISHED: dict[str, Any] = {"steps": 100, "targets": 9, "queries": 5000}
SHORT: dict[str, Any] = {"steps": 10, "targets": 3, "queries": 60}
STAGES = {"apgd-ce": ("steps",), "apgd-t": ("steps", "targets"), "fab-t": ("steps", "targets"), "square": ("queries",)}


@dataclass(frozen=True)
class Subject:
    """A model, images that it gets right, and the budget."""

    name: str
    model: ZeroShotClassifier
    x: Tensor
    y: Tensor
    eps: float
    clean: str

    def first(self, rows: int | slice) -> Subject:
        rows = slice(rows) if isinstance(rows, int) else rows
        return replace(self, x=self.x[rows], y=self.y[rows])

    def ours(self, name: str, seed: int, options: dict[str, Any], **more: Any) -> Tensor:
        """One attack, or the suite, of this library."""
        threat = ThreatModel("linf", self.eps)
        stages = {stage: {key: options[key] for key in keys} for stage, keys in STAGES.items()}
        own = {"stages": stages} if name == "suite" else stages[name]
        run = "autoattack" if name == "suite" else name
        return attacks.run(run, self.model, self.x, self.y, threat, seed=seed, **{"batch_size": 64, **own, **more})


def subjects(size: str, device: str) -> list[Subject]:
    """At smoke size random weights, which are undefended; else the demo's CLIP as it is, and hardened."""
    if size == "smoke":
        model = make_model("tiny", device)
        x = make_images(model, 16)
        y = attacks.predict(model, x).argmax(dim=1)
        return [Subject("random weights", model, x, y, 4 / 255, "its own predictions are the labels")]
    plain = digits_clip()
    x, y = load("test").tensors()
    found = []
    for name, model, eps, n in (
        ("undefended", plain, 8 / 255, 32),
        ("hardened", hardened_digits_clip(plain), 16 / 255, 64),
    ):
        model = model.to(device).eval()
        right = (attacks.predict(model, x.to(device)).argmax(dim=1).cpu() == y).nonzero()[:, 0]
        rows = right[torch.linspace(0, len(right) - 1, n).long()]
        clean = f"{len(right)} of {len(y)} test digits right; {n} of those, evenly spaced"
        found.append(Subject(name, model, x[rows].to(device), y[rows].to(device), eps, clean))
    return found


def correct(subject: Subject, x_adv: Tensor) -> int:
    """Images still right, once each is checked to lie within the budget."""
    clean = subject.x[: len(x_adv)]
    assert float((x_adv - clean).detach().abs().max()) <= subject.eps + 1e-6
    return int((attacks.predict(subject.model, x_adv).argmax(dim=1) == subject.y[: len(x_adv)]).sum())


def _apgd(s: Subject, seed: int, options: dict[str, Any]) -> Any:
    return torchattacks.APGD(s.model, eps=s.eps, steps=options["steps"], seed=seed)


def _apgd_t(s: Subject, seed: int, options: dict[str, Any]) -> Any:
    attack = torchattacks.APGDT(s.model, eps=s.eps, steps=options["steps"], seed=seed, n_classes=10)
    attack.target_class = options["targets"]
    return attack


def _fab_t(s: Subject, seed: int, options: dict[str, Any]) -> Any:
    every = {"eps": s.eps, "steps": options["steps"], "seed": seed, "multi_targeted": True}
    return torchattacks.FAB(s.model, n_classes=options["targets"] + 1, **every)


def _square(s: Subject, seed: int, options: dict[str, Any]) -> Any:
    return torchattacks.Square(s.model, eps=s.eps, n_queries=options["queries"], seed=seed)


def _suite(s: Subject, seed: int, options: dict[str, Any]) -> Any:
    return torchattacks.MultiAttack([make(s, seed, options) for make in (_apgd, _apgd_t, _fab_t, _square)])


def _run(make: Callable[[Subject, int, dict[str, Any]], Any]) -> Callable[[Subject, int, dict[str, Any]], Tensor]:
    return lambda subject, seed, options: make(subject, seed, options)(subject.x, subject.y)


PEERS = {
    "apgd-ce": _run(_apgd),
    "apgd-t": _run(_apgd_t),
    "fab-t": _run(_fab_t),
    "square": _run(_square),
    "suite": _run(_suite),
}


def art_autoattack(subject: Subject) -> Tensor:
    """ART's AutoAttack with every default but the budget."""
    cuda = subject.x.is_cuda
    estimator = PyTorchClassifier(
        model=subject.model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(subject.x.shape[1:]),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="gpu" if cuda else "cpu",
    )
    attack = AutoAttack(estimator, eps=subject.eps)
    labels = np.eye(10, dtype=np.float32)[subject.y.cpu().numpy()]
    return torch.from_numpy(attack.generate(subject.x.cpu().numpy(), labels)).to(subject.x)
