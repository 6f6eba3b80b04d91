"""An open_clip image tower that also gives its parts' embeddings, under open_clip's own parameter names."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clipdefense.classifier import TokenEmbeddings, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense_timm.tower import cell_features


class OpenClipTower(nn.Module):
    """``model.visual`` of an open_clip model.

    Attributes:
        visual: open_clip's own module, so that every parameter ``visual.*`` has the name it has in open_clip.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images -> (N, D) embeddings, not normalised."""
        output = self.visual(images)
        return output[0] if isinstance(output, tuple) else output  # CoCa's towers add tokens

    def embed_tokens(self, images: Tensor) -> TokenEmbeddings:
        """The pooled embedding, and every patch's or cell's own, in the joint space.

        * Vision transformers: patch tokens after the last LayerNorm and the projection.
        * ResNets with attention pooling: cells of the final map (with the pooling's position) through its value and
          output projections: what the cell adds to the pooled embedding where the pooling looks at it alone.
        * timm trunks: each cell or patch pooled as if it were the whole image, through the projection.

        Raises:
            UsageError: a tower whose pooling leaves no patch its own place (CoCa's attentional pooling).
        """
        if isinstance(self.visual, VisionTransformer):
            return _vit_tokens(self.visual, images)
        if isinstance(self.visual, ModifiedResNet):
            return _resnet_tokens(self.visual, images)
        if isinstance(self.visual, TimmModel) and not hasattr(self.visual.head, "pool"):
            features = self.visual.trunk.forward_features(images)
            cells = cell_features(self.visual.trunk, features)
            return TokenEmbeddings(self.visual.head(self.visual.trunk.forward_head(features)), self.visual.head(cells))
        raise _no_tokens(self.visual)


def _vit_tokens(visual: VisionTransformer, images: Tensor) -> TokenEmbeddings:
    if visual.attn_pool is not None or visual.pool_type == "none" or visual.proj is None:
        raise _no_tokens(visual)
    output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return TokenEmbeddings(output["image_features"], output["image_intermediates"][-1] @ visual.proj)


def _resnet_tokens(visual: ModifiedResNet, images: Tensor) -> TokenEmbeddings:
    output = visual.forward_intermediates(images, indices=1)
    pool = visual.attnpool
    cells = output["image_intermediates"][-1].flatten(2).transpose(1, 2)
    cells = cells + pool.positional_embedding[1:].to(cells.dtype)
    return TokenEmbeddings(output["image_features"], pool.c_proj(pool.v_proj(cells)))


def _no_tokens(visual: nn.Module) -> UsageError:
    return UsageError(
        f"the image tower {type(visual).__name__} pools in a way that gives its patches no embedding of their own; "
        "a tower with class-token, average or ResNet attention pooling is expected."
    )


def tower_state_dict(model: ZeroShotClassifier) -> dict[str, Tensor]:
    """The image tower's weights under open_clip's names, ``visual.*``: ``clip.load_state_dict(..., strict=False)``.

    Head, transform and scale are not among them.

    Raises:
        UsageError: the model's tower is not open_clip's.
    """
    tower = model.tower
    if isinstance(tower, OpenClipTower):
        return dict(tower.state_dict())
    if isinstance(tower, (VisionTransformer, ModifiedResNet, TimmModel)):
        return {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    raise UsageError(f"the model's tower is a {type(tower).__name__}, not an open_clip image tower.")
