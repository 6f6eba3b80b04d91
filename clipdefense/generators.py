"""The global generators of Python, NumPy and torch, from which other libraries' code draws: lent, and given back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept(devices: Sequence[int | torch.device]) -> Iterator[None]:
    """Python's, NumPy's and torch's generators are afterwards what they were: the CPU's, and those of CUDA devices."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  (a global to restore, not to draw from)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """All of them seeded inside, on every CUDA device in use, and outside as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with generators_kept(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
