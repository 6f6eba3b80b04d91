"""A small network on which the false robustness of reverse attention shows; made in seconds, nothing is downloaded.

Reverse attention hides the gradient of a network that has learned something. On an untrained one there is nothing to
hide, so that no audit of it can tell: this is what the conformance suite judges it on.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.threat import ThreatModel
from clipdefense_ancra.ancra import ANCRA

NAMES = ("zero", "one", "two", "three")
FEATURES = 64
EPS = 0.1  # of [0, 1] pixels: digits of 8 x 8 pixels are coarse


def handwritten_digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits 0 to 3: images (720, 3, 8, 8) in [0, 1], labels (720,)."""
    raw = load_digits(n_class=len(NAMES))
    return torch.from_numpy(raw.images / 16).float()[:, None].repeat(1, 3, 1, 1), torch.from_numpy(raw.target).long()


def _tower() -> nn.Module:
    """Three convolutions; the embedding is an average after a ReLU, so >= 0 as in the published ResNets."""
    widths, strides = (3, 16, 32, FEATURES), (1, 2, 2)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths, widths[1:], strides):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def trained_on_digits(held_out: int = 64) -> tuple[ZeroShotClassifier, Tensor, Tensor, ThreatModel]:
    """A classifier that ANCRA-TRADES trained through reverse attention, images apart, and a threat.

    Args:
        held_out: n, images that did not train.

    Returns:
        The model in eval mode, images (n, 3, 8, 8) in [0, 1], labels (n,), and the threat model to judge it by.
    """
    x, y = handwritten_digits()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tower, anchors = _tower(), torch.randn(len(NAMES), FEATURES)
    plain = (0.0,) * 3, (1.0,) * 3
    model = ZeroShotClassifier(tower, anchors, class_names=NAMES, image_size=8, mean=plain[0], std=plain[1])
    trainer = ANCRA(
        model,
        base="trades",
        reverse_attention="label",
        threat=ThreatModel("linf", 2 * EPS, step_size=0.8 * EPS, steps=3),
        optimizer="adamw",
        schedule="constant",
        lr=3e-3,
        warmup_steps=0,
        batch_size=64,
        epochs=6,
        measure_every=0,
        show_progress=False,
    )
    trainer.fit(x[:-held_out], y[:-held_out])
    return model.eval(), x[-held_out:], y[-held_out:], ThreatModel("linf", EPS)
