"""Hardened models back in plain open_clip: the same logits there, or a refusal that says what would be lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipdefense import EmbeddingTable, ZeroShotClassifier, get_defense, load_model
from clipdefense.cli import main
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import save_model
from clipdefense_openclip.export import export_open_clip, read_for_export

NAMES = ["cat", "dog", "aquarium fish"]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
    "convnext": {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 64},
}
Saved = Callable[..., str]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """``saved(tower)`` -> the spec of a tiny CLIP on disk, which open_clip itself knows as ``clipdefense-tiny``."""

    def save(tower: str = "vit", **more: Any) -> str:
        config = {"embed_dim": 24, "vision_cfg": VISION[tower], "text_cfg": TEXT, "quick_gelu": True, **more}
        config |= {"custom_text": True} if tower == "convnext" else {}
        (tmp_path / "clipdefense-tiny.json").write_text(json.dumps(config))
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(tmp_path / "clipdefense-tiny.json")
        torch.manual_seed(0)
        clip = open_clip.create_model("clipdefense-tiny", pretrained_text=False)
        with torch.no_grad():
            clip.logit_scale.fill_(3.0)
        save_file(clip.state_dict(), tmp_path / "clip.safetensors")
        return f"open_clip:{tmp_path / 'clipdefense-tiny.json'}@{tmp_path / 'clip.safetensors'}"

    return save


def images(model: ZeroShotClassifier, n: int = 6) -> Tensor:
    return torch.rand(n, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))


def harden(model: ZeroShotClassifier, name: str = "tecoa", **options: Any) -> None:
    """One update at a learning rate that shows."""
    before = {key: value.clone() for key, value in model.tower.state_dict().items()}
    defense = get_defense(name)(model, lr=0.1, batch_size=6, epochs=1, warmup_steps=0, show_progress=False, **options)
    defense.fit(images(model), torch.arange(6) % len(NAMES))
    assert any(not torch.equal(value, before[key]) for key, value in model.tower.state_dict().items())


@torch.no_grad()
def logits_of(clip: Any, model: ZeroShotClassifier) -> Tensor:
    """By open_clip alone: its own towers, its preprocessing statistics, its scale."""
    clip.eval()
    settings = clip.visual.preprocess_cfg
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a photo of a {name}." for name in NAMES])
    image, text = clip.encode_image((images(model) - mean) / std), clip.encode_text(tokens)
    return clip.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


@pytest.mark.parametrize("tower", VISION)
def test_a_hardened_model_gives_its_logits_in_plain_open_clip(saved: Saved, tmp_path: Path, tower: str) -> None:
    model = load_model(saved(tower), NAMES)
    original = model(images(model)).detach()
    harden(model)
    path = export_open_clip(model, tmp_path / "new" / "hardened.safetensors")
    clip = open_clip.create_model("clipdefense-tiny", pretrained=str(path))
    with torch.no_grad():
        assert torch.allclose(logits_of(clip, model), model(images(model)), atol=1e-5, rtol=0)
        assert not torch.allclose(logits_of(clip, model), original, atol=1e-2)
    again = load_model(f"open_clip:{tmp_path / 'clipdefense-tiny.json'}@{path}", NAMES)
    assert torch.equal(again(images(model)), model(images(model)))
    with safe_open(path, "pt") as file:
        assert file.metadata()["source"] == model.source


@pytest.mark.parametrize("tower", VISION)
def test_the_tower_alone_goes_over_other_weights(saved: Saved, tmp_path: Path, tower: str) -> None:
    spec = saved(tower)
    model = load_model(spec, NAMES)
    harden(model)
    path = export_open_clip(model, tmp_path / "tower.safetensors", tower_only=True)
    clip = open_clip.create_model(
        "clipdefense-tiny", pretrained=spec.partition("@")[2], pretrained_image_path=str(path)
    )
    assert load_file(path).keys() == clip.visual.state_dict().keys()
    with torch.no_grad():
        assert torch.allclose(logits_of(clip, model), model(images(model)), atol=1e-5, rtol=0)


class Turned(nn.Module):
    """A transform of class embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(24).flip(0))

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings @ self.weight


def changed(spec: str, what: str) -> ZeroShotClassifier:
    options: dict[str, dict[str, Any]] = {
        "transform": {"transform": Turned()},
        "scale": {"logit_scale": 50},
        "mean": {"mean": (0.485, 0.456, 0.406)},
        "std": {"std": (0.229, 0.224, 0.225)},
        "no text tower": {"class_encoder": EmbeddingTable(NAMES, torch.eye(3, 24)), "logit_scale": 20},
    }
    model = load_model(spec, NAMES, **options.get(what, {}))
    if what == "size":
        model.image_size = 48
    if what == "embeddings":
        model.head.embeddings += 0.1
    if what == "no encoder":
        model.class_encoder = None
    return model


REFUSALS = {
    "transform": r"would lose the head's transform of class embeddings \(Turned\)\. Pass tower_only=True",
    "scale": r"would lose the head's logit scale 50 \(the checkpoint's is 20\.0855\)\. Pass",
    "mean": r"lose the channel mean \(0\.485, 0\.456, 0\.406\) \(open_clip's is \(0\.4815, 0\.4578, 0\.4082\)\)\. Pass",
    "std": r"lose the channel std \(0\.229, 0\.224, 0\.225\) \(open_clip's is \(0\.2686, 0\.2613, 0\.2758\)\)\. Pass",
    "size": r"would lose the image size 48 \(the tower's is 32 x 32\)\. Pass",
    "embeddings": r"the class embeddings, which are not the text tower's for 'a photo of a \{\}\.' \(templates=",
    "no text tower": r"embeddings, which no text tower of the model gives \(.* of type EmbeddingTable; base= loads one",
    "no encoder": r"embeddings, which no text tower of the model gives \(it has no class encoder; base= loads one",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_would_be_lost_is_named(saved: Saved, tmp_path: Path, what: str) -> None:
    model, path = changed(saved(), what), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match=REFUSALS[what]):
        export_open_clip(model, path)
    assert not path.exists()
    if what in ("mean", "std", "size"):
        with pytest.warns(UserWarning, match="the exported tower is only right with the (channel|image size)"):
            export_open_clip(model, path, tower_only=True)
    else:
        export_open_clip(model, path, tower_only=True)
    tower = load_file(path)
    assert all(torch.equal(tower[name], value) for name, value in model.tower.visual.state_dict().items())


def test_several_losses_are_named_at_once(saved: Saved, tmp_path: Path) -> None:
    model = changed(saved(), "transform")
    model.head.scale.fill_(5.0)
    model.image_size = 64
    with pytest.raises(UsageError, match=r"\(Turned\); the head's logit scale 5 .*; the image size 64"):
        export_open_clip(model, tmp_path / "out.safetensors")


def test_methods_that_change_the_head_or_the_pixels_are_refused(saved: Saved, tmp_path: Path) -> None:
    spec, path = saved(), tmp_path / "out.safetensors"
    anchored = load_model(spec, NAMES)
    harden(anchored, "laat")
    with pytest.raises(
        UsageError, match=r"\(AnchorExpansion\); the head's logit scale 20 \(the checkpoint's is 20\.08"
    ):
        export_open_clip(anchored, path)
    released = load_model(spec, NAMES)
    with pytest.warns(UserWarning, match="ImageNet's channel statistics"):
        harden(released, "pmg-aft", variant="released")
    with pytest.raises(UsageError, match=r"lose the channel mean .*; the channel std .* Pass tower_only=True"):
        export_open_clip(released, path)


def test_statistics_that_the_configuration_states_are_kept(saved: Saved, tmp_path: Path) -> None:
    """A folder of the hub's layout: open_clip takes mean and std from it."""
    spec, folder = saved(), tmp_path / "hub"
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    config = json.loads((tmp_path / "clipdefense-tiny.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(load_file(spec.partition("@")[2]), folder / "open_clip_model.safetensors")
    model = load_model(f"open_clip:{folder}", NAMES)
    harden(model)
    export_open_clip(model, folder / "open_clip_model.safetensors")
    clip = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        assert torch.allclose(logits_of(clip, model), model(images(model)), atol=1e-5, rtol=0)


def test_what_is_no_open_clip_model_or_no_checkpoint_name(saved: Saved, tmp_path: Path) -> None:
    model = load_model(saved(), NAMES)
    with pytest.raises(UsageError, match=r"path is '.*out\.pt'; an exported checkpoint ends in \.safetensors"):
        export_open_clip(model, tmp_path / "out.pt")
    other = ZeroShotClassifier(nn.Linear(2, 2), torch.eye(2))
    with pytest.raises(UsageError, match="tower is a Linear, not an open_clip image tower"):
        export_open_clip(other, tmp_path / "out.safetensors", tower_only=True)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["clipdefense", "export-open-clip", *map(str, arguments)])
    with pytest.raises(SystemExit) as leave:
        main()
    return int(str(leave.value.code))


def test_the_command_exports_a_saved_model(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = saved(), tmp_path / "out.safetensors"
    model = load_model(spec, NAMES)
    harden(model)
    hardened = save_model(model, tmp_path / "hardened.safetensors")
    place = f"{spec.partition('@')[0]}@{hardened}"
    assert command(monkeypatch, "-m", place, "--out", out) == 0
    assert f"pretrained='{out}'" in capsys.readouterr().out.replace("\n", "")
    clip = open_clip.create_model("clipdefense-tiny", pretrained=str(out))
    with torch.no_grad():
        assert torch.allclose(logits_of(clip, model), model(images(model)), atol=1e-5, rtol=0)

    tower = tmp_path / "tower.safetensors"
    assert command(monkeypatch, "-m", place, "--out", tower, "--tower-only") == 0
    assert f"pretrained_image_path='{tower}'" in capsys.readouterr().out.replace("\n", "")
    assert load_file(tower).keys() == clip.visual.state_dict().keys()
    bare = f"{spec.partition('@')[0]}@{tower}"  # what others publish: an image tower and nothing else
    assert command(monkeypatch, "-m", bare, "--base", spec.partition("@")[2], "--out", tmp_path / "b.safetensors") == 0
    whole, again = load_file(out), load_file(tmp_path / "b.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_command_refuses_in_one_line(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = saved(), tmp_path / "out.safetensors"
    config = spec.partition("@")[0]
    turned = f"{config}@{save_model(changed(spec, 'transform'), tmp_path / 'turned.safetensors')}"
    assert command(monkeypatch, "-m", turned, "--out", out) == 2
    error = capsys.readouterr().err
    assert "would lose the head's transform of class embeddings (transform.weight)" in error and "--tower-only" in error
    assert command(monkeypatch, "-m", turned, "--out", out, "--tower-only") == 0 and out.exists()
    assert command(monkeypatch, "-m", "demo:digits", "--out", out) == 2
    assert "not of the form open_clip:ARCHITECTURE@FILE" in capsys.readouterr().err
    prompted = load_model(spec, NAMES, templates=["this is {}"])
    place = f"{config}@{save_model(prompted, tmp_path / 'prompted.safetensors')}"
    assert command(monkeypatch, "-m", place, "--out", out) == 2
    assert "not the text tower's for 'a photo of a {}.'" in capsys.readouterr().err
    assert command(monkeypatch, "-m", place, "--out", out, "--template", "this is {}") == 0


def test_reading_the_tower_alone_keeps_its_statistics(saved: Saved, tmp_path: Path) -> None:
    spec = saved()
    odd = save_model(changed(spec, "mean"), tmp_path / "odd.safetensors")
    model = read_for_export(f"{spec.partition('@')[0]}@{odd}", tower_only=True)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.warns(UserWarning, match=r"only right with the channel mean \(0\.485"):
        export_open_clip(model, tmp_path / "tower.safetensors", tower_only=True)
