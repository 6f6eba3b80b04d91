"""What the tests of PMG-AFT share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdefense.classifier import CLIP_MEAN, CLIP_STD, ZeroShotClassifier
from clipdefense_pmgaft.pmgaft import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PMGAFT,
)

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
Make = Callable[..., ZeroShotClassifier]


def begun(model: ZeroShotClassifier, **options: Any) -> PMGAFT:
    defense = PMGAFT(model, **options)
    defense.begin()
    return defense


def a_batch(images: Tensor, n: int = 6) -> dict[str, Tensor]:
    x = images[:n]
    x_adv = (x + (torch.rand_like(x) * 2 - 1) * 8 / 255).clamp(0, 1)
    return {"x": x, "x_adv": x_adv, "y": torch.arange(n) % 10, "ids": torch.arange(n)}


def statistics(model: ZeroShotClassifier) -> tuple[list[float], list[float]]:
    return model.mean.flatten().tolist(), model.std.flatten().tolist()


CLIPS = pytest.approx(CLIP_MEAN, abs=1e-7), pytest.approx(CLIP_STD, abs=1e-7)
IMAGENETS = pytest.approx(IMAGENET_MEAN, abs=1e-7), pytest.approx(IMAGENET_STD, abs=1e-7)
