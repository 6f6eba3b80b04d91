"""The model as an attack calls it: one evaluation with its gradient, in the precision and on the draws asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import logits_of, no_gradient, sent, tf32
from clipdefense.attacks.options import Options


class Embedder(nn.Module):
    """A model's ``embed`` in the place of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).embed(x))


def keyed(model: nn.Module, ids: Tensor, seed: int) -> dict[str, Any]:
    """What :func:`clipdefense.attacks.context.predict` passes on so that a random model's draws repeat."""
    return {"ids": ids, "seed": seed} if takes_keys(model) else {}


def takes_keys(model: nn.Module) -> bool:
    """Whether the model's draws can be keyed: its forward takes ``ids`` and ``seed`` (a wrapped random defence)."""
    return {"ids", "seed"} <= set(inspect.signature(model.forward).parameters)


def evaluate(
    forward: Callable[..., Tensor],
    x_adv: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    eot: int = 1,
    gradient: bool = True,
    dtype: str = "fp32",
    extra: Callable[[Tensor], Tensor | None] = lambda x: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One evaluation, over ``eot`` draws of a randomised model.

    Args:
        forward: ``(images, number of the draw) -> logits``.
        x_adv: (N, C, H, W).
        objective: logits -> (N,).
        eot: draws.
        gradient: whether to take the gradient; without, only forwards are spent.
        dtype: of the forward and backward, see :class:`clipdefense.attacks.options.Options`.
        extra: a term added to the objective, images -> (N,).

    Returns:
        (loss (N,) and gradient (N, C, H, W) or empty, averaged; logits (eot, N, classes)), detached.
    """
    losses, gradients, outputs = [], [], []
    for draw in range(eot):
        leaf = x_adv.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient), tf32(dtype == "tf32"):
            with torch.autocast(x_adv.device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
                logits, term = forward(leaf, draw), extra(leaf)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = objective(logits) if term is None else objective(logits) + term
            if gradient:
                gradients.append(_gradient(loss, leaf))
        losses.append(loss.detach())
        outputs.append(logits.detach())
    return _mean(losses), _mean(gradients) if gradient else x_adv.new_empty(0), torch.stack(outputs)


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """
    Raises:
        UsageError: the loss does not depend on the images through autograd.
    """
    gradient = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise no_gradient()
    return gradient


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(dim=0) if len(parts) > 1 else parts[0]


class Forward:
    """The model as a run calls it: draws keyed where they can be, compiled and padded where asked for."""

    def __init__(self, model: nn.Module, ids: Tensor, seed: int, options: Options) -> None:
        self.model, self.ids, self.seed, self.keyed = model, ids, seed, takes_keys(model)
        self.compiled: Callable[..., Any] = torch.compile(model, dynamic=False) if options.compile else model
        self.trusted, self.doubts = not options.compile, options.doubts
        self.sizes = [math.ceil(options.batch_size / 2**k) for k in range(4)] if options.compile else []

    def plain(self, x: Tensor, rows: Tensor, draws: int) -> Tensor:
        """(draws, N, classes) logits as a verdict takes them: never compiled, draws keyed apart from all steps'."""
        if not self.keyed:
            return torch.stack([logits_of(self.model, x) for _ in range(draws)])
        ids = self.ids[rows]
        return torch.stack([logits_of(self.model, x, ids=ids, seed=self.seed + draw) for draw in range(draws)])

    def bound(self, rows: Tensor, age: Tensor, eot: int) -> Callable[[Tensor, int], Tensor]:
        """``(images, draw) -> logits`` for these rows, whose images had ``age`` evaluations."""

        def forward(x: Tensor, draw: int) -> Tensor:
            if not self.keyed:
                return self._compiled(x)
            # every draw of every step of every image its own: ids stay below 2^40, the step goes above
            step = sent(age * eot + draw + 1, rows.device) << 40
            return logits_of(self.model, x, ids=self.ids[rows] + step, seed=self.seed)

        return forward

    def _compiled(self, x: Tensor) -> Tensor:
        """Through the compiled model where there is one, and where its first answer is the model's own."""
        logits = logits_of(self.compiled, self._padded(x))[: len(x)]
        if not self.trusted:
            self.trusted = True
            with torch.no_grad():
                plain = logits_of(self.model, x)
            if not torch.allclose(logits, plain, rtol=0.02, atol=0.02 * float(plain.abs().max()), equal_nan=True):
                self.doubts.of_compiled(float((logits - plain).abs().max()))
                self.compiled, self.sizes, logits = self.model, [], logits_of(self.model, x)
        return logits

    def _padded(self, x: Tensor) -> Tensor:
        missing = min((size for size in self.sizes if size >= len(x)), default=len(x)) - len(x)
        return torch.cat([x, x[:1].expand(missing, -1, -1, -1)]) if missing else x
