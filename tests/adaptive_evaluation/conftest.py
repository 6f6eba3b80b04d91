"""A small adaptive evaluation for the tests of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.evaluation.results import Evaluation

from .helpers import SUITE, THREAT


@pytest.fixture
def run(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> Callable[..., Evaluation]:
    """``run(defense=..., **options)``: a small adaptive evaluation of six images."""

    def evaluate(model: nn.Module = tiny_model, **options: Any) -> Evaluation:
        settings: dict[str, Any] = {"attacks": ["pgd"], "adaptive": SUITE, **options}
        return cd.evaluate(model, images[:6], labels[:6], settings.pop("threat", THREAT), **settings)

    return evaluate
