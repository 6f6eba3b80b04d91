"""The loop under every iterative gradient attack: evaluate, let broken images leave, advance the rest, refill.

An attack is a per-image state machine (:class:`Method`); since each image carries its own state, an image that is
broken leaves at once and the next of its work unit takes the place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode, check_finite, logits_of
from clipdefense.attacks.objectives import Objective
from clipdefense.checks import check_images, check_labels
from clipdefense.randomness import draw_seed

State = dict[str, Tensor]
"""Per-image tensors, all (N, ...); always holds ``x`` (clean) and ``x_adv`` (the point to evaluate next)."""

UNIT = 512


class Evaluation(NamedTuple):
    """What the model says at ``state["x_adv"]``."""

    loss: Tensor  # (N,), what the attack maximises
    gradient: Tensor  # (N, C, H, W) of the loss; empty for a method that asks for none
    wrong: Tensor  # (N,) bool, misclassified


class Method(Protocol):
    """An attack as a state machine over images, each at its own step."""

    evaluations: int  # an image gets at most so many
    uses_gradient: bool

    def start(self, x: Tensor, ids: Tensor) -> State:
        """The state of images that enter."""

    def advance(self, state: State, seen: Evaluation) -> State:
        """The state after one evaluation."""

    def result(self, state: State) -> Tensor:
        """What an image that was never broken returns, (N, C, H, W)."""


class MinimumNorm(Method, Protocol):
    """A method whose points may lie outside the ball, and whose images may finish before ``evaluations``."""

    def inside(self, state: State) -> Tensor:
        """(N,) whether ``x_adv`` is within the budget."""

    def finished(self, state: State) -> Tensor:
        """(N,) whether the image has had all its steps."""


class Outcome(NamedTuple):
    """What a run leaves."""

    x_adv: Tensor  # (N, C, H, W)
    broken: Tensor  # (N,) bool: seen misclassified, within the budget, at x_adv; all False without early stop


def evaluate(
    model: nn.Module,
    x_adv: Tensor,
    objective: Callable[[Tensor], Tensor],
    eot: int = 1,
    gradient: bool = True,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One evaluation, averaged over ``eot`` draws of a randomised model.

    Args:
        model: images -> logits. One with ``extra_loss(x, y)`` (a :class:`clipdefense.ViewModule`) has it added.
        x_adv: (N, C, H, W).
        objective: logits -> (N,).
        eot: draws.
        gradient: whether to take the gradient; without, only forwards are spent.
        labels: (N,), for ``extra_loss``.

    Returns:
        (loss (N,), gradient (N, C, H, W) or empty, logits (N, classes)), detached.
    """
    extra: Callable[..., Tensor | None] = getattr(model, "extra_loss", lambda x, y: None)
    losses, gradients, outputs = [], [], []
    for _ in range(eot):
        leaf = x_adv.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = logits_of(model, leaf)
            loss = objective(logits)
            term = extra(leaf, labels)
            total = loss if term is None else loss + term
        if gradient:
            gradients.append(torch.autograd.grad(total.sum(), leaf)[0])
        losses.append(total.detach())
        outputs.append(logits.detach())
    return tuple(_mean(parts, x_adv) for parts in (losses, gradients, outputs))  # type: ignore[return-value]


def _mean(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) > 1:
        return torch.stack(parts).mean(dim=0)
    return parts[0] if parts else like.new_empty(0)


def prepare(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    generator: torch.Generator | None,
    ids: Tensor | None,
) -> tuple[int, Tensor]:
    """Check an attack's arguments; returns (seed, ids), the seed drawn from the generator where one is given."""
    channels = getattr(getattr(model, "mean", None), "shape", (0, None))[1]
    check_images(x, channels=channels)
    classes = getattr(model, "class_names", None)
    check_labels(y, len(x), classes=None if classes is None else len(classes))
    if ids is None:
        ids = torch.arange(len(x), device=x.device)
    else:
        check_labels(ids, len(x), argument="ids")
    return (seed if generator is None else draw_seed(generator)), ids.to(x.device)


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Method,
    objective: Objective,
    *,
    ids: Tensor,
    targets: Tensor | None = None,
    eot: int = 1,
    early_stop: bool = True,
    batch_size: int = 128,
) -> Outcome:
    """Run a method on all images, in work units of 512, at most ``batch_size`` at a time.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W); y: (N,) labels; ids: (N,) that key the draws.
        method: the attack.
        objective: what it maximises; it is given the targets too where there are any.
        targets: (N,) target classes.
        eot: draws an evaluation, for randomised models.
        early_stop: an image leaves as soon as it is misclassified, with the iterate that broke it. Off, every
            image goes through all steps (training's inner attack; randomised models, where one draw proves little).
        batch_size: images a forward.

    Returns:
        Adversarial images, detached, on x's device and in its dtype, and which of them were seen broken.
    """
    y = y.long()  # what cross-entropy and gather take
    with attack_mode(model):
        job = _Run(model, x, y, method, objective, ids, targets, eot, early_stop, batch_size)
        for indices in torch.arange(len(x), device=x.device).split(UNIT):
            job.unit(indices)
    return Outcome(job.x_adv, job.broken)


class _Run:
    """One run's arguments and its results so far."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        method: Method,
        objective: Objective,
        ids: Tensor,
        targets: Tensor | None,
        eot: int,
        early_stop: bool,
        batch_size: int,
    ) -> None:
        self.model, self.x, self.y, self.ids, self.targets = model, x, y, ids, targets
        self.method, self.objective = method, objective
        self.eot, self.early_stop, self.batch_size = eot, early_stop, batch_size
        self.inside: Callable[[State], Tensor] | None = getattr(method, "inside", None)
        self.finished: Callable[[State], Tensor] | None = getattr(method, "finished", None)
        self.x_adv = x.detach().clone()
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def unit(self, waiting: Tensor) -> None:
        """One work unit: images enter while there is room, and leave broken or done."""
        active, age, state = waiting[:0], torch.zeros(0, dtype=torch.long), State()
        while len(active) or len(waiting):
            if len(waiting) and len(active) < self.batch_size:
                entering, waiting = waiting.tensor_split([self.batch_size - len(active)])
                fresh = self.method.start(self.x[entering].detach(), self.ids[entering])
                state = {k: torch.cat([state[k], fresh[k]]) for k in fresh} if state else fresh
                active, age = torch.cat([active, entering]), torch.cat([age, age.new_zeros(len(entering))])

            seen = self._evaluate(state, active, first=not age.any())
            if self.early_stop:
                broken = seen.wrong if self.inside is None else seen.wrong & self.inside(state)
                if broken.any():
                    self.x_adv[active[broken]] = state["x_adv"][broken]
                    self.broken[active[broken]] = True
                    stay = ~broken
                    seen = Evaluation(*(part[stay] if len(part) else part for part in seen))
                    state, active, age = _rows(state, stay), active[stay], age[stay.cpu()]
                    if not len(active):
                        continue
            state, age = self.method.advance(state, seen), age + 1
            state, active, age = self._release(state, active, age)

    def _evaluate(self, state: State, active: Tensor, first: bool) -> Evaluation:
        y = self.y[active]
        keys = (y,) if self.targets is None else (y, self.targets[active])
        loss, gradient, logits = evaluate(
            self.model,
            state["x_adv"],
            lambda logits: self.objective(logits, *keys),
            self.eot,
            self.method.uses_gradient,
            y,
        )
        if first:
            check_finite(logits, self.ids[active])
        return Evaluation(loss, gradient, logits.argmax(dim=1) != y)

    def _release(self, state: State, active: Tensor, age: Tensor) -> tuple[State, Tensor, Tensor]:
        """Let the images go that have had all their evaluations; ages are on the CPU, so nothing synchronises."""
        done = age >= self.method.evaluations
        if self.finished is not None:
            done |= self.finished(state).cpu()
        if not done.any():
            return state, active, age
        gone = done.to(active.device)
        self.x_adv[active[gone]] = self.method.result(state)[gone]
        return _rows(state, ~gone), active[~gone], age[~done]


def _rows(state: State, mask: Tensor) -> State:
    return {k: v[mask] for k, v in state.items()}
