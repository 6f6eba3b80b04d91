"""Comp-TGA, complementary text-guided attention (TPAMI 2026, arXiv 2603.18598): TGA-ZSR with another map.

    A = M(t_y) * (1 - M(t'_y))

with ``M`` the map of TGA-ZSR, ``t_y`` the text embedding of the true class and ``t'_y`` that of the negated prompt
``This is not a photo of a {}``. Both maps are brought to [0, 1] on the token grid, then up-sampled, then multiplied.
The released code resizes with antialiasing, which changes nothing when a map is enlarged. It calls the losses L_LARM
and L_GACM; they are L_AR and L_AMC of TGA-ZSR on these maps, with weights 0.10 and 0.07.

The released code seeds torch's generator anew in every step, so that every batch meets the same noise in its attack;
here the noise of an image differs from epoch to epoch. Its authors report 44.46 % robust accuracy under PGD (mean of
16 datasets); an independent run got 31.40 % under PGD and 26.24 % under AutoAttack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipdefense.classifier import ClassHead, TokenEmbeddings, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.estimator import CLIPClassifier
from clipdefense_tgazsr.tgazsr import TGAZSR

NEGATIVE_TEMPLATE = "This is not a photo of a {}"


def complementary_map(M: Tensor, M_negative: Tensor) -> Tensor:
    """``A = M * (1 - M')``: what resembles the class and does not resemble its negation; (N, H, W) each, in [0, 1]."""
    return M * (1 - M_negative)


def negated_embeddings(model: ZeroShotClassifier) -> Tensor:
    """(C, D) unit embeddings of ``This is not a photo of a {}`` for the model's classes, by its own text tower.

    Raises:
        UsageError: the model's class encoder is no text tower of open_clip, so prompts cannot be had from it.
    """
    from clipdefense_openclip.text import TextEncoder

    encoder = model.class_encoder
    if not isinstance(encoder, TextEncoder):
        got = "no class encoder" if encoder is None else f"a class encoder of type {type(encoder).__name__}"
        raise UsageError(
            f"negative_embeddings is None, and the model has {got}, which cannot encode {NEGATIVE_TEMPLATE!r}; pass "
            f"that prompt's text embeddings, ({len(model.class_names)}, {model.head.embeddings.shape[1]}), a row a "
            "class, or load a model with its text tower (open_clip:...)."
        )
    negated = TextEncoder(encoder.model, encoder.tokenizer, (NEGATIVE_TEMPLATE,), batch_size=encoder.batch_size)
    return negated(model.class_names)


class CompTGA(TGAZSR):
    """Comp-TGA as an ART trainer; variants, settings and everything else as for :class:`TGAZSR`.

    A head with a transform applies it to the negated embeddings too.

    Attributes:
        negative_anchors: (C, D) unit vectors t'.
    """

    name: ClassVar[str] = "comp-tga"

    def __init__(
        self,
        classifier: CLIPClassifier | ZeroShotClassifier,
        *,
        alpha: float = 0.10,
        beta: float = 0.07,
        grid: tuple[int, int] | None = None,
        negative_embeddings: Tensor | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            classifier: the estimator (ART) or the bare model to train, in place.
            alpha, beta, grid: as for :class:`TGAZSR`.
            negative_embeddings: (C, D) text embeddings of the negated prompts, in the order of the classes; None
                has the model's text tower encode them.
            overrides: ``threat``, ``config``, ``variant`` and config fields, as for every trainer.

        Raises:
            UsageError: embeddings of another shape or not finite, none for a model without a text tower, or what
                :class:`TGAZSR` refuses.
        """
        super().__init__(classifier, alpha=alpha, beta=beta, grid=grid, **overrides)
        head = self.model.head
        if negative_embeddings is None:
            negatives, self._source = negated_embeddings(self.model), NEGATIVE_TEMPLATE
        else:
            _check_negative(negative_embeddings, head)
            negatives = negative_embeddings.detach()
            content = negatives.double().cpu().contiguous().numpy().tobytes()
            self._source = f"given, SHA-256 {hashlib.sha256(content).hexdigest()}"
        self.negative_anchors = ClassHead(head.names, negatives.to(head.embeddings), head.transform).anchors

    def hyper_parameters(self) -> Mapping[str, Any]:
        return {**super().hyper_parameters(), "negative_embeddings": self._source}

    def begin(self) -> None:
        super().begin()
        self.negative_anchors = self.negative_anchors.to(self.model.device)

    def attention(self, embeddings: TokenEmbeddings, y: Tensor) -> Tensor:
        M = self._map(embeddings, self.model.head.anchors, y, antialias=True)
        M_negative = self._map(embeddings, self.negative_anchors, y, antialias=True)
        return complementary_map(M, M_negative)


def _check_negative(embeddings: Any, head: ClassHead) -> None:
    expected = tuple(head.embeddings.shape)
    if not isinstance(embeddings, Tensor) or tuple(embeddings.shape) != expected:
        got = f"has shape {tuple(embeddings.shape)}" if isinstance(embeddings, Tensor) else f"is {embeddings!r:.80}"
        raise UsageError(f"negative_embeddings {got}; a tensor of shape {expected} is expected, a row a class.")
    if not torch.isfinite(embeddings).all() or (embeddings.norm(dim=1) == 0).any():
        raise UsageError("negative_embeddings contains NaN, infinite or zero rows; finite non-zero ones are expected.")
