"""timm towers: hand-computed embeddings and cells, every layout of weights, centred anchors, the real MobileNetV2."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdefense import EmbeddingTable, ZeroShotClassifier, load_model
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import save_model
from clipdefense.weights import load_strictly, read_state_dict
from clipdefense_timm.anchors import read_embedding_table
from clipdefense_timm.tower import MeanCentring, TimmTower, cell_features

NAMES = [f"thing {i}" for i in range(6)]
NET, WIDTH, DIM = "mobilenetv2_035", 1280, 16


def bank() -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(3)) + 1


def make_trunk(name: str = NET, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


@pytest.fixture
def tower() -> TimmTower:
    trunk = make_trunk(pad_type="same")
    mean, std = torch.rand(WIDTH), torch.rand(WIDTH) + 0.5
    return TimmTower(trunk, nn.Linear(WIDTH, DIM), feature_mean=mean, feature_std=std).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    np.savez(tmp_path / "anchors.npz", names=np.array(NAMES), embeddings=bank().numpy())
    return tmp_path / "anchors.npz"


def saved_tower(tower: TimmTower, folder: Path) -> str:
    save_file(tower.state_dict(), folder / "tower.safetensors")
    return f"timm:{NET}@{folder / 'tower.safetensors'}"


OPTIONS = {"trunk_options": {"pad_type": "same"}, "image_size": 64}


def test_the_embedding_is_the_standardised_pooled_feature_projected(tower: TimmTower, images: Tensor) -> None:
    pooled = tower.trunk.forward_features(images).mean(dim=(2, 3))
    assert tower.feature_mean is not None and tower.feature_std is not None
    features = (pooled - tower.feature_mean) / tower.feature_std
    assert torch.allclose(tower.features(images), features, atol=1e-5)
    assert torch.allclose(tower(images), features @ tower.projection.weight.T + tower.projection.bias, atol=1e-5)
    plain = TimmTower(tower.trunk, tower.projection)
    assert torch.allclose(plain(images), tower.projection(pooled), atol=1e-5)


def test_cells_average_to_the_embedding_in_row_major_order(tower: TimmTower, images: Tensor) -> None:
    pooled, tokens = tower.embed_tokens(images)
    assert tokens.shape == (2, 4, DIM)
    assert torch.equal(pooled, tower(images))
    assert torch.allclose(tokens.mean(dim=1), pooled, atol=1e-5)
    cell = tower.trunk.forward_features(images)[:, :, 1, 0]  # row 1, column 0 of a 2 x 2 map
    assert torch.allclose(tokens[:, 2], tower.projection((cell - tower.feature_mean) / tower.feature_std), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "side", "cells"),
    [
        ("convnext_atto", {}, 64, 4),  # average, then LayerNorm
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24}, 224, 49),  # channels last
        ("vit_tiny_patch16_224", {"depth": 1}, 224, 196),  # class token
        ("vit_medium_patch16_gap_256", {"depth": 1}, 256, 256),  # average of tokens
        ("eva02_tiny_patch14_224", {"depth": 1}, 224, 256),  # average of tokens behind a prefix
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 224, 196),  # attention pooling
        ("mobilenetv3_small_050", {}, 64, 4),  # a layer after pooling
    ],
)
@torch.no_grad()
def test_a_cell_is_pooled_as_if_it_were_the_whole_image(
    name: str, options: dict[str, object], side: int, cells: int
) -> None:
    trunk = make_trunk(name, **options)
    features = trunk.forward_features(torch.rand(2, 3, side, side))
    found = cell_features(trunk, features)
    assert found.shape[:2] == (2, cells)
    prefix = getattr(trunk, "num_prefix_tokens", 0)
    if features.dim() == 4:
        last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        uniform = features[:, :1, 1:2, :] if last else features[:, :, :1, 1:2]
        uniform = uniform.expand_as(features)
    else:
        uniform = features[:, prefix + 1 : prefix + 2].expand_as(features)
    assert torch.allclose(found[:, 1], trunk.forward_head(uniform), atol=1e-4)


def test_parts_that_do_not_fit_are_errors() -> None:
    trunk = make_trunk()
    with pytest.raises(UsageError, match="num_classes=0"):
        TimmTower(timm.create_model(NET, num_classes=5), nn.Linear(WIDTH, DIM))
    with pytest.raises(UsageError, match="takes 7 features, but the trunk gives 1280"):
        TimmTower(trunk, nn.Linear(7, DIM))
    with pytest.raises(UsageError, match="go together"):
        TimmTower(trunk, nn.Linear(WIDTH, DIM), feature_mean=torch.zeros(WIDTH))
    with pytest.raises(UsageError, match=r"feature_std has shape \(1,\)"):
        TimmTower(trunk, nn.Linear(WIDTH, DIM), feature_mean=torch.zeros(WIDTH), feature_std=torch.ones(1))
    with pytest.raises(UsageError, match="not above 0"):
        TimmTower(trunk, nn.Linear(WIDTH, DIM), feature_mean=torch.zeros(WIDTH), feature_std=torch.zeros(WIDTH))


def test_loading_a_tower_with_stored_anchors(tower: TimmTower, images: Tensor, anchors: Path, tmp_path: Path) -> None:
    spec = saved_tower(tower, tmp_path)
    chosen = [NAMES[4], NAMES[1]]
    model = load_model(
        spec, chosen, embeddings=str(anchors), logit_scale=20, mean=(0.5,) * 3, std=(0.25,) * 3, **OPTIONS
    )
    expected = 20 * F.normalize(tower((images - 0.5) / 0.25), dim=1) @ F.normalize(bank()[[4, 1]], dim=1).T
    assert not model.training
    assert torch.allclose(model(images), expected, atol=1e-4)
    assert model.source == spec
    assert model.with_classes([NAMES[0], NAMES[5]]).class_names == (NAMES[0], NAMES[5])
    usual = load_model(spec, chosen, embeddings=EmbeddingTable(NAMES, bank()))
    assert usual.image_size == 224 and float(usual.head.scale) == 100
    assert usual.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(UsageError, match="'thing 9'; near it: thing"):
        load_model(spec, ["thing 9", "thing 1"], embeddings=str(anchors))


def test_anchors_are_centred_and_new_names_go_through_the_same_map(
    tower: TimmTower, anchors: Path, tmp_path: Path
) -> None:
    model = load_model(saved_tower(tower, tmp_path), NAMES[:3], embeddings=str(anchors), centre=True, **OPTIONS)
    unit = F.normalize(bank(), dim=1)
    expected = F.normalize(unit - unit.mean(dim=0), dim=1)
    assert torch.allclose(model.head.anchors, expected[:3], atol=1e-6)
    assert torch.allclose(model.with_classes(NAMES[3:]).head.anchors, expected[3:], atol=1e-6)
    with pytest.raises(UsageError, match="one transform"):
        load_model(
            saved_tower(tower, tmp_path),
            NAMES,
            embeddings=str(anchors),
            centre=True,
            transform=nn.Identity(),
            **OPTIONS,
        )
    with pytest.raises(UsageError, match=r"\(B, D\)"):
        MeanCentring(torch.ones(3))


def test_a_saved_model_comes_back_whole(tower: TimmTower, images: Tensor, tmp_path: Path) -> None:
    table = EmbeddingTable(NAMES, bank())
    model = ZeroShotClassifier(
        tower, table(NAMES[:4]), class_names=NAMES[:4], logit_scale=20, image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3,
        transform=MeanCentring(bank()), class_encoder=table,
    ).eval()  # fmt: skip
    path = save_model(model, tmp_path / "saved.safetensors", trunk_options=OPTIONS["trunk_options"])
    spec = f"timm:{NET}@{path}"
    again = load_model(spec)
    assert again.class_names == model.class_names
    assert torch.equal(again(images), model(images))
    part = load_model(spec, [NAMES[3], NAMES[0]])
    assert torch.allclose(part(images), model(images)[:, [3, 0]], atol=1e-4)
    with pytest.raises(UsageError, match="'thing 5'"):
        load_model(spec, [NAMES[0], NAMES[5]])
    others = load_model(spec, NAMES[4:], embeddings=table)  # through the centring that was saved
    assert torch.allclose(others.head.anchors, model.with_classes(NAMES[4:]).head.anchors)
    assert json.loads((tmp_path / "saved.safetensors.json").read_text())["image_size"] == others.image_size == 64


def test_a_trunk_and_a_projection_in_two_files(tower: TimmTower, images: Tensor, anchors: Path, tmp_path: Path) -> None:
    whole = timm.create_model(NET, num_classes=10, pad_type="same")
    whole.load_state_dict(tower.trunk.state_dict(), strict=False)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "trunk.pt")  # brings a classifier that has no use here
    rest = {k.removeprefix("projection."): v for k, v in tower.state_dict().items() if not k.startswith("trunk.")}
    save_file(rest, tmp_path / "rest.safetensors")
    spec = f"timm:{NET}@{tmp_path / 'trunk.pt'}"
    model = load_model(spec, NAMES, embeddings=str(anchors), projection=str(tmp_path / "rest.safetensors"), **OPTIONS)
    assert torch.allclose(model.tower(images), tower(images), atol=1e-5)
    with pytest.raises(UsageError, match=r"has no projection.*projection="):
        load_model(spec, NAMES, embeddings=str(anchors))
    torch.save(tower.trunk.state_dict() | {"extra.weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"1 unknown\): trunk\.extra\.weight is not in the model"):
        other = f"timm:{NET}@{tmp_path / 'other.pt'}"
        load_model(other, NAMES, embeddings=str(anchors), projection=str(tmp_path / "rest.safetensors"), **OPTIONS)
    save_file({"weight": torch.zeros(DIM, WIDTH)}, tmp_path / "bare.safetensors")
    bare = load_model(spec, NAMES, embeddings=str(anchors), projection=str(tmp_path / "bare.safetensors"))
    assert bare.tower.projection.bias is None and bare.tower.feature_mean is None


def test_what_cannot_be_loaded(tower: TimmTower, anchors: Path, tmp_path: Path) -> None:
    spec = saved_tower(tower, tmp_path)
    path = spec.partition("@")[2]
    for bad, message in [
        (f"timm:mobilenet_035@{path}", "'mobilenet_035' is unknown; did you mean"),
        (f"timm:{NET}", "names no weights"),
        (f"timm:{NET}@{path}.absent", "does not exist"),
        (f"timm:mobilenetv2_050@{path}", r"does not fit TimmTower: \d+ of \d+ entries do not match"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_model(bad, NAMES, embeddings=str(anchors))
    with pytest.raises(UsageError, match="brings no class embeddings"):
        load_model(spec, NAMES)
    with pytest.raises(UsageError, match="brings no class names"):
        load_model(spec, embeddings=str(anchors))
    with pytest.raises(UsageError, match=r"trunk_options is \{'pad_tipe'"):
        load_model(spec, NAMES, embeddings=str(anchors), trunk_options={"pad_tipe": "same"})


def test_embedding_tables_from_files(anchors: Path, tmp_path: Path) -> None:
    table = read_embedding_table(anchors)
    assert table.names == tuple(NAMES) and torch.equal(table.embeddings, bank())
    save_file({"e": bank().half()}, tmp_path / "t.safetensors", {"n": json.dumps(NAMES)})
    table = read_embedding_table(tmp_path / "t.safetensors", names="n", embeddings="e")
    assert table.names == tuple(NAMES) and torch.allclose(table(NAMES[:1]), bank()[:1], atol=1e-2)
    with pytest.raises(UsageError, match=r"no 'names' with 'embeddings'; its arrays are e\."):
        read_embedding_table(tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match=r"do not exist"):
        read_embedding_table(tmp_path / "absent.npz")
    anchors.write_bytes(anchors.read_bytes()[:100])
    with pytest.raises(UsageError, match="truncated"):
        read_embedding_table(anchors)


def test_loading_leaves_the_random_state_alone_and_casts_the_tower(
    tower: TimmTower, images: Tensor, anchors: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    model = load_model(saved_tower(tower, tmp_path), NAMES, embeddings=str(anchors), dtype="bfloat16", **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.dtype == torch.bfloat16 and model(images).dtype == torch.float32
    assert copy.deepcopy(model).embed_tokens(images).tokens.dtype == torch.float32


def test_the_real_mobilenet_and_anchors(data_folder: Path) -> None:
    trunk = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=0).eval()
    weights = data_folder / "weights" / "mobilenetv2_100_imagenet_fp16.safetensors"
    state = read_state_dict(weights)
    load_strictly(trunk, {k: v for k, v in state.items() if not k.startswith("classifier")}, str(weights))
    table = read_embedding_table(data_folder / "clip_text_anchors.npz", names="vitb32_names", embeddings="vitb32_emb")
    assert len(table.names) == 1585
    tower = TimmTower(trunk, nn.Linear(1280, 512))
    shift = (128 / 255,) * 3  # (255 x - 128) / 128
    model = ZeroShotClassifier(
        tower, table(["cat", "dog"]), image_size=128, mean=shift, std=shift, transform=MeanCentring(table.embeddings)
    ).eval()
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.allclose(model.preprocess(x), (255 * x - 128) / 128, atol=1e-5)
        assert tower.features(model.preprocess(x)).shape == (2, 1280)
        pooled, tokens = model.embed_tokens(x)
    assert tokens.shape == (2, 16, 512)
    assert torch.allclose(tokens.mean(dim=1), pooled, atol=1e-4)
