"""TGA-ZSR and Comp-TGA: towers of every kind, published settings, names, negated prompts, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from art.defences.trainer import Trainer
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.classifier import ClassHead, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.schedule import warmup_steps
from clipdefense_openclip.text import TextEncoder
from clipdefense_openclip.tower import OpenClipTower
from clipdefense_tgazsr.comptga import NEGATIVE_TEMPLATE, CompTGA, negated_embeddings
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
    token_grid,
)
from clipdefense_timm.tower import TimmTower

from .helpers import METHODS, QUIET, batch_of, colours, negatives, trainer


def open_clip_model(vision: dict[str, Any], side: int) -> ZeroShotClassifier:
    clip = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=vision,
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 32, "heads": 1, "layers": 1},
    )
    return ZeroShotClassifier(OpenClipTower(clip.visual), negatives(1), image_size=side).eval()


def timm_model(name: str, side: int, **options: Any) -> ZeroShotClassifier:
    trunk = timm.create_model(name, num_classes=0, **options)
    tower = TimmTower(trunk, nn.Linear(trunk.num_features, 32))
    return ZeroShotClassifier(tower, negatives(1), image_size=side).eval()


TINY_TIMM_VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
TOWERS: dict[str, tuple[Callable[[], ZeroShotClassifier], tuple[int, int]]] = {
    "vit": (lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": 8, "image_size": 40}, 40), (5, 5)),
    "vit, oblong patches": (
        lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": (8, 16), "image_size": 32}, 32),
        (4, 2),
    ),
    "vit, oblong patches, square count": (
        lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": (4, 16), "image_size": 32}, 32),
        (8, 2),
    ),
    "vit, average": (
        lambda: open_clip_model(
            {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "pool_type": "avg"},
            32,
        ),
        (4, 4),
    ),
    "resnet": (lambda: open_clip_model({"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, 64), (2, 2)),
    "timm cnn": (lambda: timm_model("mobilenetv2_035", 64), (2, 2)),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", 64, **TINY_TIMM_VIT), (4, 4)),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tower_with_tokens_trains(kind: str) -> None:
    make, grid = TOWERS[kind]
    model = make()
    before = copy.deepcopy(model.tower.state_dict())
    defense = TGAZSR(model, **QUIET, batch_size=4, epochs=2, lr=1e-3, warmup_steps=0)
    side = model.image_size
    defense.fit(torch.rand(4, 3, side, side), torch.arange(4))
    assert defense.grid == grid and defense.map_size == side
    first, second = defense.history.steps
    assert first["ar"] > 0 and second["ar"] > 0 and second["amc"] > 0
    changed = [name for name, value in model.tower.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2
    frozen = defense.frozen
    assert frozen is not None
    assert all(torch.equal(value, before[name]) for name, value in frozen.tower.state_dict().items())


def test_grids() -> None:
    tower = nn.Linear(1, 1)
    assert token_grid(tower, 49) == (7, 7)
    assert token_grid(tower, 8, (2, 4)) == (2, 4)
    assert token_grid(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_TIMM_VIT), 16) == (4, 4)
    with pytest.raises(UsageError, match=r"grid is \(3, 3\), but the tower Linear gives 8 tokens an image"):
        token_grid(tower, 8, (3, 3))
    with pytest.raises(UsageError, match=r"gives 8 tokens an image, which form no square; pass grid=\(rows, columns\)"):
        token_grid(tower, 8)
    with pytest.raises(UsageError, match="has 1 token an image, whose map is constant; give it larger images"):
        token_grid(tower, 1)


# Settings, names, errors ---------------------------------------------------------------------------------------------


@METHODS
def test_published_settings(method: type[TGAZSR], vit: ZeroShotClassifier) -> None:
    default, released = trainer(method, vit), trainer(method, vit, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 1 / 255, 1 / 255, 2)
        assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 1e-4, 0.9, 0.0)
        assert (config.batch_size, config.epochs, config.schedule, config.train) == (128, 10, "cosine", "tower")
        assert (defense.alpha, defense.beta) == ((0.08, 0.05) if method is TGAZSR else (0.10, 0.07))
    assert (default.map_size, released.map_size) == (32, 224)
    assert warmup_steps(released.config, 50) == 1000 and warmup_steps(default.config, 50) == 7
    published = 10 * (100_000 // 128)  # at the length it was published for, the two are one
    assert warmup_steps(default.config, published) == warmup_steps(released.config, published) == 1000
    with pytest.raises(UsageError, match="variant 'relased' is unknown; did you mean 'released'"):
        trainer(method, vit, variant="relased")


def test_they_are_art_trainers_found_by_name(vit: ZeroShotClassifier) -> None:
    assert cd.get_defense("tga-zsr") is TGAZSR and cd.get_defense("comp-tga") is CompTGA
    estimator = cd.CLIPClassifier(vit)
    defense = TGAZSR(estimator, alpha=0.1)
    assert isinstance(defense, Trainer) and defense.get_classifier() is estimator
    record = defense.record()
    assert (record["method"], record["hyper_parameters"]) == ("tga-zsr", {"alpha": 0.1, "beta": 0.05, "grid": None})
    comp = CompTGA(vit, negative_embeddings=negatives(), grid=(4, 4))
    facts = dict(comp.hyper_parameters())
    assert comp.record()["method"] == "comp-tga" and facts["grid"] == [4, 4]
    assert facts["negative_embeddings"].startswith("given, SHA-256 ")
    assert facts != dict(CompTGA(vit, negative_embeddings=negatives(6), grid=(4, 4)).hyper_parameters())


def text_encoder(templates: tuple[str, ...]) -> TextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(
            embed_dim=32,
            vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
        )
    return TextEncoder(clip, open_clip.SimpleTokenizer(context_length=16), templates)


def test_the_text_tower_encodes_the_negated_prompts(vit: ZeroShotClassifier, images: Tensor) -> None:
    assert NEGATIVE_TEMPLATE == "This is not a photo of a {}"
    encoder = text_encoder(("a photo of a {}.",))
    names = list(vit.class_names)
    model = ZeroShotClassifier(vit.tower, encoder(names), class_names=names, image_size=32, class_encoder=encoder)
    expected = text_encoder((NEGATIVE_TEMPLATE,))(names)
    torch.testing.assert_close(negated_embeddings(model), expected)
    defense = CompTGA(model, **QUIET, batch_size=4, epochs=1)
    torch.testing.assert_close(defense.negative_anchors, expected)
    assert defense.hyper_parameters()["negative_embeddings"] == NEGATIVE_TEMPLATE
    assert encoder.templates == ("a photo of a {}.",)
    assert (defense.negative_anchors - model.head.anchors).abs().max() > 0.01
    defense.fit(images[:4], torch.arange(4))
    assert defense.history.steps[0]["ar"] > 0


def test_the_copy_of_the_model_shares_the_class_encoder(vit: ZeroShotClassifier) -> None:
    vit.class_encoder = cd.EmbeddingTable(vit.class_names, vit.head.embeddings)
    defense = TGAZSR(vit)
    defense.begin()
    assert defense.frozen is not None and defense.frozen.class_encoder is vit.class_encoder
    assert defense.frozen.tower is not vit.tower


def test_a_heads_transform_applies_to_negated_embeddings(vit: ZeroShotClassifier) -> None:
    transform = nn.Linear(32, 32)
    vit.head = ClassHead(vit.class_names, vit.head.embeddings, transform)
    with torch.no_grad():
        expected = F.normalize(transform(negatives()), dim=1)
    torch.testing.assert_close(CompTGA(vit, negative_embeddings=negatives()).negative_anchors, expected)


def test_towers_without_tokens_are_refused_before_training(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    y, options = torch.arange(12) % 10, {**QUIET, "batch_size": 12}
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(UsageError, match="has no patch tokens; open_clip ViT and ResNet towers and timm towers"):
        TGAZSR(tiny_model, **options).fit(images, y)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    pooled = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "attentional_pool": True}
    with pytest.raises(UsageError, match="a tower with class-token, average or ResNet attention pooling is expected"):
        TGAZSR(open_clip_model(pooled, 32), **options).fit(images, y)
    with pytest.raises(UsageError, match="the tower TimmTower has 1 token an image, whose map is constant"):
        TGAZSR(timm_model("mobilenetv2_035", 32), **options).fit(images, y)
    with pytest.raises(UsageError, match="8 tokens an image, which form no square"):
        TGAZSR(colours((16, 8)), **options).fit(images, y % 3)


def test_bad_input(vit: ZeroShotClassifier, images: Tensor) -> None:
    for name in ("alpha", "beta"):
        for bad in (-0.1, math.nan, math.inf, "1", True):
            with pytest.raises(UsageError, match=rf"{name} is .*; a number of at least 0 is expected"):
                TGAZSR(vit, **{name: bad})
    for bad in (4, (4,), (4, 0), (4.0, 4.0), (True, 2)):
        with pytest.raises(UsageError, match=r"grid is .*; two positive whole numbers, rows and columns"):
            TGAZSR(vit, grid=bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"grid is \(2, 4\), but the tower OpenClipTower gives 16 tokens"):
        TGAZSR(vit, grid=(2, 4)).begin()
    with pytest.raises(UsageError, match=r"training option 'alhpa' is unknown"):
        TGAZSR(vit, alhpa=1)
    with pytest.raises(UsageError, match=r"call begin\(\) before it, as fit\(\) does"):
        TGAZSR(vit).losses(batch_of(images))


def test_bad_negative_embeddings(vit: ZeroShotClassifier) -> None:
    with pytest.raises(UsageError, match=r"the model has no class encoder, which cannot encode 'This is not a photo"):
        CompTGA(vit)
    vit.class_encoder = cd.EmbeddingTable(vit.class_names, vit.head.embeddings)
    with pytest.raises(UsageError, match=r"a class encoder of type EmbeddingTable, .* \(10, 32\), a row a class"):
        CompTGA(vit)
    with pytest.raises(UsageError, match=r"has shape \(9, 32\); a tensor of shape \(10, 32\) is expected"):
        CompTGA(vit, negative_embeddings=negatives(classes=9))
    with pytest.raises(UsageError, match=r"negative_embeddings is \[\[1\]\]; a tensor of shape"):
        CompTGA(vit, negative_embeddings=[[1]])  # type: ignore[arg-type]
    for row in (torch.zeros(32), torch.full((32,), math.nan)):
        bad = negatives()
        bad[2] = row
        with pytest.raises(UsageError, match="NaN, infinite or zero rows"):
            CompTGA(vit, negative_embeddings=bad)
