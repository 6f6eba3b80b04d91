"""The networks with reverse attention that ANCRA was published on (arXiv 2310.03358): logits of every head.

With ``b`` over the last two blocks of the last stage, ``W`` the weight of the one linear layer and ``c`` its bias,

    z_b = after(block_b(h)) >= 0,   p_b = fc(pool(z_b)),   h = z_b * W_c,   c = argmax p_b (training: y),
    p' = fc(pool(h))

W is neither normalised nor detached, its bias is not masked, and no ReLU follows the mask. ``after`` is nothing in the
ResNet, whose blocks end in a ReLU, and the network's last BatchNorm and ReLU in the two pre-activation networks: one
BatchNorm for both blocks, so that its statistics are of two depths. The released forward sets the module's mode as a
side effect; here the mask is an argument and nothing is set.

``pool`` is the average of the map; the PreActResNet keeps four averages, of its quarters, and its masks are as coarse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.errors import UsageError
from clipdefense_ancra.reverse_attention import Mask, hard_mask, head_logits


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


class PreActBlock(nn.Module):
    """``conv(ReLU(BN(conv(a)))) + shortcut``, a = ReLU(BN(h)); the shortcut is h, or a 1 x 1 convolution of a."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        a = F.relu(self.bn1(h))
        inner: Tensor = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return inner + (h if self.shortcut is None else self.shortcut(a))


class ReverseAttentionNetwork(nn.Module):
    """Stem, stages, and reverse attention after each of the last two blocks.

    Attributes:
        head_names: ``"final"`` (p'), ``"aux0"`` (p_0), ``"aux1"`` (p_1).
        cells: the last map is averaged to ``cells x cells``.
    """

    head_names: tuple[str, ...] = ("final", "aux0", "aux1")

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], after: nn.Module, channels: int, classes: int, cells: int
    ) -> None:
        super().__init__()
        self.stem, self.body, self.reverse = stem, nn.Sequential(*blocks[:-2]), nn.ModuleList(blocks[-2:])
        self.after, self.cells = after, cells
        self.fc = nn.Linear(channels * cells**2, classes)

    def pooled(self, z: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, C cells^2), each the average of its part of the map.

        Raises:
            UsageError: a map whose side is no multiple of the cells.
        """
        if min(z.shape[-2:]) < self.cells or any(side % self.cells for side in z.shape[-2:]):
            raise UsageError(
                f"images end in a map of {tuple(z.shape[-2:])}, which does not divide into {self.cells} x {self.cells} "
                f"parts; take an image_size that is a multiple of {8 * self.cells}."
            )
        return F.avg_pool2d(z, (z.shape[-2] // self.cells, z.shape[-1] // self.cells)).flatten(1)

    def spread(self, mask: Tensor, z: Tensor) -> Tensor:
        """A mask (N, C cells^2) over the parts of the map that :meth:`pooled` averages, (N, C, S, S)."""
        n, channels, height, width = z.shape
        parts = mask.view(n, channels, self.cells, 1, self.cells, 1)
        down, across = height // self.cells, width // self.cells
        return parts.expand(-1, -1, -1, down, -1, across).reshape(z.shape)

    def heads(self, x: Tensor, mask: Mask = hard_mask) -> tuple[Tensor, ...]:
        """(p', p_0, p_1), each (N, K), for images (N, 3, H, W)."""
        h, auxiliary = self.body(self.stem(x)), []
        for block in self.reverse:
            z = self.after(block(h))
            auxiliary.append(self.fc(self.pooled(z)))
            h = z * self.spread(mask(auxiliary[-1], self.fc.weight), z)
        return self.fc(self.pooled(h)), *auxiliary

    def logits(self, x: Tensor, head: str = "final") -> Tensor:
        """(N, K) of ``"final"``, ``"aux0"``, ``"aux1"``, ``"sum"``, ``"soft"`` or ``"straight-through"``."""
        return head_logits(self, x, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x)[0]


class ResNetRA(ReverseAttentionNetwork):
    """ResNet-18 for small images: stages of 64, 128, 256 and 512 channels, two blocks each."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        """
        Args:
            classes: K.
            width: channels of the first stage; 64 is ResNet-18.
        """
        stem = nn.Sequential(_convolution(width), nn.BatchNorm2d(width), nn.ReLU())
        blocks = _stages(Block, width, [width, 2 * width, 4 * width, 8 * width], 2)
        super().__init__(stem, blocks, nn.Identity(), 8 * width, classes, cells=1)


class PreActResNetRA(ReverseAttentionNetwork):
    """Pre-activation ResNet-18 for images of 64 px (Tiny-ImageNet), whose last layer sees 2 x 2 averages."""

    def __init__(self, classes: int = 200, width: int = 64) -> None:
        """Arguments as in :class:`ResNetRA`."""
        blocks = _stages(PreActBlock, width, [width, 2 * width, 4 * width, 8 * width], 2)
        after = nn.Sequential(nn.BatchNorm2d(8 * width), nn.ReLU())
        super().__init__(_convolution(width), blocks, after, 8 * width, classes, cells=2)


class WideResNetRA(ReverseAttentionNetwork):
    """WideResNet: three stages of 16, 32 and 64 times the width."""

    def __init__(self, classes: int = 10, width: int = 10, depth: int = 34) -> None:
        """
        Args:
            classes: K.
            width: the widening factor.
            depth: 6 n + 4, with n blocks a stage, n of at least 2: 28 and 34 are published.
        """
        blocks = _stages(PreActBlock, 16, [16 * width, 32 * width, 64 * width], (depth - 4) // 6)
        after = nn.Sequential(nn.BatchNorm2d(64 * width), nn.ReLU())
        super().__init__(_convolution(16), blocks, after, 64 * width, classes, cells=1)


def _convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, 1, 1, bias=False)


def _stages(kind: type[nn.Module], channels: int, widths: Sequence[int], blocks: int) -> list[nn.Module]:
    """The blocks of all stages; the first of each but the first stage halves the map."""
    made = []
    for stage, out in enumerate(widths):
        for number in range(blocks):
            made.append(kind(channels, out, 2 if stage and not number else 1))
            channels = out
    return made
