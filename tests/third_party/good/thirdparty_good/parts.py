"""A model, a defence, two attacks and a data set, against the public interfaces alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.data import from_arrays


class Cells(nn.Module):
    """Average colours of 4 x 4 cells: (N, 3, S, S) -> (N, 48)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


def load_cells(name: str, weights: str | None, *, classes: Any, seed: int = 0) -> cd.ZeroShotClassifier:
    embeddings = torch.randn(len(classes), 48, generator=torch.Generator().manual_seed(seed))
    return cd.ZeroShotClassifier(Cells(), embeddings, class_names=classes, image_size=int(name)).eval()


class Smooth(cd.InputDefense):
    """A 3 x 3 mean filter."""

    def __init__(self, model: nn.Module, *, strength: float = 1.0, batch_size: int = 64) -> None:
        super().__init__(batch_size=batch_size)
        self.model = model
        self.strength = strength

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return self.strength * (F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x)

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("bpda", lambda x, ids, seed: self.bpda(model, x, ids, seed)),)


def corner(
    model: nn.Module, x: Tensor, y: Tensor, threat: cd.ThreatModel, *, seed: int = 0, ids: Tensor | None = None
) -> Tensor:
    return cd.attacks.pgd(
        model, x, y, cd.ThreatModel(threat.norm, threat.eps, step_size=threat.eps, steps=1), random_start=False
    )


def family(name: str) -> Any:
    steps = int(name.removeprefix("steps-"))

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, threat: cd.ThreatModel, *, seed: int = 0, ids: Tensor | None = None
    ) -> Tensor:
        return cd.attacks.pgd(model, x, y, cd.ThreatModel(threat.norm, threat.eps, steps=steps), seed=seed, ids=ids)

    return attack


def load_ramps(rest: str, *, split: str = "test", n: int | None = None, size: int | None = None) -> Any:
    count = int(rest)
    slope = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(count, 3, 16, 16)
    colour = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return from_arrays(slope * colour, torch.arange(count) % 3, ["red", "green", "blue"], name="ramps", size=size)
