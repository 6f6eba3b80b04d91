"""The tests' tiny ViT with its patch tokens."""

from __future__ import annotations

from typing import Any

import pytest

from clipdefense.classifier import ZeroShotClassifier
from clipdefense_openclip.tower import OpenClipTower

from .helpers import Make


@pytest.fixture
def make_vit(make_model: Make) -> Make:
    """The tests' tiny ViT with its patch tokens, 4 x 4."""

    def make(**options: Any) -> ZeroShotClassifier:
        model = make_model(**options)
        model.tower = OpenClipTower(model.tower).eval()
        return model

    return make


@pytest.fixture
def vit(make_vit: Make) -> ZeroShotClassifier:
    return make_vit()
