"""Trading passes for memory: a forward whose graph is computed again when the backward needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from clipdefense.trainers import TrainerDefense


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were: a BatchNorm that sees the same batch again must not count it twice."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                # past autograd's version count: a graph that has saved the buffer must not think it stale
                buffer.data.copy_(value)


@contextmanager
def recomputing(defense: TrainerDefense, enabled: bool) -> Iterator[None]:
    """The defence's passes recomputed inside, where enabled."""
    before, defense.low_memory = defense.low_memory, enabled
    try:
        yield
    finally:
        defense.low_memory = before


def recomputed(tower: nn.Module, encode: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``encode(x)`` without keeping its graph: the backward pass computes it again, one more forward.

    Losses over several sets of images then hold one graph at a time. Random draws and autocast are those of the first
    pass.

    Args:
        tower: whose statistics the second pass must leave alone.
        encode: images -> tensors, through the tower.
        x: (N, C, H, W).
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), statistics_kept(tower)

    return checkpoint(encode, x, use_reentrant=False, context_fn=contexts)
