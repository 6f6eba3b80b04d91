"""What the tests of TGA-ZSR and Comp-TGA share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdefense.classifier import TokenEmbeddings, ZeroShotClassifier
from clipdefense_tgazsr.comptga import CompTGA
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
)

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
DOUBLE = torch.float64
Make = Callable[..., ZeroShotClassifier]


def negatives(seed: int = 5, classes: int = 10) -> Tensor:
    return torch.randn(classes, 32, generator=torch.Generator().manual_seed(seed))


def trainer(method: type[TGAZSR], model: ZeroShotClassifier, **options: Any) -> TGAZSR:
    if method is CompTGA:
        options.setdefault("negative_embeddings", negatives(classes=len(model.class_names)))
    return method(model, **QUIET, **options)


METHODS = pytest.mark.parametrize("method", [TGAZSR, CompTGA])


def batch_of(images: Tensor, n: int = 3) -> dict[str, Tensor]:
    noise = torch.randn(images[:n].shape, generator=torch.Generator().manual_seed(1)).to(images)
    return {"x": images[:n], "x_adv": (images[:n] + 0.03 * noise).clamp(0, 1), "y": torch.arange(n) % 10}


def by_hand() -> tuple[TokenEmbeddings, Tensor]:
    """Two channels, both with norm 5 over the class token and four patches."""
    tokens = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [4.0, 0.0], [0.0, 4.0]]], dtype=DOUBLE)
    return TokenEmbeddings(torch.tensor([[2.0, 0.0]], dtype=DOUBLE), tokens), torch.tensor([[0.6, 0.8]], dtype=DOUBLE)


class PatchTower(nn.Module):
    """Each patch's mean colour, mapped linearly: no positions, no attention, so what a token shows is known."""

    def __init__(self, patch: tuple[int, int], dim: int = 3) -> None:
        super().__init__()
        self.cut = nn.AvgPool2d(patch)
        self.proj = nn.Linear(3, dim, bias=False)
        nn.init.eye_(self.proj.weight)

    def embed_tokens(self, images: Tensor) -> TokenEmbeddings:
        tokens = self.proj(self.cut(images).flatten(2).transpose(1, 2))
        return TokenEmbeddings(tokens.mean(dim=1), tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed_tokens(images).pooled


def colours(patch: tuple[int, int]) -> ZeroShotClassifier:
    plain: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return ZeroShotClassifier(PatchTower(patch), torch.eye(3), logit_scale=10.0, image_size=32, **plain)
