"""What stops a run: losses that are not finite, and memory that is not there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipdefense.errors import UsageError

# What runs out where torch has no exception of its own for it: the CPU's allocator, C++, cuBLAS and cuDNN.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "_STATUS_ALLOC_FAILED")


class DivergedError(UsageError):
    """A loss term, its gradient or the model's output stopped being finite.

    Attributes:
        step: the update, from 1, that was not made.
        term: the loss term, ``"gradient"`` or ``"inner attack"``.
    """

    def __init__(self, step: int, term: str, value: float, lr: float) -> None:
        self.step, self.term = step, term
        kept = "the weights are as they came" if step == 1 else "the weights are the last whose losses were finite"
        super().__init__(
            f"training stopped at step {step}: {term} is {value}; {kept}. Lower lr (it was {lr:.3g} at this step), "
            "raise warmup_steps or set max_grad_norm."
        )


class LastGood:
    """A copy of the trained parameters and the model's buffers, renewed once a step's losses have proved finite."""

    def __init__(self, model: nn.Module, weights: Iterable[nn.Parameter]) -> None:
        self._live = [*(weight.data for weight in weights), *model.buffers()]
        self._kept = [tensor.clone() for tensor in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        for kept, live in zip(self._kept, self._live):
            kept.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, live in zip(self._kept, self._live):
            live.copy_(kept)


def first_not_finite(values: dict[str, float]) -> tuple[str, float] | None:
    """The first entry that is NaN or infinite."""
    return next(((name, value) for name, value in values.items() if not math.isfinite(value)), None)


@torch.no_grad()
def output_is_finite(model: nn.Module, x: Tensor) -> bool:
    """Whether the model's logits on these images are finite."""
    return bool(torch.isfinite(model(x)).all())


@contextmanager
def memory_advice(images: int, batch_size: int, accumulate: int, device: torch.device) -> Iterator[None]:
    """Turns "out of memory" into an error that says what was tried and what to try.

    Args:
        images: held at once, in one piece of the batch.
        batch_size, accumulate: as configured.
        device: where.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        if images > 1:
            pieces = min(2 * accumulate, batch_size)
            advice = f"accumulate={pieces} makes the same update from pieces of {math.ceil(batch_size / pieces)} images"
        else:
            advice = "not even one image fits: train less of the tower (train='last_blocks:2') or use a larger device"
        raise UsageError(
            f"out of memory on {device} with {images} images at once (batch_size {batch_size}, accumulate "
            f"{accumulate}); {advice}."
        ) from error
