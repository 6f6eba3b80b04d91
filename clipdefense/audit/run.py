"""``cd.audit(...)``: the twenty checks, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import logits_of
from clipdefense.attacks.doubts import AttackWarning
from clipdefense.attacks.engine import prepare
from clipdefense.audit import checks_attacks, checks_consistency, checks_gradient
from clipdefense.audit.exam import OWN, VIEWS, Exam
from clipdefense.audit.report import Accuracy, Audit, Finding, reason
from clipdefense.audit.subject import SEEDS, as_given, subject_of
from clipdefense.audit.thresholds import CHECKS
from clipdefense.defenses import TestTimeDefense
from clipdefense.errors import UsageError
from clipdefense.evaluation.fingerprint import constructed, fingerprint
from clipdefense.evaluation.roles import check_roles
from clipdefense.generators import global_seed
from clipdefense.threat import ThreatModel

FEWEST_IMAGES, MOST_IMAGES = 8, 64
EOT = 2  # draws a step on a view; each step draws afresh

Progress = Callable[[str], None]

ORDER: dict[int, Callable[[Exam], Finding]] = {
    4: checks_consistency.determinism,
    5: checks_consistency.coupling,
    6: checks_consistency.optimisation,
    19: checks_consistency.threat_model,
    1: checks_gradient.unusable_gradients,
    2: checks_gradient.wrong_gradients,
    3: checks_gradient.precision_dependence,
    16: checks_gradient.planted_missed,
    17: checks_gradient.misleading_slices,
    8: checks_attacks.transfer,
    9: checks_attacks.black_box,
    10: checks_attacks.eps_sweep,
    11: checks_attacks.more_steps,
    12: checks_attacks.iterates,
    13: checks_attacks.above_clean,
    14: checks_attacks.random_noise,
    15: checks_attacks.adaptive_views,
    7: checks_consistency.identity,
    18: checks_consistency.stored,
    20: checks_consistency.intervals,  # last: it looks at everything that was tried
}


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    defense: TestTimeDefense | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Twenty checks of a model, or of a test-time defence around it, before its robust accuracy is believed.

    What a defence declares (its traits, its adaptive views) chooses the protocol; what it does not declare and the
    audit finds is INVALID. A module that a defence's ``wrap`` made is taken apart; one that declares nothing is judged
    by its own gradients, and an undefended classifier among its parts serves for transfer. Steps, restarts and step
    size are the audit's own.

    Args:
        model: images in [0, 1] -> logits, in the modes in which it is to be used: train mode is not corrected.
        x: (N, C, H, W) in [0, 1], at least 8, of which 64 are used; y: (N,) integer labels.
        threat: norm and eps, above 0, in [0, 1] pixel units.
        defense: a test-time defence around the model.
        seed: of attacks and noise. The global generators are seeded with it too, and restored afterwards.
        progress: told which check begins.

    Returns:
        An :class:`~clipdefense.audit.report.Audit`: a finding a check, and the robust accuracies unless one is INVALID.

    Raises:
        UsageError: bad images, labels, model, defence or threat model; a model that does not return logits.
    """
    with examination(model, x, y, threat, defense=defense, seed=seed) as exam:
        facts = fingerprint(model, **_settings(exam))
        findings: list[Finding] = []
        for number, check in ORDER.items():
            if progress is not None:
                progress(f"check {len(findings) + 1} of {len(ORDER)}: {CHECKS[number]}")
            findings.append(check(exam))
    return _result(exam, tuple(sorted(findings, key=lambda finding: finding.number)), facts)


@contextmanager
def examination(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    defense: TestTimeDefense | None = None,
    seed: int = 0,
) -> Iterator[Exam]:
    """What :func:`audit` runs its checks on, :data:`ORDER` or single ones of them; arguments as there."""
    check_roles(model, threat, defense, None, None)
    if threat.eps == 0:
        raise UsageError("threat has eps 0; an audit attacks, so eps above 0 is expected, such as 4/255.")
    seed, _ = prepare(model, x, y, seed, None, None)
    if len(x) < FEWEST_IMAGES:
        raise UsageError(f"x has {len(x)} images; an audit compares counts, so at least {FEWEST_IMAGES} are expected.")
    x, y = x[:MOST_IMAGES].detach(), y[:MOST_IMAGES].to(x.device, torch.int64)
    with global_seed(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # a finding says the same, and more
        with as_given(model) as asked, torch.no_grad():
            classes = logits_of(asked, x[:2]).shape[1]
        if int(y.max()) >= classes:
            raise UsageError(f"y has labels up to {int(y.max())}, but the model has {classes} classes.")
        yield Exam(subject_of(model, defense, x, y, EOT), x, y, threat, seed)


def _settings(exam: Exam) -> dict[str, Any]:
    defense = exam.subject.defense
    return {
        "seed": exam.seed,
        "attacked_at": list(exam.x.shape[2:]),
        "n": exam.n,
        "norm": exam.threat.norm,
        "eps": exam.threat.eps,
        "defense": None if defense is None else constructed(defense),
        "effort": {"own gradients": vars(OWN), "views": {**vars(VIEWS), "eot": EOT}, "defence_seeds": SEEDS},
    }


def _result(exam: Exam, findings: tuple[Finding, ...], facts: dict[str, Any]) -> Audit:
    subject, withheld = exam.subject, reason(findings)
    transfer = adaptive = None
    if not withheld:
        if exam.transfer:
            right = torch.stack([made.judged.right for made in exam.transfer]).all(dim=0) & exam.clean.right
            label = "transfer from the undefended model"
            transfer = Accuracy(
                float(right.float().mean()), exam.n, label + (f" ({subject.part})" if subject.part else "")
            )
        if subject.views or subject.defense is None:
            label = (
                "worst case over " + ("the adaptive views and " if subject.views else "") + "all attacks of the audit"
            )
            adaptive = Accuracy(float(exam.worst_case().float().mean()), exam.n, label)
    clean = Accuracy(float(exam.clean.right.float().mean()), exam.n, "no attack")
    name = type(exam.subject.judge if subject.defense is None else subject.defense).__name__
    assert [finding.number for finding in findings] == list(CHECKS)
    return Audit(name, exam.threat, findings, clean, transfer, adaptive, withheld, facts)
