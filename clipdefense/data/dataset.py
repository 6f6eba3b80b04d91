"""Labelled images as a map-style dataset: selected, renumbered and resized without decoding anything twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipdefense.checks import check_labels
from clipdefense.data.pixels import resize_image, resize_tensor, to_tensor
from clipdefense.data.resizing import Resize, ResizedImages
from clipdefense.data.sources import ArrayImages, ImageSource
from clipdefense.errors import UsageError, unknown_name

KEPT_BYTES = 1 << 30


class _Kept:
    """Decoded 8-bit images by row, up to a number of bytes; what comes later is decoded again."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.images: dict[int, Tensor] = {}
        self.left = limit

    def keep(self, row: int, pixels: Tensor) -> None:
        if row not in self.images and pixels.dtype == torch.uint8 and pixels.nbytes <= self.left:
            self.images[row] = pixels
            self.left -= pixels.nbytes


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """``ds[i] -> (float image (3, H, W) in [0, 1], label)``, decoded when it is asked for.

    Selections (:meth:`select`, :meth:`sample`, :meth:`only`) are views: they share the images.

    Attributes:
        classes: class names, in label order; a data set may bring repeated ones (:meth:`renamed` tells them apart).
        labels: (N,) int64.
        ids: (N,) int64, each image's number in the data set before any selection: the key of random draws.
        name: for messages and reports.
        size: side to which images are resized (shorter side by Pillow's anti-aliased bicubic, then the centre is
            cropped), or None for images as they are.
        meta: what the data set says of itself (source, licence).
    """

    def __init__(
        self,
        images: ImageSource,
        labels: Any,
        classes: Sequence[str],
        *,
        name: str = "images",
        size: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            images: the images, by row.
            labels: one integer an image, in [0, len(classes)).
            classes: names, a label each.
            name, size, meta: the attributes.

        Raises:
            UsageError: labels, names or a size that do not fit.
        """
        self.classes = _check_names(classes, name)
        self.labels = _as_tensor(labels)
        if not len(images):
            raise UsageError(f"data set {name!r} is empty; at least one image is expected.")
        check_labels(self.labels, len(images), len(self.classes), f"labels of data set {name!r}")
        self.labels = self.labels.long()
        self.ids = torch.arange(len(images))
        self.name = name
        self.size = _check_size(size)
        self.meta = dict(meta or {})
        self._images = images
        self._kept = _Kept()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        size = "native size" if self.size is None else f"{self.size} px"
        return f"ImageDataset({self.name!r}, {len(self)} images, {len(self.classes)} classes, {size})"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        pixels = self._pixels(int(self.ids[index]))
        return _to_float(pixels), int(self.labels[index])

    def _pixels(self, row: int) -> Tensor:
        """One image at this dataset's size, (3, H, W): uint8, or float where the source is."""
        if row in self._kept.images:
            return self._kept.images[row]
        try:
            image = self._images[row]
            if isinstance(image, Image.Image):
                return to_tensor(image if self.size is None else resize_image(image, self.size))
            return image if self.size is None else resize_tensor(image, self.size)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise anything for damaged bytes
            where = self._images.where(row)
            raise UsageError(
                f"image {row} of data set {self.name!r}{f' ({where})' if where else ''} cannot be decoded "
                f"({type(error).__name__}: {error}); replace it, or leave it out with select()."
            ) from error

    def tensors(self, indices: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float32 and labels (N,), all at once.

        An image is decoded the first time this method meets it; its 8-bit pixels are then kept, up to 1 GiB of them,
        for every later access through this dataset or a selection of it.

        Args:
            indices: which; None for all.

        Raises:
            UsageError: images of several shapes (give ``size=``), or one that cannot be decoded.
        """
        chosen = range(len(self)) if indices is None else self._check_indices(indices).tolist()
        x: Tensor | None = None
        for place, index in enumerate(chosen):
            row = int(self.ids[index])
            pixels = self._pixels(row)
            self._kept.keep(row, pixels)
            if x is None:
                x = torch.empty(len(chosen), *pixels.shape)
            if pixels.shape != x.shape[1:]:
                raise UsageError(
                    f"data set {self.name!r} has images of several shapes, such as {tuple(x.shape[1:])} and "
                    f"{tuple(pixels.shape)}; load it with size=, which resizes and crops to one."
                )
            x[place] = _to_float(pixels)
        assert x is not None
        return x, self.labels[list(chosen)].clone()

    def where(self, index: int) -> str:
        """The image's path, as far as the data set has one."""
        return self._images.where(int(self.ids[index]))

    def select(self, indices: Sequence[int] | Tensor) -> ImageDataset:
        """The images at these indices, in this order; class names and numbers stay.

        Raises:
            UsageError: none, or one out of range.
        """
        rows = self._check_indices(indices)
        return self._view(ids=self.ids[rows], labels=self.labels[rows])

    def sample(self, n: int, seed: int = 0) -> ImageDataset:
        """n images, as evenly over the classes as these allow, in the data set's order.

        The choice is a function of (labels, n, seed), and a smaller sample is part of a larger one.

        Raises:
            UsageError: n below 1 or above the number of images.
        """
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= len(self):
            raise UsageError(f"n is {n!r}; a whole number from 1 to {len(self)}, the images there are, is expected.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        # in this order, round k takes every class's k-th image
        seen: Counter[int] = Counter()
        rounds = []
        for label in self.labels[order].tolist():
            rounds.append(seen[label])
            seen[label] += 1
        chosen = order[torch.tensor(rounds).argsort(stable=True)[:n]]
        return self.select(chosen.sort().values)

    def only(self, classes: Sequence[str]) -> ImageDataset:
        """The images of these classes, labels renumbered in the order given.

        Raises:
            UsageError: an unknown or repeated name, or classes without images.
        """
        wanted = _check_names(classes, self.name)
        number = torch.full((len(self.classes),), -1)
        for label, name in enumerate(wanted):
            if wanted.index(name) != label:
                raise UsageError(f"classes contains {name!r} more than once.")
            number[self._label(name)] = label
        labels = number[self.labels]
        kept = (labels >= 0).nonzero().flatten()
        if not len(kept):
            raise UsageError(f"data set {self.name!r} has no image of the classes {', '.join(wanted)}.")
        return self._view(ids=self.ids[kept], labels=labels[kept], classes=wanted)

    def renamed(self, names: Mapping[str, str] | Sequence[str]) -> ImageDataset:
        """The same images under other class names.

        Args:
            names: a name for each class, or only those that change, such as ``{"automobile": "car"}``.

        Raises:
            UsageError: an unknown class, or another number of names.
        """
        listed = list(self.classes)
        if isinstance(names, Mapping):
            for old, new in names.items():
                listed[self._label(old)] = new
        else:
            listed = list(_check_names(names, self.name))
        if len(listed) != len(self.classes):
            raise UsageError(f"names has {len(listed)} names; {len(self.classes)}, one a class, are expected.")
        return self._view(classes=_check_names(listed, self.name))

    def resized(self, rule: Resize, **meta: Any) -> ImageDataset:
        """The same images under a resize rule instead of ``size``; ``meta`` is added to what the data set says."""
        source = ResizedImages(self._images, rule)
        return self._view(_images=source, _kept=_Kept(), size=None, meta={**self.meta, **meta})

    def _label(self, name: str) -> int:
        if name not in self.classes:
            raise unknown_name(f"class of data set {self.name!r}", name, self.classes)
        if self.classes.count(name) > 1:
            labels = [label for label, other in enumerate(self.classes) if other == name]
            raise UsageError(
                f"data set {self.name!r} has the class name {name!r} at the labels {labels}; give every class a name "
                "of its own with renamed([...])."
            )
        return self.classes.index(name)

    def _view(self, **changes: Any) -> ImageDataset:
        view = object.__new__(ImageDataset)
        view.__dict__.update(self.__dict__, **changes)
        return view

    def _check_indices(self, indices: Sequence[int] | Tensor) -> Tensor:
        rows = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
        if rows.dim() != 1 or not len(rows) or rows.is_floating_point() or rows.dtype == torch.bool:
            raise UsageError(
                f"indices has shape {tuple(rows.shape)} and dtype {rows.dtype}; a list of at least one whole number is "
                "expected (a mask converts with mask.nonzero().flatten())."
            )
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= len(self):
            raise UsageError(f"indices has values in [{low}, {high}]; [0, {len(self) - 1}] is expected.")
        return rows.long()


def from_arrays(
    x: Any,
    y: Any,
    classes: Sequence[str] | None = None,
    *,
    name: str = "arrays",
    size: int | None = None,
    layout: str | None = None,
) -> ImageDataset:
    """A dataset of pixels in memory.

    Args:
        x: array or tensor: uint8, or floating point in [0, 1]; (N, C, H, W), (N, H, W, C) or (N, H, W).
        y: (N,) integer labels.
        classes: names; ``class 0``, ``class 1``, ... when not given.
        name: for messages.
        size: side to resize to, or None.
        layout: ``"NCHW"`` or ``"NHWC"``; None tells by where the channels are.

    Raises:
        UsageError: shapes, dtypes or values that do not fit.
    """
    pixels = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asanyarray(x)
    labels = _as_tensor(y)
    source = ArrayImages(pixels, layout)
    check_labels(labels, len(source))
    names = [f"class {i}" for i in range(int(labels.max()) + 1)] if classes is None else classes
    return ImageDataset(source, labels, names, name=name, size=size)


def _as_tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels.detach().cpu()
    array = np.asarray(labels)
    # torch has no arithmetic for some of NumPy's unsigned integers
    return torch.as_tensor(array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array)


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def _check_names(names: Sequence[str], dataset: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"classes is the string {names!r}; a list of names is expected, such as ['cat', 'dog'].")
    listed = tuple(str(name) for name in names)
    if not listed or not all(name.strip() for name in listed):
        raise UsageError(f"classes of data set {dataset!r} is {listed}; at least one name, none empty, is expected.")
    return listed


def _check_size(size: int | None) -> int | None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UsageError(f"size is {size!r}; a positive whole number of pixels, or None for native size, is expected.")
    return size
