"""Checks 1, 2, 3, 16 and 17: are the gradients there, are they right, and do they lead anywhere?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense import randomness
from clipdefense.attacks.context import attack_mode
from clipdefense.attacks.norms import BALLS, project
from clipdefense.attacks.objectives import cross_entropy, margin
from clipdefense.audit.exam import Exam
from clipdefense.audit.report import Finding, found, skipped
from clipdefense.audit.subject import Target, copied, finite, target_of

MISSED = 0.2  # relative, of directional derivatives
CHANGED = 0.01  # relative, of gradients
DISAGREE = 0.1  # of the gradient's L1 mass
SCALES = (2.0**8, 2.0**16)  # powers of two: exact in every binary format, short of its ends
DIRECTIONS = 8
COARSE = 4  # cells a side of the coarse directions
FRACTIONS = (1 / 2, 1 / 8, 1 / 64)  # of eps, the steps of finite differences
FINE_FRACTION = 1 / 4096  # one more in float64
SLICE = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of eps
PLANTS = 64  # random points among which a planted example is chosen


def unusable_gradients(exam: Exam) -> Finding:
    """1: no gradient, a zero one, or one that is not finite."""
    shares = {target.label: _unusable(exam, target) for target in exam.subject.targets}
    label = min(shares, key=lambda name: shares[name][0])
    value, where = shares[label]
    text = f"{100 * value:.0f} % of the {where} images have no usable cross-entropy gradient ({label})."
    return found(1, {"unusable_gradients": value}, text)


def _unusable(exam: Exam, target: Target) -> tuple[float, str]:
    """The largest share over clean images, noisy ones and those where an attack ended, and which of them it was."""
    shares = []
    for where, x in (("clean", exam.x), ("noisy", exam.noisy), ("attacked", exam.endpoints)):
        gradient = target.gradient(x, exam.y, cross_entropy)
        if gradient is None:
            shares.append((1.0, where))
            continue
        flat = gradient.flatten(1)
        usable = torch.isfinite(flat).all(dim=1) & (flat != 0).any(dim=1)
        shares.append((1 - float(usable.float().mean()), where))
    return max(shares, key=lambda share: share[0])


def wrong_gradients(exam: Exam) -> Finding:
    """2: directional derivatives of the margin against central differences."""
    target = exam.subject.exact
    if target is None:
        return skipped(2, "The declared defence has surrogate gradients, and there is no undefended model to look at.")
    double = _doubled(exam, target)
    shares = {}
    for where, x in (("noisy", exam.noisy), ("attacked", exam.endpoints)):
        missed = _missed(exam, target if double is None else double, x[exam.few], exam.y[exam.few], double is not None)
        shares[where] = float((missed > MISSED).float().mean())
    where = max(shares, key=lambda name: shares[name])
    precision = "float32" if double is None else "float64"
    text = f"Gradients of {target.label} miss finite differences on {100 * shares[where]:.0f} % of the {where} images"
    return found(2, {"wrong_gradients": shares[where]}, f"{text} ({precision}).")


def _doubled(exam: Exam, target: Target) -> Target | None:
    """The target in float64, where it can be copied and works there."""
    spare = copied(target.parts[0], torch.float64)
    if spare is None:
        return None
    double = target_of(target.label, spare)
    gradient = double.gradient(exam.x[:2].double(), exam.y[:2], margin)
    return double if gradient is not None and bool(torch.isfinite(gradient).all()) else None


def _directions(x: Tensor, seed: int) -> Tensor:
    """(DIRECTIONS, N, C, H, W) of random signs: pixel by pixel, and in coarse cells, along which images vary more."""
    ids, parts = torch.arange(len(x), device=x.device), []
    for k in range(DIRECTIONS):
        shape = tuple(x.shape[1:]) if k % 2 else (x.shape[1], COARSE, COARSE)
        u = randomness.uniform(shape, ids, seed=seed, stream=2000 + k, dtype=x.dtype) - 0.5
        parts.append(F.interpolate(u, size=x.shape[-2:]).sign())
    return torch.stack(parts)


def _inside(x: Tensor, step: float, seed: int) -> Tensor:
    """The images a little moved, so that no step leaves the box and no two pixels are level.

    Where pixels are level, as in a black background, a maximum or a median has a kink, and no gradient is right.
    """
    ids = torch.arange(len(x), device=x.device)
    u = randomness.uniform(tuple(x.shape[1:]), ids, seed=seed, stream=2999, dtype=x.dtype)
    return x.clamp(2 * step, 1 - 2 * step) + step * (2 * u - 1)


def _missed(exam: Exam, target: Target, x: Tensor, y: Tensor, double: bool) -> Tensor:
    """(N,) relative error of the directional derivatives, at the step size where it is least."""
    x = x.double() if double else x
    fractions = (*FRACTIONS, FINE_FRACTION) if double else FRACTIONS
    steps = [fraction * exam.reach for fraction in fractions]
    x = _inside(x, steps[0], exam.seed)
    gradient, directions = target.gradient(x, y, margin), _directions(x, exam.seed)
    ids = torch.arange(len(x), device=x.device)
    given = x.new_zeros(DIRECTIONS, len(x)) if gradient is None else (gradient * directions).flatten(2).sum(dim=2)

    def value(point: Tensor) -> Tensor:
        logits = finite(target.raw(point, ids, 0))
        rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1)
        return torch.stack([margin(logits, y), rounding])

    errors = []
    with attack_mode(target), torch.no_grad():
        for step in steps:
            pairs = [(value(x + step * u), value(x - step * u)) for u in directions]
            seen = torch.stack([(up[0] - down[0]) / (2 * step) for up, down in pairs])
            floor = 32 * pairs[0][0][1] / step
            size = torch.maximum(seen.norm(dim=0), given.norm(dim=0))
            error = (seen - given).norm(dim=0) / size.clamp_min(1e-300 if double else 1e-30)
            # where both are below rounding there is nothing to compare, which is no agreement
            errors.append(torch.where(size > floor * DIRECTIONS**0.5, error, torch.inf))
    least = torch.stack(errors).amin(dim=0)
    return torch.where(torch.isnan(least), torch.inf, least).masked_fill(torch.stack(errors).isinf().all(dim=0), 0.0)


def precision_dependence(exam: Exam) -> Finding:
    """3: the gradient under a scaled loss, and against float64."""
    target = exam.subject.exact
    if target is None:
        return skipped(3, "The declared defence has surrogate gradients, and there is no undefended model to look at.")
    x, y = exam.noisy[exam.few], exam.y[exam.few]
    plain = target.gradient(x, y, cross_entropy)
    if plain is None:
        return skipped(3, "There is no gradient to compare (see check 1).")
    scaled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for scale in SCALES:
        other = target.gradient(x, y, cross_entropy, scale=scale)
        if other is not None:
            change = (other / scale - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1).clamp_min(1e-38)
            # what overflows under a scale says nothing; what was zero and is no longer, says much
            scaled |= torch.isfinite(other).flatten(1).all(dim=1) & ~(change <= CHANGED)
    opposed, double = torch.zeros_like(scaled), _doubled(exam, target)
    if double is not None:
        opposed = _opposed(target.gradient(x, y, margin), double.gradient(x.double(), y, margin))
    value = float((scaled | opposed).float().mean())
    text = f"On {int(scaled.sum())} of {len(x)} images the gradient changes with the scale of the loss, on " + (
        f"{int(opposed.sum())} its signs differ from float64's." if double is not None else "float64 cannot run it."
    )
    return found(3, {"precision_dependence": value}, text)


def _opposed(single: Tensor | None, double: Tensor | None) -> Tensor:
    """(N,) whether too much of the gradient has another sign than in float64."""
    assert single is not None and double is not None
    mass = double.abs().flatten(1)
    against = mass * (single.sign() != double.sign()).flatten(1)
    return against.sum(dim=1) > DISAGREE * mass.sum(dim=1)


class _Planted(nn.Module):
    """A binary classifier an image: a linear readout of the target's logits with a threshold."""

    def __init__(self, target: Target, origin: Tensor, readout: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.target, self.origin, self.readout, self.threshold = target, origin, readout, threshold

    def logits(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """(N, 2): zero, and how far the readout is past the threshold (1 there, 0 at the clean image, 2 beyond)."""
        rows = ids & ((1 << 40) - 1)  # attacks put the step above the image's number
        moved = finite(self.target.raw(x, ids, seed)) - self.origin[rows]
        past = (moved * self.readout[rows]).sum(dim=1) / self.threshold[rows] - 1
        return torch.stack([torch.zeros_like(past), past], dim=1)


def planted_missed(exam: Exam) -> Finding:
    """16: adversarial examples that are known to be there (the binarization test of Zimmermann et al. 2022)."""
    subject = exam.subject
    if subject.traits.randomized:
        return skipped(16, "Declared randomness moves planted examples from draw to draw.")
    x, ids = exam.x[exam.few], torch.arange(len(exam.x[exam.few]), device=exam.x.device)
    origin = subject.logits(x)
    moved = torch.stack([subject.logits(point) for point in _plants(exam, x)]) - origin
    length = moved.norm(dim=2)
    chosen = length.argmax(dim=0)
    readout = F.normalize(moved[chosen, ids], dim=1)
    reached = (moved * readout).sum(dim=2).topk(2, dim=0).values
    threshold = reached.mean(dim=0).clamp_min(1e-12)
    there = (reached[0] > reached[1] * 1.001) & (reached[0] > 1e-4 * exam.spread[exam.few])
    if int(there.sum()) < len(x) // 4 or int(there.sum()) < 4:
        return skipped(16, f"Noise moves the logits of {int(there.sum())} of {len(x)} images; nothing can be planted.")
    found_some = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for target in subject.targets:
        planted = _Planted(target, origin, readout, threshold)
        attacked = Target(target.label, planted.logits, list(target.parts), eot=target.eot)
        attacked.blind = target.blind
        x_adv = exam.attack_planted(attacked, x)
        judged = ((subject.logits(x_adv) - origin) * readout).sum(dim=1)
        found_some |= judged > threshold
    missed = float((~found_some)[there].float().mean())
    text = f"The attack finds {int((found_some & there).sum())} of {int(there.sum())} planted adversarial examples."
    return found(16, {"planted_missed": missed}, text)


def _plants(exam: Exam, x: Tensor) -> list[Tensor]:
    ball, ids = BALLS[exam.threat.norm], torch.arange(len(x), device=x.device)
    eps, seed = exam.threat.eps, exam.seed
    draws = (ball.surface(x, ids, eps, seed=seed, stream=3000 + k) for k in range(PLANTS))
    return [project(ball, x, x + draw, eps) for draw in draws]


def misleading_slices(exam: Exam) -> Finding:
    """17: the margin along the gradient's direction against random directions of the same length."""
    x, y, subject = exam.x[exam.few], exam.y[exam.few], exam.subject
    ball, eps = BALLS[exam.threat.norm], exam.threat.eps
    ids = torch.arange(len(x), device=x.device)

    def furthest(direction: Tensor) -> Tensor:
        points = [project(ball, x, x + fraction * eps * direction, eps) for fraction in SLICE]
        return torch.stack([margin(subject.logits(point), y) for point in points]).amax(dim=0)

    signs = torch.stack(
        [ball.direction(randomness.normal(tuple(x.shape[1:]), ids, seed=exam.seed, stream=4000 + k)) for k in range(8)]
    )
    chance = torch.stack([furthest(direction.to(x)) for direction in signs]).amax(dim=0)
    shares = {}
    for target in subject.targets:
        gradient = target.gradient(x, y, margin)
        led = torch.zeros_like(x) if gradient is None else ball.direction(torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
        shares[target.label] = float((furthest(led) <= chance).float().mean())
    label = min(shares, key=lambda name: shares[name])
    text = (
        f"On {100 * shares[label]:.0f} % of the images the gradient ({label}) leads no further than a random direction."
    )
    return found(17, {"misleading_slices": shares[label]}, text)
