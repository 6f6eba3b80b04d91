"""Asymmetric negative contrast (ANC; arXiv 2310.03358), and smooth relatives of it that are not ANCRA's.

An image x and a negative x^- of another class should not be given the same class with confidence. With P and P^- their
softmax probabilities over the whole class list,

    S(x, x^-) = 1[argmax P = argmax P^-] sqrt(max P  max P^-),
    S_alpha   = alpha S(sg[x], x^-) + (1 - alpha) S(x, sg[x^-]),        L_ANC = 1/N sum_i S_alpha(x_i, x^-_i)

where sg stops the gradient. The value does not depend on alpha; what reaches x and x^- does: (1 - alpha) and alpha
times the gradient of S. At the published alpha = 1 the natural image is left alone and its negative is pushed.

The paper speaks of a distance between features. The released code, and this, compares the top-1 probabilities: no
temperature, no margin, zero for every pair that is not confused. The sum is divided by N, not by the number of
confused pairs. Similarities are computed from log-probabilities, so that no gradient is infinite where a probability
underflows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Similarity = Callable[[Tensor, Tensor], Tensor]
"""(anchors (N, ...), negatives (N, ...)) -> (N,) in [0, 1]."""


def asymmetric(similarity: Similarity, anchor: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """``1/N sum_i alpha S(sg[a_i], n_i) + (1 - alpha) S(a_i, sg[n_i])`` -> scalar.

    Args:
        similarity: S.
        anchor: (N, ...) of the natural images.
        negative: (N, ...) of their negatives, row by row.
        alpha: share of the gradient that reaches the negatives, in [0, 1].
    """
    if alpha == 1:
        return similarity(anchor.detach(), negative).mean()
    if alpha == 0:
        return similarity(anchor, negative.detach()).mean()
    pushed, pulled = similarity(anchor.detach(), negative), similarity(anchor, negative.detach())
    return (alpha * pushed + (1 - alpha) * pulled).mean()


def confusion(logits: Tensor, logits_neg: Tensor) -> Tensor:
    """``1[argmax P = argmax P^-] sqrt(max P  max P^-)`` of logits (N, K) -> (N,); the paper's S."""
    top, top_neg = (F.log_softmax(z, dim=1).max(dim=1) for z in (logits, logits_neg))
    similarity = (0.5 * (top.values + top_neg.values)).exp()
    return similarity * (top.indices == top_neg.indices)


def shared_label(logits: Tensor, logits_neg: Tensor, y: Tensor) -> Tensor:
    """``sqrt(P_y P^-_y)`` with y (N,) the anchor's label -> (N,): confused or not, and whatever is predicted."""
    log_p, log_p_neg = (F.log_softmax(z, dim=1).gather(1, y[:, None])[:, 0] for z in (logits, logits_neg))
    return (0.5 * (log_p + log_p_neg)).exp()


def bhattacharyya(logits: Tensor, logits_neg: Tensor) -> Tensor:
    """``sum_k sqrt(P_k P^-_k)`` -> (N,), the Bhattacharyya coefficient; S where both are one-hot on the same class."""
    return (0.5 * (F.log_softmax(logits, dim=1) + F.log_softmax(logits_neg, dim=1))).exp().sum(dim=1)


def feature_overlap(f: Tensor, f_neg: Tensor, margin: float) -> Tensor:
    """``max(0, cos(f(x), f(x^-)) - margin)`` of embeddings (N, D) -> (N,)."""
    return (F.cosine_similarity(f, f_neg, dim=1) - margin).clamp_min(0)


def negative_contrast(logits: Tensor, logits_neg: Tensor, *, alpha: float = 1.0) -> Tensor:
    """L_ANC, ANCRA's contrast.

    Args:
        logits: (N, K) of the natural images.
        logits_neg: (N, K) of their negatives.
        alpha: share of the gradient that reaches the negatives, in [0, 1]; 1 is published.

    Returns:
        Scalar in [0, 1], the mean over all N pairs.
    """
    return asymmetric(confusion, logits, logits_neg, alpha)


def per_class_contrast(logits: Tensor, logits_neg: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    """A smooth variant, not ANCRA: S is :func:`shared_label`; y (N,) the anchors' labels, the rest as above."""
    return asymmetric(lambda a, b: shared_label(a, b, y), logits, logits_neg, alpha)


def bhattacharyya_contrast(logits: Tensor, logits_neg: Tensor, *, alpha: float = 1.0) -> Tensor:
    """A smooth variant, not ANCRA: S is :func:`bhattacharyya`."""
    return asymmetric(bhattacharyya, logits, logits_neg, alpha)


def feature_contrast(f: Tensor, f_neg: Tensor, *, alpha: float = 1.0, margin: float = 0.0) -> Tensor:
    """A smooth variant, not ANCRA, on embeddings (N, D): S is :func:`feature_overlap`; cosines below margin cost 0."""
    return asymmetric(lambda a, b: feature_overlap(a, b, margin), f, f_neg, alpha)
