"""Adversarial defences for CLIP-style zero-shot classifiers, and an evaluation of them that can be believed.

The public names load on first use: ``import clipdefense`` alone imports neither torch nor ART.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AttackView": "defenses",
    "CLIPClassifier": "estimator",
    "ClassHead": "classifier",
    "EmbeddingTable": "classifier",
    "InputDefense": "defenses",
    "MissingPackageError": "errors",
    "TestTimeDefense": "defenses",
    "ThreatModel": "threat",
    "TokenEmbeddings": "classifier",
    "TrainerDefense": "trainers",
    "TrainingConfig": "training.config",
    "Traits": "defenses",
    "UsageError": "errors",
    "ViewModule": "defenses",
    "ZeroShotClassifier": "classifier",
    "audit": "audit",
    "check_defense": "conformance",
    "evaluate": "evaluation",
    "get_attack": "plugins",
    "get_defense": "plugins",
    "hookimpl": "hookspecs",
    "list_plugins": "plugins",
    "load_dataset": "plugins",
    "load_model": "plugins",
}
_SUBMODULES = ("attacks", "data", "evaluation", "training")

__all__ = [*_HOME, *_SUBMODULES, "__version__"]

if TYPE_CHECKING:
    from clipdefense import attacks, data, training
    from clipdefense.audit import audit
    from clipdefense.classifier import ClassHead, EmbeddingTable, TokenEmbeddings, ZeroShotClassifier
    from clipdefense.conformance import check_defense
    from clipdefense.defenses import AttackView, InputDefense, TestTimeDefense, Traits, ViewModule
    from clipdefense.errors import MissingPackageError, UsageError
    from clipdefense.estimator import CLIPClassifier
    from clipdefense.evaluation import evaluate
    from clipdefense.hookspecs import hookimpl
    from clipdefense.plugins import get_attack, get_defense, list_plugins, load_dataset, load_model
    from clipdefense.threat import ThreatModel
    from clipdefense.trainers import TrainerDefense
    from clipdefense.training.config import TrainingConfig


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"clipdefense.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"clipdefense.{name}")
    raise AttributeError(f"module 'clipdefense' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
