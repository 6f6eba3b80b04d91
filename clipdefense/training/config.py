"""How a trainer defence trains: one immutable object, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from clipdefense.errors import UsageError, check_known, check_number, check_whole, unknown_name

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "milestones", "constant")
SELECTIONS = ("tower", "last_blocks:k", "layernorm", "head")

# What changes where or how a run is carried out, but not what it computes: a resume may differ in these.
_INCIDENTAL = frozenset(
    {"checkpoint", "checkpoint_every", "resume", "device", "workers", "measure_every", "show_progress", "mix"}
)


@dataclass(frozen=True)
class TrainingConfig:
    """Training hyper-parameters, immutable; :meth:`override` gives a changed copy.

    Attributes:
        epochs: passes over the training images.
        batch_size: images an update, over all processes together (a loader brings its own batches). An epoch is
            the whole batches of a fresh order; the remainder waits for another epoch.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of either optimiser, on every parameter that trains.
        schedule: after warm-up ``"cosine"`` to 0 at the last step, ``"milestones"`` or ``"constant"``.
        warmup_steps: updates of linear warm-up, ``lr * (step + 1) / warmup_steps`` at step 0, 1, ...
        warmup_cap: largest share of the run that warm-up takes, so that a published number of steps does not
            swallow a short run; 1 for exactly ``warmup_steps``. Overriding ``warmup_steps`` alone sets it to 1.
        milestones: epochs at whose start the learning rate is multiplied by ``gamma``; one, several, or as on a
            command line ``"60,80"``.
        gamma: factor at each milestone.
        max_steps: stop after so many updates, whatever ``epochs`` says.
        max_grad_norm: L2 norm to which the gradient of an update is clipped.
        accumulate: pieces a batch is cut into, one after the other; the update stays that of the whole batch, the
            memory is that of one piece.
        bf16: bfloat16 autocast around the losses; the inner attack stays in float32.
        low_memory: keep no graph of the losses' forward passes and compute each again in the backward: the memory of
            one graph, for one more forward each.
        seed: of data order, attack noise and dropout.
        train: what trains in the image tower: ``"tower"``, ``"last_blocks:k"`` (the last k blocks and what follows
            them), ``"layernorm"`` (every LayerNorm) or ``"head"`` (the last projection).
        mix: weight of the trained parameters against the original ones in the result,
            ``(1 - mix) * original + mix * trained``; 1 keeps the trained ones.
        validation: share of the training images held out, in [0, 1), for the accuracies after each epoch.
        measure_every: updates between measurements of clean and robust batch accuracy (two more forward passes);
            0 for never.
        checkpoint: folder for the training state and, at the end, ``model.safetensors``.
        checkpoint_every: updates between states; None for the end of each epoch only.
        resume: continue from the state in ``checkpoint`` where there is one.
        device: ``"cpu"``, ``"cuda"``, ...; None is the launcher's, or else where the model is.
        deterministic: bit-identical repetition on CUDA too (slower; an operation that cannot is an error).
        workers: processes that read a map-style dataset; 0 reads in this one.
        show_progress: a progress bar with the loss terms and accuracies.

    Raises:
        UsageError: a value outside its range, named.
    """

    epochs: int = 10
    batch_size: int = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "milestones", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_cap: float = 1.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    max_steps: int | None = None
    max_grad_norm: float | None = None
    accumulate: int = 1
    bf16: bool = False
    low_memory: bool = False
    seed: int = 0
    train: str = "tower"
    mix: float = 1.0
    validation: float = 0.0
    measure_every: int = 20
    checkpoint: str | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    device: str | None = None
    deterministic: bool = False
    workers: int = 0
    show_progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", _epochs(self.milestones))
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", str(self.checkpoint))
        for name in ("epochs", "batch_size", "accumulate"):
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "measure_every", "workers", "seed"):
            check_whole(name, getattr(self, name), 0)
        for name in ("max_steps", "checkpoint_every"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for epoch in self.milestones:
            check_whole("milestones", epoch, 1)
        check_number("lr", self.lr, 0, math.inf, open_low=True)
        check_number("gamma", self.gamma, 0, 1, open_low=True)
        check_number("warmup_cap", self.warmup_cap, 0, 1, open_low=True)
        check_number("momentum", self.momentum, 0, 1, open_high=True)
        check_number("weight_decay", self.weight_decay, 0, math.inf)
        check_number("mix", self.mix, 0, 1)
        check_number("validation", self.validation, 0, 1, open_high=True)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0, math.inf, open_low=True)
        self._check_choices()

    def _check_choices(self) -> None:
        for name in ("bf16", "low_memory", "resume", "deterministic", "show_progress"):
            if not isinstance(getattr(self, name), bool):  # "no" would count as yes
                raise UsageError(f"{name} is {getattr(self, name)!r}; True or False is expected.")
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", str(self.schedule), SCHEDULES)
        check_selection(self.train)
        if self.batch_size < self.accumulate:
            raise UsageError(
                f"accumulate is {self.accumulate} with batch_size {self.batch_size}; a batch cannot be cut into more "
                "pieces than it has images."
            )
        if (self.schedule == "milestones") != bool(self.milestones):
            raise UsageError(
                f"milestones is {self.milestones} with schedule {self.schedule!r}; epochs such as (60, 80) belong to "
                "schedule='milestones', and to no other."
            )
        if self.resume and self.checkpoint is None:
            raise UsageError("resume is True but checkpoint is None; name the folder that holds the training state.")

    def override(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed.

        Raises:
            UsageError: a field the config does not have (the nearest are named), or a value outside its range.
        """
        check_known("training option", changes, [field.name for field in fields(self)])
        if "warmup_steps" in changes:
            changes.setdefault("warmup_cap", 1.0)
        return replace(self, **changes)

    def arithmetic(self) -> dict[str, Any]:
        """The fields that decide what is computed, JSON-ready: a resume must agree in all of them."""
        return {name: value for name, value in self.as_dict().items() if name not in _INCIDENTAL}

    def as_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _epochs(milestones: Any) -> tuple[Any, ...]:
    """Whole numbers where they are, and whatever else was given, for a check to name."""
    if isinstance(milestones, str):
        return tuple(int(part) if part.strip().isdecimal() else part for part in milestones.split(","))
    return tuple(milestones) if isinstance(milestones, (tuple, list)) else (milestones,)


def check_selection(train: str) -> tuple[str, int]:
    """``"tower"`` -> ``("tower", 0)``, ``"last_blocks:3"`` -> ``("last_blocks", 3)``.

    Raises:
        UsageError: neither of the known selections.
    """
    name, colon, count = str(train).partition(":")
    if name == "last_blocks":
        if not count.isdecimal() or int(count) < 1:
            raise UsageError(f"train is {train!r}; write the number of blocks as last_blocks:2.")
        return name, int(count)
    if colon or name not in SELECTIONS:
        raise unknown_name("train", str(train), SELECTIONS)
    return name, 0
