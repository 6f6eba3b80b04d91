"""What a number depends on: weights, classes, versions, machine."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipdefense.defenses import TestTimeDefense
from clipdefense.weights import sha256_of_weights

PACKAGES = ("clipdefense", "torch", "torchvision", "adversarial-robustness-toolbox", "open_clip_torch", "timm", "numpy")


_KNOWN: ContextVar[dict[int, str] | None] = ContextVar("hashes of weights", default=None)


@contextmanager
def hashed_once(known: dict[int, str]) -> Iterator[None]:
    """Inside, a model's weights are hashed once, for whoever judges the same model over and over.

    A hash reads every weight: of a ViT-B/32 that takes about as long as attacking a work unit on a large GPU.

    Args:
        known: hashes by the identity of the model, filled as they are needed. Whoever keeps it keeps the models too,
            and does not change their weights.
    """
    token = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _sha256(model: nn.Module) -> str:
    known = _KNOWN.get()
    if known is None:
        return sha256_of_weights(model)
    if id(model) not in known:
        known[id(model)] = sha256_of_weights(model)
    return known[id(model)]


@cache
def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Versions and hardware, for the head of every result."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": dict(_versions()),
    }


def fingerprint(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Everything a verdict depends on besides the images.

    Args:
        model: the (undefended) model.
        settings: what else to record: seeds, batch size, attacks.
    """
    names = getattr(model, "class_names", None)
    return {
        "model": getattr(model, "source", "") or type(model).__name__,
        "weights_sha256": _sha256(model),
        "classes": None if names is None else len(names),
        "class_names_sha256": None if names is None else hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "image_size": getattr(model, "image_size", None),
        **{name: getattr(model, name).flatten().tolist() for name in ("mean", "std") if hasattr(model, name)},
        "dtype": str(getattr(model, "dtype", next((p.dtype for p in model.parameters()), None))),
        "device": str(getattr(model, "device", next((p.device for p in model.parameters()), "cpu"))),
        "verdicts": "float32, TF32 off",
        **settings,
        "machine": machine(),
    }


def constructed(defense: TestTimeDefense) -> dict[str, Any]:
    """A defence's class and public attributes, models by the hash of their weights, JSON-ready."""
    facts: dict[str, Any] = {"class": f"{type(defense).__module__}.{type(defense).__qualname__}"}
    for name, value in vars(defense).items():
        if isinstance(value, nn.Module):
            facts[f"{name}_sha256"] = _sha256(value)
        elif not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None))):
            facts[name] = value
    return facts
