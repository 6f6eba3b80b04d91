"""The real-data model: a frozen ImageNet MobileNetV2 whose features are mapped to CLIP's text space.

Built from the data folder alone (its README has the recipe): the trunk's pooled features of Tiny-ImageNet images,
standardised, through one linear layer, trained to point at real CLIP ViT-B/32 text embeddings of the class names.
Zero-shot on names that were not trained on; the trunk has seen ImageNet labels, so the concepts are not new to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from clipdefense import EmbeddingTable, ZeroShotClassifier, load_dataset
from clipdefense.data import ImageDataset
from clipdefense.weights import read_state_dict
from clipdefense_timm.tower import MeanCentring, TimmTower

SIDE = 128
SCALE = 20.0
MEAN = STD = (128 / 255,) * 3  # the trunk's input is (255 x - 128) / 128
RENAMED = {"automobile": "car"}  # CIFAR-10's name has no embedding; its synonym has


@dataclass(frozen=True)
class Anchors:
    """CLIP ViT-B/32 text embeddings of 1,585 names, prompt "a <name>"."""

    table: EmbeddingTable
    bank: Tensor

    @classmethod
    def read(cls, folder: Path) -> Anchors:
        with np.load(folder / "clip_text_anchors.npz", allow_pickle=False) as archive:
            bank = torch.from_numpy(archive["vitb32_emb"]).float()
            names = [str(name) for name in archive["vitb32_names"]]
        return cls(EmbeddingTable(names, bank), bank)


def covered(data: ImageDataset, anchors: Anchors, without: tuple[str, ...] = ()) -> ImageDataset:
    """The images of the classes whose (lower-cased) name has an embedding, in the data set's order of classes."""
    names = [RENAMED.get(name.lower(), name.lower()) for name in data.classes]
    known = set(anchors.table.names) - set(without)
    return data.renamed(names).only([name for name in names if name in known])


def trunk(folder: Path) -> nn.Module:
    """The MobileNetV2 without its classifier, in eval mode."""
    model = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=0)
    state = read_state_dict(folder / "weights" / "mobilenetv2_100_imagenet_fp16.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items() if not k.startswith("classifier")})
    # its normalisation was folded into the weights: with batch statistics it would be another network
    return freeze_batch_norm_2d(model).eval()


@torch.no_grad()
def pooled_features(model: nn.Module, data: ImageDataset, batch_size: int = 128, device: str = "cpu") -> Tensor:
    """(N, 1280) features of images at the data set's size."""
    parts = []
    for start in range(0, len(data), batch_size):
        x, _ = data.tensors(range(start, min(start + batch_size, len(data))))
        parts.append(model((x.to(device) - MEAN[0]) / STD[0]).cpu())
    return torch.cat(parts)


def train_projection(features: Tensor, labels: Tensor, anchors: Tensor, seed: int, epochs: int = 15) -> nn.Linear:
    """AdamW on cross-entropy at scale 20 between projected features and class anchors, dropout 0.3 on the features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projection = nn.Linear(features.shape[1], anchors.shape[1])
        optimizer = torch.optim.AdamW(projection.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for rows in torch.randperm(len(features), generator=generator).split(256):
                embedding = F.normalize(projection(F.dropout(features[rows], 0.3)), dim=1)
                loss = F.cross_entropy(SCALE * embedding @ anchors.T, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return projection


def training_set(folder: Path, anchors: Anchors, side: int = SIDE) -> ImageDataset:
    """Tiny-ImageNet's training images of the 95 classes whose name has an embedding."""
    return covered(load_dataset(f"npz:{folder / 'tiny_imagenet_train10k.npz'}", size=side), anchors)


def build(
    folder: Path, seed: int = 0, device: str = "cpu", side: int = SIDE, transform: nn.Module | None = None
) -> tuple[ZeroShotClassifier, tuple[str, ...]]:
    """The model, with the trained Tiny-ImageNet classes as its head, and the names it was trained on.

    ``transform`` maps class anchors, for the projection and in the head; None centres them on the whole bank.
    """
    anchors = Anchors.read(folder)
    data = training_set(folder, anchors, side)
    backbone = trunk(folder).to(device)
    features = pooled_features(backbone, data, device=device)
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-3
    transform = MeanCentring(anchors.bank) if transform is None else transform
    targets = F.normalize(transform(anchors.table(data.classes)), dim=1)
    projection = train_projection((features - mean) / std, data.labels, targets, seed)
    tower = TimmTower(backbone, projection, feature_mean=mean, feature_std=std)
    model = ZeroShotClassifier(
        tower,
        anchors.table(data.classes),
        class_names=data.classes,
        logit_scale=SCALE,
        image_size=side,
        mean=MEAN,
        std=STD,
        transform=transform,
        class_encoder=anchors.table,
        source="mobilenetv2_100 + CLIP ViT-B/32 text anchors",
    )
    return model.to(device).eval(), data.classes
