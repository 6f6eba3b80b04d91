"""LAAT, language-driven anchor-based adversarial training (Li et al., CVPR 2024, arXiv 2301.13096).

Each class has a fixed unit vector, its anchor: the text embedding of its name, moved away from the others by the
expansion (:mod:`clipdefense_laat.expansion`). An image encoder learns to point adversarial images at their anchors, and
an image and its adversarial counterpart in one direction:

    L = A-CE(x') + beta S(x, x'),   A-CE(x') = CE(n(f(x')) A^T / tau, y),   S(x, x') = -mean_i cos(f(x_i), f(x'_i))

with ``f`` the encoder's embedding, ``n`` the L2 normalisation, ``A`` (K, D) the anchors, ``tau`` the temperature, and
x' from PGD on the plain cross-entropy. A new class needs no more than its name, whose text embedding goes through the
training classes' expansion.

Where paper and code part. The paper's word "smoothness" suggests a divergence of predictions; the code's term is the
cosine of features, before the anchors, without stop-gradient. There is no clean cross-entropy. With tau = 1 the loss
of perfectly placed features is not 0 but about 3.3 for the 64 classes of CIFAR-FS. Passes besides the attack's: one
forward and backward of x', and one of x where ``smoothness`` is above 0. The code makes a third, of x' again, whose
values are those of the first; only BatchNorm notices, and ``"released"`` moves its statistics as that pass would (with
DropBlock, off in the published command, the code would draw a second mask, and this does not).
The code selects its checkpoints on the novel test classes; pass ``validation_data`` of training classes instead.

Its option of adversarial weight perturbation (:mod:`clipdefense_laat.awp`; off in the published command) is
``awp_gamma``. The weights ascend A-CE(x') alone, the smoothness takes no part. One more forward and backward of x', in
eval mode like the attack's; the update, weight decay included, is applied to the weights that were not moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode, predict
from clipdefense.attacks.pgd import pgd
from clipdefense.errors import UsageError, check_number
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig
from clipdefense_laat.awp import moved, perturbation, perturbed_weights, with_weights
from clipdefense_laat.expansion import AnchorExpansion, check_dimension

_AWP = "awp "  # before a weight's name: its perturbation, in the batch that the losses get


def cosine_logits(f: Tensor, anchors: Tensor, tau: float = 1.0) -> Tensor:
    """``n(f) A^T / tau``; embeddings (N, D), unit anchors (K, D) -> (N, K), never in bfloat16."""
    kind = f.device.type
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with exact:
        return (1 / tau) * F.normalize(f, dim=1) @ anchors.to(f.dtype).T


def a_ce(f: Tensor, anchors: Tensor, y: Tensor, tau: float = 1.0) -> Tensor:
    """A-CE, ``mean_i -log softmax(n(f_i) A^T / tau)_{y_i}``: embeddings (N, D), unit anchors (K, D), labels (N,)."""
    return F.cross_entropy(cosine_logits(f, anchors, tau), y)


def cosine_smoothness(f_clean: Tensor, f_adv: Tensor) -> Tensor:
    """``S = -mean_i cos(f(x_i), f(x'_i))``, in [-1, 1], with gradients to both; embeddings (N, D) -> scalar."""
    return -F.cosine_similarity(f_clean, f_adv, dim=1).mean()


def kl_divergence(logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
    """``KL(softmax(z(x_i)) || softmax(z(x'_i)))`` of each image, with gradients to both; (N, K) -> (N,)."""
    p, q = logits_clean.log_softmax(dim=1), logits_adv.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def trades_kl(logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
    """The second term of TRADES (1901.08573) as LAAT's code has it: the mean of :func:`kl_divergence`, a scalar."""
    return kl_divergence(logits_clean, logits_adv).mean()


class LAAT(TrainerDefense):
    """LAAT as an ART trainer. A fit gives the model's head the fitted expansion and the scale 1 / tau, in place.

    A head that brings an expansion of its own keeps it; a fit after another one changes nothing about it. TeCoA is the
    special case ``expansion=False, smoothness=0, tau=0.01`` under TeCoA's threat and config.

    Variants:
        ``"released"``: the paper's setting, an image network trained from scratch (``laat:conv4-512``,
            ``laat:resnet12``; the anchors' prompt is ``This is a photo of a {}``): tau 1; SGD with momentum 0.9,
            learning rate 0.05, a tenth of it from epoch 60 of 100, weight decay 5e-4, batches of 128; PGD with 7 steps
            of 2/255 in the Linf ball of radius 8/255. The code means to lower the rate again at epoch 80 and never
            does. Its augmentation is the data set's: :mod:`clipdefense_laat.augmentation`.
        ``"default"``: fine-tuning of CLIP's image tower, which the paper does not do; these are this library's
            settings. tau 0.05, between CLIP's 0.01, at which the smoothness hardly counts, and 1, which suits training
            from scratch only; AdamW, learning rate 1e-5 after a warm-up, cosine to 0, weight decay 1e-4, batches of
            256, 10 epochs; PGD with 7 steps of eps / 4 in the radius 1/255 that is common for CLIP.

    Expanded anchors are for a tower that was trained towards them. On a CLIP that was not, the component that all its
    image embeddings share turns into a preference for the classes nearest the mean.
    """

    name: ClassVar[str] = "laat"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")

    def __init__(
        self,
        classifier: Any,
        *,
        tau: float | None = None,
        smoothness: float = 1.0,
        expansion: bool = True,
        quantile: float = 1.0,
        trades: bool = False,
        awp_gamma: float = 0.0,
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier: the estimator (ART) or the bare model to train, in place; its classes are the training classes,
                which the expansion is fitted on.
            tau: temperature; None is the variant's (1 for ``"released"``, 0.05).
            smoothness: beta; 0 spends no pass on the clean images.
            expansion: whether anchors are expanded; False leaves the head's anchors as they are.
            quantile: of the training classes' angles, see :meth:`AnchorExpansion.fit`; 1 is the published maximum.
            trades: the TRADES form instead, ``A-CE(x) + beta KL(softmax z(x) || softmax z(x'))``, whose attack ascends
                that divergence with the clean prediction held fixed, from a uniform point of the ball.
            awp_gamma: size of the adversarial weight perturbation relative to each weight; 0 (published) makes none,
                0.005 is what a comment of the code suggests.
            overrides: ``threat``, ``config``, ``variant`` and single fields of the config, see
                :class:`clipdefense.trainers.TrainerDefense`.

        Raises:
            UsageError: a value outside its range, options that do not go together, or a head with a transform that
                expansion does not go with.
        """
        super().__init__(classifier, **overrides)
        usual = 1.0 if self.variant == "released" else 0.05
        tau = usual if tau is None else tau
        check_number("tau", tau, 0, math.inf, open_low=True)
        check_number("smoothness", smoothness, 0, math.inf)
        check_number("awp_gamma", awp_gamma, 0, math.inf)
        self.awp_gamma = float(awp_gamma)
        self.tau, self.smoothness = float(tau), float(smoothness)
        self.expansion, self.quantile, self.trades = bool(expansion), quantile, bool(trades)
        if not isinstance(quantile, (int, float)) or not 0 < quantile <= 1:
            raise UsageError(f"quantile is {quantile!r}; a number above 0 and at most 1 is expected.")
        if self.trades and self.threat.restarts > 1:
            raise UsageError(f"trades is True with {self.threat.restarts} restarts; its attack has one.")
        transform = self.model.head.transform
        if self.expansion and not isinstance(transform, (AnchorExpansion, type(None))):
            raise UsageError(
                f"expansion is True, but the head has a {type(transform).__name__} as its transform, and a head has "
                "one; load the model without it, or pass expansion=False."
            )
        if not self.expansion and isinstance(transform, AnchorExpansion):
            raise UsageError(
                "expansion is False, but the head's anchors are expanded already; load the model without a transform."
            )

    def default_threat(self) -> ThreatModel:
        eps = 8 / 255 if self.variant == "released" else 1 / 255
        return ThreatModel("linf", eps=eps, step_size=eps / 4, steps=7)

    def default_config(self) -> TrainingConfig:
        if self.variant == "released":
            return TrainingConfig(
                optimizer="sgd",
                lr=0.05,
                momentum=0.9,
                weight_decay=5e-4,
                batch_size=128,
                epochs=100,
                schedule="milestones",
                milestones=(60,),
                gamma=0.1,
            )
        return TrainingConfig(
            optimizer="adamw",
            lr=1e-5,
            weight_decay=1e-4,
            batch_size=256,
            epochs=10,
            schedule="cosine",
            warmup_steps=1000,
            warmup_cap=0.1,
        )

    def hyper_parameters(self) -> Mapping[str, Any]:
        names = ("tau", "smoothness", "expansion", "quantile", "trades", "awp_gamma")
        return {name: getattr(self, name) for name in names}

    def begin(self) -> None:
        """Gives the head the training classes' expansion and the scale 1 / tau.

        Raises:
            UsageError: anchors of another dimension than the tower's, or that cannot be expanded; a perturbation of
                weights that are recomputed.
        """
        if self.awp_gamma and self.low_memory:
            raise UsageError(
                f"awp_gamma is {self.awp_gamma} with low_memory, which computes passes again when the weights are no "
                "longer perturbed; leave one of them out (accumulate saves memory too)."
            )
        check_dimension(self.model)
        head = self.model.head
        if self.expansion and head.transform is None:
            head.transform = AnchorExpansion.fit(head.embeddings, quantile=self.quantile)
        head.scale.fill_(1 / self.tau)
        head.to(head.embeddings.device)  # a head that is moved computes its anchors afresh

    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        """The adversarial images; and, each under its name, how far the weights move for the losses, if they do."""
        made = self._kl_attack(batch, seed) if self.trades else super().inner_attack(batch, seed=seed)
        return made | self._weight_perturbation(made["x_adv"], batch["y"]) if self.awp_gamma else made

    def _weight_perturbation(self, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        tower, names = self.model.tower, perturbed_weights(self.model.tower)
        with attack_mode(self.model):
            v = perturbation(
                tower,
                names,
                lambda: a_ce(self.model.embed(x_adv), self.model.head.anchors, y, self.tau),
                self.awp_gamma,
            )
        return {_AWP + name: offset for name, offset in v.items()}

    def _kl_attack(self, batch: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        x = batch["x"]
        clean, rows = predict(self.model, x, batch_size=len(x)), torch.arange(len(x), device=x.device)

        def objective(logits: Tensor, row: Tensor) -> Tensor:
            return kl_divergence(clean[row].to(logits.dtype), logits)

        every: dict[str, Any] = {"early_stop": False, "batch_size": len(x), "seed": seed, "ids": batch["ids"]}
        return {"x_adv": pgd(_Unnamed(self.model), x, rows, self.threat, objective=objective, **every)}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        offsets = {name.removeprefix(_AWP): value for name, value in batch.items() if name.startswith(_AWP)}
        if not offsets:
            return self._terms(batch)
        tower = self.model.tower
        return with_weights(tower, moved(tower, offsets), lambda: self._terms(batch))

    def _terms(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, x_adv, y, beta = batch["x"], batch["x_adv"], batch["y"], self.smoothness
        anchors, tau = self.model.head.anchors, self.tau
        if self.trades:
            f_clean = self.embed(x)
            terms = {"a_ce": a_ce(f_clean, anchors, y, tau)}
            if beta:
                z_clean, z_adv = (cosine_logits(f, anchors, tau) for f in (f_clean, self.embed(x_adv)))
                terms["kl"] = beta * trades_kl(z_clean, z_adv)
            return terms
        first = RepeatedPass(self.model.tower, self.variant == "released")
        f_adv = self.embed(x_adv)
        first.over()
        terms = {"a_ce": a_ce(f_adv, anchors, y, tau)}
        if beta:
            terms["smoothness"] = beta * cosine_smoothness(self.embed(x), f_adv)
            first.repeat()
        return terms


class RepeatedPass:
    """A forward pass's effect on BatchNorm's running statistics, which can be had again without the pass.

    A pass moves them by ``r <- (1 - mu) r + mu s``; r before and after the first time gives ``mu s``.
    """

    def __init__(self, tower: nn.Module, wanted: bool = True) -> None:
        """
        Args:
            tower: about to make the pass, in train mode.
            wanted: False keeps nothing and repeats nothing.
        """
        kind = nn.modules.batchnorm._BatchNorm
        norms = [part for part in tower.modules() if isinstance(part, kind) and part.training] if wanted else []
        self._norms = [norm for norm in norms if norm.running_mean is not None and norm.momentum is not None]
        self._share = [tuple(-(1 - mu) * value for value in values) for mu, values in self._state()]

    def _state(self) -> list[tuple[float, tuple[Tensor, Tensor]]]:
        return [(norm.momentum, (norm.running_mean, norm.running_var)) for norm in self._norms]  # type: ignore[misc]

    def over(self) -> None:
        """The pass was made: keeps ``mu s``."""
        self._share = [
            tuple(value + kept for value, kept in zip(values, before))
            for (_, values), before in zip(self._state(), self._share)
        ]

    @torch.no_grad()
    def repeat(self) -> None:
        """Move the statistics as if the pass had been made once more."""
        for (mu, values), share in zip(self._state(), self._share):
            for value, own in zip(values, share):
                # .data: the backward of a pass in train mode does not read them, but would refuse them changed
                value.data.mul_(1 - mu).add_(own)
        for norm in self._norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)


class _Unnamed(nn.Module):
    """A classifier's logits without its class list: rows of the batch then stand where an attack takes labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits
