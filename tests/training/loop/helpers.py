"""Images, labels, orders and a defence that the tests of the loop share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0, "warmup_steps": 0}
Make = Callable[..., ZeroShotClassifier]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def images_and_labels(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, 32, 32, generator=generator, dtype=dtype), torch.arange(n) % 10


def rows_of_epoch(n: int, batch_size: int, epoch: int) -> list[Tensor]:
    from clipdefense.training.data import Arrays, Share

    x = torch.zeros(n, 3, 1, 1)
    source = Arrays(x, torch.zeros(n).long(), 10, True, batch_size=batch_size, seed=0)
    return [batch["ids"] for batch in source.batches(epoch, 0, Share())]


class TwoPasses(TrainerDefense):
    """Clean and adversarial cross-entropy: two graphs at once, two calls of the head."""

    name = "two-passes"

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=2 / 255, step_size=1 / 255, steps=2)

    def default_config(self) -> TrainingConfig:
        return TrainingConfig(batch_size=6, epochs=1, lr=1e-2, show_progress=False, measure_every=0)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part: F.cross_entropy(self.logits(batch[part]), batch["y"]) for part in ("x", "x_adv")}
