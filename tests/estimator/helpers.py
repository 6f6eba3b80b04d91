"""Models and a defence that the tests of CLIPClassifier share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense import InputDefense, ZeroShotClassifier

Make = Callable[..., ZeroShotClassifier]


class Darken(InputDefense):
    """A defence with a closed form: each pixel loses a quarter of its value. It remembers what it was shown."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.model = model
        self.shown: list[int] = []

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.shown.append(len(x))
        return -0.25 * x


class Logits(nn.Module):
    """A plain network with dropout, whose backbone is reached through a method."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))
        self.unreached = nn.ModuleDict({"tower": nn.Linear(64, 64)})
        self.head = nn.Linear(64, 10)

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(self.backbone(x), self.unreached["tower"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


PLAIN = {"input_shape": (3, 32, 32), "nb_classes": 10}


def arts_own(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> PyTorchClassifier:
    settings = {**PLAIN, "clip_values": (0, 1), "device_type": "cpu", **options}
    return PyTorchClassifier(model, loss or nn.CrossEntropyLoss(), **settings)


def logits_of(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def state_of(model: nn.Module) -> dict[str, Any]:
    weights = {name: (weight.requires_grad, weight.grad) for name, weight in model.named_parameters()}
    return {**weights, **{f"mode of {name}": part.training for name, part in model.named_modules()}}
