"""Out of memory: the same task again with half as many images a forward, until memory suffices."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from clipdefense.attacks.doubts import outside
from clipdefense.errors import UsageError
from clipdefense.evaluation.counts import counted
from clipdefense.runs.results import CellResult

T = TypeVar("T")

ADVICE = "take a smaller model or size, or another device"
"""What helps where not even one image fits."""


def halved(task: Callable[[int], T], batch_size: int, what: str, advice: str = ADVICE) -> tuple[T, int]:
    """A task's result, at half the batch size whenever memory does not suffice.

    A failed attempt's tensors live as long as its traceback does, which holds the frames that they are local to. So
    the error is caught in a call of its own, and only once that has returned is the cache emptied: inside of the
    ``except`` that would free nothing, and the next attempt would find the memory as full as the last one did.

    Args:
        task: given a batch size; begun afresh after a failure, so that it must not have counted anything before.
        batch_size: images a forward to begin with, at least 1.
        what: whose memory does not suffice, such as ``"'a cell'"``.
        advice: what to do where it does not for one image.

    Returns:
        What the task returned, and the batch size that sufficed, which the next task had better begin with.

    Raises:
        UsageError: memory does not suffice for one image at a time. Other errors of the task pass.

    Warns:
        UserWarning: of every halving, at the line outside of this library that called.
    """
    while True:
        outcome = _attempt(task, batch_size)
        if outcome is not None:
            return outcome[0], batch_size
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if batch_size <= 1:
            raise UsageError(f"memory does not suffice for one image at a time of {what}; {advice}.")
        batch_size = (batch_size + 1) // 2
        warnings.warn(f"out of memory: going on with {counted(batch_size, 'image')} a forward.", stacklevel=outside())


def _attempt(task: Callable[[int], T], batch_size: int) -> tuple[T] | None:
    """None where memory did not suffice."""
    try:
        return (task(batch_size),)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        return None


def sufficed(cells: Sequence[CellResult]) -> int:
    """Images a forward for which memory sufficed wherever these cells' verdicts were made: the fewest of any of them.

    What was asked for may be more, and have been halved.

    Args:
        cells: at least one.
    """
    return min(bucket for cell in cells for _, _, bucket in cell.made_on)
