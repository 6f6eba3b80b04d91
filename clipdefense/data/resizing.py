"""How an image gets the size at which it is attacked: the rule that a protocol states."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from clipdefense.data.pixels import resize_image, resize_tensor
from clipdefense.data.sources import ImageSource
from clipdefense.errors import UsageError, unknown_name

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Resize:
    """Shorter side to ``side``, then the central square of ``crop`` pixels; nothing at all where ``side`` is None.

    Attributes:
        side: pixels of the shorter side; None leaves images as they are.
        crop: side of the square cut out, at most ``side``; None is ``side``.
        interpolation: Pillow's ``"bicubic"`` or ``"bilinear"``, both anti-aliased.
        squash: both sides become ``side``, whatever becomes of the proportions; there is no crop then.

    Raises:
        UsageError: sides that are no positive whole numbers, or a crop that is larger than the image.
    """

    side: int | None = None
    crop: int | None = None
    interpolation: Interpolation = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        for name, value in (("side", self.side), ("crop", self.crop)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} is {value!r}; a positive whole number of pixels, or None, is expected.")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise unknown_name("interpolation", str(self.interpolation), ("bicubic", "bilinear"))
        if self.crop is not None and (self.side is None or self.squash or self.crop > self.side):
            raise UsageError(
                f"crop is {self.crop} with side {self.side} and squash {self.squash}; a crop is at most the side, and "
                "squashed or untouched images have none."
            )

    @property
    def attack_at(self) -> int | None:
        """The side at which a perturbation lives; None is each image's native size."""
        return self.side if self.crop is None else self.crop

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """An RGB image, or float pixels (3, H, W) in [0, 1], of the size that the rule gives."""
        if self.side is None:
            return image
        options: dict[str, Any] = {"interpolation": self.interpolation, "squash": self.squash}
        if isinstance(image, Tensor):
            return resize_tensor(image, self.side, self.crop, **options)
        return resize_image(image, self.side, self.crop, **options)

    def __str__(self) -> str:
        if self.side is None:
            return "native size"
        if self.squash:
            return f"both sides to {self.side}, {self.interpolation}"
        return f"shorter side to {self.side}, {self.interpolation}, centre {self.attack_at}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ResizedImages:
    """A source whose images go through a rule as they are decoded."""

    def __init__(self, images: ImageSource, rule: Resize) -> None:
        self.images, self.rule = images, rule

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Image.Image | Tensor:
        return self.rule(self.images[row])

    def where(self, row: int) -> str:
        return self.images.where(row)
