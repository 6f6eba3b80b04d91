"""ANCRA, asymmetric negative contrast with optional reverse attention (arXiv 2310.03358), as an ART trainer.

    L = L_base(x, x') + zeta L_ANC(x, x^-)

    x'   = argmax over the ball around x of CE(z(.), y)
    x^-  = argmin over the ball around x_n of CE(z(.), y), x_n an image of the batch whose class is not y

L_base: :mod:`clipdefense_ancra.bases`. L_ANC: :mod:`clipdefense_ancra.contrast`; at alpha = 1 it lowers the confidence
of x^- where that is confidence in the class which x is given. x^- gets no cross-entropy of its own. Probabilities run
over all of the model's classes, negatives over the classes present in the batch.

With reverse attention each loss l runs over all heads, ``[l] = l(p') + cr_beta / B sum_b l(p_b)``, in the attack too
(there with the masks of predicted classes). The authors' one released training is TRADES on such a ResNet; ours on
CLIP leaves reverse attention out, see :mod:`clipdefense_ancra.reverse_attention` for why. With it, and masks of true
labels as released, x and x^- are never masked alike, so that the contrast acts through p_0 alone, and p' can be fitted
from the label.

A batch cut by ``accumulate``, or over processes, draws its negatives within each piece and averages over pieces.

Images through the network a step, forward (f) and backward (b), K attack steps: 2 K f, 2 K b in the attacks; in the
losses 3 f, and 2 b (TeCoA at alpha = 1, where x needs no gradient) or 3 b.

Paper and released code differ: the paper speaks of distances between features and of aligned features, the code
compares top-1 probabilities and has no alignment but the mask; its TRADES is trained on cross-entropy attacks; its
first step is taken from a start that may lie a little outside [0, 1], ours is clipped to it. Of its ways to choose
negatives this is the default one, a random image of a random other class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipdefense.attacks.objectives import cross_entropy
from clipdefense.attacks.pgd import pgd
from clipdefense.checks import check_labels
from clipdefense.errors import UsageError, check_number, unknown_name
from clipdefense.randomness import normal
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig
from clipdefense_ancra.bases import BETA, base_terms
from clipdefense_ancra.contrast import bhattacharyya_contrast, feature_contrast, negative_contrast, per_class_contrast
from clipdefense_ancra.negatives import draw_negatives
from clipdefense_ancra.resnet import RAClassifier
from clipdefense_ancra.reverse_attention import (
    AllHeads,
    ReverseAttentionModel,
    all_heads_cross_entropy,
    hard_mask,
    head_weights,
)

CONTRASTS = ("strict", "smooth", "bhattacharyya", "feature")
MASKS = ("off", "label", "predicted")
START_STREAM, NEGATIVE_STREAM = 2, 3


class Encoded(NamedTuple):
    """One set of images through the model: logits (N, K) of every head, and the embeddings (N, D) of a plain one."""

    heads: tuple[Tensor, ...]
    features: Tensor | None


class ANCRA(TrainerDefense):
    """Asymmetric negative contrast on a TeCoA, TRADES or MART base.

    Variants:
        ``"default"``: for CLIP. TeCoA + 3 L_ANC; PGD-10 with steps of 0.22 eps at eps = 1/255; optimiser and
            schedule are TeCoA's (SGD, 1e-5, cosine, 10 epochs of batches of 256). None of this has been published.
        ``"released"``: the released constants for ResNet-18 on CIFAR: TRADES with beta 6, eps = 8/255 in 10 steps of
            0.007, SGD 0.01 (an older text of theirs says 0.1), weight decay 2e-4, batches of 128, 120 epochs, a tenth
            of the rate from epochs 75, 90 and 100 (counted from 0). On a :class:`RAClassifier` that is the released
            objective; TeCoA and MART bases are reconstructions. On WRN-28-10 an older text of theirs has zeta 6; the
            PreActResNet on Tiny-ImageNet was trained with lr 0.1 and weight decay 5e-4. Crops (padding 4) and flips
            are the data set's, and on Tiny-ImageNet there are none.

    Both start an attack 0.001 times a normal draw away from the image. ``contrast="strict"`` is ANCRA; the other
    contrasts are smooth variants and not the published method.
    """

    name: ClassVar[str] = "ancra"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")

    def __init__(
        self,
        classifier: Any,
        *,
        base: Literal["tecoa", "trades", "mart"] | None = None,
        contrast: Literal["strict", "smooth", "bhattacharyya", "feature"] = "strict",
        alpha: float = 1.0,
        zeta: float = 3.0,
        beta: float | None = None,
        start: float = 0.001,
        margin: float = 0.0,
        reverse_attention: Literal["off", "label", "predicted"] | None = None,
        cr_beta: float = 2.0,
        variant: str = "default",
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier: the estimator or the bare model to train, in place.
            base: None is ``"tecoa"``, or ``"trades"`` for ``"released"``.
            contrast: ``"strict"`` (ANCRA); ``"smooth"``, sqrt of both probabilities of the anchor's label;
                ``"bhattacharyya"``; ``"feature"``, on embeddings.
            alpha: share of the contrast's gradient that reaches the negatives, in [0, 1].
            zeta: weight of the contrast; 0 leaves the base alone, and makes no negatives.
            beta: weight of the KL term; None is 6 for TRADES, 5 for MART.
            start: standard deviation of an attack's start, in [0, 1] pixels.
            margin: of ``"feature"``, the cosine up to which a negative costs nothing, in [-1, 1].
            reverse_attention: train through reverse attention too, with the masks of the true labels (published) or
                of the predicted classes; None is ``"label"`` for an :class:`RAClassifier`, else ``"off"``.
            cr_beta: weight of the auxiliary heads' mean against the last.
            variant: one of :attr:`variants`.
            overrides: ``threat``, ``config``, and single fields of the config, as for every trainer.

        Raises:
            UsageError: a name or value outside what is listed, options that do not go together, a threat with
                restarts, or batches of a single image.
        """
        _check_name("base", base, (*BETA, None))
        _check_name("contrast", contrast, CONTRASTS)
        _check_name("reverse_attention", reverse_attention, (*MASKS, None))
        check_number("alpha", alpha, 0, 1)
        check_number("margin", margin, -1, 1)
        check_number("start", start, 0, 1)
        for option, value in (("zeta", zeta), ("beta", 0.0 if beta is None else beta), ("cr_beta", cr_beta)):
            check_number(option, value, 0, math.inf)
        super().__init__(classifier, variant=variant, **overrides)
        self.base = base if base is not None else "trades" if variant == "released" else "tecoa"
        if beta is not None and self.base == "tecoa":
            raise UsageError(f"beta is {beta} with base 'tecoa', which has no KL term; use base='trades' or 'mart'.")
        self.contrast, self.alpha, self.zeta = contrast, alpha, zeta
        self.beta = BETA[self.base] if beta is None else beta
        self.start, self.margin, self.cr_beta = start, margin, cr_beta
        own_blocks = isinstance(self.model, RAClassifier)
        self.reverse_attention = reverse_attention or ("label" if own_blocks else "off")
        self._check_combination(own_blocks)

    def _check_combination(self, own_blocks: bool) -> None:
        if own_blocks and self.reverse_attention == "off":
            raise UsageError(
                "reverse_attention is 'off', but the classifier is an RAClassifier, which has it built in; use 'label' "
                "or 'predicted'."
            )
        if self.contrast == "feature" and self.reverse_attention != "off":
            raise UsageError(
                "contrast 'feature' compares embeddings, which heads of reverse attention share; use another contrast, "
                "or reverse_attention='off' on CLIP."
            )
        if self.threat.restarts != 1:
            raise UsageError(f"threat has {self.threat.restarts} restarts; ANCRA's attacks have one start, restarts=1.")
        images = self.config.batch_size // self.config.accumulate
        if self.zeta and images < 2:
            raise UsageError(
                f"batch_size is {self.config.batch_size} with accumulate {self.config.accumulate}; a piece needs at "
                "least 2 images, of two classes, for there to be a negative."
            )

    def default_threat(self) -> ThreatModel:
        times = 8 if self.variant == "released" else 1
        return ThreatModel("linf", eps=times * 1 / 255, step_size=times * 0.007 / 8, steps=10)

    def default_config(self) -> TrainingConfig:
        if self.variant == "released":
            return TrainingConfig(
                optimizer="sgd",
                lr=0.01,
                momentum=0.9,
                weight_decay=2e-4,
                batch_size=128,
                epochs=120,
                schedule="milestones",
                milestones=(75, 90, 100),
                gamma=0.1,
            )
        return TrainingConfig(
            optimizer="sgd", lr=1e-5, batch_size=256, epochs=10, schedule="cosine", warmup_steps=1000, warmup_cap=0.1
        )

    def hyper_parameters(self) -> Mapping[str, Any]:
        names = ("base", "contrast", "alpha", "zeta", "beta", "start", "margin", "reverse_attention", "cr_beta")
        return {name: getattr(self, name) for name in names}

    def _network(self) -> nn.Module | None:
        """What has several heads, or None for CLIP as it is."""
        if isinstance(self.model, RAClassifier):
            return self.model
        return None if self.reverse_attention == "off" else ReverseAttentionModel(self.model)

    def _weights(self) -> tuple[float, ...]:
        """Of the heads in ``[l]``."""
        network: Any = self._network()
        return head_weights(1 if network is None else len(network.head_names), self.cr_beta)

    def attack_objective(self, batch: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy; over all heads, which :class:`AllHeads` puts side by side, where there are several."""
        weights = self._weights()
        return cross_entropy if len(weights) == 1 else partial(all_heads_cross_entropy, weights=weights)

    def inner_attack(
        self,
        batch: Mapping[str, Tensor],
        *,
        seed: int,
        negatives: Tensor | None = None,
        noise: Tensor | None = None,
        negative_noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The adversarial images and the targeted negatives; the arguments after the seed replace its draws.

        Args:
            batch: ``x`` (N, C, H, W), ``y`` and ``ids`` (N,).
            seed: of the draws, which the ids key.
            negatives: (N,) rows of the batch, each of another class than its anchor.
            noise: (N, C, H, W) standard normal, ``start`` times which is where x' begins.
            negative_noise: the same for x^-.

        Returns:
            ``x_adv``, ``x_neg`` (N, C, H, W) in [0, 1] and ``negatives`` (N,); ``x_adv`` alone where zeta is 0.

        Raises:
            UsageError: a batch of one class, or draws passed in that do not fit.
        """
        x, y, ids = batch["x"], batch["y"], batch["ids"]
        if self.zeta and negatives is None:
            negatives = draw_negatives(y, ids, len(self.model.class_names), seed=seed)
        elif self.zeta and negatives is not None:
            _check_negatives(negatives, y)
        begin = self._begin("noise", x, ids, noise, seed, START_STREAM)
        if not self.zeta or negatives is None:
            return {"x_adv": self._attack(batch, x, y, begin, torch.zeros_like(y))}
        begin = torch.cat([begin, self._begin("negative_noise", x, ids, negative_noise, seed, NEGATIVE_STREAM)])
        # both attacks are on the anchors' labels, one away from them and one towards them: one run of twice the images
        towards = torch.arange(2, device=y.device).repeat_interleave(len(y))
        x_adv, x_neg = self._attack(batch, torch.cat([x, x[negatives]]), y.repeat(2), begin, towards).chunk(2)
        return {"x_adv": x_adv, "negatives": negatives, "x_neg": x_neg}

    def _begin(self, name: str, x: Tensor, ids: Tensor, given: Tensor | None, seed: int, stream: int) -> Tensor:
        if given is not None and given.shape != x.shape:
            raise UsageError(f"{name} has shape {tuple(given.shape)}; x's shape {tuple(x.shape)} is expected.")
        draw = normal(tuple(x.shape[1:]), ids, seed=seed, stream=stream, dtype=x.dtype) if given is None else given
        return self.start * draw

    def _attack(self, batch: Mapping[str, Tensor], x: Tensor, y: Tensor, begin: Tensor, towards: Tensor) -> Tensor:
        """PGD away from the labels y where ``towards`` (M,) is 0, and towards them where it is 1."""
        network, objective = self._network(), self.attack_objective(batch)
        return pgd(
            self.model if network is None else AllHeads(network),
            x,
            y,
            self.threat,
            objective=lambda logits, labels, sign: (1 - 2 * sign) * objective(logits, labels),
            target=towards,
            init=begin,
            early_stop=False,
            batch_size=len(batch["x"]) if self.low_memory else len(x),
        )

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's terms and, weighted by zeta, ``anc`` (or the name of another contrast), over all heads."""
        y = batch["y"]
        robust = self._encode(batch["x_adv"], y)
        clean = negative = None
        if self.zeta or self.base != "tecoa":
            with torch.set_grad_enabled(torch.is_grad_enabled() and (self.base != "tecoa" or self.alpha < 1)):
                clean = self._encode(batch["x"], y)
        if self.zeta:
            negative = self._encode(batch["x_neg"], y[batch["negatives"]])
        total: dict[str, Tensor] = {}
        for head, weight in enumerate(self._weights()):
            logits = None if clean is None else clean.heads[head]
            terms = base_terms(self.base, logits, robust.heads[head], y, self.beta)
            if clean is not None and negative is not None:
                name = "anc" if self.contrast == "strict" else f"{self.contrast}_contrast"
                terms[name] = self.zeta * self._contrast(clean, negative, head, y)
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + weight * value
        return total

    def _encode(self, x: Tensor, y: Tensor) -> Encoded:
        """One pass; y chooses the masks where they are those of the labels."""
        return Encoded(*self._pass(partial(self._plain if self._network() is None else self._masked, y), x))

    def _plain(self, y: Tensor, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        features = self.model.embed(x)
        return (self.model.head(features),), features

    def _masked(self, y: Tensor, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        network: Any = self._network()
        return network.heads(x, partial(hard_mask, y=y) if self.reverse_attention == "label" else hard_mask), None

    def _contrast(self, clean: Encoded, negative: Encoded, head: int, y: Tensor) -> Tensor:
        logits, logits_neg = clean.heads[head], negative.heads[head]
        if self.contrast == "strict":
            return negative_contrast(logits, logits_neg, alpha=self.alpha)
        if self.contrast == "smooth":
            return per_class_contrast(logits, logits_neg, y, alpha=self.alpha)
        if self.contrast == "bhattacharyya":
            return bhattacharyya_contrast(logits, logits_neg, alpha=self.alpha)
        assert clean.features is not None and negative.features is not None
        return feature_contrast(clean.features, negative.features, alpha=self.alpha, margin=self.margin)


def _check_name(option: str, value: Any, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise unknown_name(option, str(value), [name for name in known if name is not None])


def _check_negatives(negatives: Tensor, y: Tensor) -> None:
    check_labels(negatives, len(y), classes=len(y), argument="negatives")
    same = (y[negatives] == y).nonzero()[:, 0]
    if len(same):
        raise UsageError(
            f"negatives gives image {int(same[0])} one of its own class {int(y[same[0]])}; one of another is expected."
        )
