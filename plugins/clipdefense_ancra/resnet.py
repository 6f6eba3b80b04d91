"""The ResNet with reverse attention that ANCRA was published on (arXiv 2310.03358), as a classifier of this library.

ResNet-18 for small images: 3x3 stem of stride 1, stages of 64, 128, 256 and 512 channels with two blocks each. Both
blocks of the last stage are followed by reverse attention, and one linear layer serves every head:

    z_b = block_b(h) >= 0,   p_b = fc(GAP(z_b)),   h = z_b * W_c,   c = argmax p_b (training: y),   p' = fc(GAP(h))

for b = 0, 1, W the layer's weight (not normalised, not detached; its bias is not masked). No ReLU follows the mask.
The released forward sets the module's mode as a side effect; here the mask is an argument and nothing is set.

The paper's WideResNets and its PreActResNet for 64 px are not here. Why RA is not to be trusted stands in
:mod:`clipdefense_ancra.reverse_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import ClassHead, ZeroShotClassifier
from clipdefense.defenses import AttackView
from clipdefense.errors import UsageError
from clipdefense_ancra.reverse_attention import Mask, hard_mask, head_logits, views


class Block(nn.Module):
    """``ReLU(BN(conv(ReLU(BN(conv h)))) + shortcut(h))``."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, h: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(h)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(h))


class ResNetRA(nn.Module):
    """ResNet-18 with reverse attention after both blocks of its last stage.

    Attributes:
        head_names: ``"final"`` (p'), ``"aux0"`` (p_0), ``"aux1"`` (p_1).
    """

    head_names: tuple[str, ...] = ("final", "aux0", "aux1")

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        """
        Args:
            classes: K.
            width: channels of the first stage; 64 is ResNet-18.
        """
        super().__init__()
        stages = [width, 2 * width, 4 * width, 8 * width]
        blocks, channels = [], width
        for out in stages:
            for stride in (1 if out == width else 2, 1):
                blocks.append(Block(channels, out, stride))
                channels = out
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(*blocks[:-2])
        self.reverse = nn.ModuleList(blocks[-2:])
        self.fc = nn.Linear(channels, classes)

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """(p', p_0, p_1), each (N, K), for images (N, 3, H, W)."""
        h, auxiliary = self.body(self.stem(x)), []
        for block in self.reverse:
            z = block(h)
            auxiliary.append(self.fc(z.mean(dim=(2, 3))))
            h = z * mask(auxiliary[-1], self.fc.weight)[:, :, None, None]
        return self.fc(h.mean(dim=(2, 3))), *auxiliary

    def logits(self, x: Tensor, head: str = "final") -> Tensor:
        """(N, K) of ``"final"``, ``"aux0"``, ``"aux1"``, ``"sum"``, ``"soft"`` or ``"straight-through"``."""
        return head_logits(self, x, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x)[0]


class LogitHead(ClassHead):
    """A class head for a tower that has its own last layer: logits in, the same logits out."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, torch.eye(len(names)), scale=1.0)

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding


class RAClassifier(ZeroShotClassifier):
    """:class:`ResNetRA` as a classifier on pixels in [0, 1], not normalised, for this library's trainers and attacks.

    ``forward`` is p' with the masks of the predicted classes, as published. It is zero-shot in nothing but the type:
    the last layer is trained, so ``embed`` gives logits, and it has no classes but its own.

    Attributes:
        head_names: those of :class:`ResNetRA`.
    """

    head_names: tuple[str, ...] = ResNetRA.head_names

    def __init__(self, class_names: Sequence[str], *, width: int = 64, image_size: int = 32) -> None:
        """
        Args:
            class_names: in label order.
            width: see :class:`ResNetRA`.
            image_size: side in pixels; other images are resized to it.

        Raises:
            UsageError: fewer than two names, or an image size or width below 1.
        """
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UsageError(f"width is {width!r}; a whole number of channels of at least 1 is expected (64).")
        count = len(class_names)
        super().__init__(
            ResNetRA(count, width),
            torch.eye(count),
            class_names=class_names,
            image_size=image_size,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            source=f"clipdefense_ancra:ResNetRA(width={width})",
        )
        self.head = LogitHead(class_names)

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """(p', p_0, p_1), each (N, K) in at least float32, for images (N, 3, H, W) in [0, 1]."""
        heads = self.tower.heads(self.preprocess(x), mask)  # type: ignore[operator]
        return tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in heads)

    def logits(self, x: Tensor, head: str = "final") -> Tensor:
        """(N, K) of a head or surrogate, see :meth:`ResNetRA.logits`."""
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
