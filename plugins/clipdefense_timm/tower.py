"""A timm trunk as an image tower, the embeddings of its cells, and the centring of class anchors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import TokenEmbeddings
from clipdefense.errors import UsageError


def cell_features(trunk: nn.Module, features: Tensor) -> Tensor:
    """Each cell or patch pooled as if it were the whole image.

    For a trunk that averages and then applies a linear map, the mean of the result is the pooled vector itself.

    Args:
        trunk: a timm model without classifier.
        features: what its ``forward_features`` gave: (N, C, H, W), (N, H, W, C) or (N, prefix + P, C).

    Returns:
        (N, P, F) in row-major order, F the trunk's pooled features.
    """
    n = features.shape[0]
    if features.dim() == 4 and getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        cells = features.flatten(0, 2)[:, None, None, :]
    elif features.dim() == 4:
        cells = features.flatten(2).transpose(1, 2).flatten(0, 1)[:, :, None, None]
    else:
        # whatever the head pools over, prefix or patches, it finds this patch there
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        cells = features[:, prefix:].flatten(0, 1)[:, None, :].expand(-1, prefix + 1, -1)
    pooled: Tensor = trunk.forward_head(cells)  # type: ignore[operator]
    return pooled.unflatten(0, (n, -1))


class TimmTower(nn.Module):
    """timm trunk -> pooled features -> standardised -> linear projection.

    Attributes:
        trunk: a timm model built with ``num_classes=0``.
        projection: ``nn.Linear(F, D)``, with or without bias.
        feature_mean, feature_std: (F,) statistics by which features are standardised; absent where not given.
    """

    feature_mean: Tensor | None
    feature_std: Tensor | None

    def __init__(
        self,
        trunk: nn.Module,
        projection: nn.Linear,
        *,
        feature_mean: Tensor | None = None,
        feature_std: Tensor | None = None,
    ) -> None:
        """
        Raises:
            UsageError: a trunk with a classifier, or parts of different widths.
        """
        super().__init__()
        if getattr(trunk, "num_classes", 0):
            raise UsageError("trunk has a classifier; build it with timm.create_model(..., num_classes=0).")
        width = getattr(trunk, "head_hidden_size", None) or getattr(trunk, "num_features", None)
        if width is not None and width != projection.in_features:
            raise UsageError(f"projection takes {projection.in_features} features, but the trunk gives {width}.")
        if (feature_mean is None) != (feature_std is None):
            raise UsageError("feature_mean and feature_std go together; one of them is None.")
        for name, value in (("feature_mean", feature_mean), ("feature_std", feature_std)):
            if value is not None and value.shape != (projection.in_features,):
                raise UsageError(f"{name} has shape {tuple(value.shape)}; ({projection.in_features},) is expected.")
        if feature_std is not None and not bool((feature_std > 0).all()):
            raise UsageError("feature_std has values that are not above 0; add a small constant to it.")
        self.trunk = trunk
        self.projection = projection
        self.register_buffer("feature_mean", None if feature_mean is None else feature_mean.detach().clone())
        self.register_buffer("feature_std", None if feature_std is None else feature_std.detach().clone())

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images -> (N, F) pooled features, standardised."""
        return self._standardised(self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images -> (N, D) embeddings, not normalised."""
        return self.projection(self.features(images))

    def embed_tokens(self, images: Tensor) -> TokenEmbeddings:
        """The pooled embedding (N, D), and every cell's of the final map (N, P, D), in the joint space."""
        features = self.trunk.forward_features(images)  # type: ignore[operator]
        cells = cell_features(self.trunk, features)
        pooled = self.trunk.forward_head(features)  # type: ignore[operator]
        return TokenEmbeddings(*(self.projection(self._standardised(part)) for part in (pooled, cells)))

    def _standardised(self, features: Tensor) -> Tensor:
        if self.feature_mean is None or self.feature_std is None:
            return features
        return (features - self.feature_mean) / self.feature_std


class MeanCentring(nn.Module):
    """Class anchors relative to the mean of a bank of them: a transform for a class head.

    Text embeddings share a large common component; without it their directions differ more.

    Attributes:
        centre: (D,), the mean of the bank's unit embeddings.
    """

    centre: Tensor

    def __init__(self, bank: Tensor) -> None:
        """
        Args:
            bank: (B, D) embeddings, normalised here; any number of classes beyond those in use.
        """
        super().__init__()
        if bank.dim() != 2:
            raise UsageError(f"bank has shape {tuple(bank.shape)}; (B, D) embeddings are expected.")
        self.register_buffer("centre", F.normalize(bank.detach().float(), dim=1).mean(dim=0))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(C, D) -> (C, D): normalised, less the centre."""
        return F.normalize(embeddings, dim=1) - self.centre.to(embeddings.dtype)
