"""A cell as RobustBench's model-info fields, then every row with its interval."""

from __future__ import annotations

from typing import Any

from clipdefense.evaluation.ensemble import AFTER, as_published, is_autoattack, listed
from clipdefense.evaluation.report import kept, rows_of
from clipdefense.evaluation.results import Kind, Row
from clipdefense.runs.config import NO_DEFENSE
from clipdefense.runs.results import NEAR, CellResult
from clipdefense.threat import format_eps

_ON_THE_MODEL: tuple[Kind, ...] = ("itself", "view", "own gradient")
"""Rows in which AutoAttack attacks what is deployed, and does not only have its images passed on to it."""


def entry(cell: CellResult) -> dict[str, Any]:
    """JSON-ready.

    ``autoattack_acc`` is the accuracy under the standard AutoAttack with its published budgets, of the model itself or
    of a defence under the adaptive view that hurts it most; null where that did not run, was not finished or is
    withheld, and ``footnote`` says why.
    """
    evaluation = cell.evaluation
    threat = evaluation.threat
    auto, footnotes = _autoattack(cell)
    withheld = evaluation.withheld
    unfinished = f"NOT FINISHED: every number is of {cell.count[1:-1]} images" if cell.missing else ""
    return {
        "name": cell.cell.model.label if cell.cell.defense.spec == NO_DEFENSE else cell.cell.name,
        "authors": None,
        "venue": None,
        "link": None,
        "architecture": cell.facts.get("model"),
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": cell.cell.dataset.label,
        "eps": format_eps(threat.eps),
        "clean_acc": f"{100 * evaluation.clean.accuracy:.2f}",
        "reported": None,
        "autoattack_acc": None if auto is None else f"{100 * auto:.2f}",
        "unreliable": bool(withheld) if cell.audit else None,
        "footnote": "; ".join(filter(None, (evaluation.caveat, unfinished, *footnotes))),
        "cell": cell.cell.name,
        "model": cell.cell.model.label,
        "defense": cell.cell.defense.label,
        "norm": threat.norm,
        "eps_value": threat.eps,
        "n": evaluation.n,
        "images": cell.images,
        "rows": [
            {
                "attack": attack,
                "attacked": row.attacked,
                "verdict_seeds": len(row.correct),
                "accuracy": row.accuracy if kept(evaluation, row) else None,
                "interval_95": list(row.interval) if kept(evaluation, row) else None,
                "worst_case": bottom,
            }
            for attack, row, bottom in rows_of(evaluation)
        ],
        "audit": cell.audit.get("verdict"),
        "withheld": withheld or None,
        "left_out": list(cell.left_out),
        f"margins_below_{NEAR:g}": cell.near,
        "unrepeatable_verdicts": cell.unrepeatable,
        "corrupt": [{"image": sample, "reason": reason} for sample, reason in cell.corrupt],
        "units": {"done": cell.units, "missing": cell.missing},
        "made_on": [dict(zip(("device", "threads", "batch_size"), where)) for where in cell.made_on],
        "fingerprint": cell.facts,
    }


def _autoattack(cell: CellResult) -> tuple[float | None, list[str]]:
    """The accuracy that may stand beside RobustBench's, and what has to be said of it or of its absence."""
    evaluation = cell.evaluation
    rows = [row for row in evaluation.rows if _name(row) == "autoattack"]
    if not rows:
        theirs = dict.fromkeys(_name(row) for row in evaluation.rows if is_autoattack(row.attack))
        return None, [
            f"no autoattack_acc: {listed(list(theirs))} is another library's" if theirs else "no AutoAttack ran"
        ]
    if evaluation.withheld:
        return None, ["autoattack_acc is withheld, because the audit is INVALID"]
    direct = [row for row in rows if row.kind in _ON_THE_MODEL]
    if not direct:
        return None, ["no autoattack_acc: it ran on the undefended model alone"]
    reasons = {row.attack: as_published(row.attack.removeprefix(AFTER)) for row in direct}
    standard = [row for row in direct if not reasons[row.attack]]
    if not standard:
        return None, [f"no autoattack_acc: {reason}" for reason in dict.fromkeys(reasons.values())]
    if cell.missing:
        return None, ["no autoattack_acc before it is finished"]
    least = min(standard, key=lambda row: row.accuracy)
    footnotes = [f"autoattack_acc is under the {least.attacked}"] if least.kind != "itself" else []
    if least.attack.startswith(AFTER):
        footnotes.append("autoattack_acc counts what the attacks before it left standing")
    return least.accuracy, footnotes


def _name(row: Row) -> str:
    return row.attack.removeprefix(AFTER).partition(",")[0]
