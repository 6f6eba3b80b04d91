"""Which parameters train, and in what mode the rest stays."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import timm
import torch
from torch import nn

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.parameters import all_used, select_parameters, training_only


def names_of(tower: nn.Module, train: str) -> set[str]:
    chosen = {id(weight) for weight in select_parameters(tower, train)}
    return {name for name, weight in tower.named_parameters() if id(weight) in chosen}


def test_selections_of_an_open_clip_vit(tiny_model: ZeroShotClassifier) -> None:
    tower = tiny_model.tower
    everything = {name for name, _ in tower.named_parameters()}
    norms = {name for name in everything if ".ln_" in name or name.startswith("ln_")}
    assert names_of(tower, "tower") == everything
    assert names_of(tower, "layernorm") == norms and len(norms) == 12
    assert names_of(tower, "head") == {"proj"}
    last = {name for name in everything if "resblocks.1." in name}
    assert names_of(tower, "last_blocks:1") == last | {"ln_post.weight", "ln_post.bias", "proj"}
    first = {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias"}
    assert names_of(tower, "last_blocks:2") == everything - first


def test_more_blocks_than_there_are(tiny_model: ZeroShotClassifier) -> None:
    with pytest.raises(UsageError, match="train is 'last_blocks:3', but the tower has 2 blocks"):
        select_parameters(tiny_model.tower, "last_blocks:3")


def test_a_tower_without_layernorms_says_so() -> None:
    with pytest.raises(UsageError, match="train is 'layernorm', but the tower Sequential has none of it"):
        select_parameters(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "layernorm")


def test_selections_of_timm_towers() -> None:
    mobile = timm.create_model("mobilenetv2_050", num_classes=16)
    assert names_of(mobile, "head") == {"classifier.weight", "classifier.bias"}
    last = names_of(mobile, "last_blocks:1")
    assert {name.split(".")[0] for name in last} == {"blocks", "conv_head", "bn2", "classifier"}
    assert {name.split(".")[1] for name in last if name.startswith("blocks")} == {"6"}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=16, img_size=32)
    assert {name.split(".")[0] for name in names_of(vit, "last_blocks:2")} == {"blocks", "norm", "head"}


def test_the_head_of_an_open_clip_resnet_is_its_attention_pool() -> None:
    tower = open_clip.model.ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=2, image_size=32, width=8)
    assert {name.split(".")[0] for name in names_of(tower, "head")} == {"attnpool"}


class ConvTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x))


def test_frozen_parts_stay_in_eval_and_everything_comes_back() -> None:
    model = ZeroShotClassifier(ConvTower(), torch.randn(3, 8), image_size=8)
    model.train()
    model.tower.stem[1].eval()
    model.tower.stem[0].weight.requires_grad_(False)
    before = {name: part.training for name, part in model.named_modules()}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with training_only(model, select_parameters(model.tower, "head")):
        modes = {name: part.training for name, part in model.tower.named_modules()}
        assert [name for name, mode in modes.items() if not mode] == ["stem", *(f"stem.{i}" for i in range(4))]
        assert modes["head.3"]  # a dropout belongs to what trains around it
        trains = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert trains == ["tower.head.2.weight", "tower.head.2.bias"]
        statistics = model.tower.stem[1].running_mean.clone()
        model(torch.rand(4, 3, 8, 8)).sum().backward()
        assert torch.equal(model.tower.stem[1].running_mean, statistics)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())


def test_a_batchnorm_that_trains_updates_its_statistics(make_model: Callable[..., ZeroShotClassifier]) -> None:
    model = ZeroShotClassifier(ConvTower(), torch.randn(3, 8), image_size=8).eval()
    with training_only(model, select_parameters(model.tower, "tower")):
        model(torch.rand(4, 3, 8, 8))
    assert model.tower.stem[1].num_batches_tracked == 1
    assert not model.training


def test_layers_that_a_tower_does_not_use_are_known(make_model: Callable[..., ZeroShotClassifier]) -> None:
    model = make_model()
    model.tower.train()
    weights = list(model.tower.parameters())
    assert all_used(model, weights)
    spare = nn.Linear(3, 3)
    assert not all_used(model, [*weights, spare.weight])
    assert model.tower.training and all(weight.grad is None for weight in weights)
