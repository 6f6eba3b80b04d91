"""What an attacker who knows TTC attacks: the counterattack made differentiable, its gate evaded or held open.

No published attack is known that was made for TTC, besides a straight-through one in a later paper; these are this
library's. Symbols as in ``ttc.py``. What can be smoothed is: the sign of a step into a tanh, the gate into a sigmoid,
and the steps unrolled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.norms import box, per_image
from clipdefense.defenses import AttackView, Numbers

if TYPE_CHECKING:
    from clipdefense_ttc.ttc import TTC

EOT = 20


def soft_sign(gradient: Tensor, kappa: float = 1.0) -> Tensor:
    """``tanh(kappa G / mean|G|)``, the mean over each image: the sign for large kappa, and differentiable.

    Args:
        gradient: (N, C, H, W).
        kappa: sharpness.
    """
    scale = per_image(gradient.abs().flatten(1).mean(dim=1), gradient).clamp_min(1e-30)
    return torch.tanh(kappa * gradient / scale)


def soft_gate(r: Tensor, threshold: float) -> Tensor:
    """``sigmoid((tau - r) / (tau / 4))``, (N,) -> (N,): near 1 where the image would be counterattacked."""
    return torch.sigmoid((threshold - r) / max(threshold / 4, 1e-6))


def evasion(r: Tensor, threshold: float, margin: float) -> Tensor:
    """``-relu(tau + m - r)``, (N,) -> (N,): rises until r is past the threshold, where TTC adds noise alone."""
    return -F.relu(threshold + margin - r)


def unrolled(surrogate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``surrogate(x)``, which takes gradients inside, whatever mode the caller is in; detached where he wants none."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        result = surrogate(x if wanted else x.detach().clone().requires_grad_(True))
    return result if wanted else result.detach()


class GateEvasion:
    """The attack on TTC's gate: r past the threshold, and the image that then keeps its noise alone misclassified.

    Attributes:
        weight: of the term, in the units of the attack's objective: what an image loses whose r is 0.
        margin: how far past the threshold r is driven, since it differs from draw to draw.
    """

    def __init__(self, ttc: TTC, model: nn.Module, *, weight: float | None = None, margin: float | None = None) -> None:
        """
        Args:
            ttc: the defence.
            model: the model it defends.
            weight: None is a tenth of the model's logit scale (10 for a model that shows none); chosen on 60 of the
                demo's validation images, at scale 12. More of it opens more gates and breaks fewer images.
            margin: None is a quarter of the threshold.
        """
        self.ttc, self.model = ttc, model
        scale = getattr(getattr(model, "head", None), "scale", 100.0)
        self.weight = float(scale) / 10 if weight is None else weight
        self.margin = ttc.threshold / 4 if margin is None else margin
        self._latest: tuple[Callable[[], Any], Tensor, int] = (lambda: None, torch.empty(0), 0)

    def forward(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """Logits of what an image becomes that TTC lets pass, (N, C): with its noise, or as it is for ``"zero"``."""
        self._latest = (weakref.ref(x), ids, seed)
        if self.ttc.benign == "zero":
            return self.model(x)
        return self.model(x + box(x, self.ttc.draw(x.detach(), ids, seed)))

    def extra_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """``-weight / tau * relu(tau + m - r)``, (N,); y plays no part.

        An attack gives the term no ids. It takes the draws of the forward pass before it where that was on the same
        tensor, as it is in every attack of this library; elsewhere all images share one draw.
        """
        tensor, ids, seed = self._latest
        if tensor() is not x:
            ids, seed = torch.full((len(x),), -(2**62), device=x.device), self.ttc.seed
        r = self.ttc.measured(x, box(x, self.ttc.draw(x.detach(), ids, seed)))
        return self.weight / max(self.ttc.threshold, 1e-6) * evasion(r, self.ttc.threshold, self.margin)


class DefendedEmbedding(nn.Module):
    """The defended model with an ``embed``, for attacks that need no labels (``pgd`` with ``objective="drift"``).

    They drive f(x_adv + D) from where TTC leaves the clean image, through the smoothed counterattack. Each pass takes
    the next numbers of a counter: passes over the same image are fresh draws.
    """

    def __init__(self, ttc: TTC, model: nn.Module, seed: int = 0) -> None:
        """
        Args:
            ttc: the defence.
            model: the model it defends; its ``embed`` gives embeddings.
            seed: of the draws.
        """
        super().__init__()
        self.ttc, self.model, self.seed = ttc, model, seed
        self.numbers = Numbers()

    def embed(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, D), differentiable in x."""
        ids = self.numbers.next(x)

        def surrogate(leaf: Tensor) -> Tensor:
            defended = self.ttc.smoothed(leaf, self.ttc.draw(leaf.detach(), ids, self.seed))
            return cast(Any, self.model).embed(defended)

        return unrolled(surrogate, x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, classes): the defended model's own logits, which verdicts are made of."""
        return self.ttc.bpda(self.model, x, self.numbers.next(x), self.seed)


def adaptive(ttc: TTC, model: nn.Module) -> tuple[AttackView, ...]:
    """The views that :meth:`clipdefense_ttc.ttc.TTC.adaptive` describes."""

    def surrogate(gate_on: bool) -> Callable[[Tensor, Tensor, int], Tensor]:
        def forward(x: Tensor, ids: Tensor, seed: int) -> Tensor:
            def defended(leaf: Tensor) -> Tensor:
                return model(ttc.smoothed(leaf, ttc.draw(leaf.detach(), ids, seed), gate_on=gate_on))

            return unrolled(defended, x)

        return forward

    both = (
        AttackView("bpda-eot", lambda x, ids, seed: ttc.bpda(model, x, ids, seed), eot=EOT),
        AttackView("smoothed", surrogate(False), eot=EOT),
    )
    if ttc.eps == 0 or ttc.steps == 0:
        return both
    gate = GateEvasion(ttc, model)
    return (
        *both,
        AttackView("gate-evasion", gate.forward, gate.extra_loss, eot=EOT),
        AttackView("gate-forced-on", surrogate(True), eot=EOT),
    )
