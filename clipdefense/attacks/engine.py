"""The loop under every iterative gradient attack: evaluate, let broken images leave, advance the rest, refill.

An attack is a per-image state machine (:class:`Method`); since each image carries its own state, an image that is
broken leaves at once and the next of its work unit takes the place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode, check_finite, logits_of
from clipdefense.attacks.objectives import Objective
from clipdefense.checks import check_images, check_labels
from clipdefense.randomness import draw_seed

State = dict[str, Tensor]
"""Per-image tensors, all (N, ...); always holds ``x`` (clean) and ``x_adv`` (where the next gradient is taken)."""

UNIT = 512


class Method(Protocol):
    """A gradient attack as a state machine over images, each at its own step."""

    evaluations: int  # gradient evaluations an image gets at most

    def start(self, x: Tensor, ids: Tensor) -> State:
        """The state of images that enter."""

    def advance(self, state: State, loss: Tensor, gradient: Tensor) -> State:
        """The state after one evaluation at ``state["x_adv"]``: loss (N,) and its gradient (N, C, H, W)."""

    def result(self, state: State) -> Tensor:
        """What an image that was never broken returns, (N, C, H, W)."""


def loss_and_gradient(
    model: nn.Module, x_adv: Tensor, y: Tensor, objective: Objective, eot: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One evaluation, averaged over ``eot`` draws of a randomised model.

    Returns:
        (loss (N,), gradient (N, C, H, W), logits (N, classes)), detached. A model with ``extra_loss(x, y)`` (a
        :class:`clipdefense.ViewModule`) has it added to the objective.
    """
    extra: Callable[[Tensor, Tensor], Tensor | None] = getattr(model, "extra_loss", lambda x, y: None)
    losses, gradients, outputs = [], [], []
    for _ in range(eot):
        leaf = x_adv.detach().requires_grad_(True)
        logits = logits_of(model, leaf)
        loss = objective(logits, y)
        term = extra(leaf, y)
        total = loss if term is None else loss + term
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        losses.append(total.detach())
        gradients.append(gradient)
        outputs.append(logits.detach())
    if eot == 1:
        return losses[0], gradients[0], outputs[0]
    return torch.stack(losses).mean(0), torch.stack(gradients).mean(0), torch.stack(outputs).mean(0)


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
    eot: int = 1,
    early_stop: bool = True,
    batch_size: int = 128,
) -> Tensor:
    """Run a method on all images, in work units of 512, at most ``batch_size`` at a time.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W); y: (N,) labels; ids: (N,) that key the draws.
        method: the attack.
        objective: what it maximises.
        eot: draws an evaluation, for randomised models.
        early_stop: an image leaves as soon as it is misclassified, with the iterate that broke it. Off, every
            image goes through all steps (training's inner attack; randomised models, where one draw proves little).
        batch_size: images a forward.

    Returns:
        (N, C, H, W) adversarial images, detached, on x's device and in its dtype.
    """
    y = y.long()  # what cross-entropy and gather take
    with attack_mode(model):
        result = x.detach().clone()  # in here: a clone made under inference mode could not be written to
        for indices in torch.arange(len(x), device=x.device).split(UNIT):
            _run_unit(model, x, y, method, objective, ids, indices, eot, early_stop, batch_size, result)
    return result


def _run_unit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Method,
    objective: Objective,
    ids: Tensor,
    waiting: Tensor,
    eot: int,
    early_stop: bool,
    batch_size: int,
    result: Tensor,
) -> None:
    active, age, state = waiting[:0], torch.zeros(0, dtype=torch.long), State()
    while len(active) or len(waiting):
        if len(waiting) and len(active) < batch_size:
            entering, waiting = waiting.tensor_split([batch_size - len(active)])
            fresh = method.start(x[entering].detach(), ids[entering])
            state = {k: torch.cat([state[k], fresh[k]]) for k in fresh} if state else fresh
            active, age = torch.cat([active, entering]), torch.cat([age, age.new_zeros(len(entering))])

        loss, gradient, logits = loss_and_gradient(model, state["x_adv"], y[active], objective, eot)
        if not age.any():
            check_finite(logits, ids[active])
        if early_stop:
            broken = logits.argmax(dim=1) != y[active]
            if broken.any():
                result[active[broken]] = state["x_adv"][broken]
                state, (loss, gradient, active) = _keep(state, ~broken, loss, gradient, active)
                age = age[(~broken).cpu()]
                if not len(active):
                    continue
        state = method.advance(state, loss, gradient)
        age = age + 1
        done = age >= method.evaluations  # on the CPU: no synchronisation with the device
        if done.all():
            result[active] = method.result(state)
            active, age, state = active[:0], age[:0], State()
        elif done.any():
            gone = done.to(active.device)
            result[active[gone]] = method.result(state)[gone]
            state, (active,) = _keep(state, ~gone, active)
            age = age[~done]


def _keep(state: State, mask: Tensor, *others: Tensor) -> tuple[State, tuple[Tensor, ...]]:
    """The rows where the mask holds."""
    return {k: v[mask] for k, v in state.items()}, tuple(other[mask] for other in others)
