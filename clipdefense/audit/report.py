"""What an audit found: one finding a check, the verdict over them, and the robust accuracies unless it is INVALID."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clipdefense.audit.thresholds import BY_KEY, CHECKS, Statistic, Verdict
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.statistics import Interval, wilson
from clipdefense.threat import ThreatModel

TRANSFER_ONLY = "transfer only: nothing adaptive was there to attack"


@dataclass(frozen=True)
class Finding:
    """What one check says.

    Attributes:
        number, name: of the check.
        statistic: key of the measure that decided, see :mod:`clipdefense.audit.thresholds`; empty when skipped.
        value: of that statistic; None when skipped.
        verdict: PASS, WARN, INVALID or SKIPPED.
        evidence: one sentence: what was seen, or why the check was skipped.
        advice: one sentence: what to do; empty where there is nothing to do.
        measured: every statistic of the check, by key.
    """

    number: int
    name: str
    statistic: str
    value: float | None
    verdict: Verdict
    evidence: str
    advice: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "number": self.number,
            "name": self.name,
            "statistic": self.statistic,
            "value": self.value,
            "verdict": self.verdict.name,
            "evidence": self.evidence,
            "advice": self.advice,
            "measured": dict(self.measured),
        }


def found(
    number: int, measured: Mapping[str, float], evidence: str, *, info: Mapping[str, float] | None = None
) -> Finding:
    """The finding of a check from what it measured: the worst of its statistics decides.

    Args:
        number: of the check.
        measured: statistic key -> value, at least one.
        evidence: one sentence.
        info: further numbers to keep that have no threshold.
    """
    rows: list[tuple[Statistic, float]] = [(BY_KEY[key], float(value)) for key, value in measured.items()]
    assert rows and all(row.check == number for row, _ in rows)
    statistic, value = max(rows, key=lambda row: row[0].verdict(row[1]))
    verdict = statistic.verdict(value)
    advice = statistic.advice if verdict > Verdict.PASS else ""
    kept = {key: float(value) for key, value in {**measured, **(info or {})}.items()}
    return Finding(number, CHECKS[number], statistic.key, value, verdict, evidence, advice, kept)


def skipped(number: int, reason: str) -> Finding:
    """The finding of a check that does not apply, with the reason as its evidence."""
    return Finding(number, CHECKS[number], "", None, Verdict.SKIPPED, reason)


@dataclass(frozen=True)
class Accuracy:
    """A share of right images, with what it was measured under.

    Attributes:
        value: in [0, 1].
        n: images.
        label: what attacked.
    """

    value: float
    n: int
    label: str

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval."""
        return wilson(self.value, self.n)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"accuracy": self.value, "n": self.n, "interval_95": list(self.interval), "under": self.label}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}], n = {self.n}, {self.label}"


@dataclass(frozen=True)
class Audit:
    """The result of :func:`clipdefense.audit`.

    Attributes:
        name: what was audited.
        threat: the attacker's budget.
        findings: one a check, in order.
        clean: accuracy without an attack.
        transfer: under images made on the undefended model; None without one, or when withheld.
        adaptive: under everything the audit tried, per-image worst case; None where only transfer was there, or when
            withheld.
        withheld: why the robust accuracies are not given; empty when they are.
        fingerprint: what the numbers depend on.
    """

    name: str
    threat: ThreatModel
    findings: tuple[Finding, ...]
    clean: Accuracy
    transfer: Accuracy | None
    adaptive: Accuracy | None
    withheld: str
    fingerprint: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        return worst(self.findings)

    @property
    def label(self) -> str:
        """What must stand beside the robust accuracies."""
        if self.withheld:
            return f"withheld: {self.withheld}"
        return "" if self.adaptive is not None else TRANSFER_ONLY

    def finding(self, number: int) -> Finding:
        """The finding of the check of that number.

        Raises:
            UsageError: no check has it; they go from 1 to 20.
        """
        if number not in CHECKS:
            raise UsageError(f"number is {number!r}; a check's, in 1 to {len(CHECKS)}, is expected.")
        return next(finding for finding in self.findings if finding.number == number)

    def robust(self, kind: str) -> Accuracy | None:
        """``"adaptive"`` or ``"transfer"``.

        Raises:
            UsageError: another kind.
        """
        known = {"adaptive": self.adaptive, "transfer": self.transfer}
        if kind not in known:
            raise unknown_name("robust accuracy", kind, known)
        return known[kind]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; withheld accuracies are null, with the reason beside them."""
        return {
            "name": self.name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "verdict": self.verdict.name,
            "withheld": self.withheld or None,
            "label": self.label,
            "clean": self.clean.to_dict(),
            "transfer": None if self.transfer is None else self.transfer.to_dict(),
            "adaptive": None if self.adaptive is None else self.adaptive.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "fingerprint": dict(self.fingerprint),
        }


def worst(findings: tuple[Finding, ...]) -> Verdict:
    """The verdict over all findings; skipped ones say nothing."""
    return max((finding.verdict for finding in findings), default=Verdict.SKIPPED)


def reason(findings: tuple[Finding, ...]) -> str:
    """Why the number is withheld: the INVALID findings, one after the other; empty when there is none."""
    bad = [f"{f.name} ({f.number}): {f.evidence}" for f in findings if f.verdict is Verdict.INVALID]
    return " ".join(bad)


@dataclass(frozen=True)
class Floor:
    """A condition on an audit for a build, written ``adaptive=30``: percent of images right.

    Attributes:
        kind: ``"adaptive"`` or ``"transfer"``.
        percent: the least accuracy that passes.
    """

    kind: str
    percent: float

    @classmethod
    def parse(cls, text: str) -> Floor:
        """
        Raises:
            UsageError: not of the form ``adaptive=NUMBER`` or ``transfer=NUMBER`` with a number in [0, 100].
        """
        kind, equals, number = (part.strip() for part in text.partition("="))
        if equals and kind not in ("adaptive", "transfer"):
            raise unknown_name("--fail-under", kind, ("adaptive", "transfer"))
        try:
            percent = float(number)
        except ValueError:
            percent = -1.0
        if not equals or not 0 <= percent <= 100:
            raise UsageError(
                f"--fail-under is {text!r}; adaptive=PERCENT or transfer=PERCENT is expected, in 0 to 100."
            )
        return cls(kind, percent)

    def missed(self, audit: Audit) -> str:
        """Why the audit does not meet it, one sentence; empty when it does."""
        accuracy = audit.robust(self.kind)
        if accuracy is None:
            return f"There is no {self.kind} accuracy ({audit.label or 'nothing undefended to attack'})."
        if 100 * accuracy.value < self.percent:
            return f"The {self.kind} accuracy is {100 * accuracy.value:.1f} %, under {self.percent:g} %."
        return ""
