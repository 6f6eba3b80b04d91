"""The base losses that ANCRA's contrast is added to: TeCoA (which is PGD-AT on CLIP), TRADES and MART.

Only ANCRA-TRADES was released. The other two follow the paper's tables with the published weights and are
reconstructions. In all three the inner attack maximises cross-entropy, TRADES included: the released "TRADES" does
not attack its KL term. Nothing is detached in TRADES or MART, the clean side least of all.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clipdefense_tecoa.tecoa import tecoa_loss

BETA = {"tecoa": 0.0, "trades": 6.0, "mart": 5.0}
"""The published weight of each base's second term."""


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """``KL(P(x) || P(x'))`` of logits (N, K) -> (N,)."""
    log_p, log_p_adv = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    return (log_p.exp() * (log_p - log_p_adv)).sum(dim=1)


def trades_robust(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """``mean_i KL(P(x_i) || P(x'_i))`` (Zhang et al., ICML 2019, arXiv 1901.08573) -> scalar."""
    return divergence(logits, logits_adv).mean()


def boosted_cross_entropy(logits_adv: Tensor, y: Tensor) -> Tensor:
    """``mean_i -log P_y(x'_i) - log(1 - max_{k != y} P_k(x'_i))`` (MART; Wang et al., ICLR 2020) -> scalar.

    ``log(1 - P_k)`` is the log-sum-exp of the other logits less that of all, which is exact; a small constant inside
    the logarithm would cap the loss instead.
    """
    rival = logits_adv.scatter(1, y[:, None], float("-inf")).argmax(dim=1, keepdim=True)
    others = logits_adv.scatter(1, rival, float("-inf"))
    log_of_rest = others.logsumexp(dim=1) - logits_adv.logsumexp(dim=1)
    return F.cross_entropy(logits_adv, y) - log_of_rest.mean()


def mart_robust(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """``mean_i KL(P(x_i) || P(x'_i)) (1 - P_y(x_i))``: what the model is unsure of counts more -> scalar."""
    log_p_y = F.log_softmax(logits, dim=1).gather(1, y[:, None])[:, 0]
    return (divergence(logits, logits_adv) * -log_p_y.expm1()).mean()


def base_terms(base: str, logits: Tensor | None, logits_adv: Tensor, y: Tensor, beta: float) -> dict[str, Tensor]:
    """The base's loss terms by name; their sum is its loss.

    Args:
        base: ``"tecoa"``: CE(x'); ``"trades"``: CE(x) + beta KL; ``"mart"``: BCE(x') + beta KL (1 - P_y).
        logits: (N, K) of the natural images; None does for ``"tecoa"``.
        logits_adv: (N, K) of the adversarial ones.
        y: (N,) labels.
        beta: weight of the KL term.
    """
    if base == "tecoa":
        return {"ce": tecoa_loss(logits_adv, y)}
    assert logits is not None
    if base == "trades":
        return {"natural": F.cross_entropy(logits, y), "robust": beta * trades_robust(logits, logits_adv)}
    return {"bce": boosted_cross_entropy(logits_adv, y), "robust": beta * mart_robust(logits, logits_adv, y)}
