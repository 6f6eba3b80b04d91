"""TTE, test-time transformation ensembling (Perez et al. 2021): mean logits over flips and crops of the image.

    z(x) = mean of the model's logits on x, flip(x), crop_i(x), flip(crop_i(x)),   i = 1 .. n

A crop is a window of the image's own size in the image padded with zeros (black). n = 4 gives the published 10 passes.
Padding is an eighth of the side, the published 4 pixels at 32 and 28 at 224.

The released code does not do what it means to: all n crops come out as the same crop (a loop variable bound late), so
its 10 passes see 4 different images. It draws the place once, when the defence is built, from 0 .. 2p - 1 instead of
0 .. 2p. That is variant ``"released"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.attacks.context import logits_of
from clipdefense.checks import check_batch
from clipdefense.defenses import AttackView, Numbers, TestTimeDefense, Traits
from clipdefense.errors import UsageError, check_whole, unknown_name
from clipdefense.randomness import uniform

VARIANTS = ("default", "released")
PADDING = 8  # the padding is the side divided by this


def padding_of(x: Tensor) -> tuple[int, int]:
    """p for rows and columns of images (N, C, H, W): an eighth of the side, rounded; 4 at 32 pixels, 28 at 224."""
    return round(x.shape[2] / PADDING), round(x.shape[3] / PADDING)


def crop(x: Tensor, offset: Tensor) -> Tensor:
    """Each image's window of its own size in the image padded with zeros.

    Args:
        x: (N, C, H, W).
        offset: (N, 2) int64, top row and left column in the padded image, 0 .. 2p; p is the image itself.

    Returns:
        (N, C, H, W), differentiable in x.
    """
    (n, channels, height, width), (p, q) = x.shape, padding_of(x)
    padded = F.pad(x, (q, q, p, p))
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    rows = offset[:, 0, None] + torch.arange(height, device=x.device)
    columns = offset[:, 1, None] + torch.arange(width, device=x.device)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def ensemble(x: Tensor, offsets: Tensor) -> Iterator[Tensor]:
    """The images whose logits are averaged: x, its flip, the crops, the crops' flips; 2 + 2n times (N, C, H, W).

    Args:
        x: (N, C, H, W).
        offsets: (N, n, 2), see :func:`crop`.
    """
    yield x
    yield x.flip(3)
    for offset in offsets.unbind(dim=1):
        window = crop(x, offset)
        yield window
        yield window.flip(3)


def distinct(u: Tensor, count: int) -> Tensor:
    """(N, n) different numbers out of 0 .. count - 1 in each row, every choice equally likely.

    Args:
        u: (N, n) uniform in [0, 1), float64.
        count: at least n.
    """
    chosen = torch.empty(len(u), 0, dtype=torch.int64, device=u.device)
    for k in range(u.shape[1]):
        rank = (u[:, k] * (count - k)).long()  # among those not yet chosen
        for taken in chosen.sort(dim=1).values.unbind(dim=1):
            rank = rank + (rank >= taken)
        chosen = torch.cat([chosen, rank[:, None]], dim=1)
    return chosen


class TTE(TestTimeDefense):
    """The ensemble around a classifier. It has no face among ART's preprocessors: give ART what :meth:`wrap` returns.

    Variants:
        ``"default"``: n different crops for each image and pass, none of them the image itself.
        ``"released"``: one crop for all images and passes, in the place of all n; it depends on the seed alone.

    Attributes:
        traits: randomised. ``"released"`` is so between seeds only, each seed being a defence built anew.
    """

    traits: ClassVar[Traits] = Traits(randomized=True)

    def __init__(self, model: Any = None, *, crops: int = 4, variant: str = "default", seed: int = 0) -> None:
        """
        Args:
            model: taken, so that all defences are made alike, and not used.
            crops: n.
            variant: see the class.
            seed: keys the crops, together with image ids or with the count of images seen so far.

        Raises:
            UsageError: a value outside its range.
        """
        check_whole("crops", crops, 1)
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        check_whole("seed", seed)
        self.crops, self.variant, self.seed = crops, variant, seed
        self._numbers = Numbers()

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """(N, n, 2) places of the crops for images x, see :func:`crop`; a function of (seed, id) alone.

        Raises:
            UsageError: images so small that there are not n different crops.
        """
        p, q = padding_of(x)
        if self.variant == "released":
            u = uniform((2,), torch.zeros_like(ids[:1]), seed=seed, dtype=torch.float64)
            corner = (u * torch.tensor([2 * p, 2 * q], device=u.device)).long()
            return corner[:, None].expand(len(ids), self.crops, 2)
        places = (2 * p + 1) * (2 * q + 1)
        if self.crops > places - 1:
            raise UsageError(
                f"crops is {self.crops}, but images of {tuple(x.shape[2:])} pixels, padded by {(p, q)}, have "
                f"{places - 1} crops besides the image itself; take fewer crops or larger images."
            )
        flat = distinct(uniform((self.crops,), ids, seed=seed, dtype=torch.float64), places - 1)
        flat = flat + (flat >= places // 2)  # the middle is the image itself
        return torch.stack([flat // (2 * q + 1), flat % (2 * q + 1)], dim=2)

    def logits(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        offsets: Tensor | None = None,
        ids: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Mean logits over the ensemble, (N, classes), differentiable in x through all 2 + 2n passes.

        Args:
            model: images -> logits.
            x: (N, C, H, W) in [0, 1].
            offsets: (N, n, 2) integers, places of the crops instead of fresh ones, see :func:`crop`; any n.
            ids: (N,) image ids that key the draws. Without them each image takes the next number of a counter, and
                :meth:`reset` repeats it.
            seed: of the draws; None is the defence's own.

        Raises:
            UsageError: images, places or ids that cannot be used.
        """
        check_batch(x)
        if offsets is not None:
            offsets = _checked(x, offsets)
        else:
            offsets = self.draw(x, self._numbers.keys(x, ids).to(x.device), self.seed if seed is None else seed)
        return torch.stack([logits_of(model, view) for view in ensemble(x, offsets)]).mean(dim=0)

    def reset(self) -> None:
        """Begin the sequence of un-numbered draws again: the same calls then give the same results."""
        self._numbers = Numbers()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The defended classifier; its ``forward`` also takes ``ids``, ``seed`` and ``offsets``."""
        return EnsembledModel(self, model)

    def adaptive(self, model: nn.Module) -> tuple[AttackView, ...]:
        """``eot``: the exact gradient through the ensemble, with fresh crops in each draw.

        A draw averages n crops already, so few are needed.
        """
        return (AttackView("eot", lambda x, ids, seed: self.logits(model, x, ids=ids, seed=seed), eot=5),)


class EnsembledModel(nn.Module):
    """A classifier's mean logits over TTE's flips and crops, from :meth:`TTE.wrap`."""

    def __init__(self, defense: TTE, model: nn.Module) -> None:
        super().__init__()
        self.defense = defense
        self.model = model

    def forward(
        self, x: Tensor, ids: Tensor | None = None, seed: int | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        """(N, C, H, W) -> (N, classes); arguments as :meth:`TTE.logits`."""
        return self.defense.logits(self.model, x, offsets=offsets, ids=ids, seed=seed)


def _checked(x: Tensor, offsets: Tensor) -> Tensor:
    """The places that a caller passed in, as int64 on x's device."""
    p, q = padding_of(x)
    fits = offsets.dim() == 3 and offsets.shape[0] == len(x) and offsets.shape[1] > 0 and offsets.shape[2] == 2
    if not fits or offsets.is_floating_point():
        raise UsageError(
            f"offsets has shape {tuple(offsets.shape)}, {offsets.dtype}; integers of shape ({len(x)}, n, 2) are "
            "expected, the top row and left column of n crops an image."
        )
    offsets = offsets.to(x.device, torch.int64)
    if (offsets < 0).any() or (offsets[..., 0] > 2 * p).any() or (offsets[..., 1] > 2 * q).any():
        raise UsageError(f"offsets lead out of the padded image; rows in 0 .. {2 * p}, columns in 0 .. {2 * q} do not.")
    return offsets
