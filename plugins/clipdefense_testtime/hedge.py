"""Hedge defence (Wu et al. 2021): step away from every class at once.

    x_0 = x + U(-eps, eps),   x_{k+1} = clip(P_eps(x_k + alpha sign(grad L(x_k))), 0, 1),   k = 0 .. K-1
    L = KL(uniform || softmax(z)) = -1/C sum_c log softmax(z)_c - log C

and predict on x_K. The hope is that the loss of a false class, on which an attack has just landed, rises the most. But
dL/dz_c = softmax(z)_c - 1/C: a step raises every class above chance, the leading one most, so x_K mostly says what x_0
said, surer of it. As with the anti-adversary, following the defended logits' gradient then fails where an attack on the
undefended model succeeds. Hence the view ``start``.

The start is not clipped to the box, as published. Defaults are the official ones, made for other models than CLIP: eps
0.031, alpha 0.007, K = 20; what later papers used on CLIP is not known.

Croce et al. (ICML 2022, 2202.13711) ran eps 8/255, alpha 4/255 with the sum of cross-entropies over all classes, whose
steps are the same, and found that an attacker who knows of it leaves nothing of the gain: 45.0 % without the defence,
54.1 % under transfer, 45.2 % in the worst case (APGD with BPDA and EOT).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipdefense.attacks.context import attack_mode, frozen, logits_of
from clipdefense.attacks.norms import box
from clipdefense.defenses import AttackView, Traits
from clipdefense.errors import check_whole
from clipdefense_testtime.anti_adversary import classifier_of
from clipdefense_ttc.noise import UniformNoiseDefense, check_pixels
from clipdefense_ttc.views import soft_sign, unrolled


def hedge_loss(logits: Tensor) -> Tensor:
    """``KL(uniform || softmax(z))``, which the defence ascends; (N, C) -> (N,).

    The sum over c of CE(z, c) is C times this plus a constant. Per image: the released code's mean over the batch
    changes no sign.
    """
    return -logits.log_softmax(dim=1).mean(dim=1) - math.log(logits.shape[1])


class HedgeDefense(UniformNoiseDefense):
    """Hedge defence, per image. The noise of :meth:`draw` is x_0 - x, and :meth:`perturbation` returns x_K - x.

    Attributes:
        traits: randomised (the start) and optimising in its forward pass.
    """

    traits: ClassVar[Traits] = Traits(randomized=True, optimizes_in_forward=True)

    def __init__(
        self,
        model: Any,
        *,
        eps: float = 0.031,
        step_size: float = 0.007,
        steps: int = 20,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        """
        Args:
            model: the classifier to defend, images -> logits, or a :class:`clipdefense.CLIPClassifier`.
            eps: radius, Linf, in [0, 1] pixels; 0 turns the defence off.
            step_size: alpha, in [0, 1] pixels.
            steps: K; 0 adds the start's noise alone, clipped to the box.
            seed: keys the start.
            batch_size: images handled at a time.

        Raises:
            UsageError: a value outside its range, or something that is no classifier.
        """
        super().__init__(eps=eps, seed=seed, batch_size=batch_size)
        check_pixels(step_size=step_size)
        check_whole("steps", steps, 0)
        self.model = classifier_of(model)
        self.step_size, self.steps = step_size, steps

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x_K - x for one chunk: K forwards and K backwards."""
        assert noise is not None
        if self.eps == 0 or self.steps == 0:
            return box(x, noise)
        d_k = noise
        with attack_mode(self.model):
            for _ in range(self.steps):
                point = (x + d_k).requires_grad_(True)
                (gradient,) = torch.autograd.grad(hedge_loss(logits_of(self.model, point)).sum(), point)
                d_k = self._moved(x, d_k, gradient.sign())
        return d_k

    def _moved(self, x: Tensor, d_k: Tensor, direction: Tensor) -> Tensor:
        return box(x, (d_k + self.step_size * direction).clamp(-self.eps, self.eps))

    def smoothed(self, x: Tensor, noise: Tensor, *, kappa: float = 1.0) -> Tensor:
        """x_K with a gradient through all steps: ``tanh(kappa G / mean|G|)`` for each sign, unrolled.

        Args:
            x: (N, C, H, W) in [0, 1], differentiable.
            noise: x_0 - x; clipped to the ball.
            kappa: sharpness; larger is nearer to the sign and has less gradient.
        """
        d_k = noise.clamp(-self.eps, self.eps)
        if self.eps == 0 or self.steps == 0:
            return x + box(x, d_k)
        with sdpa_kernel(SDPBackend.MATH), frozen(self.model):
            for _ in range(self.steps):
                point = x + d_k
                loss = hedge_loss(logits_of(self.model, point)).sum()
                (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
                d_k = self._moved(x, d_k, soft_sign(gradient, kappa))
        return x + d_k

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """What an attacker who knows hedge defence differentiates, averaged over draws of the start:

        * ``bpda-eot``: the straight-through gradient, Croce et al.'s.
        * ``smoothed``: the unrolled steps of :meth:`smoothed`. A draw costs K forwards and double backwards and keeps
          K graphs in memory, so it has fewer draws.
        * ``start``: the undefended logits at x_0, which the steps only make surer; expect this to be the strongest.
        """

        def smoothed(x: Tensor, ids: Tensor, seed: int) -> Tensor:
            return unrolled(lambda leaf: model(self.smoothed(leaf, self.draw(leaf.detach(), ids, seed))), x)

        return (
            AttackView("bpda-eot", lambda x, ids, seed: self.bpda(model, x, ids, seed), eot=20),
            AttackView("smoothed", smoothed, eot=4),
            AttackView("start", lambda x, ids, seed: model(x + self.draw(x.detach(), ids, seed)), eot=20),
        )
