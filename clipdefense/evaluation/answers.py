"""What the judged model says of images: one fp32 forward an image and seed, from which every verdict is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipdefense.attacks.context import check_finite, predict
from clipdefense.attacks.forward import keyed
from clipdefense.attacks.objectives import margin
from clipdefense.checks import check_labels


@dataclass(frozen=True, eq=False)
class Answers:
    """What the judged model says of n images.

    Attributes:
        predicted: (seeds, n) classes, by the largest logit.
        margin: (seeds, n) ``z_label - max z_other``, negative where misclassified.
    """

    predicted: NDArray[np.int64]
    margin: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Those of the parts' images, one part after the other."""
        predicted, margins = ([getattr(part, name) for part in parts] for name in ("predicted", "margin"))
        return cls(np.concatenate(predicted, axis=1), np.concatenate(margins, axis=1))


def ask(judge: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seeds: Sequence[int], batch_size: int) -> Answers:
    """Ask the judged model, once a seed.

    Args:
        judge: images -> logits; its draws are keyed by (seed, id) where it takes both.
        x: (n, C, H, W) in [0, 1]; y: (n,) labels; ids: (n,); all on one device.
        seeds: of the draws.
        batch_size: images a forward.

    Raises:
        UsageError: a logit that is NaN or infinite, naming the images, or a label without a logit.
    """
    predicted, margins = [], []
    for seed in seeds:
        logits = predict(judge, x, batch_size=batch_size, **keyed(judge, ids, seed))
        check_finite(logits, ids)
        check_labels(y, len(x), classes=logits.shape[1])
        predicted.append(logits.argmax(dim=1))
        margins.append(-margin(logits, y.long()))
    return Answers(torch.stack(predicted).cpu().numpy(), torch.stack(margins).double().cpu().numpy())
