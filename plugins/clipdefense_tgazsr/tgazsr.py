"""TGA-ZSR, text-guided attention for zero-shot robustness (Yu et al., NeurIPS 2024, arXiv 2410.21802).

Where an image's parts resemble the text of its true class is a map. The map of an adversarial image is drawn towards
the original tower's map of the clean image, and so is the trained tower's map of the clean image:

    L      = L_CE + alpha L_AR + beta L_AMC
    L_CE   = CE(z(x_adv), y),                            x_adv by PGD on this term alone
    L_AR   = (1/N) sum_n || M(f, x_adv, y) - M(f_0, x, y) ||_2        attention refinement
    L_AMC  = (1/N) sum_n || M(f, x, y)     - M(f_0, x, y) ||_2        attention-based model constraint

with ``f`` the image tower that trains, ``f_0`` its frozen original, ``z`` the scaled cosine logits, and the map

    F_0 = pooled embedding,  F_p = token p in the joint space,  p = 1 .. P
    F'_{p,d} = F_{p,d} / || F_{.,d} ||_2          over the 1 + P tokens, for each channel d
    S_p  = <F'_p, t_y>,                           t_y the unit text embedding of the true class
    M    = (S - min_p S) / (max_p S - min_p S),   as an h x w grid, up-sampled bilinearly

Paper and released code differ, and this follows the code, whose numbers were published: the paper does not mention
that channels are normalised over tokens (tokens themselves are not normalised); it resizes before min-max, the code
after; it takes tokens "before the pooling operation", the code after the last LayerNorm and the projection. The norm
is not squared, and 0.08 and 0.05 mean something for maps of 224 x 224 pixels only: on 7 x 7 the same distance is some
24 times smaller. The code's distances "l1" and "cos", which with these weights weigh next to nothing, and its Grad-CAM
maps, through which no gradient flows, are not here.

The robust accuracy that the paper reports under PGD (42.09 %, mean of 16 datasets) comes from code that attacks in
half precision and keeps the best epoch on those same datasets; its AutoAttack figure (30.86 %) is of another model,
trained with beta 0.009. An independent run of the method got 31.55 % under PGD and 30.52 % under AutoAttack.

Passes a step, besides the inner attack: x_adv and x through ``f``, x through ``f_0`` without graph (the released code
encodes x_adv twice). Maps are computed in full float32 whatever the autocast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.context import full_fp32
from clipdefense.classifier import TokenEmbeddings, ZeroShotClassifier
from clipdefense.errors import UsageError, check_number
from clipdefense.estimator import CLIPClassifier
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig

PUBLISHED_SIZE = 224
"""Side in pixels of the maps for which the published weights hold."""

_ROUNDING = 16  # units in the last place within which a map counts as constant


def token_similarity(embeddings: TokenEmbeddings, t: Tensor, *, guarded: bool = True) -> Tensor:
    """``S_p = <F'_p, t>``, each channel of F divided by its norm over all tokens, the class token included.

    A tower whose tokens do not include its class token (average pooling, CNNs) has the pooled embedding in its place.

    Args:
        embeddings: pooled (N, D), the token F_0, and tokens (N, P, D), row by row.
        t: (N, D) unit text embeddings, each image's own class.
        guarded: a channel that is zero on all tokens counts as zero, without gradient; False gives NaN, as released.

    Returns:
        (N, P).
    """
    every = torch.cat([embeddings.pooled[:, None], embeddings.tokens], dim=1)
    norm = torch.linalg.vector_norm(every, dim=1, keepdim=True)
    # products and a sum rather than a matrix product: equal tokens have equal similarities, to the last bit
    return (_ratio(every, norm, norm > 0, guarded)[:, 1:] * t[:, None]).sum(dim=2)


def min_max(S: Tensor, *, guarded: bool = True) -> Tensor:
    """``M = (S - min S) / (max S - min S)`` of each row, in [0, 1].

    Args:
        S: (N, P).
        guarded: a row that is constant up to rounding (16 units in the last place of its largest value) becomes
            zeros, without gradient; False gives NaN where all its values are equal, as released.

    Returns:
        (N, P).
    """
    low, high = S.amin(dim=1, keepdim=True), S.amax(dim=1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(S.dtype).eps * S.detach().abs().amax(dim=1, keepdim=True)
    return _ratio(S - low, high - low, high - low > rounding, guarded)


def _ratio(numerator: Tensor, denominator: Tensor, usable: Tensor, guarded: bool) -> Tensor:
    if not guarded:
        return numerator / denominator
    usable = usable | ~torch.isfinite(denominator)  # what diverged has to show
    # two selections: a gradient of the quotient by zero would be NaN even where the first discards its value
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def resize_matrix(source: int, target: int, *, antialias: bool = False, like: Tensor) -> Tensor:
    """(target, source) weights of bilinear resizing along one axis, those of ``F.interpolate(align_corners=False)``.

    The backward pass of ``F.interpolate`` adds up in any order on CUDA; that of a matrix product has one.

    Args:
        source, target: lengths, at least 1.
        antialias: widen the triangle when shrinking. When enlarging it changes nothing.
        like: its dtype and device are the result's.
    """
    places = torch.arange(target, device=like.device)[:, None]
    cells = torch.arange(source, device=like.device)[None]
    # everything times 2 * target, so in whole numbers: one division rounds, at the end
    centre = (2 * places + 1) * source - target
    if not antialias:
        centre = centre.clamp(0, 2 * target * (source - 1))
    width = 2 * (max(source, target) if antialias else target)
    weights = (width - (centre - 2 * target * cells).abs()).clamp_min(0)
    return weights.to(like.dtype) / weights.sum(dim=1, keepdim=True).to(like.dtype)


def upsample(maps: Tensor, size: int, *, antialias: bool = False) -> Tensor:
    """(N, h, w) -> (N, size, size), bilinear (``align_corners=False``), as two matrix products."""
    rows, columns = (resize_matrix(side, size, antialias=antialias, like=maps) for side in maps.shape[1:])
    return rows @ maps @ columns.T


def attention_map(
    embeddings: TokenEmbeddings,
    t: Tensor,
    grid: tuple[int, int],
    size: int = PUBLISHED_SIZE,
    *,
    guarded: bool = True,
    antialias: bool = False,
) -> Tensor:
    """The text-guided attention map: :func:`token_similarity`, :func:`min_max` on the grid, then :func:`upsample`.

    Args:
        embeddings: pooled (N, D) and tokens (N, P, D) in row-major order, un-normalised.
        t: (N, D) unit text embeddings.
        grid: (h, w) with h * w = P.
        size: side of the map in pixels.
        guarded: see :func:`min_max`.
        antialias: see :func:`resize_matrix`.

    Returns:
        (N, size, size), in [0, 1].
    """
    with full_fp32():
        M = min_max(token_similarity(embeddings, t, guarded=guarded), guarded=guarded)
        return upsample(M.unflatten(1, grid), size, antialias=antialias)


def ce_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``L_CE``, cross-entropy of logits (N, C) against labels (N,), mean over the batch."""
    return F.cross_entropy(logits, y)


def map_distance(M: Tensor, M_ori: Tensor, *, per_pixel: bool = True) -> Tensor:
    """``(1/N) sum_n ||M_n - M_ori_n||_2``, not squared: its gradient keeps its length until the maps are equal.

    Args:
        M, M_ori: (N, H, W).
        per_pixel: 224 times the root mean square over pixels instead, which is the same at 224 x 224 and does not
            grow with the size.

    Returns:
        Scalar; where two maps are equal the gradient is zero.
    """
    distance = torch.linalg.vector_norm((M - M_ori).flatten(1), dim=1).mean()
    return distance * (PUBLISHED_SIZE / math.sqrt(M[0].numel())) if per_pixel else distance


def attention_refinement_loss(M_adv: Tensor, M_ori: Tensor, *, per_pixel: bool = True) -> Tensor:
    """``L_AR``: trained tower's maps of adversarial images to the original tower's of the clean; :func:`map_distance`.

    Args:
        M_adv, M_ori: (N, H, W).
        per_pixel: see :func:`map_distance`.
    """
    return map_distance(M_adv, M_ori, per_pixel=per_pixel)


def attention_model_constraint_loss(M_cln: Tensor, M_ori: Tensor, *, per_pixel: bool = True) -> Tensor:
    """``L_AMC``: trained tower's maps of clean images to the original tower's of the same; :func:`map_distance`.

    Args:
        M_cln, M_ori: (N, H, W).
        per_pixel: see :func:`map_distance`.
    """
    return map_distance(M_cln, M_ori, per_pixel=per_pixel)


def token_grid(tower: nn.Module, count: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """(h, w) of a tower's tokens: as given, as the tower's patches say (``grid_size``), or else a square.

    Args:
        tower: the image tower.
        count: tokens an image, P.
        grid: the caller's word for it.

    Raises:
        UsageError: a grid that has not P cells, a P that is no square in a tower that does not say, or P = 1.
    """
    if count < 2:
        raise UsageError(
            f"the tower {type(tower).__name__} has {count} token an image, whose map is constant; give it larger "
            "images (image_size) or take a tower with a finer final map."
        )
    stated = [getattr(part, "grid_size", None) for part in tower.modules()] if grid is None else [grid]
    for sides in stated:
        if isinstance(sides, (tuple, list)) and len(sides) == 2 and math.prod(sides) == count:
            return int(sides[0]), int(sides[1])
    if grid is not None:
        raise UsageError(f"grid is {grid}, but the tower {type(tower).__name__} gives {count} tokens an image.")
    side = math.isqrt(count)
    if side * side != count:
        raise UsageError(
            f"the tower {type(tower).__name__} gives {count} tokens an image, which form no square; pass grid=(rows, "
            "columns)."
        )
    return side, side


class TGAZSR(TrainerDefense):
    """TGA-ZSR as an ART trainer. Trains the whole image tower; prompts are ``This is a photo of a {}`` in the paper.

    Needs a tower with tokens (:meth:`clipdefense.ZeroShotClassifier.embed_tokens`): a vision transformer's patches, or
    the cells of a CNN's final map, to which the paper does not apply it. A BatchNorm that trains normalises by the
    batch and the frozen tower by its statistics, so that L_AMC starts above 0 there.

    Variants:
        ``"default"``: distances per pixel (224 times the root mean square), on maps of the model's own image size, so
            that the weights mean the same at every resolution; at 224 pixels these are the released losses. A
            constant map, or a channel that is zero on all tokens, counts as zero without gradient. Warm-up takes at
            most 0.13 of the run, since the published 1000 updates were meant for 7820.
        ``"released"``: what the released code computes: maps of 224 x 224 whatever the model takes, the plain L2
            norm, nothing guarded. A constant map (or a channel that is zero on all tokens) is NaN, and so are its
            losses: the fit stops at that step with an error that names the term, the weights the last good ones.
            1000 updates of warm-up however short the run.

    Both share the rest: SGD with learning rate 1e-4, momentum 0.9, no weight decay, batches of 128, 10 epochs, cosine
    to 0; PGD with 2 steps of 1/255 in the Linf ball of radius 1/255, from a uniform point. The released attack runs in
    half precision and leaves its gradients in the weights' ``.grad``; here neither happens. The last epoch is kept.

    Attributes:
        alpha, beta: weights of L_AR and L_AMC.
        grid: rows and columns of tokens, once a fit has begun.
        frozen: the original model f_0, once a fit has begun.
    """

    name: ClassVar[str] = "tga-zsr"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")

    def __init__(
        self,
        classifier: CLIPClassifier | ZeroShotClassifier,
        *,
        alpha: float = 0.08,
        beta: float = 0.05,
        grid: tuple[int, int] | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier: the estimator (ART) or the bare model to train, in place.
            alpha: weight of L_AR, at least 0; a term of weight 0 is left out, with its passes.
            beta: weight of L_AMC, at least 0; the paper's AutoAttack table is of a model with 0.009.
            grid: (rows, columns) of the tower's tokens; None asks the tower.
            overrides: ``threat``, ``config``, ``variant`` and config fields, as for every trainer.

        Raises:
            UsageError: a weight or a grid that cannot be used, or what :class:`clipdefense.trainers.TrainerDefense`
                refuses; when a fit begins, a tower without tokens.
        """
        super().__init__(classifier, **overrides)
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_number(name, value, 0, math.inf)
        if grid is not None and not _is_grid(grid):
            raise UsageError(f"grid is {grid!r}; two positive whole numbers, rows and columns, are expected.")
        self.alpha, self.beta = float(alpha), float(beta)
        self._given_grid = None if grid is None else (grid[0], grid[1])
        self.grid: tuple[int, int] | None = None
        self.frozen: ZeroShotClassifier | None = None

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=2)

    def default_config(self) -> TrainingConfig:
        return TrainingConfig(
            optimizer="sgd",
            lr=1e-4,
            momentum=0.9,
            weight_decay=0.0,
            batch_size=128,
            epochs=10,
            schedule="cosine",
            warmup_steps=1000,
            warmup_cap=1.0 if self.variant == "released" else 0.13,
            train="tower",
        )

    def hyper_parameters(self) -> Mapping[str, Any]:
        grid = None if self._given_grid is None else list(self._given_grid)
        return {"alpha": self.alpha, "beta": self.beta, "grid": grid}

    @property
    def map_size(self) -> int:
        """Side of the maps in pixels."""
        return PUBLISHED_SIZE if self.variant == "released" else self.model.image_size

    def begin(self) -> None:
        """Copy the original model, and see what its tokens are like.

        Raises:
            UsageError: a tower without tokens, or whose tokens form no known grid.
        """
        self.frozen = self.frozen_copy()
        side, device = self.model.image_size, self.model.device
        blank = torch.zeros(1, self.model.mean.numel(), side, side, device=device)
        with torch.no_grad():
            tokens = self.frozen.embed_tokens(blank).tokens
        self.grid = token_grid(self.model.tower, tokens.shape[1], self._given_grid)

    def attention(self, embeddings: TokenEmbeddings, y: Tensor) -> Tensor:
        """Each image's map (N, S, S) for its label: what L_AR and L_AMC compare."""
        return self._map(embeddings, self.model.head.anchors, y)

    def _map(self, embeddings: TokenEmbeddings, anchors: Tensor, y: Tensor, *, antialias: bool = False) -> Tensor:
        assert self.grid is not None
        t = anchors[y].to(embeddings.tokens.dtype)
        guarded = self.variant != "released"
        return attention_map(embeddings, t, self.grid, self.map_size, guarded=guarded, antialias=antialias)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, y = batch["x"], batch["y"]
        if self.frozen is None:
            raise UsageError("losses() compares with the original tower; call begin() before it, as fit() does.")
        per_pixel, terms = self.variant != "released", {}
        adversarial = self.embed_tokens(batch["x_adv"])
        ce = ce_loss(self.model.head(adversarial.pooled), y)
        if self.alpha or self.beta:
            with torch.no_grad():
                M_ori = self.attention(self.frozen.embed_tokens(x), y)
        if self.alpha:
            M_adv = self.attention(adversarial, y)
            terms["ar"] = self.alpha * attention_refinement_loss(M_adv, M_ori, per_pixel=per_pixel)
        if self.beta:
            M_cln = self.attention(self.embed_tokens(x), y)
            terms["amc"] = self.beta * attention_model_constraint_loss(M_cln, M_ori, per_pixel=per_pixel)
        return {"ce": ce, **terms}


def _is_grid(grid: Any) -> bool:
    return (
        isinstance(grid, (tuple, list))
        and len(grid) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in grid)
    )
