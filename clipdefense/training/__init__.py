"""The fine-tuning loop that every trainer defence runs on, its options, and its files.

The names load on first use: importing this package imports neither torch nor accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "DivergedError": "guard",
    "TrainingConfig": "config",
    "load_weights": "checkpoint",
    "save_model": "checkpoint",
    "select_parameters": "parameters",
}

__all__ = [
    "DivergedError",
    "TrainingConfig",
    "load_weights",
    "save_model",
    "select_parameters",
]

if TYPE_CHECKING:
    from clipdefense.training.checkpoint import load_weights, save_model
    from clipdefense.training.config import TrainingConfig
    from clipdefense.training.guard import DivergedError
    from clipdefense.training.parameters import select_parameters


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"clipdefense.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'clipdefense.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
