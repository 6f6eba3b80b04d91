"""The classifier every part of the library works on: images in [0, 1] -> cosine logits.

Everything that defines the classifier (resize, normalisation, dtype, tower, class head, scale) happens inside
``forward``, because ART's and torchattacks' attacks only ever see the module.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.checks import check_batch, check_class_names
from clipdefense.errors import UsageError
from clipdefense.resize import bicubic

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ClassEncoder = Callable[[Sequence[str]], Tensor]
"""Class names -> their (C, D) embeddings: a text tower with prompts, or a table of stored embeddings."""


class TokenEmbeddings(NamedTuple):
    """What a tower says of an image, and of its parts, in the joint space."""

    pooled: Tensor  # (N, D), what embed() returns
    tokens: Tensor  # (N, P, D), patches (or cells of a CNN's final map) in row-major order


class EmbeddingTable:
    """Stored class embeddings as a :data:`ClassEncoder`, for towers that have no text tower at hand."""

    def __init__(self, names: Sequence[str], embeddings: Tensor) -> None:
        """
        Args:
            names: the names that are known, distinct.
            embeddings: (len(names), D).
        """
        if len(names) != len(embeddings):
            raise UsageError(
                f"embeddings has {len(embeddings)} rows for {len(names)} names; one row a name is expected."
            )
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UsageError(f"names contains {repeated[0]!r} more than once; the names of stored embeddings differ.")
        self.names = tuple(names)
        self.embeddings = embeddings.detach().clone()
        self._row = {name: row for row, name in enumerate(self.names)}

    def __call__(self, names: Sequence[str]) -> Tensor:
        """(C, D) embeddings of the names, exact match.

        Raises:
            UsageError: a name is not in the table; the nearest that are, are named.
        """
        missing = [name for name in names if name not in self._row]
        if missing:
            near = difflib.get_close_matches(missing[0], self.names, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UsageError(
                f"classes: {len(missing)} of {len(names)} names have no stored embedding, "
                f"the first is {missing[0]!r}{hint}."
            )
        return self.embeddings[[self._row[name] for name in names]]


class ClassHead(nn.Module):
    """Cosine classifier against one anchor a class: ``scale * <e / |e|, transform(c) / |transform(c)|>``.

    Attributes:
        names: class names, in label order.
        embeddings: (C, D) class embeddings as given, before the transform.
        transform: a map on class embeddings, or None (LAAT's fitted expansion is one).
        scale: the logit scale (exp of CLIP's ``logit_scale``; 100 for OpenAI's models).
        anchors: (C, D) unit class vectors, computed from the above.
    """

    embeddings: Tensor
    anchors: Tensor
    scale: Tensor

    def __init__(
        self, names: Sequence[str], embeddings: Tensor, transform: nn.Module | None = None, scale: float = 100.0
    ) -> None:
        super().__init__()
        self.names = check_class_names(names)
        if not isinstance(embeddings, Tensor):
            raise UsageError(f"class_embeddings is a {type(embeddings).__name__}; a torch tensor is expected.")
        if embeddings.dim() != 2 or len(embeddings) != len(self.names):
            raise UsageError(
                f"class_embeddings has shape {tuple(embeddings.shape)}; "
                f"({len(self.names)}, D) is expected, a row a class."
            )
        if not torch.isfinite(embeddings).all() or (embeddings.norm(dim=1) == 0).any():
            raise UsageError("class_embeddings contains NaN, infinite or zero rows; finite non-zero ones are expected.")
        if not 0 < scale < math.inf:
            raise UsageError(f"logit_scale is {scale}; a positive number is expected (100 for OpenAI's CLIP).")
        self.transform = transform
        self.register_buffer("embeddings", embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32)))
        self.register_buffer("scale", torch.tensor(float(scale), dtype=self.embeddings.dtype))
        self.register_buffer("anchors", self._anchors(), persistent=False)
        self.register_load_state_dict_post_hook(_renew_anchors)  # runs once the transform has its weights too

    def _anchors(self) -> Tensor:
        with torch.no_grad():
            mapped = self.embeddings if self.transform is None else self.transform(self.embeddings)
            return F.normalize(mapped.to(torch.promote_types(mapped.dtype, torch.float32)), dim=1)

    def forward(self, embedding: Tensor) -> Tensor:
        """(N, D) image embeddings -> (N, C) logits, float32, or float64 for float64 embeddings."""
        with _without_autocast(embedding):  # bf16 cosines times 100 are off by halves
            unit = F.normalize(embedding, dim=1)
            return self.scale.to(unit.dtype) * unit @ self.anchors.to(unit.dtype).T

    def _apply(self, *args: Any, **kwargs: Any) -> ClassHead:
        super()._apply(*args, **kwargs)
        self.anchors = self._anchors()  # a cast of the old ones would keep the old precision, or lose some
        return self

    def extra_repr(self) -> str:
        return f"classes={len(self.names)}, dim={self.embeddings.shape[1]}, scale={float(self.scale):g}"


def _without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _renew_anchors(head: ClassHead, _: Any) -> None:
    head.anchors = head._anchors()


class ZeroShotClassifier(nn.Module):
    """Image tower + class head + preprocessing, as one module on pixels.

    Attributes:
        tower: maps normalised images (N, 3, S, S) to embeddings (N, D). A tower that also offers
            ``embed_tokens(images) -> TokenEmbeddings`` gives this class's :meth:`embed_tokens`.
        head: the :class:`ClassHead`.
        image_size: S, the side the tower takes; other sizes are resized to (S, S) inside ``forward``.
        class_encoder: used by :meth:`with_classes`; not a submodule, so it holds no parameters of this model.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        class_embeddings: Tensor,
        *,
        class_names: Sequence[str] | None = None,
        logit_scale: float = 100.0,
        image_size: int = 224,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        transform: nn.Module | None = None,
        class_encoder: ClassEncoder | None = None,
        source: str = "",
    ) -> None:
        """
        Args:
            tower: any image encoder, normalised images -> (N, D).
            class_embeddings: (C, D); normalised by the head.
            class_names: C distinct names; ``class 0``, ``class 1``, ... when not given.
            logit_scale: factor on the cosines, > 0.
            image_size: side in pixels that the tower takes.
            mean, std: channel statistics, in [0, 1] pixel units.
            transform: the head's map on class embeddings.
            class_encoder: names -> embeddings, for :meth:`with_classes`.
            source: where the tower came from (``plugin:name@weights``), for reports.

        Raises:
            UsageError: shapes, names or values that do not fit, each named.
        """
        super().__init__()
        if not isinstance(image_size, int) or image_size < 1:
            raise UsageError(f"image_size is {image_size!r}; a positive whole number of pixels is expected.")
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise UsageError(f"mean {tuple(mean)} and std {tuple(std)} must have one value a channel, std above 0.")
        names = [f"class {i}" for i in range(len(class_embeddings))] if class_names is None else class_names
        self.tower = tower
        self.head = ClassHead(names, class_embeddings, transform, logit_scale)
        self.image_size = image_size
        self.class_encoder = class_encoder
        self.source = source
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.head.names

    @property
    def device(self) -> torch.device:
        return self.head.anchors.device

    @property
    def dtype(self) -> torch.dtype:
        """The tower's parameter dtype, to which inputs are cast."""
        return next((p.dtype for p in self.tower.parameters() if p.is_floating_point()), torch.float32)

    def _apply(self, *args: Any, **kwargs: Any) -> ZeroShotClassifier:
        mean, std = self.mean, self.std
        super()._apply(*args, **kwargs)
        # half precision is the tower's business: pixels are normalised with the exact statistics
        self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize (bicubic, no antialias, no clamp) and normalise, in at least float32; then the tower's dtype.

        Args:
            x: (N, 3, H, W) in [0, 1], any floating dtype.

        Returns:
            (N, 3, S, S). Images that already have side S are not resampled.

        Raises:
            UsageError: integers, another rank or channel count, or no images; the values are not looked at.
        """
        check_batch(x, channels=self.mean.numel())
        x = x.to(torch.promote_types(self.dtype, torch.float32))
        size = (self.image_size, self.image_size)
        if x.shape[-2:] != size:
            with _without_autocast(x):
                x = bicubic(x, size)
        return ((x - self.mean.to(x.dtype)) / self.std.to(x.dtype)).to(self.dtype)

    def embed(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D) embeddings, not normalised, float32 (float64 for a float64 tower)."""
        embedding = self.tower(self.preprocess(x))
        return embedding.to(torch.promote_types(embedding.dtype, torch.float32))

    def embed_tokens(self, x: Tensor) -> TokenEmbeddings:
        """Pooled embedding (N, D) and patch tokens (N, P, D) in the joint space.

        Raises:
            UsageError: the tower has no tokens.
        """
        encode = getattr(self.tower, "embed_tokens", None)
        if encode is None:
            raise UsageError(
                f"the tower {type(self.tower).__name__} has no patch tokens; open_clip ViT and ResNet towers and timm "
                "towers loaded by name have them, or give your tower a method embed_tokens(images) -> TokenEmbeddings."
            )
        pooled, tokens = encode(self.preprocess(x))
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        return TokenEmbeddings(pooled.to(dtype), tokens.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N, C) logits, float32 (float64 for a float64 tower)."""
        return self.head(self.embed(x))

    def with_classes(self, names: Sequence[str]) -> ZeroShotClassifier:
        """The same tower (shared, not copied) on another class list, through the head's own transform.

        Raises:
            UsageError: bad names, or names nobody can embed.
        """
        names = check_class_names(names)
        encoder = self.class_encoder or EmbeddingTable(self.head.names, self.head.embeddings)
        other = ZeroShotClassifier(
            self.tower,
            encoder(names).to(self.device),
            class_names=names,
            logit_scale=float(self.head.scale),
            image_size=self.image_size,
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            transform=self.head.transform,
            class_encoder=self.class_encoder,
            source=self.source,
        )
        # train() would change the modes of the tower, which is shared
        other.training, other.head.training = self.training, self.head.training
        other.mean, other.std = self.mean, self.std  # a defence that trains with other statistics sets them in place
        return other
