"""The state of one audit: the subject, its images, and the attacks that several checks share, each run once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipdefense.attacks.norms import BALLS, project
from clipdefense.attacks.objectives import cross_entropy
from clipdefense.attacks.pgd import pgd
from clipdefense.attacks.square import square
from clipdefense.audit.statistics import ahead, mcnemar
from clipdefense.audit.subject import Judged, Subject, Target, operations, target_of
from clipdefense.threat import ThreatModel

FEW = 32  # images of the dearer checks
TIE = 0.01  # of the spread of an image's logits: margins nearer than this are level


@dataclass(frozen=True)
class Effort:
    """What the attacks may spend; views draw several times a step, so they get less of everything else."""

    steps: int
    objectives: tuple[str, ...]
    queries: int
    noise_draws: int


OWN = Effort(steps=20, objectives=("margin", "ce"), queries=200, noise_draws=10)
VIEWS = Effort(steps=10, objectives=("margin",), queries=100, noise_draws=4)
LONGER = 5  # times the steps, for the check whether more of them matter


class Attempt(NamedTuple):
    """Images that an attacker made within the budget, and what the judge said."""

    label: str
    x_adv: Tensor
    judged: Judged
    target: Target | None = None


def broken_by(attempts: Sequence[Attempt]) -> Tensor:
    """(N,) broken by any of them."""
    return torch.stack([made.judged.broken for made in attempts]).any(dim=0)


def margins_of(attempts: Sequence[Attempt]) -> Tensor:
    """(attempts, N) margins that they reached."""
    return torch.stack([made.judged.margin for made in attempts])


class Comparison(NamedTuple):
    """Who got further on how many images, and how likely that is by chance."""

    more: int
    fewer: int
    p: float


@dataclass
class Exam:
    """One audit under way.

    Attributes:
        subject: what is audited.
        x: (N, C, H, W) in [0, 1]; y: (N,).
        threat: the budget.
        seed: of attacks and noise.
        tried: every attempt on all images at eps, for the worst case.
    """

    subject: Subject
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int
    tried: list[Attempt] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def few(self) -> slice:
        """The images of the dearer checks."""
        return slice(FEW)

    @property
    def effort(self) -> Effort:
        return VIEWS if self.subject.views else OWN

    @property
    def full_eps(self) -> float:
        """The eps that allows any image."""
        return 1.0 if self.threat.norm == "linf" else math.sqrt(self.x[0].numel())

    @property
    def reach(self) -> float:
        """How far a pixel moves when all move alike, in [0, 1]."""
        return self.threat.eps / self.full_eps

    @cached_property
    def clean(self) -> Judged:
        return self.subject.judged(self.x, self.y)

    @cached_property
    def spread(self) -> Tensor:
        """(N,) the range of each image's clean logits: the unit of differences between logits."""
        logits = self.subject.logits(self.x)
        return (logits.amax(dim=1) - logits.amin(dim=1)).clamp_min(1e-12)

    @cached_property
    def noisy(self) -> Tensor:
        """(N, C, H, W): the images with noise from the ball."""
        return self.noise(0)

    def noise(self, draw: int) -> Tensor:
        """The images at a random point of the ball, in the box."""
        ball, ids = BALLS[self.threat.norm], torch.arange(self.n, device=self.x.device)
        noise = ball.uniform(self.x, ids, self.threat.eps, seed=self.seed, stream=1000 + draw)
        return project(ball, self.x, self.x + noise, self.threat.eps)

    def attack(
        self,
        target: Target,
        objective: str,
        *,
        rows: slice | Tensor = slice(None),
        steps: int | None = None,
        eps: float | None = None,
        seed: int = 0,
        random_start: bool = True,
        early_stop: bool = False,
    ) -> Tensor:
        """PGD on a target, for some of the images; the last iterate, unless stopped early."""
        eps = self.threat.eps if eps is None else eps
        budget = ThreatModel(self.threat.norm, eps, steps=self.effort.steps if steps is None else steps)
        x, y = self.x[rows], self.y[rows]
        options: dict[str, Any] = {"eot": target.eot, "early_stop": early_stop, "random_start": random_start}
        return pgd(target, x, y, budget, objective=objective, seed=self.seed + seed, batch_size=len(x), **options)

    def attack_planted(self, target: Target, x: Tensor) -> Tensor:
        """The same attack on a binary target, all of whose images are of class 0."""
        budget = ThreatModel(self.threat.norm, self.threat.eps, steps=self.effort.steps)
        y = torch.zeros(len(x), dtype=torch.long, device=x.device)
        options: dict[str, Any] = {"objective": "margin", "eot": target.eot, "early_stop": False}
        return pgd(target, x, y, budget, seed=self.seed, batch_size=len(x), **options)

    def attempt(self, label: str, x_adv: Tensor, target: Target | None = None) -> Attempt:
        """Judge images made from all the images within the budget, and remember them."""
        made = Attempt(label, x_adv, self.subject.judged(x_adv, self.y), target)
        self.tried.append(made)
        return made

    @cached_property
    def white(self) -> tuple[Attempt, ...]:
        """The white-box attack: every target, every objective."""
        return tuple(
            self.attempt(f"{objective} on {target.label}", self.attack(target, objective), target)
            for target in self.subject.targets
            for objective in self.effort.objectives
        )

    @cached_property
    def by_own_gradients(self) -> tuple[Attempt, ...]:
        """Attacks that follow the judge's own gradients, where the white-box attack has views."""
        return self._attempts(self.subject.own, f"on {self.subject.own.label}")

    @cached_property
    def white_margin(self) -> Tensor:
        """(N,) the furthest that the white-box attack got."""
        return margins_of(self.white).amax(dim=0)

    @cached_property
    def white_broken(self) -> Tensor:
        """(N,) broken by some white-box attack."""
        return broken_by(self.white)

    @cached_property
    def endpoints(self) -> Tensor:
        """(N, C, H, W): where the white-box attack got furthest."""
        best = margins_of(self.white).argmax(dim=0)
        return torch.stack([made.x_adv for made in self.white])[best, torch.arange(self.n, device=self.x.device)]

    @cached_property
    def strongest(self) -> Target:
        """The target whose attack broke most; of those that broke as many, the one whose gradient costs least."""
        most = max(int(made.judged.broken.sum()) for made in self.white)
        best = {made.target: None for made in self.white if made.target and int(made.judged.broken.sum()) == most}
        if len(best) == 1:
            return next(iter(best))
        one = self.x[:1], self.y[:1]
        return min(best, key=lambda target: operations(lambda: target.gradient(*one, cross_entropy)))

    @cached_property
    def transfer(self) -> tuple[Attempt, ...]:
        """Attacks on the undefended model; none without one."""
        if self.subject.undefended is None:
            return ()
        return self._attempts(target_of("the undefended model", self.subject.undefended), "transferred")

    def _attempts(self, target: Target, how: str) -> tuple[Attempt, ...]:
        """Every objective on a target that has exact gradients."""
        target.look(self.x, self.y, cross_entropy)
        made = [self.attack(target, objective, steps=OWN.steps) for objective in OWN.objectives]
        return tuple(
            self.attempt(f"{objective} {how}", x_adv, target) for objective, x_adv in zip(OWN.objectives, made)
        )

    @cached_property
    def black(self) -> Attempt:
        """Square on the judge: all images, or the first of them where the judge is dear; the others stay clean."""
        target, rows = self.subject.own, slice(None) if not self.subject.views else self.few
        budget = replace(self.threat, restarts=1)
        x, y, queries = self.x[rows], self.y[rows], self.effort.queries
        x_adv = square(target, x, y, budget, queries=queries, seed=self.seed, early_stop=False, batch_size=len(x))
        rest = self.x.clone()
        rest[rows] = x_adv
        return self.attempt("square", rest)

    @cached_property
    def random(self) -> tuple[Attempt, ...]:
        """Noise from the ball."""
        return tuple(self.attempt("random noise", self.noise(draw)) for draw in range(self.effort.noise_draws))

    def compare(self, others: tuple[Attempt, ...], rows: slice = slice(None)) -> Comparison:
        """Whether others got further than the white-box attack.

        Further means a larger margin where the white-box attack had exact gradients, so that images count which
        neither breaks; where it had views, which stand for the judge, it means broken.
        """
        if self.subject.views:
            more, fewer = ahead(broken_by(others)[rows], self.white_broken[rows])
        else:
            gap = (margins_of(others).amax(dim=0) - self.white_margin) / self.spread
            more, fewer = ahead((gap > TIE)[rows], (gap < -TIE)[rows])
        return Comparison(more, fewer, mcnemar(more, fewer))

    def worst_case(self) -> Tensor:
        """(N,) right without an attack and under everything that was tried."""
        right = ~self.clean.broken
        for made in self.tried:
            right = right & ~made.judged.broken
        return right
