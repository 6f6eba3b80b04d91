"""open_clip models: towers and tokens against open_clip itself, the text side, and every layout of weights."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdefense import EmbeddingTable, ZeroShotClassifier, load_model
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import save_model
from clipdefense_openclip.architecture import build, find_architecture
from clipdefense_openclip.text import TextEncoder
from clipdefense_openclip.tower import OpenClipTower, tower_state_dict

NAMES = ["cat", "dog", "aquarium fish"]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
VIT = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
TOWERS: dict[str, tuple[dict[str, Any], int]] = {  # vision_cfg, number of tokens
    "vit": (VIT, 16),
    "vit of another grid": (VIT | {"image_size": 40}, 25),
    "vit, average": (VIT | {"pool_type": "avg"}, 16),
    "vit, norm after pooling": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, 16),
    "resnet": (RESNET, 4),
    "convnext": ({"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 64}, 4),
    "timm vit": ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}, 196),
}


def configuration(vision: dict[str, Any] = VIT, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": dict(vision), "text_cfg": dict(TEXT), "quick_gelu": True, **more}


def make_clip(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    timm_based = "timm_model_name" in config["vision_cfg"]
    cls = open_clip.CustomTextCLIP if timm_based else open_clip.CLIP
    model = cls(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    with torch.no_grad():  # far from the values that models start with
        model.logit_scale.fill_(3.0)
        for name, weight in model.visual.named_parameters():
            if "bn" in name or "ln" in name or "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


Saved = Callable[..., tuple[Any, str]]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """``saved(vision_cfg, **config)`` -> a plain open_clip model, and the spec under which it lies on disk."""

    def save(vision: dict[str, Any] = VIT, **more: Any) -> tuple[Any, str]:
        config = configuration(vision, **more)
        if "timm_model_name" in vision:
            config["custom_text"] = True
        clip = make_clip(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(clip.state_dict(), tmp_path / "clip.safetensors")
        return clip, f"open_clip:{tmp_path / 'config.json'}@{tmp_path / 'clip.safetensors'}"

    return save


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(5))


def text_matrix(clip: Any, names: list[str], templates: list[str]) -> Tensor:
    """One class and template at a time, by open_clip's own text tower."""
    tokenize = open_clip.SimpleTokenizer(context_length=16)
    rows = []
    for name in names:
        units = [F.normalize(clip.encode_text(tokenize([t.replace("{}", name)]))[0], dim=0) for t in templates]
        rows.append(F.normalize(sum(units) / len(units), dim=0))
    return torch.stack(rows)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (x - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_logits_and_tokens_are_those_of_open_clip(saved: Saved, tower: str) -> None:
    vision, count = TOWERS[tower]
    clip, spec = saved(vision)
    model = load_model(spec, NAMES)
    side = vision["image_size"]
    assert model.image_size == side and not any(part.training for part in model.modules())
    x = images(side)
    embedding = clip.encode_image(normalised(x))
    expected = torch.e**3 * F.normalize(embedding, dim=1) @ text_matrix(clip, NAMES, ["a photo of a {}."]).T
    assert torch.allclose(model(x), expected, atol=1e-4)
    pooled, tokens = model.embed_tokens(x)
    assert torch.equal(pooled, model.embed(x))
    assert tokens.shape == (2, count, 24) and torch.isfinite(tokens).all()


@torch.no_grad()
def test_vit_tokens_are_normalised_and_projected(saved: Saved) -> None:
    for more in ({}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}):
        clip, spec = saved(VIT | more)
        model = load_model(spec, NAMES)
        clip.visual.output_tokens = True
        pooled, raw = clip.visual(normalised(images()))
        raw = clip.visual.ln_post(raw) if "final_ln_after_pool" in more else raw
        found = model.embed_tokens(images())
        assert torch.allclose(found.tokens, raw @ clip.visual.proj, atol=1e-5)
        assert torch.allclose(found.pooled, pooled, atol=1e-5)
        if more == {"pool_type": "avg"}:
            assert torch.allclose(found.tokens.mean(dim=1), pooled, atol=1e-5)


@torch.no_grad()
def test_vit_tokens_are_in_row_major_order(saved: Saved) -> None:
    clip, _ = saved(VIT | {"image_size": 24})
    for block in clip.visual.transformer.resblocks:  # blocks that do nothing: a token knows its own patch alone
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    tower = OpenClipTower(clip.visual)
    x = images(24)
    changed = x.clone()
    changed[:, :, 8:16, 16:24] += 0.5  # row 1, column 2 of 3 x 3 patches
    differs = (tower.embed_tokens(changed).tokens - tower.embed_tokens(x).tokens).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [5]


@torch.no_grad()
def test_resnet_tokens_are_what_attention_pooling_mixes(saved: Saved) -> None:
    clip, _ = saved(RESNET)
    pool = clip.visual.attnpool
    nn.init.zeros_(pool.q_proj.weight), nn.init.zeros_(pool.q_proj.bias)  # attends to everything alike
    x = images(64)
    pooled, tokens = OpenClipTower(clip.visual).embed_tokens(x)
    assert torch.equal(pooled, clip.visual(x))
    cells = clip.visual.forward_intermediates(x)["image_intermediates"][-1]
    mean = pool.c_proj(pool.v_proj(cells.mean(dim=(2, 3)) + pool.positional_embedding[0]))
    assert torch.allclose((mean + tokens.sum(dim=1)) / 5, pooled, atol=1e-5)
    one = pool.c_proj(pool.v_proj(cells[:, :, 1, 0] + pool.positional_embedding[3]))
    assert torch.allclose(tokens[:, 2], one, atol=1e-5)


@torch.no_grad()
def test_convnext_tokens_are_cells_through_its_norm_and_projection(saved: Saved) -> None:
    clip, _ = saved(TOWERS["convnext"][0])
    trunk, x = clip.visual.trunk, images(64)
    cells = trunk.head.norm(trunk.forward_features(x)).flatten(2).transpose(1, 2)
    tokens = OpenClipTower(clip.visual).embed_tokens(x).tokens
    assert torch.allclose(tokens, clip.visual.head.proj(cells), atol=1e-5)


def test_coca_classifies_but_has_no_patch_tokens(tmp_path: Path) -> None:
    vision = VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 1, "layers": 1}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    config = configuration(vision, custom_text=True, multimodal_cfg=decoder) | {"text_cfg": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    coca = build(find_architecture(str(tmp_path / "config.json"))).eval()
    assert isinstance(coca, open_clip.CoCa)
    torch.save(coca.state_dict(), tmp_path / "coca.pt")
    model = load_model(f"open_clip:{tmp_path / 'config.json'}@{tmp_path / 'coca.pt'}", NAMES)
    expected = coca.encode_image(normalised(images()), normalize=False)
    assert torch.allclose(model.embed(images()), expected, atol=1e-5)
    with pytest.raises(UsageError, match="no embedding of their own"):
        model.embed_tokens(images())


@pytest.mark.parametrize("tower", ["vit", "resnet", "convnext"])
def test_a_hardened_tower_goes_back_into_open_clip(saved: Saved, tower: str) -> None:
    clip, spec = saved(TOWERS[tower][0])
    model = load_model(spec, NAMES)
    with torch.no_grad():
        for weight in model.tower.parameters():
            weight.mul_(1.01)
    state = tower_state_dict(model)
    assert state.keys() == {name for name in clip.state_dict() if name.startswith("visual.")}
    assert {f"tower.{name}" for name in state} == {name for name in model.state_dict() if name.startswith("tower.")}
    found = clip.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not any(name.startswith("visual.") for name in found.missing_keys)
    x = images(model.image_size)
    assert torch.allclose(clip.encode_image(normalised(x)), model.embed(x), atol=1e-5)
    bare = ZeroShotClassifier(clip.visual, model.head.embeddings, image_size=model.image_size)
    assert tower_state_dict(bare).keys() == state.keys()
    with pytest.raises(UsageError, match="Linear, not an open_clip"):
        tower_state_dict(ZeroShotClassifier(nn.Linear(2, 2), torch.eye(2)))


def test_the_text_tower_runs_once_a_class_list_and_is_no_part_of_the_model(saved: Saved) -> None:
    clip, spec = saved()
    templates = ["a photo of a {}.", "{} in a drawing"]
    model = load_model(spec, NAMES, templates=templates)
    assert torch.allclose(model.head.embeddings, text_matrix(clip, NAMES, templates), atol=1e-5)
    encoder = model.class_encoder
    assert isinstance(encoder, TextEncoder) and encoder.passes == 1
    model(images()), model.with_classes(NAMES)
    assert encoder.passes == 1
    other = model.with_classes(["horse", "cat"])
    assert encoder.passes == 2
    assert torch.allclose(other.head.embeddings, text_matrix(clip, ["horse", "cat"], templates), atol=1e-5)
    assert other.class_encoder is encoder
    assert not any(
        "token_embedding" in name or ("positional" in name and "visual" not in name) for name in model.state_dict()
    )
    assert copy.deepcopy(model).class_encoder is encoder
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.with_classes(["horse", "cat"]).head.anchors, other.head.anchors)
    assert not any(weight.requires_grad for weight in encoder.model.parameters()) and not encoder.model.training
    known = encoder(NAMES).clone()
    encoder(NAMES).zero_()  # what a caller does to his copy stays his
    assert torch.equal(encoder(NAMES), known)


def partly(state: dict[str, Tensor], layout: str) -> Any:
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    bare = {name.removeprefix("visual."): value for name, value in visual.items()}
    return {
        "whole": state,
        "wrapped": {"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        "half": {name: value.half() for name, value in state.items()},
        "openai": state | {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")},
        "visual": visual,
        "bare (FARE)": bare,
        "TeCoA": {"vision_encoder_state_dict": bare, "epoch": 3, "optimizer": {}},
        "TeCoA, wrapped": {
            "vision_encoder_state_dict": {f"module.{n}": v for n, v in visual.items()},
            "best_acc1": 0.5,
        },
    }[layout]


LAYOUTS = ["whole", "wrapped", "half", "openai", "visual", "bare (FARE)", "TeCoA", "TeCoA, wrapped"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", ["vit", "convnext"])
def test_every_layout_of_weights(saved: Saved, tmp_path: Path, tower: str, layout: str) -> None:
    clip, spec = saved(TOWERS[tower][0])
    torch.save(partly(clip.state_dict(), layout), tmp_path / "other.pt")
    config, _, whole = spec.partition("@")
    alone = layout not in LAYOUTS[:4]
    spec = f"{config}@{tmp_path / 'other.pt'}"
    if alone:
        with pytest.raises(UsageError, match=r"other\.pt holds no text tower.*base="):
            load_model(spec, NAMES)
    model = load_model(spec, NAMES, base=whole if alone else None)
    x = images(model.image_size)
    expected = load_model(f"{config}@{whole}", NAMES)(x)
    assert torch.allclose(model(x), expected, atol=1e-1 if layout == "half" else 1e-4)
    if alone:
        table = EmbeddingTable(NAMES, torch.eye(3, 24))
        with pytest.raises(UsageError, match=r"holds no logit scale; pass logit_scale="):
            load_model(spec, NAMES, class_encoder=table)
        stored = load_model(spec, NAMES, class_encoder=table, logit_scale=50)
        assert float(stored.head.scale) == 50 and torch.allclose(stored.embed(x), model.embed(x))


def test_a_saved_model_brings_its_classes_and_finds_its_text_tower(saved: Saved, tmp_path: Path) -> None:
    _, spec = saved()
    config, _, whole = spec.partition("@")
    model = load_model(spec, NAMES, templates=["this is {}"], logit_scale=30, mean=(0.5,) * 3, std=(0.25,) * 3)
    path = save_model(model, tmp_path / "first" / "hardened.safetensors")
    again = load_model(f"{config}@{path}")
    assert again.class_names == model.class_names
    assert torch.equal(again(images()), model(images()))  # embeddings, scale, mean and std are the saved ones
    part = load_model(f"{config}@{path}", ["dog", "cat"])
    assert torch.allclose(part(images()), model(images())[:, [1, 0]], atol=1e-5)
    new = load_model(f"{config}@{path}", ["dog", "horse"], templates=["this is {}"])  # from what it was made of
    assert torch.allclose(new.head.embeddings[0], model.head.embeddings[1], atol=1e-5)
    asked = load_model(f"{config}@{path}", ["dog", "cat"], templates=["a {}, drawn"])  # not the stored prompt's
    assert not torch.allclose(asked.head.embeddings, part.head.embeddings, atol=1e-3)
    second = save_model(again, tmp_path / "second.safetensors")  # made of a saved model
    assert load_model(f"{config}@{second}", ["dog", "horse"]).class_names == ("dog", "horse")
    assert load_model(f"{config}@{second}", base=whole).with_classes(["horse", "cow"]).class_names == ("horse", "cow")
    Path(f"{second}.json").unlink()
    with pytest.raises(UsageError, match="brings no class names"):
        load_model(f"{config}@{second}")


def test_a_saved_transform_needs_its_module(saved: Saved, tmp_path: Path) -> None:
    _, spec = saved()
    config = spec.partition("@")[0]
    model = load_model(spec, NAMES, transform=nn.Linear(24, 24))
    path = save_model(model, tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match=r"a transform \((weight, bias|bias, weight)\); pass transform="):
        load_model(f"{config}@{path}")
    again = load_model(f"{config}@{path}", transform=nn.Linear(24, 24))
    assert torch.equal(again(images()), model(images()))


def test_a_folder_of_the_hubs_layout_is_a_model(saved: Saved, tmp_path: Path) -> None:
    clip, _ = saved()
    folder = tmp_path / "hub"
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "size": 32}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": configuration(), "preprocess_cfg": preprocess})
    )
    with pytest.raises(UsageError, match="found: none"):
        load_model(f"open_clip:{folder}", NAMES)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    model = load_model(f"open_clip:{folder}", NAMES)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert model.source == f"open_clip:{folder}"
    named = load_model(f"open_clip:{folder / 'open_clip_config.json'}@{folder}", NAMES)
    assert torch.equal(named(images()), model(images()))


def test_precision_device_and_random_state(saved: Saved) -> None:
    _, spec = saved()
    before = torch.get_rng_state()
    model = load_model(spec, NAMES, dtype="bfloat16", device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.dtype == torch.bfloat16 and model(images()).dtype == torch.float32
    exact = load_model(spec, NAMES, dtype=torch.float64)
    assert exact(images().double()).dtype == torch.float64
    assert torch.allclose(exact(images()).float(), load_model(spec, NAMES)(images()), atol=1e-4)
    assert torch.equal(model.head.anchors, load_model(spec, NAMES).head.anchors)  # never in half precision


def test_gradients_reach_the_pixels_and_the_weights(saved: Saved) -> None:
    _, spec = saved()
    model = load_model(spec, NAMES)
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(weight.grad is not None for weight in model.tower.parameters())
    assert any(isinstance(part, QuickGELU) for part in model.tower.modules())


def test_what_cannot_be_loaded(saved: Saved, tmp_path: Path) -> None:
    clip, spec = saved()
    config, _, whole = spec.partition("@")
    torch.save(clip.state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(Path(whole).read_bytes()[:5000])
    torch.save(make_clip(configuration(VIT | {"width": 128})).state_dict(), tmp_path / "wide.pt")
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "bad.json").write_text('{"embed_dim": 24, "vision_cfg": {"leyers": 2}, "text_cfg": {}}')
    (tmp_path / "list.json").write_text("[1]")
    wide = {"embed_dim": 24, "vision_cfg": VIT | {"image_size": [32, 64]}, "text_cfg": TEXT}
    (tmp_path / "oblong.json").write_text(json.dumps(wide))
    torch.save(make_clip(wide).state_dict(), tmp_path / "oblong.pt")
    for bad, message in [
        (f"{config}@{tmp_path / 'cut.pt'}", "truncated or not a checkpoint"),
        (f"{config}@{tmp_path / 'cut.safetensors'}", "truncated"),
        (f"{config}@{tmp_path / 'wide.pt'}", r"conv1.weight is \(128, .*\) instead of \(64, 3, 8, 8\).*; and \d+ more"),
        (f"{config}@{tmp_path / 'foreign.safetensors'}", r"32 missing, 1 unknown\)"),
        (f"{config}@absent", ": pretrained tag 'absent' is unknown"),
        (f"{config}@folder/absent.pt", r"'folder/absent\.pt' do not exist \(looked for /"),
        (f"open_clip:{tmp_path / 'absent.json'}@{whole}", "cannot be read"),
        (f"open_clip:{tmp_path / 'list.json'}@{whole}", "lacks embed_dim, vision_cfg, text_cfg"),
        (f"open_clip:{tmp_path / 'bad.json'}@{whole}", "not a configuration that open_clip builds.*leyers"),
        (f"open_clip:{tmp_path / 'oblong.json'}@{tmp_path / 'oblong.pt'}", "32 x 64 pixels; a square"),
        ("open_clip:ViT-B-23@openai", "'ViT-B-23' is unknown; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32-quickgelu@opnai", "'opnai' is unknown; did you mean 'openai'"),
        ("open_clip:ViT-B-32-quickgelu", "names no weights; put a tag"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            load_model(bad, NAMES)
    with pytest.raises(UsageError, match="brings no class names"):
        load_model(spec)
    with pytest.raises(UsageError, match="more than once"):
        load_model(spec, ["cat", "cat"])


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for spec, tried in [
        ("open_clip:ViT-B-32-quickgelu@openai", "timm/vit_base_patch32_clip_224.openai"),
        ("open_clip:hf-hub:org/some-clip", r"open_clip_config\.json of hf-hub:org/some-clip"),
        ("open_clip:ViT-B-32-quickgelu@hf-hub:org/some-clip", "hf-hub:org/some-clip"),
    ]:
        with pytest.raises(
            UsageError, match=rf"{tried} could not be downloaded \(.+\); without a network, give a file"
        ):
            load_model(spec, NAMES, cache_dir=str(tmp_path))
