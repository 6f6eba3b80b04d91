"""The perturbations that broke images: one safetensors file a work unit, fp32, whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipdefense.errors import UsageError
from clipdefense.weights import write_tensors

FOLDER = "adversarial"

Broken = tuple[Tensor, Tensor]
"""(k,) image ids and (k, C, H, W) perturbations."""


def bank_file(folder: Path, cell: int, unit: int) -> Path:
    """Where a work unit's perturbations are."""
    return folder / FOLDER / f"cell-{cell}-unit-{unit}.safetensors"


def write_bank(path: Path, broken: Mapping[int, Broken]) -> None:
    """Write what broke images, by the number of the attack.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for number, (ids, delta) in broken.items():
        tensors[f"{number}.ids"], tensors[f"{number}.delta"] = ids, delta
    write_tensors(path, tensors, {})


def check_banks(paths: Iterable[Path]) -> None:
    """Every file is there, so that a missing one shows before the others are worked on for hours.

    Raises:
        UsageError: one is not.
    """
    for path in paths:
        if not path.is_file():
            raise _unreadable(path, "there is no such file")


def read_bank(path: Path) -> dict[int, Broken]:
    """What :func:`write_bank` wrote.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
        numbers = sorted({int(name.partition(".")[0]) for name in tensors})
        return {number: (tensors[f"{number}.ids"], tensors[f"{number}.delta"]) for number in numbers}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, why: object) -> UsageError:
    return UsageError(f"perturbations {str(path)!r} cannot be read ({why}); what they prove has to be computed again.")
