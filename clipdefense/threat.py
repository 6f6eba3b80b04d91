"""What an attacker may do: a norm, a radius, and the effort of an iterative attack."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from clipdefense.errors import UsageError, check_whole, is_number, unknown_name

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")


@dataclass(frozen=True)
class ThreatModel:
    """An attacker's budget, immutable and hashable.

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball around the image, in [0, 1] pixel units (8/255, not 8).
        step_size: size of one PGD step in the same units; None means :attr:`alpha`'s rule.
        steps: iterations of an attack that does not say otherwise.
        restarts: random restarts of an attack that does not say otherwise.

    Raises:
        UsageError: any of them outside its range; an eps that looks like 0-255 units is named as such.
    """

    norm: Norm
    eps: float
    step_size: float | None = None
    steps: int = 10
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", str(self.norm), NORMS)
        _check_radius("eps", self.eps, self.norm, minimum_open=False)
        if self.step_size is not None:
            _check_radius("step_size", self.step_size, self.norm, minimum_open=True)
        for name, value, least in (("steps", self.steps, 0), ("restarts", self.restarts, 1)):
            check_whole(name, value, least)

    @property
    def alpha(self) -> float:
        """The step size: as given, else ``min(eps, 2.5 * eps / steps)``, which reaches any point of the ball."""
        if self.step_size is not None:
            return self.step_size
        return min(self.eps, 2.5 * self.eps / max(self.steps, 1))

    def __str__(self) -> str:
        return f"{self.norm}, eps {format_eps(self.eps)}"


def _check_radius(name: str, value: float, norm: str, *, minimum_open: bool) -> None:
    if not is_number(value):
        raise UsageError(f"{name} is {value!r}; a finite number in [0, 1] pixel units is expected, such as 8/255.")
    if value < 0 or (minimum_open and value == 0):
        raise UsageError(f"{name} is {value}; it must be {'above' if minimum_open else 'at least'} 0.")
    if norm == "linf" and value > 1:
        raise UsageError(
            f"{name} is {value}, but images are in [0, 1]; did you mean {value:g}/255 = {value / 255:.4f}?"
        )


def parse_eps(text: str) -> float:
    """``"1/255"``, ``"0.5/255"``, ``"0.0039"`` or ``"0"`` as the nearest float.

    Raises:
        UsageError: the text is neither a number nor a fraction of two.
    """
    parts = text.replace(" ", "").split("/")
    try:
        numerator, denominator = (Fraction(part) for part in (parts if len(parts) > 1 else (*parts, "1")))
        return float(numerator / denominator)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(f"eps {text!r} is not a number; write it as 1/255 or 0.0039.") from None


def format_eps(eps: float) -> str:
    """``1/255`` for a multiple of 1/255 (halves too), ``0.5`` for one of 0.1, else four significant digits."""
    halves = eps * 510
    if abs(eps * 10 - round(eps * 10)) > 1e-9 and abs(halves - round(halves)) < 1e-6:
        return f"{round(halves) / 2:g}/255"
    return f"{eps:.4g}"
