"""The state of a run, one file in the checkpoint folder: weights, optimiser, position, history, hyper-parameters."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipdefense.errors import UsageError
from clipdefense.weights import write_tensors

STATE_FILE, MODEL_FILE = "training-state.safetensors", "model.safetensors"
BASE = "base weights (SHA-256)"
_FORMAT = "clipdefense-training-state"
_SHOWN = 12


@dataclass
class History:
    """What a run measured.

    Attributes:
        steps: one record an update: ``step`` (from 1), ``epoch`` (from 1), ``lr``, each loss term, ``loss`` (their
            sum), ``gradient_norm`` (before clipping), and where measured ``clean_accuracy`` and ``robust_accuracy``
            of the batch before the update.
        epochs: one record an epoch: ``epoch``, ``step``, the mean of each loss term, and where images are held out
            ``validation_clean_accuracy`` and ``validation_robust_accuracy``.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Position:
    """Where a run is: ``step`` updates made, the next batch is number ``batch`` of ``epoch`` (both from 0)."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def make_folder(folder: Path) -> None:
    """Now, so that a place that cannot be written is not found out at the end of an epoch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"checkpoint is {str(folder)!r}, where no folder can be made ({error.strerror}); name another place."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"checkpoint is {str(folder)!r}, which cannot be written; name another folder.")


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    history: History,
    identity: dict[str, Any],
) -> None:
    """Write the state, atomically.

    Args:
        folder: of the checkpoint.
        model: its buffers and the parameters that train are written; the rest is in ``identity`` as a hash.
        optimizer: its tensors are written; its hyper-parameters are in ``identity``.
        position, history: of the run.
        identity: everything that a resume has to agree in, JSON-ready.
    """
    tensors = {f"model.{name}": value for name, value in _changing(model).items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    facts = {
        "format": _FORMAT,
        "version": 1,
        "position": vars(position),
        "identity": identity,
        "history": vars(history),
    }
    write_tensors(folder / STATE_FILE, tensors, {"state": json.dumps(facts)})


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[Position, History]:
    """Read the state back into model and optimiser.

    Raises:
        UsageError: a file that cannot be read, or a run with other hyper-parameters, data or base weights (listed).
    """
    path = folder / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"the training state {path} cannot be read ({error}); use another checkpoint folder."
        ) from error
    if facts.get("format") != _FORMAT:
        raise UsageError(f"{path} is not a training state of clipdefense; name another checkpoint folder.")
    _compare(facts["identity"], json.loads(json.dumps(identity)), path)

    changing = _changing(model)
    with torch.no_grad():
        for name, value in changing.items():
            value.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Position(**facts["position"]), History(**facts["history"])


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the parameters that are frozen."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _compare(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    theirs, ours = _flat(theirs), _flat(ours)
    names = [name for name in {**theirs, **ours} if theirs.get(name, _ABSENT) != ours.get(name, _ABSENT)]
    if names:
        listed = "; ".join(
            f"{name} {_difference(ours.get(name, _ABSENT), theirs.get(name, _ABSENT))}" for name in names
        )
        fresh = " on the model it began with, loaded afresh (a fit trains in place)" if BASE in names else ""
        raise UsageError(
            f"resume: {path} is of a run that differs in {len(names)} of its settings: {listed}. Use the same{fresh}, "
            "or another checkpoint folder."
        )


class _Absent:
    def __repr__(self) -> str:
        return "not there"


_ABSENT = _Absent()


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in groups under the group's name: ``{"threat": {"eps": e}}`` -> ``{"threat.eps": e}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _difference(ours: Any, theirs: Any) -> str:
    """Both values; of long lists, such as a thousand class names, the lengths and the first entries that differ."""
    if not (isinstance(ours, list) and isinstance(theirs, list) and max(len(ours), len(theirs)) > _SHOWN):
        return f"is {ours!r}, was {theirs!r}"
    pairs = enumerate(zip_longest(ours, theirs))
    place, (here, there) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    return f"has {len(ours)} entries, had {len(theirs)}: number {place} is {here!r}, was {there!r}"
