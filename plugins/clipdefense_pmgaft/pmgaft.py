"""PMG-AFT, pre-trained model guided adversarial fine-tuning (Wang et al., CVPR 2024, arXiv 2401.04350).

The image tower learns to classify adversarial images while two terms keep its predictions on them near those of the
frozen original model and near its own on the clean images. With logits ``A = z(x')`` and ``K = z(x)`` of the model
that trains, ``O = z_0(x')`` of the frozen one, and P their softmax over the training classes:

    L = L_robust + alpha L_general + beta L_clean
    L_robust = CE(A, y),   L_general = KL(P_O || P_A),   L_clean = KL(P_K || P_A)

The adversarial image ``x' = x + delta`` is made against the model that trains, by ascent on the cross-entropy.
Nothing is detached: L_clean has a gradient through both of its logits. Distances are between predictions; no
features enter. Class embeddings and logit scale stay as they are.

**Two losses bear this name.** The released code (``variant="released"``) normalises the text embeddings again, which
divides the logit scale out: cosines in [-1, 1] everywhere, cross-entropy averaged over the batch but divergences
summed over it, and ImageNet's channel statistics instead of CLIP's. Re-implementations in later papers, and the
default here, take the model's own logits (scale 100), average the divergences, and keep the model's statistics. At
scale 1 an averaged divergence is negligible, at scale 100 a summed one drowns the cross-entropy (a synthetic batch of
256 images, 200 classes: 0.00045 beside a cross-entropy of 5.2; 736 beside 6.2), so the ingredients are never mixed.

The directions are those of the current released code, and of AGFT. An earlier revision had both divergences the other
way round, as others' re-implementations have the first; which of the two made the paper's numbers is unknown.

What the released code does and this does not: mixed precision in float16; the attack's gradients in the weights'
``.grad``, which vanish under its loss scaling; an epoch's last, smaller batch (the loop takes whole batches), whose
divergences weigh less; batch statistics updated by the attack, where a tower has any; the choice of the best
checkpoint on the zero-shot test sets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdefense.attacks.objectives import cross_entropy
from clipdefense.classifier import IMAGENET_MEAN, IMAGENET_STD
from clipdefense.errors import UsageError, check_number
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier
    from clipdefense.estimator import CLIPClassifier

RELEASED_BATCH = 256  # over which the released code sums its divergences

_TOGETHER = ("scale", "logit_scale", "temperature", "reduction", "kl_reduction", "kl_weight", "mean", "std")


def robust_loss(A: Tensor, y: Tensor) -> Tensor:
    """``L_robust = mean_i -log softmax(A_i)_{y_i}``; logits on x' (N, C), labels (N,) -> scalar."""
    return F.cross_entropy(A, y)


def generalisation_loss(A: Tensor, O: Tensor) -> Tensor:  # noqa: E741  (the paper's symbol)
    """``L_general = mean_i KL(softmax(O_i) || softmax(A_i))``: the frozen model on x' is the reference.

    Args:
        A: (N, C) logits of the model that trains, on x'.
        O: (N, C) logits of the frozen model, on the same x'.
    """
    return _kl(O, A)


def clean_loss(A: Tensor, K: Tensor) -> Tensor:
    """``L_clean = mean_i KL(softmax(K_i) || softmax(A_i))``: the trained model on x is the reference, not detached.

    Args:
        A: (N, C) logits of the model that trains, on x'.
        K: (N, C) its logits on x.
    """
    return _kl(K, A)


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    """``mean_i sum_c P log(P / Q)``, P of the reference, Q of the other logits; summed over classes."""
    log_p, log_q = reference.log_softmax(dim=1), logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


class PMGAFT(TrainerDefense):
    """PMG-AFT as an ART trainer. Trains the whole image tower; prompts are ``This is a photo of a {}``.

    Variants:
        ``"default"``: the model's own logits and channel statistics, divergences averaged over the batch, and a
            warm-up of at most a tenth of the run. The learning rate is the released one.
        ``"released"``: cosines at scale 1 in the attack and in all three terms; divergences times 256, so that at any
            batch size, number of pieces or processes they stand to the cross-entropy as a sum over the published
            batch of 256 does; alpha = beta = 1; 1000 updates of warm-up however short the run; and **the model's
            ``mean`` and ``std`` become ImageNet's**, for attack, model, frozen model and from then on.

    ``"released"`` changes the classifier's preprocessing in place when the fit begins, with a warning, because the
    weights it makes are only right with it: ``model.mean`` and ``model.std`` are as much part of the result as the
    tower. They are in :meth:`hyper_parameters` and in the model file. A fit that ends with the old weights puts the old
    ones back. Models on other class lists (``with_classes``) share the tower and the change, but not the change where
    the fit runs on another device than the model's: make them afterwards then. With ``mix`` below 1, the tower is a
    mixture and the statistics are ImageNet's. Its attack on scale-1 cosines pushes towards the mean of the classes
    rather than to the nearest wrong one, and is weak; the trained model keeps its logit scale, so that it is evaluated
    on sharp logits. Divergences at scale 1 are small (1e-3), and ``bf16=True`` rounds them coarsely (by 6 % on the
    towers of the parity tests).

    Both variants share the rest: SGD at 5e-5 with momentum 0.9, no weight decay, batches of 256, 10 epochs, cosine to
    0; PGD with 2 steps of 1/255 in the Linf ball of radius 1/255, from a uniform point.

    Attributes:
        teacher: the model as it is when a fit begins, frozen, with the same preprocessing; where alpha is above 0.
    """

    name: ClassVar[str] = "pmg-aft"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")
    teacher: ZeroShotClassifier

    def __init__(
        self,
        classifier: CLIPClassifier | ZeroShotClassifier,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        threat: ThreatModel | None = None,
        config: TrainingConfig | None = None,
        variant: str = "default",
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier, threat, config, variant, overrides: as in :class:`clipdefense.TrainerDefense`.
            alpha: weight of L_general, at least 0; the paper's 1. At 0 there is no frozen model and no pass of it.
            beta: weight of L_clean, at least 0; the paper's 1. At 0 the clean images are not encoded.

        Raises:
            UsageError: a weight outside its range, or other than 1 with ``"released"``; an option that would take
                one ingredient of a variant alone; ``"released"`` on a model without three channels; or as in the base
                class.
        """
        for option in filter(overrides.__contains__, _TOGETHER):
            raise UsageError(
                f"{option} is {overrides[option]!r}, but the scale of the logits, the reduction of the divergences and "
                "the channel statistics of PMG-AFT belong together; choose all of them with variant='default' or "
                "variant='released'."
            )
        super().__init__(classifier, threat=threat, config=config, variant=variant, **overrides)
        self.released = variant == "released"
        for name, weight in (("alpha", alpha), ("beta", beta)):
            check_number(name, weight, 0, math.inf)
            if self.released and weight != 1:
                raise UsageError(
                    f"{name} is {weight!r} with variant='released', whose code has no such weight (it is 1); "
                    "variant='default' takes others."
                )
        if self.released and self.model.mean.numel() != 3:
            raise UsageError(
                f"the model takes {self.model.mean.numel()} channels; variant='released' sets ImageNet's statistics, "
                "which are of 3; use variant='default'."
            )
        self.alpha, self.beta = float(alpha), float(beta)
        self._before: tuple[Tensor, Tensor] | None = None  # mean and std, while a fit with others runs

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=2)

    def default_config(self) -> TrainingConfig:
        return TrainingConfig(
            optimizer="sgd",
            lr=5e-5,
            momentum=0.9,
            weight_decay=0.0,
            batch_size=RELEASED_BATCH,
            epochs=10,
            schedule="cosine",
            warmup_steps=1000,
            warmup_cap=1.0 if self.variant == "released" else 0.1,
            train="tower",
        )

    def hyper_parameters(self) -> Mapping[str, Any]:
        """``alpha``, ``beta``; ``logit_scale`` of attack and losses; ``kl_weight``, the factor on the averaged
        divergences; ``mean`` and ``std``, the channel statistics that the trained weights belong to."""
        model = self.model
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "logit_scale": 1.0 if self.released else float(model.head.scale),
            "kl_weight": self.kl_weight,
            "mean": list(IMAGENET_MEAN) if self.released else model.mean.flatten().tolist(),
            "std": list(IMAGENET_STD) if self.released else model.std.flatten().tolist(),
        }

    @property
    def kl_weight(self) -> float:
        """Of the averaged divergences: 256 makes them the released code's sum over its batch of 256."""
        return float(RELEASED_BATCH) if self.released else 1.0

    def tempered(self, logits: Tensor) -> Tensor:
        """The model's logits as this variant uses them: (N, C) as they are, or the cosines alone (``released``)."""
        return logits / self.model.head.scale.to(logits) if self.released else logits

    def begin(self) -> None:
        if self.alpha:
            self.teacher = self.frozen_copy()
        if self.released:
            self._before = self.model.mean.clone(), self.model.std.clone()
            self._set_statistics()

    def _set_statistics(self) -> None:
        model = self.model
        mean, std = (torch.tensor(v).to(model.mean).view_as(model.mean) for v in (IMAGENET_MEAN, IMAGENET_STD))
        if not (torch.equal(model.mean, mean) and torch.equal(model.std, std)):
            warnings.warn(
                "pmg-aft, variant 'released', trains with ImageNet's channel statistics: the model's mean was "
                f"{_rounded(model.mean)} and its std {_rounded(model.std)}, and from now on they are {IMAGENET_MEAN} "
                f"and {IMAGENET_STD}; the weights are only right with them.",
                stacklevel=2,
            )
        for changed in (model, self.teacher):
            changed.mean.copy_(mean)
            changed.std.copy_(std)

    def end(self) -> None:
        """The old statistics again where the weights are the old ones: the fit failed, or its first update diverged."""
        before, self._before = self._before, None
        if before is None:
            return
        now, then = self.model.tower.parameters(), self.teacher.tower.parameters()
        if all(torch.equal(weight, old) for weight, old in zip(now, then)):
            self.model.mean.copy_(before[0])
            self.model.std.copy_(before[1])

    def attack_objective(self, batch: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy of each image, on the logits that the losses see."""
        return lambda logits, y: cross_entropy(self.tempered(logits), y)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        A = self.tempered(self.logits(batch["x_adv"]))
        terms = {"robust": robust_loss(A, batch["y"])}
        if self.alpha:
            with torch.no_grad():
                O = self.tempered(self.teacher(batch["x_adv"]))  # noqa: E741  (the paper's symbol)
            terms["general"] = self.alpha * self.kl_weight * generalisation_loss(A, O)
        if self.beta:
            K = self.tempered(self.logits(batch["x"]))
            terms["clean"] = self.beta * self.kl_weight * clean_loss(A, K)
        return terms


def _rounded(statistics: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in statistics.flatten().tolist())
