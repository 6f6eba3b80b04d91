"""Reverse attention (RA; arXiv 2310.03358): features times the weights of the class they are taken for. Known unsound.

With z the features, W (K, D) the classifier's weights and p = W z the auxiliary logits,

    c = argmax p (training: the true label y),    z' = z * W_c elementwise,    p' = W z'

so that ``p'_k = sum_j W_kj W_cj z_j``. Why the robustness it shows is false:

* for z >= 0 (the published ResNets) ``p'_c = sum_j W_cj^2 z_j`` is large and never negative: p' repeats the class that
  the first auxiliary head chose. The decision is made there; what follows changes the gradient only.
* with the mask fixed, ``d(p'_k - p'_y)/dz = (W_k - W_y) * W_y``: the sign is turned on every feature with W_yj < 0, and
  for random weights this direction is about orthogonal to W_k - W_y, which leads to another class.
* the argmax has no gradient: an attack on p' never sees that moving p changes the mask.

The paper's protocol attacks p' alone. Attack the first p instead and little is left: on the small network that this
plugin's tests train as released, on four digits, PGD on p' leaves 26 % standing, and PGD of the same budget on p_0
none. RA is therefore off unless asked for, and every p can be attacked: :func:`views`.

On CLIP, z = f(x)/||f(x)|| and W are the class embeddings. Two things differ. f has both signs, so that p' need not
repeat the choice and accuracy can fall. And text embeddings of CLIP share a few outlying coordinates, which carry
nearly all of W_c * W_k whatever k is, so that the raw form discriminates nothing; W is centred, ``t_k - mean_k t_k``,
which leaves the plain decision as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.objectives import cross_entropy
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.defenses import AttackView, TestTimeDefense, Traits
from clipdefense.errors import UsageError, unknown_name
from clipdefense.threat import ThreatModel

POLICIES = ("ra", "plain")
SURROGATES = ("sum", "soft", "straight-through")

Mask = Callable[[Tensor, Tensor], Tensor]
"""(auxiliary logits p (N, K), weights W (K, D)) -> what multiplies the features, (N, D)."""


def hard_mask(p: Tensor, weight: Tensor, y: Tensor | None = None) -> Tensor:
    """``W_c`` with c = y where labels (N,) are given, else argmax p; no gradient through the choice."""
    chosen: Tensor = weight[p.argmax(dim=1) if y is None else y]
    return chosen


def soft_mask(p: Tensor, weight: Tensor, sharpness: float = 1.0) -> Tensor:
    """``sum_k softmax(sharpness p)_k W_k``: differentiable in p, and the hard mask in the limit."""
    return (sharpness * p).softmax(dim=1) @ weight


def straight_through_mask(p: Tensor, weight: Tensor, sharpness: float = 1.0) -> Tensor:
    """The value of :func:`hard_mask` with the gradient in p of :func:`soft_mask`."""
    soft = soft_mask(p, weight, sharpness)
    return soft + (hard_mask(p, weight) - soft).detach()


class MultiHead(Protocol):
    """A network with reverse attention.

    Attributes:
        head_names: of its heads: the last logits p' first, then the auxiliary ones in the order of the blocks.
    """

    head_names: tuple[str, ...]

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """Logits (N, K) of each head, in the order of :attr:`head_names`, for images (N, 3, H, W) in [0, 1]."""


def head_logits(network: MultiHead, x: Tensor, head: str, sharpness: float = 1.0) -> Tensor:
    """What an attack may differentiate, (N, K).

    Args:
        network: with reverse attention.
        x: (N, 3, H, W) in [0, 1].
        head: one of ``network.head_names``; ``"sum"``: the log-probabilities of all heads added up, so that a
            targeted attack has them agree; ``"soft"``, ``"straight-through"``: p' under those masks.
        sharpness: of the soft mask.

    Raises:
        UsageError: an unknown head.
    """
    if head in network.head_names:
        return network.heads(x)[network.head_names.index(head)]
    if head == "sum":
        return torch.stack([F.log_softmax(p, dim=1) for p in network.heads(x)]).sum(dim=0)
    if head == "soft":
        return network.heads(x, partial(soft_mask, sharpness=sharpness))[0]
    if head == "straight-through":
        return network.heads(x, partial(straight_through_mask, sharpness=sharpness))[0]
    raise unknown_name("head", head, (*network.head_names, *SURROGATES))


def views(network: MultiHead, sharpness: float = 1.0) -> tuple[AttackView, ...]:
    """Every head and every surrogate of :func:`head_logits` as a view; judge what they break on the deployed logits."""

    def view(head: str) -> AttackView:
        return AttackView(head, lambda x, ids, seed: head_logits(network, x, head, sharpness))

    return tuple(view(head) for head in (*network.head_names, *SURROGATES))


def check_sharpness(sharpness: Any) -> None:
    """A positive number."""
    if isinstance(sharpness, bool) or not isinstance(sharpness, (int, float)) or not 0 < sharpness < float("inf"):
        raise UsageError(f"sharpness is {sharpness!r}; a number above 0 is expected, such as 1 to 10.")


class ReverseAttentionModel(nn.Module):
    """Reverse attention on the embeddings of a zero-shot classifier.

    Attributes:
        head_names: ``"ra"`` (p') and ``"plain"`` (CLIP's own logits, which choose the mask).
    """

    head_names: tuple[str, ...] = ("ra", "plain")

    def __init__(
        self, model: ZeroShotClassifier, *, head: str = "plain", centre: bool = True, bounded: bool = False
    ) -> None:
        """
        Args:
            model: the classifier; its tower and head are shared.
            head: what :meth:`forward` returns: ``"plain"`` or ``"ra"``.
            centre: take the class embeddings relative to their mean; False is the raw form, which does not work.
            bounded: normalise f * W_c again, ``s <n(f * W_c), W_k>``; the published form does not.

        Raises:
            UsageError: an unknown head.
        """
        super().__init__()
        if head not in POLICIES:
            raise unknown_name("head", str(head), POLICIES)
        self.model = model
        self.head, self.centre, self.bounded = head, centre, bounded

    def weights(self, dtype: torch.dtype) -> Tensor:
        """W (K, D): unit class embeddings, less their mean where centred."""
        anchors = self.model.head.anchors.to(dtype)
        return anchors - anchors.mean(dim=0) if self.centre else anchors

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """(p', p), each (N, K), for images (N, 3, H, W) in [0, 1]."""
        embedding = self.model.embed(x)
        p = self.model.head(embedding)
        kind = embedding.device.type
        with torch.autocast(kind, enabled=False):  # as in the plain head: bf16 cosines times the scale are off
            f, w = F.normalize(embedding, dim=1), self.weights(embedding.dtype)
            masked = f * mask(p, w)
            if self.bounded:
                masked = F.normalize(masked, dim=1)
            return self.model.head.scale.to(f.dtype) * masked @ w.T, p

    def logits(self, x: Tensor, head: str = "ra") -> Tensor:
        """Logits of a head or surrogate by name, see :func:`head_logits`."""
        return head_logits(self, x, head)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, K) deployed logits."""
        return self.model(x) if self.head == "plain" else self.heads(x)[0]


class HeadModule(nn.Module):
    """One head of a network with reverse attention, as a module for ART, torchattacks and AutoAttack."""

    def __init__(self, network: nn.Module, head: str, sharpness: float = 1.0) -> None:
        """
        Args:
            network: a :class:`MultiHead` module.
            head, sharpness: see :func:`head_logits`.
        """
        super().__init__()
        self.network: Any = network
        self.head, self.sharpness = head, sharpness

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, K)."""
        return head_logits(self.network, x, self.head, self.sharpness)


class AllHeads(nn.Module):
    """All heads side by side, (N, H K), for an attack on all of them at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.network.heads(x), dim=1)


def head_weights(heads: int, cr_beta: float) -> tuple[float, ...]:
    """Weights of ``[l] = l(p') + cr_beta / B sum_b l(p_b)`` for 1 + B heads, the last logits first."""
    auxiliary = heads - 1
    return (1.0, *[cr_beta / max(auxiliary, 1)] * auxiliary)


def all_heads_cross_entropy(logits: Tensor, y: Tensor, weights: tuple[float, ...]) -> Tensor:
    """``[CE]`` of :class:`AllHeads`' logits (N, H K) -> (N,): what the released attack maximises."""
    parts = logits.chunk(len(weights), dim=1)
    return torch.stack([weight * cross_entropy(part, y) for weight, part in zip(weights, parts)]).sum(dim=0)


class ReverseAttention(TestTimeDefense):
    """Reverse attention at inference, to be measured, not to be trusted (see the module's text).

    Around a :class:`clipdefense.ZeroShotClassifier` it is :class:`ReverseAttentionModel`; around a
    :class:`clipdefense_ancra.resnet.RAClassifier`, which has its own blocks, it adds the adaptive views alone.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(
        self,
        model: Any,
        *,
        head: Literal["ra", "plain"] = "ra",
        centre: bool = True,
        bounded: bool = False,
        sharpness: float = 1.0,
    ) -> None:
        """
        Args:
            model: the classifier, or a :class:`clipdefense.CLIPClassifier` of it.
            head: what decides: ``"ra"``, p' as published, or ``"plain"``, the (first) auxiliary logits, which for
                CLIP are its own: no defence.
            centre, bounded: see :class:`ReverseAttentionModel`; for CLIP only.
            sharpness: of the soft masks of the adaptive views.

        Raises:
            UsageError: an unknown head, a sharpness that is not above 0, a model without class embeddings.
        """
        if head not in POLICIES:
            raise unknown_name("head", str(head), POLICIES)
        check_sharpness(sharpness)
        self.head, self.centre, self.bounded, self.sharpness = head, centre, bounded, sharpness
        self._network(getattr(model, "model", model))

    @classmethod
    def conformance_model(cls) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
        """What :func:`clipdefense.check_defense` audits it on: an untrained network has no gradient worth hiding."""
        from clipdefense_ancra.digits import trained_on_digits  # which trains by what this module offers

        return trained_on_digits()

    def _network(self, model: Any) -> Any:
        if callable(getattr(model, "heads", None)):
            return model
        if not isinstance(model, ZeroShotClassifier):
            raise UsageError(
                f"model is a {type(model).__name__}; a ZeroShotClassifier, whose class embeddings are the masks, or an "
                "RAClassifier is expected."
            )
        return ReverseAttentionModel(model, head=self.head, centre=self.centre, bounded=self.bounded)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The deployed classifier."""
        network: Any = self._network(model)
        if isinstance(network, ReverseAttentionModel):
            return network
        return HeadModule(network, network.head_names[POLICIES.index(self.head)])

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """Each auxiliary head, the last logits (the paper's protocol), all together, and p' under soft masks.

        Attack them by margin as well as cross-entropy, targeted too, and count what any of them breaks. A view of
        the head that decides is the plain white-box attack; the others are for the gradient that it hides.
        """
        return views(self._network(model), self.sharpness)
