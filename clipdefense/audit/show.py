"""An audit for people: the findings as a table, and what may be said of the accuracies."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipdefense.audit.report import Audit
from clipdefense.audit.thresholds import Verdict

_STYLES = {Verdict.INVALID: "bold red", Verdict.WARN: "yellow", Verdict.PASS: "green", Verdict.SKIPPED: "dim"}


def table(audit: Audit) -> Table:
    """One row a check: number, name, verdict, evidence and, where there is some, advice."""
    shown = Table(title=f"Audit of {audit.name}; {audit.threat}", title_justify="left")
    shown.add_column("", justify="right")
    for column in ("check", "verdict", "evidence and advice"):
        shown.add_column(column, overflow="fold")
    for finding in audit.findings:
        style = _STYLES[finding.verdict]
        said = escape(" ".join(filter(None, (finding.evidence, finding.advice))))
        verdict = f"[{style}]{finding.verdict.name}[/{style}]"
        shown.add_row(str(finding.number), finding.name, verdict, said)
    return shown


def lines(audit: Audit) -> list[str]:
    """The verdict and the accuracies, each a line; withheld ones say why."""
    said = [f"verdict: {audit.verdict.name}", f"clean: {audit.clean}"]
    if audit.withheld:
        return [*said, "transfer: withheld", "adaptive: withheld", f"why: {audit.withheld}"]
    transfer = "nothing undefended to attack" if audit.transfer is None else str(audit.transfer)
    return [*said, f"transfer: {transfer}", f"adaptive: {audit.label if audit.adaptive is None else audit.adaptive}"]


def show(console: Console, audit: Audit, missed: Sequence[str] = ()) -> None:
    """Everything on a console; ``missed`` are the floors that the audit does not meet."""
    console.print(table(audit))
    for line in (*lines(audit), *missed):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
