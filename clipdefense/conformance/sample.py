"""A small real model and images for the conformance suite: made here, the same every time, nothing downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import TokenEmbeddings, ZeroShotClassifier

CLASSES, DIM, SIDE = 10, 32, 32


class SampleTower(nn.Module):
    """An open_clip ViT of 2 layers, width 64, patch 8, on 32 px, untrained, with its patch tokens."""

    def __init__(self) -> None:
        import open_clip

        super().__init__()
        clip = open_clip.model.CLIP(
            embed_dim=DIM,
            vision_cfg={"layers": 2, "width": 64, "patch_size": 8, "image_size": SIDE},
            text_cfg={"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
            quick_gelu=True,
        )
        self.visual = clip.visual

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalised -> (N, 32)."""
        return self.visual(images)

    def embed_tokens(self, images: Tensor) -> TokenEmbeddings:
        """The pooled embedding, and the 16 patch tokens after the last LayerNorm and the projection."""
        output = self.visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return TokenEmbeddings(output["image_features"], output["image_intermediates"][-1] @ self.visual.proj)


class Sample(NamedTuple):
    """What a defence is tried on; the undefended model is right on every image."""

    model: ZeroShotClassifier
    x: Tensor  # (n, 3, 32, 32) in [0, 1], smooth
    y: Tensor  # (n,)


def sample_model(dtype: torch.dtype = torch.float32) -> ZeroShotClassifier:
    """The model, in eval mode: 10 classes, embeddings of 32 dimensions, logit scale 100."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        tower = SampleTower()
        anchors = torch.randn(CLASSES, DIM)
        # without the direction that all its embeddings share, an untrained tower's predictions spread over the classes
        with torch.no_grad():
            common = F.normalize(tower(torch.randn(64, 3, SIDE, SIDE)).mean(dim=0), dim=0)
        anchors = anchors - anchors @ common[:, None] * common
    names = [f"thing {i}" for i in range(CLASSES)]
    return ZeroShotClassifier(tower, anchors, class_names=names, image_size=SIDE).to(dtype).eval()


def sample(n: int = 8, dtype: torch.dtype = torch.float32) -> Sample:
    """The model and n images, which it is right on."""
    model = sample_model(dtype)
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 1.4 - 0.2
    x = F.interpolate(coarse, size=SIDE, mode="bilinear").clamp(0, 1).to(dtype)
    with torch.no_grad():
        return Sample(model, x, model(x).argmax(dim=1))
