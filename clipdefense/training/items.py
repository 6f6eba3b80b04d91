"""What arrays, datasets and loaders give, as checked batches: images in [0, 1], integer labels, one class list."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdefense.checks import check_images, check_labels
from clipdefense.errors import UsageError
from clipdefense.plugins import registry

Batch = dict[str, Tensor]
"""``ids`` (N,) sample ids, ``x`` (N, C, H, W), and ``y`` (N,) where there are labels."""


def pair(item: Any, what: str) -> tuple[Any, Any]:
    """(image, label) or (images, labels) as a dataset or loader gave them; None for a label that is not there.

    Args:
        item: the image alone, bare or in a tuple or list of one, or a tuple or list of two.
        what: it is, for the message.

    Raises:
        UsageError: a mapping, or another number of entries: which of them is the label nobody can know.
    """
    wanted = "(image, label) or the image alone is expected"
    if isinstance(item, Mapping):
        keys = ", ".join(map(repr, item))
        raise UsageError(f"{what} is a {type(item).__name__} with {keys}; {wanted}: take the two out of it, in order.")
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) not in (1, 2):
        raise UsageError(f"{what} has {len(item)} entries; {wanted}: leave out the rest.")
    return item[0], item[1] if len(item) == 2 else None


def collate(items: Sequence[tuple[int, Any]]) -> tuple[Tensor, Tensor, Tensor | None] | UsageError:
    """(ids (N,), images, labels or None) of (id, item) pairs; an error as a value, which a worker can send whole."""
    try:
        return _collated(items)
    except UsageError as error:
        return error


def _collated(items: Sequence[tuple[int, Any]]) -> tuple[Tensor, Tensor, Tensor | None]:
    numbers, images, labels = [], [], []
    for number, item in items:
        image, label = pair(item, f"item {number} of the dataset")
        if not isinstance(image, (Tensor, np.ndarray)):
            raise UsageError(
                f"item {number} of the dataset holds a {type(image).__name__}; a (C, H, W) tensor in [0, 1] is "
                "expected (torchvision's ToTensor makes one of a PIL image)."
            )
        numbers.append(number)
        images.append(torch.as_tensor(image))
        labels.append(label)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UsageError(f"images of the dataset differ in shape: {sorted(shapes)[:3]}; resize them to one shape.")
    return torch.tensor(numbers), torch.stack(images), _labels(numbers, labels)


def _labels(numbers: list[int], labels: list[Any]) -> Tensor | None:
    """One tensor of the items' labels, (N,) or one-hot (N, classes)."""
    without = [number for number, label in zip(numbers, labels) if label is None]
    if len(without) == len(labels):
        return None
    if without:
        raise UsageError(f"item {without[0]} of the dataset has no label, others do; all or none are expected.")
    try:
        found = torch.stack([torch.as_tensor(label) for label in labels])
    except (TypeError, ValueError, RuntimeError) as error:  # a string, or shapes that differ
        raise UsageError(
            f"item {numbers[0]} of the dataset has the label {labels[0]!r}; a whole number (the place of its class in "
            "the model's list) or a one-hot row is expected, the same for every item."
        ) from error
    return found.flatten() if found.shape[1:].numel() == 1 else found


def checked_batch(ids: Tensor, images: Tensor, labels: Any, classes: int, needs_labels: bool) -> Batch:
    """A batch of what a dataset or loader gave, checked."""
    check_images(images)
    batch = {"ids": ids, "x": images}
    y = as_labels(labels, len(images), classes, needs_labels)
    return batch if y is None else batch | {"y": y}


def as_images(x: Any, argument: str = "x") -> Tensor:
    """An array or tensor as a tensor, without a copy where there can be none."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise UsageError(f"{argument} is a {type(x).__name__}; an array or tensor (N, C, H, W) in [0, 1] is expected.")
    return x


def as_labels(y: Any, n: int, classes: int, required: bool) -> Tensor | None:
    """Integer labels (n,) of integer or one-hot ones.

    Args:
        y: (n,) integers or (n, classes) one-hot, array, tensor or list; None for no labels.
        n: images.
        classes: of the model's head.
        required: whether the method needs labels.

    Raises:
        UsageError: labels that are missing, do not fit the head, or are neither integer nor one-hot.
    """
    if y is None:
        if required:
            others = _methods_without_labels()
            advice = f", or use a method that needs none: {', '.join(others)}" if others else ""
            raise UsageError(f"y is None, but this method learns from labels; pass integer or one-hot ones{advice}.")
        return None
    labels = torch.as_tensor(y)
    if labels.dim() == 2:
        if labels.shape[1] != classes:
            raise UsageError(
                f"y is one-hot over {labels.shape[1]} classes, but the model's head has {classes}; load the model with "
                "the class list that the labels belong to."
            )
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
            raise UsageError("y has rows that are not one-hot; integer or one-hot labels are expected, not soft ones.")
        labels = labels.argmax(dim=1)
    if labels.numel() and not labels.is_floating_point() and int(labels.max()) >= classes:
        raise UsageError(
            f"y has labels in [{int(labels.min())}, {int(labels.max())}]; [0, {classes - 1}] is expected, since the "
            f"model's head has {classes} classes; load the model with the class list that the labels belong to."
        )
    check_labels(labels, n, classes)
    return labels.long()


def _methods_without_labels() -> list[str]:
    """The registered trainer defences that can do without."""
    found = []
    for name in registry().names("defenses"):
        with suppress(UsageError):  # a plugin that cannot be used is no advice
            if not getattr(registry().find("defenses", name).load(), "needs_labels", True):
                found.append(name)
    return found


def check_same_classes(data: Any, names: Sequence[str]) -> None:
    """Require that the class list which the data bring is the head's.

    Args:
        data: a dataset, or a loader of one; its ``classes`` are compared where it has them.
        names: of the model's head, in label order.

    Raises:
        UsageError: another number of classes, or a name that the head has at another label. A name that the head
            does not have at all may be another word for the same class; a warning says so where that is all of them.
    """
    theirs = getattr(data, "classes", None) or getattr(getattr(data, "dataset", None), "classes", None)
    if not isinstance(theirs, (list, tuple)):
        return
    advice = "give the model the dataset's list: model.with_classes(dataset.classes)."
    if len(theirs) != len(names):
        raise UsageError(f"the dataset has {len(theirs)} classes, but the model's head has {len(names)}; {advice}")
    for label, name in enumerate(theirs):
        if name in names and names[label] != name:
            raise UsageError(
                f"class {name!r} has label {label} in the dataset, {names.index(name)} in the model's head; {advice}"
            )
    if theirs and not {_plain(name) for name in theirs} & {_plain(name) for name in names}:
        warnings.warn(
            f"none of the dataset's {len(theirs)} class names ({theirs[0]!r}, ...) is one of the model's "
            f"({names[0]!r}, ...); labels are taken by position. Unless they are other words for the same, {advice}",
            stacklevel=2,
        )


def _plain(name: Any) -> str:
    """A class name without what data sets write differently."""
    return " ".join(str(name).casefold().replace("_", " ").replace("-", " ").split())
