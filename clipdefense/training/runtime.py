"""The surroundings of a run: seeds, device, determinism; all left as they were found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 62-bit seed for one purpose, independent of those for others."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def seed_torch(seed: int) -> None:
    """``torch.manual_seed``, which without an accelerator in use spends 0.2 ms on records for one that may come."""
    if torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def on_device(model: ZeroShotClassifier, device: torch.device) -> Iterator[None]:
    """The model on that device, and afterwards where it was."""
    before = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms throughout, where wanted; the process's settings come back."""
    if not wanted:
        yield
        return
    algorithms, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
