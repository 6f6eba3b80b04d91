"""The demo's TeCoA fine-tune of ``demo:digits``, made on first use and kept beside it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.plugins import get_defense
from clipdefense.threat import ThreatModel
from clipdefense.training.checkpoint import load_weights, save_model, sidecar_path
from clipdefense.weights import sha256_of_weights
from clipdefense_demo.digits import load
from clipdefense_demo.model import cached_model

THREAT = ThreatModel("linf", eps=6 / 255, step_size=3 / 255, steps=3)
# Chosen on the validation images, like everything about the demo.
SETTINGS: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "batch_size": 64,
    "epochs": 12,
    "warmup_steps": 20,
    "measure_every": 0,
}

_log = logging.getLogger(__name__)


def hardened_digits_clip(model: ZeroShotClassifier, *, progress: bool = True) -> ZeroShotClassifier:
    """A copy of the digits model, fine-tuned by TeCoA: read from the cache, or trained (half a minute) and kept there.

    Args:
        model: the plain model, which stays as it is.
        progress: show a bar while training.
    """
    path = cached_model().folder / "tecoa.safetensors"
    hardened = copy.deepcopy(model)
    base = sha256_of_weights(model)
    if _fits(path, base):
        load_weights(hardened, path)
        return hardened
    trainer = get_defense("tecoa")(hardened, threat=THREAT, show_progress=progress, **SETTINGS)
    trainer.fit(load("train", split=None))
    try:
        save_model(hardened, path, **trainer.record(), settings=SETTINGS)
    except OSError as error:
        _log.warning("the fine-tuned model cannot be kept in %s (%s).", path.parent, error)
    return hardened.eval()


def _fits(path: Path, base_sha256: str) -> bool:
    """Whether a cached fine-tune is there, whole, and made from this model with these settings."""
    try:
        facts = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        return bool(path.is_file() and facts["base_weights_sha256"] == base_sha256 and facts["settings"] == SETTINGS)
    except (OSError, ValueError, KeyError, UsageError):
        return False
