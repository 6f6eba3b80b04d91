"""Anti-adversary (Alfarra et al. 2022): move the image to where the model is surer of what it says anyway.

    y^ = argmax z(x),   d_0 = 0,   d_{k+1} = d_k - alpha sign(grad_d CE(z(x + d_k), y^)),   k = 0 .. K-1

and predict on x + d_K.

The label y^ is the undefended model's, and the steps make it surer, so the decision is nearly always the undefended
model's: an attacker who follows the defended logits' gradient meets a flat, confident model, and one who attacks the
undefended model wins. Croce et al. (ICML 2022, 2202.13711) saw it on an adversarially trained model, 100 images: 81 %
under APGD on the defended model, 62 % under images made on the undefended one, which is all that the undefended model
has. Hence the view ``pseudo-label``.

The released code takes K = 2 steps of alpha = 0.15 in normalised space, without projection and without keeping to
[0, 1]: variant ``"released"``. The budgets with which later papers ran it on CLIP are not known; the default's, in
pixels and inside an explicit ball, are this library's choice.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipdefense.attacks.context import attack_mode, frozen, logits_of
from clipdefense.attacks.norms import box
from clipdefense.defenses import AttackView, InputDefense, Traits, module_of
from clipdefense.errors import UsageError, check_whole, unknown_name
from clipdefense_ttc.noise import check_pixels
from clipdefense_ttc.views import soft_sign, unrolled

VARIANTS = ("default", "released")
EPS, STEP_SIZE = 4 / 255, 2 / 255  # the default's: K = 2 steps reach the whole ball, TTC's
RELEASED_ALPHA = 0.15  # in normalised space


def pseudo_label_loss(logits: Tensor, pseudo_label: Tensor) -> Tensor:
    """``CE(z(x + d), y^)``, which the anti-adversary descends; logits (N, C), y^ (N,) -> (N,).

    Written ``log(1 + sum_{c != y^} exp(z_c - z_y^))``. The steps make the model so sure that, in float32, what the
    usual form leaves of its gradient, ``softmax(z)_y^ - 1``, is rounding.
    """
    label = pseudo_label[:, None]
    behind = (logits - logits.gather(1, label)).scatter(1, label, float("-inf"))
    return F.softplus(behind.logsumexp(dim=1))


class AntiAdversary(InputDefense):
    """The anti-adversary layer before a classifier; deterministic.

    Variants:
        ``"default"``: steps of ``step_size`` inside the ball of radius ``eps`` and the box, in pixels.
        ``"released"``: steps of 0.15 of a channel's standard deviation, as the released code takes on normalised
            images; no ball, and **x + d may leave [0, 1]**. On images that the model resizes, the released code
            would move the resized image; this moves the image itself.

    Attributes:
        traits: optimising in its forward pass; not randomised.
    """

    traits: ClassVar[Traits] = Traits(optimizes_in_forward=True)

    def __init__(
        self,
        model: Any,
        *,
        eps: float | None = None,
        step_size: float | None = None,
        steps: int = 2,
        variant: str = "default",
        batch_size: int = 128,
    ) -> None:
        """
        Args:
            model: the classifier to defend, images -> logits, or a :class:`clipdefense.CLIPClassifier`.
            eps: radius, Linf, in [0, 1] pixels; None is 4/255.
            step_size: alpha, in [0, 1] pixels; None is 2/255.
            steps: K.
            variant: see the class. ``"released"`` has its own step and no ball: eps and step_size stay None.
            batch_size: images handled at a time.

        Raises:
            UsageError: a value outside its range, something that is no classifier, or, for ``"released"``, a model
                without ``std``.
        """
        super().__init__(batch_size=batch_size)
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        check_whole("steps", steps, 0)
        self.model = classifier_of(model)
        self.variant, self.steps = variant, steps
        if variant == "released":
            if eps is not None or step_size is not None:
                raise UsageError(
                    f"eps is {eps!r} and step_size {step_size!r}, but variant 'released' has steps of 0.15 in "
                    "normalised space and no ball; leave both away, or take the default variant."
                )
            if not isinstance(getattr(self.model, "std", None), Tensor):
                raise UsageError(
                    f"model is a {type(self.model).__name__} without std, which variant 'released' takes its step "
                    "from; a ZeroShotClassifier has it, and the default variant does without."
                )
            self.eps, self.step_size = eps, step_size
            return
        self.eps, self.step_size = EPS if eps is None else eps, STEP_SIZE if step_size is None else step_size
        check_pixels(eps=self.eps, step_size=self.step_size)

    def perturbation(
        self, x: Tensor, *, noise: Tensor | None = None, ids: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """d_K, as :meth:`clipdefense.InputDefense.perturbation` says; for ``"released"`` x + d_K may leave [0, 1].

        Raises:
            UsageError: besides, noise: the method draws none.
        """
        if noise is not None:
            raise UsageError("noise was given, but the anti-adversary starts at the image itself; leave it away.")
        return super().perturbation(x, ids=ids, seed=seed)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """d_K for one chunk: K forwards and K backwards; the first gives the pseudo-label too."""
        d_k = torch.zeros_like(x)
        with attack_mode(self.model):
            for k in range(self.steps):
                leaf = d_k.clone().requires_grad_(True)
                logits = logits_of(self.model, x + leaf)
                if k == 0:
                    pseudo_label = logits.detach().argmax(dim=1)
                (gradient,) = torch.autograd.grad(pseudo_label_loss(logits, pseudo_label).sum(), leaf)
                d_k = self._moved(x, d_k, gradient.sign())
        return d_k

    def _moved(self, x: Tensor, d_k: Tensor, direction: Tensor) -> Tensor:
        if self.eps is None or self.step_size is None:
            return d_k - RELEASED_ALPHA * self.model.std.to(x) * direction
        return box(x, (d_k - self.step_size * direction).clamp(-self.eps, self.eps))

    def smoothed(self, x: Tensor, *, kappa: float = 1.0) -> Tensor:
        """x + d_K with a gradient through d_K: ``tanh(kappa G / mean|G|)`` for each sign, the steps unrolled.

        The pseudo-label stays a constant, as it is almost everywhere.

        Args:
            x: (N, C, H, W) in [0, 1], differentiable.
            kappa: sharpness; larger is nearer to the sign and has less gradient.
        """
        d_k = torch.zeros_like(x)
        with sdpa_kernel(SDPBackend.MATH), frozen(self.model):
            for k in range(self.steps):
                point = x + d_k
                logits = logits_of(self.model, point)
                if k == 0:
                    pseudo_label = logits.detach().argmax(dim=1)
                loss = pseudo_label_loss(logits, pseudo_label).sum()
                (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
                d_k = self._moved(x, d_k, soft_sign(gradient, kappa))
        return x + d_k

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """What an attacker who knows the anti-adversary differentiates; nothing is random, so one draw each:

        * ``bpda``: the straight-through gradient, which looks robust and is not.
        * ``smoothed``: the unrolled steps of :meth:`smoothed`.
        * ``pseudo-label``: the undefended logits. They choose y^, and y^ is what comes out; expect this to be the
          strongest.
        """

        def smoothed(x: Tensor, ids: Tensor, seed: int) -> Tensor:
            return unrolled(lambda leaf: model(self.smoothed(leaf)), x)

        return (
            AttackView("bpda", lambda x, ids, seed: self.bpda(model, x, ids, seed)),
            AttackView("smoothed", smoothed),
            AttackView("pseudo-label", lambda x, ids, seed: model(x)),
        )


def classifier_of(model: Any) -> Any:
    """The module that gives logits: the model itself, or the one inside an ART classifier.

    Raises:
        UsageError: neither.
    """
    module = module_of(model)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}; a torch module, images -> logits, or a CLIPClassifier is expected."
        )
    return module
