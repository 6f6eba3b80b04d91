"""``digits:train``, ``digits:val``, ``digits:test``: scikit-learn's handwritten digits as RGB images of 32 pixels.

1,797 real images of 8 x 8 pixels, the test part of the UCI "Optical Recognition of Handwritten Digits" data set
(Alpaydin and Kaynak 1998, CC BY 4.0), which scikit-learn brings along: nothing is downloaded.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from clipdefense.data import ArrayImages, ImageDataset
from clipdefense.errors import UsageError, unknown_name

Split = Literal["train", "val", "test"]

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
SPLITS: tuple[Split, ...] = get_args(Split)

# The k-th image of a class goes where k modulo 20 says: 60 % train, 15 % validation, 25 % test. Counting needs no
# generator, so the split is the same under every version of every package.
_PERIOD = 20
_TEST = (0, 4, 8, 12, 16)
_VALIDATION = (2, 10, 18)


def split_indices(labels: Tensor, split: Split) -> Tensor:
    """Rows of one part of the fixed, stratified split, rising.

    Args:
        labels: (N,) integer labels.
        split: ``"train"``, ``"val"`` (for every choice: hyper-parameters, eps, thresholds) or ``"test"`` (for none).
    """
    if split not in SPLITS:
        raise unknown_name("split of digits", str(split), SPLITS)
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    place = rank % _PERIOD
    test = torch.isin(place, torch.tensor(_TEST))
    validation = torch.isin(place, torch.tensor(_VALIDATION))
    parts = {"train": ~test & ~validation, "val": validation, "test": test}
    return parts[split].nonzero().flatten()


def load_digits_images(split: Split) -> tuple[Tensor, Tensor]:
    """One part of the digits, enlarged to 32 pixels (bicubic, clamped), grey repeated over three channels.

    Args:
        split: ``"train"`` (1,075 images), ``"val"`` (268) or ``"test"`` (454).

    Returns:
        Images (N, 3, 32, 32), float32 in [0, 1], and labels (N,), int64, into :data:`CLASSES`.

    Raises:
        UsageError: an unknown split.
    """
    raw = load_digits()
    labels = torch.as_tensor(raw.target).long()
    rows = split_indices(labels, split)
    grey = torch.as_tensor(raw.images)[rows, None].float() / 16
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = F.interpolate(grey, size=size, mode="bicubic", align_corners=False).clamp_(0, 1)
    return images.expand(-1, 3, -1, -1).contiguous(), labels[rows]


def load(
    name: str, *, split: str | None = None, n: int | None = None, seed: int = 0, size: int | None = None
) -> ImageDataset:
    """``digits:train``, ``digits:val`` or ``digits:test``.

    Args:
        name: the split.
        split: must stay None, or say the same.
        n: take so many images, evenly over the classes.
        seed: of that choice.
        size: side to resize to; None keeps 32 pixels.

    Raises:
        UsageError: an unknown split.
    """
    if name not in SPLITS:
        raise unknown_name("split of digits", name, SPLITS)
    if split not in (None, name):
        raise UsageError(f"split is {split!r}, but the data set is digits:{name}; write digits:{split} alone.")
    images, labels = load_digits_images(name)
    meta = {
        "source": "UCI Optical Recognition of Handwritten Digits, by scikit-learn",
        "licence": "CC BY 4.0",
    }
    dataset = ImageDataset(
        ArrayImages(images.numpy(), "NCHW"), labels, CLASSES, name=f"digits/{name}", size=size, meta=meta
    )
    return dataset if n is None else dataset.sample(n, seed)
