"""The conformance suite for anybody's defence, one line of pytest::

def test_my_defense():
    clipdefense.check_defense("my-defense")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clipdefense.conformance.case import Case, Check, run
from clipdefense.errors import UsageError

__all__ = ["Check", "Report", "check_defense"]


@dataclass(frozen=True)
class Report:
    """What the suite says of a defence.

    Attributes:
        name: of the defence.
        checks: each check's outcome, in the order in which they were made.
    """

    name: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == "failed")

    def __str__(self) -> str:
        """A line for each check."""
        return "\n".join(map(str, self.checks))


def check_defense(
    name: str | type,
    *,
    audit: bool = True,
    on: tuple[nn.Module, Tensor, Tensor] | None = None,
    known_unsound: str = "",
    **options: Any,
) -> Report:
    """Check a defence against everything this library promises of one, on a small model of the suite's own.

    The model is an untrained open_clip ViT of 2 layers at 32 px with 10 classes, embeddings of 32 dimensions and patch
    tokens; nothing is downloaded.

    Args:
        name: as registered, or the class itself.
        audit: judge it by :func:`clipdefense.audit` too, which takes by far the longest.
        on: (model, x, y) for the audit instead of the suite's own: an untrained model need not show the false
            robustness that a known unsound defence has on a trained one. For a trainer, the model it trained. A known
            unsound defence may bring its own: a classmethod ``conformance_model() -> (model, x, y, threat)``.
        known_unsound: for a class that is not registered, why it gives false robustness.
        options: of the defence's constructor.

    Returns:
        A :class:`Report`, a line for each check.

    Raises:
        AssertionError: checks failed; each is listed in words.
        UsageError: an unknown name, or a class that is no defence.
    """
    checks, case = _case(name, known_unsound, on, options)
    wanted = {label: check for label, check in checks.items() if audit or label != "audit"}
    report = Report(case.name, tuple(run(label, check, case) for label, check in wanted.items()))
    if report.failed:
        lines = "\n".join(f"- {check.name}: {check.said}" for check in report.failed)
        raise AssertionError(f"{case.name} fails {len(report.failed)} of {len(report.checks)} checks:\n{lines}")
    return report


def _case(
    name: str | type,
    known_unsound: str,
    on: tuple[nn.Module, Tensor, Tensor] | None,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Case]:
    """The suite for the kind of defence, and the defence."""
    from clipdefense.conformance import testtime, trainer
    from clipdefense.defenses import TestTimeDefense
    from clipdefense.plugins import registry
    from clipdefense.trainers import TrainerDefense

    if isinstance(name, str):
        contribution = registry().find("defenses", name)
        cls, label, known_unsound = contribution.load(), name, contribution.known_unsound
    else:
        cls, label = name, getattr(name, "__name__", repr(name))
    case = Case(label, cls, options, known_unsound, on)
    for kind, checks in ((TestTimeDefense, testtime.CHECKS), (TrainerDefense, trainer.CHECKS)):
        if isinstance(cls, type) and issubclass(cls, kind):
            return checks, case
    raise UsageError(
        f"{label!r} is {cls!r}; a subclass of clipdefense.TestTimeDefense, InputDefense or TrainerDefense is expected."
    )
