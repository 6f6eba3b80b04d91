"""TTC, the test-time counterattack (Xing et al., CVPR 2025, arXiv 2503.03613).

An image that noise hardly moves in embedding space is taken to be attacked ("falsely stable"); such an image is
pushed away from where its embedding lies, by ascent on the squared embedding drift. No labels, no text. Symbols:
``f`` the image encoder (embeddings un-normalised), ``d_k`` the k-th counterattack iterate, ``r`` the drift ratio,
``tau`` the threshold, ``D`` what is added to the image.

What the released code does to every image, this does only where it changes the result: an image that is not falsely
stable keeps its noise and costs no gradient step. Its passes, per image, the classification afterwards not counted:

* not falsely stable: 2 forwards (clean, noisy);
* falsely stable, in a chunk where all are: 1 + N forwards, N backwards;
* falsely stable, in a mixed chunk: 2 + N forwards, N backwards (the graph of the mixed chunk is not used);
* with a reference tower: 2 forwards of the reference besides, and the noisy forward of ``f`` only where stable.

TTC has been published under attacks that did not know it. Its adaptive views are what to judge it by.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipdefense.attacks.context import attack_mode, frozen
from clipdefense.attacks.norms import box, per_image
from clipdefense.defenses import AttackView, Traits, module_of
from clipdefense.errors import UsageError, check_whole, is_number, unknown_name
from clipdefense_ttc import views
from clipdefense_ttc.noise import UniformNoiseDefense, check_noise, check_pixels


def drift_ratio(f_noisy: Tensor, f_clean: Tensor) -> Tensor:
    """``r = ||f(x + d_0) - f(x)||_2 / ||f(x)||_2`` on un-normalised embeddings (N, D) -> (N,)."""
    return (f_noisy - f_clean).norm(dim=1) / f_clean.norm(dim=1)


def drift_loss(f_perturbed: Tensor, f_clean: Tensor) -> Tensor:
    """``||f(x + d_k) - f(x)||_2^2``, which the counterattack ascends; (N, D) -> (N,)."""
    return (f_perturbed - f_clean).square().sum(dim=1)


def iterate_weights(steps: int, beta: float) -> Tensor:
    """``w_k = exp(beta k) / sum_j exp(beta j)``, k = 0 .. N; float64, (N + 1,).

    A softmax, because the plain exponentials overflow from beta * N = 88 on in float32.
    """
    return torch.softmax(beta * torch.arange(steps + 1, dtype=torch.float64), dim=0)


class TTC(UniformNoiseDefense):
    """Test-time counterattack, per image; hyper-parameters default to the published ones for ViT-B/32.

    The noise of :meth:`draw` is d_0 before the box, and what :meth:`perturbation` returns is D.

    Attributes:
        traits: randomised (the noise d_0) and optimising in its forward pass.
    """

    traits: ClassVar[Traits] = Traits(randomized=True, optimizes_in_forward=True)

    def __init__(
        self,
        model: Any,
        *,
        eps: float = 4 / 255,
        step_size: float = 1 / 255,
        steps: int = 2,
        beta: float = 2.0,
        threshold: float = 0.2,
        reference: Any = None,
        benign: Literal["noise", "zero"] = "noise",
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        """
        Args:
            model: the classifier to defend (its ``embed`` is f), or a :class:`clipdefense.CLIPClassifier`.
            eps: radius of the counterattack, Linf, in [0, 1] pixels; 0 turns the defence off.
            step_size: of one ascent step, in [0, 1] pixels.
            steps: N; 0 adds the noise d_0 alone (the paper's random-noise baseline).
            beta: how strongly later iterates are preferred in the weighted sum.
            threshold: tau; an image with drift ratio below it is counterattacked.
            reference: the original, frozen model, whose embeddings measure the drift ratio where ``model`` was
                adversarially fine-tuned; None measures with ``model``.
            benign: what an image gets that is not falsely stable: the noise d_0 (published) or nothing.
            seed: keys the noise.
            batch_size: images handled at a time.

        Raises:
            UsageError: a value outside its range, or a model without ``embed``.
        """
        super().__init__(eps=eps, seed=seed, batch_size=batch_size)
        check_pixels(step_size=step_size)
        check_whole("steps", steps, 0)
        if not (is_number(beta) and is_number(threshold)):
            raise UsageError(f"beta is {beta!r} and threshold {threshold!r}; finite numbers are expected.")
        if benign not in ("noise", "zero"):
            raise unknown_name("benign", str(benign), ("noise", "zero"))
        self.model = _encoder(model, "model")
        self.reference = None if reference is None else _encoder(reference, "reference")
        self.step_size, self.steps = step_size, steps
        self.beta, self.threshold, self.benign = beta, threshold, benign

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """D for one chunk: the weighted counterattack where falsely stable, else d_0 (or 0)."""
        assert noise is not None
        if self.eps == 0:
            return torch.zeros_like(x)
        d_0 = box(x, noise)
        if self.steps == 0:
            return d_0
        with attack_mode(self.model):
            return self._counterattack(x, d_0)

    def _counterattack(self, x: Tensor, d_0: Tensor) -> Tensor:
        with torch.no_grad():
            f_clean = self.model.embed(x)
        leaf = d_0.clone().requires_grad_(True)
        if self.reference is None:
            f_perturbed: Tensor | None = self.model.embed(x + leaf)
            assert f_perturbed is not None
            r = drift_ratio(f_perturbed.detach(), f_clean)
        else:
            with torch.no_grad():
                f_perturbed, r = None, self.measured(x, d_0)
        stable = r < self.threshold  # False for NaN: what cannot be measured is not counterattacked
        result = d_0.clone() if self.benign == "noise" else torch.zeros_like(d_0)
        if not stable.any():
            return result
        if not stable.all():
            # a backward through the mixed chunk's graph would cost the benign images a pass they do not need
            x, d_0, f_clean, f_perturbed = x[stable], d_0[stable], f_clean[stable], None

        d_k, weights = d_0, iterate_weights(self.steps, self.beta).to(x)
        total = weights[0] * d_0
        for k in range(self.steps):
            if f_perturbed is None:
                leaf = d_k.clone().requires_grad_(True)
                f_perturbed = self.model.embed(x + leaf)
            (gradient,) = torch.autograd.grad(drift_loss(f_perturbed, f_clean).sum(), leaf)
            d_k = box(x, (d_k + self.step_size * gradient.sign()).clamp_(-self.eps, self.eps))
            total += weights[k + 1] * d_k
            f_perturbed = None
        result[stable] = total
        return result

    def measured(self, x: Tensor, d_0: Tensor) -> Tensor:
        """r as the gate sees it, (N,), differentiable in x and d_0; no chunks, no checks."""
        judge = self.model if self.reference is None else self.reference
        with frozen(judge):
            return drift_ratio(judge.embed(x + d_0), judge.embed(x))

    @torch.no_grad()
    def drift(self, x: Tensor, *, noise: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The drift ratio r of each image, (N,), for the noise that :meth:`perturbation` draws for the same ids.

        Args:
            x: (N, C, H, W) in [0, 1].
            noise: d_0, or None to draw it; as in :meth:`perturbation`.
            ids: (N,) image ids that key the draw; 0 .. N-1 when not given.
        """
        if noise is None:
            names = torch.arange(len(x), device=x.device) if ids is None else ids
            noise = self.draw(x, names, self.seed)
        else:
            noise = check_noise(x, noise, self.eps)
        parts = zip(x.split(self.batch_size), box(x, noise).split(self.batch_size))
        return torch.cat([self.measured(part, d_0) for part, d_0 in parts])

    def smoothed(self, x: Tensor, noise: Tensor, *, kappa: float = 1.0, gate_on: bool = False) -> Tensor:
        """x + D with a gradient through D: every step of the method made differentiable, and unrolled.

        ``sign(G)`` becomes ``tanh(kappa G / mean|G|)`` and the gate ``r < tau`` a sigmoid of width ``tau / 4``. Needs
        the second derivative of f, so attention runs on its plain kernel.

        Args:
            x: (N, C, H, W) in [0, 1], differentiable.
            noise: d_0 before the box. Clipped to the ball: an attack calls this at each step, and a check that raises
                would make the device wait.
            kappa: sharpness; larger is nearer to the sign and has less gradient.
            gate_on: counterattack every image, whatever its drift.
        """
        d_k = d_0 = box(x, noise.clamp(-self.eps, self.eps))
        if self.eps == 0 or self.steps == 0:
            return x + d_0
        with sdpa_kernel(SDPBackend.MATH), frozen(self.model):
            f_clean = self.model.embed(x)
            f_perturbed = self.model.embed(x + d_0)
            gate = torch.ones_like(f_clean[:, 0])
            if not gate_on:
                r = drift_ratio(f_perturbed, f_clean) if self.reference is None else self.measured(x, d_0)
                gate = views.soft_gate(r, self.threshold)
            weights = iterate_weights(self.steps, self.beta).to(x)
            total = weights[0] * d_0
            for k in range(self.steps):
                loss = drift_loss(f_perturbed, f_clean).sum()
                (gradient,) = torch.autograd.grad(loss, d_k, create_graph=True)
                step = self.step_size * views.soft_sign(gradient, kappa)
                d_k = box(x, (d_k + step).clamp(-self.eps, self.eps))
                total = total + weights[k + 1] * d_k
                if k + 1 < self.steps:
                    f_perturbed = self.model.embed(x + d_k)
            share = per_image(gate, x)
            return x + share * total + (1 - share) * (d_0 if self.benign == "noise" else torch.zeros_like(d_0))

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """What an attacker who knows TTC differentiates, all averaged over draws of the noise:

        * ``bpda-eot``: the straight-through gradient. D is piecewise constant in x, so off the box this is the exact
          gradient, and yet a weak guide: it cannot see how D turns when x moves.
        * ``smoothed``: the unrolled counterattack of :meth:`smoothed`, which can.
        * ``gate-evasion``: a term raises r to the threshold and past it, where the image keeps its noise alone, and
          the noisy image is attacked (:class:`clipdefense_ttc.views.GateEvasion`).
        * ``gate-forced-on``: :meth:`smoothed` with every image counterattacked, for images that never evade.

        The last two are left out where there is no gate (eps or steps 0). An attack on embeddings instead of logits
        does not fit a view; :class:`clipdefense_ttc.views.DefendedEmbedding` is what to give it.
        """
        return views.adaptive(self, model)


def _encoder(model: Any, argument: str) -> Any:
    """The module whose ``embed`` gives un-normalised embeddings."""
    module = module_of(model)
    if not isinstance(module, nn.Module) or not callable(getattr(module, "embed", None)):
        raise UsageError(
            f"{argument} is a {type(model).__name__}, which has no embed(images) -> embeddings; a ZeroShotClassifier "
            "or a CLIPClassifier made of one is expected."
        )
    return module
