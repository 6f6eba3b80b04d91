"""The augmentation that LAAT's networks were trained with: ``defense.fit(Augmented(dataset, cifar_fs()))``.

A fit seeds the generators for each image of each epoch, so that what is drawn here repeats, in a resumed run too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from clipdefense.errors import UsageError


def cifar_fs() -> v2.Transform:
    """32 px: zeros 4 pixels wide around the image and a window of it, a flip, a rotation by up to 15 degrees."""
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.RandomRotation(15)])


def mini_imagenet() -> v2.Transform:
    """84 px to 80: zeros 8 pixels wide around the image and a window of it, brightness, contrast, saturation, a flip.

    Test images are the middle 80 pixels, ``v2.CenterCrop(80)``.
    """
    return v2.Compose([v2.RandomCrop(80, padding=8), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomHorizontalFlip()])


class Augmented:
    """A dataset whose images are drawn anew each time they are read. Training data: keep validation images out of it.

    Attributes:
        dataset: the images as they are.
        transform: what is done to each.
    """

    def __init__(self, dataset: Any, transform: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            dataset: ``len(dataset)`` and ``dataset[i] -> (image (C, H, W) in [0, 1], label)``, such as an
                :class:`clipdefense.data.ImageDataset`, whose ids and classes it then has.
            transform: image -> image in [0, 1].

        Raises:
            UsageError: a dataset without len() and [i], or a transform that cannot be called.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(f"dataset is a {type(dataset).__name__}; one with len() and [i] is expected.")
        if not callable(transform):
            raise UsageError(f"transform is {transform!r}; a function of an image is expected, such as cifar_fs().")
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[index]
        return self.transform(torch.as_tensor(image)), label

    def __getattr__(self, name: str) -> Any:
        if name not in ("ids", "classes"):  # a pickle asks for others before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)
