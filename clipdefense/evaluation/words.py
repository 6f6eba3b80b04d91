"""A threat model, what was tried and what was not, in sentences for people who run no attacks themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
            found.setdefault(row.kind, []).append(row.attack.removeprefix("+ "))
    return [f"{said} Attacks: {_listed(found[kind])}." for kind, said in _KINDS.items() if kind in found]


def not_tried(evaluations: Sequence[Evaluation]) -> list[str]:
    """What was not, so that nobody reads the numbers as more than they are."""
    missing = []
    kinds = {row.kind for row in _rows(evaluations)}
    for evaluation in evaluations:
        if evaluation.caveat:
            what = "an attacker who knows the defence" if evaluation.caveat == "transfer only" else "adaptive views"
            missing.append(f"{what}, for {evaluation.name}")
        missing += [f"{reason}, for {evaluation.name}" for reason in evaluation.left_out]
    attacks = {row.attack.removeprefix("+ ").partition(",")[0] for row in _rows(evaluations)}
    if "black box" not in kinds and not attacks & {"square", "autoattack"}:
        missing.append("an attacker who sees answers alone, without gradients (square, or adaptive = true)")
    if "autoattack" not in attacks and not {"apgd-ce", "apgd-t"} <= attacks:
        missing.append("AutoAttack, the ensemble with which robust accuracies are usually compared")
    norms = {evaluation.threat.norm for evaluation in evaluations}
    missing += [f"{name} perturbations" for norm, name in (("linf", "Linf"), ("l2", "L2")) if norm not in norms]
    return [f"{text[0].upper()}{text[1:]}." for text in (*dict.fromkeys(missing), *_ALWAYS)]


def _rows(evaluations: Iterable[Evaluation]) -> list[Row]:
    return [row for evaluation in evaluations for row in evaluation.rows]


def _listed(names: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(names))
