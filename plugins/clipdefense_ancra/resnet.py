"""A network with reverse attention (:mod:`clipdefense_ancra.networks`) as a classifier of this library.

Why reverse attention is not to be trusted stands in :mod:`clipdefense_ancra.reverse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from clipdefense.checks import check_class_names
from clipdefense.classifier import ClassHead, ZeroShotClassifier
from clipdefense.defenses import AttackView
from clipdefense.errors import UsageError, check_whole, unknown_name
from clipdefense.weights import load_strictly, parse_device, parse_dtype, read_sidecar, read_state_dict
from clipdefense_ancra.networks import PreActResNetRA, ResNetRA, ReverseAttentionNetwork, WideResNetRA
from clipdefense_ancra.reverse_attention import Mask, hard_mask, head_logits, views


class Published(NamedTuple):
    """A network's constructor, of (classes, width), and what it was published with."""

    make: Callable[[int, int], ReverseAttentionNetwork]
    width: int
    image_size: int
    inputs: int  # of the last layer, a unit of width


NETWORKS = {
    "resnet18": Published(ResNetRA, 64, 32, 8),
    "preact-resnet18": Published(PreActResNetRA, 64, 64, 32),
    "wide-resnet28": Published(partial(WideResNetRA, depth=28), 10, 32, 64),
    "wide-resnet34": Published(partial(WideResNetRA, depth=34), 10, 32, 64),
}


class LogitHead(ClassHead):
    """A class head for a tower that has its own last layer: logits in, the same logits out."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, torch.eye(len(names)), scale=1.0)

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding


class RAClassifier(ZeroShotClassifier):
    """A network with reverse attention on pixels in [0, 1], not normalised, for this library's trainers and attacks.

    ``forward`` is p' with the masks of the predicted classes, as published. It is zero-shot in nothing but the type:
    the last layer is trained, so ``embed`` gives logits, and it has no classes but its own.

    Attributes:
        head_names: those of :class:`ReverseAttentionNetwork`.
    """

    head_names: tuple[str, ...] = ReverseAttentionNetwork.head_names

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        network: str = "resnet18",
        width: int | None = None,
        image_size: int | None = None,
    ) -> None:
        """
        Args:
            class_names: in label order.
            network: one of :data:`NETWORKS`.
            width: channels of a ResNet's first stage, or a WideResNet's factor; None is as published, 64 or 10.
            image_size: side in pixels, other images are resized to it; None is as published, 64 for the PreActResNet
                (on Tiny-ImageNet), else 32.

        Raises:
            UsageError: an unknown network, fewer than two names, or an image size or width below 1.
        """
        if network not in NETWORKS:
            raise unknown_name("network", str(network), NETWORKS)
        published = NETWORKS[network]
        width = published.width if width is None else width
        check_whole("width", width, 1)
        names = check_class_names(class_names)
        super().__init__(
            published.make(len(names), width),
            torch.eye(len(names)),
            class_names=names,
            image_size=published.image_size if image_size is None else image_size,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            source=f"ancra:{network}",
        )
        self.head = LogitHead(names)

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """(p', p_0, p_1), each (N, K) in at least float32, for images (N, 3, H, W) in [0, 1]."""
        heads = self.tower.heads(self.preprocess(x), mask)  # type: ignore[operator]
        return tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in heads)

    def logits(self, x: Tensor, head: str = "final") -> Tensor:
        """(N, K) of a head or surrogate, see :meth:`ReverseAttentionNetwork.logits`."""
        return head_logits(self, x, head)

    def adaptive(self) -> tuple[AttackView, ...]:
        """What an attacker who knows reverse attention attacks; ``ReverseAttention(model)`` hands them on."""
        return views(self)

    def with_classes(self, names: Sequence[str]) -> NoReturn:
        """
        Raises:
            UsageError: always; the last layer is trained for its own classes.
        """
        raise UsageError(
            "this classifier's last layer is trained for its own classes, so it takes no other names; build an "
            "RAClassifier of those names and train it."
        )


def load(
    name: str,
    weights: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    width: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RAClassifier:
    """``ancra:NETWORK`` is untrained, ``ancra:NETWORK@FILE`` a model saved by this library.

    Args:
        name: one of :data:`NETWORKS`.
        weights: a saved model's file.
        classes: names of the classes; a saved model has its own and takes no others.
        width, image_size: see :class:`RAClassifier`; a saved model brings its own.
        seed: of untrained weights; the global generator is left alone.
        device, dtype: of the network; None is the CPU and float32.

    Raises:
        UsageError: an unknown network, no classes or other ones than a saved model's, a file that cannot be read or
            does not fit.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    place, state = parse_device(device), {}
    if weights is not None:
        what, sidecar, state = f"checkpoint {weights}", read_sidecar(weights), read_state_dict(weights)
        if "tower.fc.weight" not in state or "class_names" not in sidecar:
            raise UsageError(f"{what} is not a saved model of ancra:{name}: it has no last layer, or no class names.")
        stored = [str(label) for label in sidecar["class_names"]]
        if classes is not None and list(classes) != stored:
            raise UsageError(f"classes differ from those that the last layer of {what} is trained for; leave them out.")
        classes, image_size = stored, image_size or sidecar.get("image_size")
        width = max(state["tower.fc.weight"].shape[1] // NETWORKS[name].inputs, 1)
    if classes is None:
        raise UsageError(f"classes is None, but ancra:{name} brings no class names of its own; pass classes=[...].")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = RAClassifier(classes, network=name, width=width, image_size=image_size)
    if state:
        load_strictly(model, state, what)
        model.source = f"ancra:{name}@{weights}"
    model.tower.to(dtype=parse_dtype(dtype))
    return model.to(place).eval()
