"""Checks 8 to 15: do the attacks behave as attacks must, and did they know what they attacked?"""

from __future__ import annotations

import torch

from clipdefense.attacks.context import attack_mode
from clipdefense.attacks.norms import BALLS, project
from clipdefense.audit.exam import FEW, LONGER, Comparison, Exam, broken_by
from clipdefense.audit.report import Finding, found, skipped
from clipdefense.audit.statistics import ahead, least, mcnemar
from clipdefense.audit.subject import call, finite
from clipdefense.defenses import InputDefense


def _further(who: str, result: Comparison, exam: Exam) -> str:
    kind = (
        "breaks what the white-box attack does not" if exam.subject.views else "gets further than the white-box attack"
    )
    return f"{who} {kind} on {result.more} images, the other way round on {result.fewer} (p = {result.p:.2g})."


def transfer(exam: Exam) -> Finding:
    """8: who does not know the defence must not be ahead of who does."""
    if not exam.transfer:
        return skipped(8, "There is no undefended model to attack.")
    result = exam.compare(exam.transfer)
    return found(8, {"transfer_ahead": result.p}, _further("Transfer from the undefended model", result, exam))


def black_box(exam: Exam) -> Finding:
    """9: who sees outputs only must not be ahead of who sees gradients."""
    rows = exam.few if exam.subject.views else slice(None)
    result = exam.compare((exam.black,), rows)
    text = _further(f"Square ({exam.effort.queries} queries)", result, exam)
    return found(9, {"black_box_ahead": result.p}, text)


def eps_sweep(exam: Exam) -> Finding:
    """10: more eps breaks more, and enough of it everything."""
    full, eps = exam.full_eps, exam.threat.eps
    ladder = sorted({min(value, full) for value in (eps, 2 * eps, 8 * eps, full / 2, full)})
    x, y = exam.x[exam.few], exam.y[exam.few]
    standing, before, splits, counts = ~exam.clean.broken[exam.few], None, {}, []
    for step in ladder:
        # from the image itself: a random start this wide would break images without an attack
        x_adv = exam.attack(exam.strongest, "margin", rows=exam.few, eps=step, random_start=False)
        stands = ~exam.subject.judged(x_adv, y).broken
        if before is not None:
            splits[f"{step:.3g}"] = ahead(stands, before)
        before, standing = stands, standing & stands
        counts.append(f"{int(stands.sum())} at {step:.3g}")
    share = float(standing.float().mean())
    text = f"Of {len(x)} images stand: {', '.join(counts)}; {int(standing.sum())} under all of them."
    return found(10, {"standing_at_full_eps": share, "not_monotone": least(splits)[1]}, text)


def more_steps(exam: Exam) -> Finding:
    """11: has the attack converged?"""
    left = (~exam.white_broken).nonzero()[:, 0]
    left = left[: FEW if exam.subject.views else None]  # a view's step is many passes
    steps = LONGER * exam.effort.steps
    x_adv = exam.x.clone()
    if len(left):
        stop = not exam.subject.views
        x_adv[left] = exam.attack(exam.strongest, "margin", rows=left, steps=steps, seed=1, early_stop=stop)
    broken = exam.attempt(f"{steps} steps", x_adv).judged.broken
    more = int((broken & ~exam.white_broken & ~exam.clean.broken).sum())
    text = f"{steps} steps from another start break {more} of {len(left)} images that {exam.effort.steps} leave."
    return found(11, {"more_steps_break": mcnemar(more, 0)}, text)


def iterates(exam: Exam) -> Finding:
    """12: is an image that was broken on the way returned unbroken?"""
    if exam.subject.views:
        return skipped(12, "A view's iterates are not the judge's; the last ones are judged, of every attack.")
    target, objective = exam.subject.targets[0], exam.effort.objectives[0]
    stopped = exam.attempt("any iterate", exam.attack(target, objective, early_stop=True)).judged.broken
    last = exam.white[0].judged.broken
    more, fewer = ahead(stopped, last)
    text = f"{more} images are broken at some iterate and not at the last, {fewer} the other way round."
    return found(12, {"last_iterate_lost": mcnemar(more, fewer)}, text)


def above_clean(exam: Exam) -> Finding:
    """13: an attack must not help."""
    clean = ~exam.clean.broken
    splits = {made.label: ahead(~made.judged.broken, clean) for made in (*exam.white, *exam.transfer)}
    label, p = least(splits)
    more, fewer = splits[label]
    text = f"{more} images are right under an attack ({label}) and wrong without it, {fewer} the other way round."
    return found(13, {"robust_above_clean": p}, text)


def random_noise(exam: Exam) -> Finding:
    """14: the two controls: an attacker who only draws noise, and a defender who does."""
    result = exam.compare(exam.random)
    measured = {"noise_ahead": result.p}
    text = _further(f"The best of {exam.effort.noise_draws} random perturbations", result, exam)
    if exam.subject.defense is not None and exam.transfer:
        gain, size = _gain(exam)
        measured["gain_over_noise"] = gain
        text = f"{text[:-1]}; on transferred images the defence is {100 * gain:+.0f} points off noise of +-{size:.3g}."
    return found(14, measured, text)


def _gain(exam: Exam) -> tuple[float, float]:
    """(accuracy on transferred images less that of noise before the undefended model, the noise's radius)."""
    subject, made = exam.subject, exam.transfer[0]
    undefended, defense = subject.undefended, subject.defense
    assert undefended is not None
    eps = exam.reach
    if isinstance(defense, InputDefense):  # its own budget
        ids = torch.arange(exam.n, device=exam.x.device)
        eps = float(defense.perturbation(made.x_adv.clamp(0, 1), ids=ids).abs().max())
    ball, right, draws = BALLS["linf"], [], 5
    with attack_mode(undefended), torch.no_grad():
        for draw in range(draws):
            names = torch.arange(exam.n, device=exam.x.device)
            noise = ball.uniform(made.x_adv, names, eps, seed=exam.seed, stream=5000 + draw)
            noised = project(ball, made.x_adv, made.x_adv + noise, eps)
            right.append(finite(call(undefended, noised, names, 0)).argmax(dim=1) == exam.y)
    return float(made.judged.right.float().mean() - torch.stack(right).float().mean()), eps


def adaptive_views(exam: Exam) -> Finding:
    """15: was there something for an attacker who knows the defence?"""
    subject = exam.subject
    if subject.defense is None and not subject.views:
        traits = subject.traits
        if not (traits.randomized or traits.optimizes_in_forward or traits.stateful):
            return skipped(15, "No defence is declared: the module's own gradients are what there is to attack.")
    names = ", ".join(target.label for target in subject.targets[: subject.views]) or "none"
    measured, text = {"views": float(subject.views)}, f"{subject.views} adaptive views ({names})"
    exact = subject.exact is not None and subject.exact.parts[0] is subject.judge and not subject.traits.randomized
    if subject.views and exact:
        through = [made for made in exam.white if made.target is not None and made.target.label != subject.own.label]
        more, fewer = ahead(broken_by(through), broken_by(exam.by_own_gradients))
        best = max(through, key=lambda made: int(made.judged.broken.sum()))
        measured["views_ahead"] = mcnemar(more, fewer)
        text += f"; they break {more} images that the judge's own gradients do not, the other way round {fewer}"
        text += f" (the strongest: {best.label})"
    return found(15, measured, text + ".")
