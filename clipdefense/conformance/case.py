"""What every check works with: the defence under test, how it is built, how it is asked, what it says."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipdefense.attacks.forward import keyed
from clipdefense.threat import ThreatModel

THREAT = ThreatModel("linf", eps=1 / 255, steps=2)
Outcome = Literal["passed", "failed", "skipped"]


class Failed(Exception):
    """A check found something wrong; the message says what, and what is expected."""


class Skipped(Exception):
    """A check does not apply, or cannot be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check's outcome.

    Attributes:
        name: such as ``"batch independence"``.
        outcome: ``"passed"``, ``"failed"`` or ``"skipped"``.
        said: the evidence, or the reason, in plain words.
    """

    name: str
    outcome: Outcome
    said: str

    def __str__(self) -> str:
        return f"{self.outcome:7} {self.name}: {self.said}"


@dataclass(frozen=True)
class Case:
    """A defence under test.

    Attributes:
        name: as registered, or the class's.
        cls: the class.
        options: of its constructor.
        known_unsound: why the registered variant gives false robustness; empty for a sound one.
        on: (model, x, y) for the audit; None takes the suite's own.
    """

    name: str
    cls: Any
    options: Mapping[str, Any]
    known_unsound: str = ""
    on: tuple[nn.Module, Tensor, Tensor] | None = None

    def build(self, model: nn.Module, **more: Any) -> Any:
        """A fresh instance for that model."""
        return self.cls(model, **{**self.options, **more})

    def answer(self, model: nn.Module, x: Tensor, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """Logits of a fresh instance, keyed where it can be."""
        return ask(self.build(model).wrap(model), x, ids, seed).detach()


CheckFunction = Callable[[Case], str]
"""Returns the evidence, in words; raises :class:`Failed` or :class:`Skipped`."""


def ask(module: nn.Module, x: Tensor, ids: Tensor | None = None, seed: int = 0) -> Tensor:
    """``module(x)``, with ids (0 .. N-1 for None) and seed where its forward takes them."""
    return module(x, **keyed(module, torch.arange(len(x)) if ids is None else ids, seed))


def run(name: str, check: CheckFunction, case: Case) -> Check:
    """The check's outcome; whatever else a defence raises is a failure too."""
    try:
        return Check(name, "passed", check(case))
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except Failed as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # a defence may raise anything; the report names it, the other checks go on
        return Check(name, "failed", f"it raises {type(error).__name__}: {' '.join(str(error).split())}")


def attack_of_torchattacks() -> Callable[[nn.Module, Tensor, Tensor], None]:
    """``(module, x, y)``: two steps of torchattacks' PGD at 8/255, which must move the images, and within the ball.

    Raises:
        Skipped: torchattacks is not installed.
    """
    try:
        from torchattacks import PGD
    except ImportError:
        raise Skipped("torchattacks is not installed: pip install 'clipdefense[torchattacks]'") from None

    def attack(module: nn.Module, x: Tensor, y: Tensor) -> None:
        moved = float((PGD(module, eps=8 / 255, alpha=2 / 255, steps=2)(x, y) - x).abs().max())
        if not 0 < moved <= 8 / 255 + 1e-6:
            raise Failed(f"PGD of torchattacks moves the images by {moved:.4g}; above 0 and at most 8/255 is expected.")

    return attack


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of logits, relative to their spread over the classes."""
    spread = float((one.amax(dim=1) - one.amin(dim=1)).max())
    return float((one - other).abs().max()) / max(spread, 1e-12)


def modes(model: nn.Module) -> list[bool]:
    """Train or eval, module by module."""
    return [part.training for part in model.modules()]


def gradients(model: nn.Module) -> list[tuple[bool, list[float] | None]]:
    """(requires_grad, .grad) of every weight."""
    return [(w.requires_grad, None if w.grad is None else w.grad.flatten().tolist()) for w in model.parameters()]


def generators() -> tuple[object, ...]:
    """The state of Python's, NumPy's and torch's global generators."""
    state = np.random.get_state()  # noqa: NPY002 - what other libraries draw from
    return random.getstate(), state[1].tolist(), state[2], torch.get_rng_state().tolist()  # type: ignore[index]
