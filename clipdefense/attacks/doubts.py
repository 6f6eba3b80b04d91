"""What the parts of an attack saw: evaluations spent, and what makes its verdict doubtful, told once at its end."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn


class AttackWarning(UserWarning):
    """Something about the model makes an attack's verdict doubtful."""


class Doubts:
    """What the parts of one attack saw; the parts of an ensemble share one.

    An image that gets no gradient from one loss, but one from another, or that another part breaks, is no doubt.
    """

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._fallen: list[Tensor] = []
        self._spent: list[tuple[Tensor, Tensor]] = []

    def of_model(self, model: nn.Module) -> None:
        """Weights in half precision, in which neither a verdict is fp32 nor a small step arrives."""
        half = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        for dtype in half:
            self._notes[
                f"model has {dtype} weights: small steps and gradients are rounded away and verdicts are not fp32, so "
                "attacks look weaker than they are; attack model.float() (gradient_dtype='bf16' keeps the speed)."
            ] = None

    def of_outputs(self, logits: Tensor) -> None:
        """(N, classes) outputs that are probabilities."""
        sums = logits.sum(dim=1)
        if bool(((logits >= 0).all() & ((sums - 1).abs() <= 1e-4).all()).item()):
            self._notes[
                "model returns probabilities (each row sums to 1): cross-entropy on them saturates, DLR loses its "
                "scale and margins round to 1, so attacks look weaker than they are; return logits."
            ] = None

    def of_compiled(self, difference: float) -> None:
        """Compiled logits that differ from the model's own by more than rounding does."""
        self._notes[
            f"the compiled model's logits differ from the model's by up to {difference:.3g}: it went on uncompiled."
        ] = None

    def of_gradients(self, ids: Tensor, taken: Tensor, zero: Tensor) -> None:
        """Images (N,), how many gradients each was given, and how many of those were exactly zero while it stood."""
        self._seen.append((ids, taken.to(ids.device), zero.to(ids.device)))

    def of_steps(self, ids: Tensor, taken: Tensor) -> None:
        """Images (N,), and how many evaluations of the model each was given; the draws of one count as one."""
        self._spent.append((ids, taken.to(ids.device)))

    def steps(self, ids: Tensor) -> Tensor:
        """(N,) int64: evaluations that these images were given by all parts together."""
        known, order = ids.sort()
        found = torch.zeros_like(known)
        for names, taken in self._spent:
            place = torch.searchsorted(known, names.to(known.device)).clamp_max(len(known) - 1)
            among = known[place] == names.to(known.device)
            found.index_add_(0, order[place[among]], taken.to(found)[among])
        return found

    def fell(self, ids: Tensor) -> None:
        """Images that are broken, of whose gradients nothing need be said."""
        self._fallen.append(ids)

    def tell(self) -> None:
        """Warn of each, at the line outside of this library that called."""
        self._look_at_gradients()
        for note in self._notes:
            warnings.warn(note, AttackWarning, stacklevel=outside())

    def _look_at_gradients(self) -> None:
        if not self._seen:
            return
        parts = [torch.cat(column) for column in zip(*self._seen)]
        ids, place = parts[0].unique(return_inverse=True)
        taken, zero = (torch.zeros_like(ids).index_add_(0, place, part.long()) for part in parts[1:])
        dead = zero * 2 > taken
        if self._fallen:
            dead &= ~torch.isin(ids, torch.cat(self._fallen))
        if count := int(dead.sum()):
            self._notes[
                f"the input gradient is exactly zero on {count} of {len(ids)} images: a gradient attack cannot move "
                "there, and what it leaves standing must not be called robust."
            ] = None


def outside() -> int:
    """The ``stacklevel``, for who calls this, of the first frame that is not this library's."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("clipdefense"):
        frame, level = frame.f_back, level + 1
    return level
