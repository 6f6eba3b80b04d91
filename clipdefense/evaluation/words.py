"""A threat model, what was tried and what was not, in sentences for people who run no attacks themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from clipdefense.evaluation.ensemble import AFTER, STANDARD, Effort, is_autoattack, listed, ran, share, shortfall
from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.threat import ThreatModel, format_eps

_KINDS = {
    "itself": "The attacker has the model itself: its weights and its gradients.",
    "transfer": "The attacker has the undefended model, and does not know that there is a defence.",
    "view": "The attacker knows the defence and differentiates through it, in the ways that its authors or this "
    "library have found (its adaptive views).",
    "own gradient": "The attacker takes the defended model's own gradient, averaged over its draws.",
    "embedding": "The attacker moves embeddings through the defence, without labels.",
    "black box": "The attacker sees only what the deployed model answers, and searches without gradients.",
}

FEW_QUERIES = 100
"""A black box that asks less often than that has hardly begun to search."""

_ALWAYS = (
    "changes that are no small additions to pixels: patches, blur, rotations, another photograph, rewording the class "
    "names",
    "attacks while the model is trained (poisoning, backdoors)",
    "images that are saved with 8 bits a channel, or compressed, between the attack and the model",
    "an attacker with more steps, more restarts or a better idea than those above",
)


def threat_in_words(threat: ThreatModel, attacked_at: Sequence[int] | None = None) -> str:
    """What one attacker may change, in one sentence or two.

    Args:
        threat: norm and radius.
        attacked_at: (height, width) in pixels at which the change is made.
    """
    where = f" of the {attacked_at[0]} x {attacked_at[1]} image" if attacked_at else ""
    eps = format_eps(threat.eps)
    if threat.norm == "linf":
        levels = 255 * threat.eps
        said = (
            f"{eps}: every colour value{where} may move by at most {levels:.3g} of its 255 levels "
            f"({100 * threat.eps:.2g} %), each pixel on its own."
        )
        return said + (" Few people see such a change." if levels <= 8 else " People may see such a change.")
    return (
        f"{threat.norm} {eps}: all changes{where} together, as the root of their summed squares, are at most "
        f"{threat.eps:.3g}, where one pixel from black to white in one colour is 1; a few pixels may change much, or "
        "many a little."
    )


def tried(evaluations: Sequence[Evaluation]) -> list[str]:
    """What attackers were tried, each with its attacks."""
    found: dict[str, list[str]] = {}
    for row in _rows(evaluations):
        if row.kind in _KINDS:
            found.setdefault(row.kind, []).append(attack_in_words(row.attack.removeprefix(AFTER)))
    return [f"{said} Attacks: {_listed(found[kind])}." for kind, said in _KINDS.items() if kind in found]


def not_tried(evaluations: Sequence[Evaluation]) -> list[str]:
    """What was not, so that nobody reads the numbers as more than they are; for whom, where others were spared less."""
    lacking: dict[str, list[str]] = {}
    for evaluation in evaluations:
        for text in dict.fromkeys(_lacks(evaluation)):
            lacking.setdefault(text, []).append(evaluation.name)
    norms = {evaluation.threat.norm for evaluation in evaluations}
    missing = [_for(text, names, len(evaluations)) for text, names in lacking.items()]
    missing += [f"{name} perturbations" for norm, name in (("linf", "Linf"), ("l2", "L2")) if norm not in norms]
    return [f"{text[0].upper()}{text[1:]}." for text in (*missing, *_ALWAYS)]


def _lacks(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.caveat:
        yield "an attacker who knows the defence" if evaluation.caveat == "transfer only" else "adaptive views"
    yield from evaluation.left_out
    # images made against the undefended model are no questions to the deployed one, whatever made them
    direct = [row for row in evaluation.rows if row.kind not in ("transfer", "embedding")]
    yield from _lacks_answers(direct)
    found = _most(direct)
    left = [name for name in STANDARD if name not in found]
    short = [f"{name} ran with {lack}" for name in STANDARD if name in found and (lack := shortfall(name, found[name]))]
    text = "AutoAttack, the ensemble with which robust accuracies are usually compared"
    if len(left) == len(STANDARD):
        if any(is_autoattack(row.attack) for row in evaluation.rows if row not in direct):
            text += ", against the defence itself (it ran on the undefended model)"
        elif unknown := [row.attack.removeprefix(AFTER) for row in direct if is_autoattack(row.attack)]:
            text += f" (what {_listed(unknown)} is made of is not known)"
        yield text
    elif left:
        yield f"{text} ({'; '.join((f'{listed(left)} did not run', *short))})"
    elif short:
        yield f"AutoAttack at its published budgets: {'; '.join(short)}"


def _lacks_answers(direct: Sequence[Row]) -> Iterator[str]:
    text = "an attacker who sees answers alone, without gradients"
    asked = [effort for row in direct if (effort := _queries(row)) is not None]
    if not asked:
        yield f"{text} (square, or adaptive = true)"
    elif max(asked) < FEW_QUERIES:
        yield f"{text} (one was tried, with {max(asked):.0f} {'query' if max(asked) == 1 else 'queries'} only)"


def _queries(row: Row) -> float | None:
    """How often a black box asks, without an end where that is not known; None for an attack that is none."""
    square = ran(row.attack).get("square")
    if square is not None:
        return square.get("queries", math.inf)
    return math.inf if row.kind == "black box" else None


def _most(direct: Sequence[Row]) -> Mapping[str, Effort]:
    """The stages of AutoAttack that ran, each with the effort of the attack that lacks least of the published one."""
    found: dict[str, Effort] = {}
    for row in direct:
        for name, effort in ran(row.attack).items():
            if name in STANDARD and (name not in found or share(name, effort) > share(name, found[name])):
                found[name] = effort
    return found


def _for(text: str, names: Sequence[str], among: int) -> str:
    return text if len(names) == among else f"{text}, for {'; '.join(names)}"


def attack_in_words(attack: str) -> str:
    """An attack's name for people: ``step_size=0.00392156862745098`` as ``step_size=1/255``."""
    return re.sub(r"(?<==)\d[\d.]*(?:e-?\d+)?(?=,|$)", lambda found: _fraction(found[0]), attack)


def _fraction(text: str) -> str:
    try:
        said = format_eps(float(text))
    except ValueError:  # a version, such as 1.2.3
        return text
    return said if said.endswith("/255") else text


def _rows(evaluations: Iterable[Evaluation]) -> list[Row]:
    return [row for evaluation in evaluations for row in evaluation.rows]


def _listed(names: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(names))
