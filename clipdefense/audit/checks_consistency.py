"""Checks 4 to 7 and 18 to 20: does the same question get the same answer, and is it the question that was meant?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode
from clipdefense.attacks.forward import takes_keys
from clipdefense.attacks.objectives import margin
from clipdefense.audit.exam import Exam
from clipdefense.audit.report import Finding, found, skipped
from clipdefense.audit.statistics import ahead, guessing, least
from clipdefense.audit.subject import Target, as_given, call, copied, finite, operations, target_of
from clipdefense.classifier import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from clipdefense.evaluation.statistics import wilson

REPEATS = 6
EOT_DRAWS = 16
ALONE = 8  # images asked about one by one
NEAR = 1 / 8  # of eps: how far a near copy is
MORE_WORK = 8  # tensor operations that a mere wrapper does not need


def _answer(module: nn.Module, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """Logits in whatever modes the module is."""
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    return finite(call(module, x, ids, 0))


def determinism(exam: Exam) -> Finding:
    """4: the same question again; and how fast declared randomness averages out."""
    x, declared = exam.x[exam.few], exam.subject.traits.randomized
    measured, info, text = {"repeat_difference": _repeated(exam, x)}, {}, ""
    if declared:
        agreement = {target.label: _eot(exam, target, x[:ALONE]) for target in exam.subject.targets}
        label = max(agreement, key=lambda name: agreement[name]["eot_agreement"])
        measured["eot_agreement"] = agreement[label].pop("eot_agreement")
        info = agreement[label]
        text = f"; averaged gradients agree to a cosine of {measured['eot_agreement']:.2f} ({label})"
    keyed = ", its draws keyed by ids and seed" if declared and takes_keys(exam.subject.judge) else ""
    kind = f"declared randomised{keyed}" if declared else "not declared randomised"
    change = f"{measured['repeat_difference']:.2g}"
    return found(4, measured, f"The same question gets another answer by up to {change} ({kind}){text}.", info=info)


def _repeated(exam: Exam, x: Tensor) -> float:
    """The largest change between identical calls, in the modes in which the judge was handed over."""
    spread = exam.spread[: len(x)]
    with as_given(exam.subject.pristine) as judge:
        with torch.no_grad():
            answers = [_answer(judge, x) for _ in range(REPEATS)]
        gradients = []
        for _ in range(2):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_(True)
                logits = _answer(judge, leaf)
            answers.append(logits.detach())
            gradients.append(_gradient(logits, leaf, exam.y[: len(x)]))
    changes = [((other - answers[0]).abs().amax(dim=1) / spread).max() for other in answers[1:]]
    first, again = gradients
    if first is not None and again is not None:
        size = torch.maximum(first.flatten(1).norm(dim=1), again.flatten(1).norm(dim=1)).clamp_min(1e-30)
        changes.append(((first - again).flatten(1).norm(dim=1) / size).max())
    return float(torch.stack(changes).max())


def _gradient(logits: Tensor, leaf: Tensor, y: Tensor) -> Tensor | None:
    try:
        (gradient,) = torch.autograd.grad(margin(logits, y).sum(), leaf, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no graph; check 1 says so
        return None
    return None if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def _eot(exam: Exam, target: Target, x: Tensor) -> dict[str, float]:
    """How well averages of the gradient over draws agree: two halves of 16, and 1 and 4 with all of them."""
    draws = []
    for draw in range(EOT_DRAWS):
        gradient = target.gradient(x, exam.y[: len(x)], margin, seed=exam.seed + 100 + draw)
        draws.append(torch.zeros_like(x) if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    stacked = torch.stack(draws).flatten(2)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a, b, dim=1).mean())

    half, whole = EOT_DRAWS // 2, stacked.mean(dim=0)
    facts = {f"cosine_{k}_of_{EOT_DRAWS}": cosine(stacked[:k].mean(dim=0), whole) for k in (1, 4)}
    return {"eot_agreement": cosine(stacked[:half].mean(dim=0), stacked[half:].mean(dim=0)), **facts}


def coupling(exam: Exam) -> Finding:
    """5: other neighbours, another order, alone; and what earlier questions leave behind."""
    subject, x = exam.subject, exam.x[exam.few]
    if subject.traits.randomized and not takes_keys(subject.judge):
        return skipped(5, "Randomness that takes no ids cannot be held still while the neighbours change.")
    spread, ids = exam.spread[: len(x)], torch.arange(len(x), device=x.device)
    changes: dict[str, float] = {}

    def note(how: str, now: Tensor, then: Tensor, rows: slice | Tensor = slice(None)) -> None:
        changes[how] = float(((now - then).abs().amax(dim=1) / spread[rows]).max())

    with as_given(subject.pristine) as judge, torch.no_grad():
        first = _answer(judge, x)
        back = torch.arange(len(x) - 1, -1, -1, device=x.device)
        note("in another order", _answer(judge, x[back], ids[back])[back], first)
        half = slice(len(x) // 2)
        strangers = torch.cat([x[half], 1 - x[half]])
        names = torch.cat([ids[half], ids[half] + len(x)])
        note("among other images", _answer(judge, strangers, names)[half], first[half], half)
        everybody = torch.cat([exam.x, 1 - exam.x])  # a larger batch than any other question here
        note("in a larger batch", _answer(judge, everybody)[: len(x)], first)
        few = slice(min(ALONE, len(x)))
        alone = [_answer(judge, x[i : i + 1], ids[i : i + 1]) for i in range(len(x[few]))]
        note("alone", torch.cat(alone), first[few], few)
        if not subject.traits.stateful:
            note("when asked again", _answer(judge, x), first)
    if not subject.traits.stateful:
        note("after its near copies", *_with_and_without_history(exam, x))
    how = max(changes, key=lambda name: changes[name])
    value = changes[how] / _rounding(subject.judge)
    text = f"An image's logits change by up to {changes[how]:.2g} of their spread {how}."
    return found(5, {"coupling": value}, text, info={f"change {name}": change for name, change in changes.items()})


def _with_and_without_history(exam: Exam, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of near copies when their originals were asked about before, and when they were not.

    The originals are mixtures of two images, which nobody asked about before the audit either.
    """
    noise = exam.noisy[: len(x)] - x
    mixed = torch.lerp(x, x.roll(1, dims=0), 0.5)
    near = (mixed + NEAR * noise).clamp(0, 1)
    answers = []
    for before in (mixed, None):
        with as_given(exam.subject.pristine) as judge, torch.no_grad():
            if before is not None:
                _answer(judge, before)
            answers.append(_answer(judge, near))
    return answers[0], answers[1]


def _rounding(judge: nn.Module) -> float:
    """How much more than 1e-4 the arithmetic of another batch shape may change in the coarsest dtype of the judge."""
    kinds = [value.dtype for value in judge.parameters() if value.is_floating_point()]
    return max([1.0, *(4 * torch.finfo(kind).eps / 1e-4 for kind in kinds)])


def optimisation(exam: Exam) -> Finding:
    """6: is a backward pass run inside forward?"""
    read = [0]

    def unpack(tensor: Tensor) -> Tensor:
        read[0] += 1
        return tensor

    x, declared = exam.x[:2], exam.subject.traits.optimizes_in_forward
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack)
        with attack_mode(exam.subject.judge), torch.no_grad(), hooks:
            _answer(exam.subject.judge, x)
    except RuntimeError as error:  # torch.func's transforms refuse such hooks, which gives them away
        if "saved tensor hooks" not in str(error):
            raise
        read[0] += 1
    said = "declared" if declared else "not declared"
    text = f"{read[0]} tensors are read back by a backward pass inside forward; optimizes_in_forward is {said}."
    return found(6, {"undeclared_optimisation": 0 if declared else read[0]}, text)


def _operations(module: nn.Module, x: Tensor) -> int:
    """Tensor operations of one forward pass."""
    with attack_mode(module), torch.no_grad():
        return operations(lambda: _answer(module, x))


def identity(exam: Exam) -> Finding:
    """7: a defence that changes nothing, or a loop that ends where it began."""
    subject = exam.subject
    if subject.undefended is None:
        return skipped(7, "There is no undefended model to compare with.")
    spread, effects = exam.spread, {}
    for where, x in (("clean", exam.x), ("noisy", exam.noisy), ("attacked", exam.transfer[0].x_adv)):
        plain = target_of("", subject.undefended)
        with attack_mode(plain), torch.no_grad():
            undefended = plain(x)
        effects[where] = float(((subject.logits(x) - undefended).abs().amax(dim=1) / spread).mean())
    where = max(effects, key=lambda name: effects[name])
    text = f"The logits differ from the undefended model's by at most {effects[where]:.2g} of their spread"
    if subject.part:
        more = _operations(subject.judge, exam.x[:2]) - _operations(subject.undefended, exam.x[:2])
        text += f", after {more} more operations than its part {subject.part!r}"
        if more < MORE_WORK:
            return skipped(7, f"The module hardly does more than its part {subject.part!r}, and claims nothing.")
    return found(7, {"defence_effect": effects[where]}, f"{text} (mean over the {where} images).")


def stored(exam: Exam) -> Finding:
    """18: is the attack still one once its images are files?"""
    broken, levels = exam.white_broken & ~exam.clean.broken, round(exam.threat.eps * 255, 9)
    measured, text = {"eps_in_levels": levels}, f"eps is {levels:g} levels of an 8-bit image"
    kept = torch.zeros_like(broken)
    for made in exam.white:
        kept |= made.judged.broken & exam.subject.judged((made.x_adv * 255).round() / 255, exam.y).broken
    lost = broken & ~kept
    if int(broken.sum()) >= 8:
        measured["lost_in_8_bits"] = int(lost.sum()) / int(broken.sum())
        text += f"; stored in 8 bits, {int(lost.sum())} of {int(broken.sum())} broken images are right again"
    return found(18, measured, text + ".")


def threat_model(exam: Exam) -> Finding:
    """19: is this the question that was meant: the range of the pixels, of eps, and a model that knows its classes?"""
    right, others = _right(exam, lambda x: x), {}
    assert right is not None
    for how, change in _ranges(exam.x.shape[1]).items():
        other = _right(exam, change)
        if other is not None:
            others[how] = ahead(other, right)
    how, p = least(others)
    classes = exam.subject.logits(exam.x[:1]).shape[1]
    measured = {
        "eps_share": exam.reach,
        "other_range_better": p,
        "at_chance": guessing(int(right.sum()), exam.n, classes),
    }
    text = f"{int(right.sum())} of {exam.n} images are right as they are"
    if how:
        text += f", and {int(right.sum()) + others[how][0] - others[how][1]} with {how}"
    return found(19, measured, f"{text}; eps covers {100 * exam.reach:.2g} % of the pixel range.")


def _ranges(channels: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Other conventions for pixels."""
    ranges: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels in [0, 255]": lambda x: x * 255,
        "pixels in [-1, 1]": lambda x: 2 * x - 1,
        "pixels divided by 255": lambda x: x / 255,
    }
    if channels == 3:
        for name, (mean, std) in (("CLIP's", (CLIP_MEAN, CLIP_STD)), ("ImageNet's", (IMAGENET_MEAN, IMAGENET_STD))):
            ranges[f"{name} normalisation"] = lambda x, mean=mean, std=std: (  # type: ignore[misc]
                (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
            )
        ranges["the channels reversed"] = lambda x: x.flip(1)
    return ranges


def _right(exam: Exam, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    """(N,) right on changed images, in one draw; None where the model refuses them."""
    spare = copied(exam.subject.judge)
    judge = exam.subject.judge if spare is None else spare
    try:
        with attack_mode(judge), torch.no_grad():
            return _answer(judge, change(exam.x)).argmax(dim=1) == exam.y
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError):  # a model may check its input
        return None


def intervals(exam: Exam) -> Finding:
    """20: what the number of images allows to be said."""
    shares = [float((~exam.clean.broken).float().mean()), float(exam.worst_case().float().mean())]
    ends = [wilson(share, exam.n) for share in shares]
    value = max((end.high - end.low) / 2 for end in ends)
    text = f"With {exam.n} images an accuracy is known to within {100 * value:.0f} points (95 % Wilson)."
    return found(20, {"half_width": value}, text)
