"""Trained digits models for the audit's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from audit_clean_models import digits, train

IMAGES = 48


@pytest.fixture(scope="session")
def trained() -> Callable[[], dict[str, nn.Module]]:
    """Fresh copies of models that were trained once, by recipe."""
    models = {recipe: train(recipe, seed=0, epochs=10) for recipe in ("cnn", "batchnorm")}
    return lambda: copy.deepcopy(models)


@pytest.fixture(scope="session")
def held_back() -> tuple[Tensor, Tensor]:
    """(48, 1, 8, 8) images in [0, 1] that no model was trained on, and their labels."""
    _, _, x, y = digits()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:IMAGES]
    return x[rows], y[rows]
