"""QuickGELU: a mismatch between architecture and weights is an error that names the right architecture."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipdefense import load_model
from clipdefense.errors import UsageError
from clipdefense_openclip.activation import Release, check_activation, evidence_of_tag, identify, releases
from clipdefense_openclip.architecture import find_architecture
from clipdefense_openclip.checkpoint import locate

NAMES = ["cat", "dog"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def save(folder: Path, quick: bool | None, name: str = "clip.pt", **more: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """A configuration (quick None: it does not say) with weights; the spec, and the state dict."""
    config = CONFIG if quick is None else CONFIG | {"quick_gelu": quick}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = open_clip.CLIP(**config).state_dict()
    torch.save(state | more, folder / name)
    return f"open_clip:{folder / 'config.json'}@{folder / name}", state


def accepted(architecture: str, tag: str) -> bool:
    evidence, settings = evidence_of_tag(architecture, tag)
    assert settings
    built = find_architecture(architecture).quick_gelu
    try:
        check_activation(architecture, built, evidence, None, tag)
    except UsageError as error:
        right = str(error).rpartition("; use ")[2].rstrip(".")
        assert right in open_clip.list_models(), error
        # the architecture that the error names takes the tag
        check_activation(right, find_architecture(right).quick_gelu, evidence_of_tag(right, tag)[0], None, tag)
        return False
    return True


def test_every_tag_of_open_clip_loads_under_one_of_its_names() -> None:
    pairs = open_clip.list_pretrained()
    wrong = {pair for pair in pairs if not accepted(*pair)}
    assert len(pairs) > 150
    for architecture in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"):
        assert (architecture, "openai") in wrong
        assert (f"{architecture}-quickgelu", "openai") not in wrong
    assert ("ViT-B-32", "laion2b_s34b_b79k") not in wrong
    assert not accepted("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


@pytest.mark.parametrize("spelling", ["ViT-B-32", "ViT-B/32"])
def test_a_tag_is_checked_before_anything_is_downloaded(spelling: str) -> None:
    with pytest.raises(UsageError, match=r"'openai' need QuickGELU: .*; use ViT-B-32-quickgelu\.$"):
        load_model(f"open_clip:{spelling}@openai", NAMES)
    with pytest.raises(UsageError, match=r"need plain GELU: .*; use ViT-B-32\.$"):
        load_model("open_clip:ViT-B-32-quickgelu@laion2b_s34b_b79k", NAMES)
    with pytest.raises(
        UsageError, match="quick_gelu is False, but open_clip's tag 'openai' was trained with QuickGELU"
    ):
        load_model("open_clip:ViT-B-32-quickgelu@openai", NAMES, quick_gelu=False)


def test_an_unknown_file_needs_a_word_only_where_either_may_be_meant(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "unknown.safetensors")
    for architecture in ("ViT-B-32", "ViT-L-14", "RN50"):
        spec = f"open_clip:{architecture}@{tmp_path / 'unknown.safetensors'}"
        with pytest.raises(UsageError, match=rf"use {architecture}-quickgelu if so, or confirm .*quick_gelu=False"):
            load_model(spec, NAMES)
        with pytest.raises(UsageError, match=rf"quick_gelu= says so; use {architecture}-quickgelu"):
            load_model(spec, NAMES, quick_gelu=True)
    check_activation("ViT-B-32", False, None, False, "it")
    check_activation("ViT-B-32-quickgelu", True, None, None, "it")  # the name says what is meant
    check_activation("ViT-S-32", False, None, None, "it")  # there is no other of this name


def test_a_configuration_decides_where_the_weights_do_not_say(tmp_path: Path) -> None:
    for quick in (None, False, True):
        spec, _ = save(tmp_path / str(quick), quick)
        model = load_model(spec, NAMES)
        assert any(isinstance(part, open_clip.transformer.QuickGELU) for part in model.tower.modules()) is bool(quick)
    with pytest.raises(UsageError, match=r'set "quick_gelu": true in the model'):
        load_model(save(tmp_path, None)[0], NAMES, quick_gelu=True)
    with pytest.raises(UsageError, match=r'set "quick_gelu": false in the model'):
        load_model(save(tmp_path, True)[0], NAMES, quick_gelu=False)


def test_files_of_openai_descent_are_recognised(tmp_path: Path) -> None:
    entries = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    save(tmp_path, True, **entries)
    assert load_model(f"open_clip:{tmp_path / 'config.json'}@{tmp_path / 'clip.pt'}", NAMES).image_size == 32
    plain, state = save(tmp_path, False, **entries)
    with pytest.raises(UsageError, match=r"entries context_length, input_resolution, vocab_size of OpenAI's archives"):
        load_model(plain, NAMES)
    with pytest.raises(UsageError, match="leave quick_gelu= out"):
        load_model(plain, NAMES, quick_gelu=False)
    visual = {name.removeprefix("visual."): v for name, v in state.items() if name.startswith("visual.")}
    torch.save({"vision_encoder_state_dict": visual}, tmp_path / "tecoa.pt")
    with pytest.raises(UsageError, match="TeCoA-style"):
        load_model(f"open_clip:{tmp_path / 'config.json'}@{tmp_path / 'tecoa.pt'}", NAMES, base=str(tmp_path / "x.pt"))


def test_a_name_is_a_hint_that_a_word_overrules(tmp_path: Path) -> None:
    for folder, name in ((tmp_path, "ViT-B-32-OpenAI.pt"), (tmp_path / "models--timm--vit.openai" / "x", "clip.pt")):
        spec, _ = save(folder, False, name)
        with pytest.raises(UsageError, match=r"the name of .* says OpenAI; .*quick_gelu=False if the name misleads"):
            load_model(spec, NAMES)
        assert load_model(spec, NAMES, quick_gelu=False).image_size == 32


def test_the_description_beside_a_file_counts(tmp_path: Path) -> None:
    spec, _ = save(tmp_path / "model", None)
    beside = tmp_path / "model" / "open_clip_config.json"
    beside.write_text(json.dumps({"model_cfg": CONFIG | {"quick_gelu": True}}))
    with pytest.raises(UsageError, match=r"open_clip_config\.json says quick_gelu"):
        load_model(spec, NAMES)
    (tmp_path / "model" / "clip.pt").rename(tmp_path / "model" / "openai.pt")
    beside.write_text(json.dumps({"model_cfg": CONFIG}))  # knows better than a name
    assert load_model(spec.replace("clip.pt", "openai.pt"), NAMES).image_size == 32
    (tmp_path / "model" / "openai.pt").rename(tmp_path / "model" / "clip.pt")
    beside.unlink()
    sidecar = {"format": "clipdefense-model", "version": 1, "source": "open_clip:ViT-B-32-quickgelu@openai"}
    (tmp_path / "model" / "clip.pt.json").write_text(json.dumps(sidecar))
    with pytest.raises(UsageError, match=r"clip\.pt\.json says that they come from ViT-B-32-quickgelu"):
        load_model(spec, NAMES)


def test_published_files_are_known_by_their_hash(tmp_path: Path) -> None:
    known = {release.filename: release for release in releases()}
    assert len(known) >= 15
    for name in ("RN50.pt", "ViT-B-32.pt", "ViT-L-14-336px.pt"):  # OpenAI's, whose addresses hold the whole hash
        assert len(known[name].digest) == 64 and int(known[name].digest, 16)
        assert known[name].tag == "openai" and known[name].settings["quick_gelu"]
    path = tmp_path / "vit_b.pt"
    torch.save(CONFIG, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    same, renamed, other = (
        Release(name, value, "tag", {})
        for name, value in (("vit_b.pt", digest[:8]), ("x.pt", digest), ("vit_b.pt", "0" * 8))
    )
    assert identify(path, [other, same]) is same
    assert identify(path, [other]) is None
    assert identify(path, [renamed]) is None  # files of other names are not hashed, unless they are TorchScript


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_renamed_archive_of_openais_is_recognised_and_any_other_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "renamed.bin"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    release = Release("ViT-B-32.pt", digest, "openai", {"quick_gelu": True})
    assert identify(path, [release]) is release
    with pytest.raises(UsageError, match="TorchScript"):
        load_model(f"open_clip:ViT-B-32-quickgelu@{path}", NAMES)


def test_mean_and_std_of_a_file_are_those_of_its_architectures_tags(tmp_path: Path) -> None:
    from clipdefense_openclip.checkpoint import _usual_preprocess

    assert tuple(_usual_preprocess("ViT-B-16-SigLIP")["mean"]) == (0.5, 0.5, 0.5)
    assert tuple(_usual_preprocess("ViT-B-32")["mean"]) == open_clip.OPENAI_DATASET_MEAN
    assert tuple(_usual_preprocess("config.json")["std"]) == open_clip.OPENAI_DATASET_STD
    assert locate(find_architecture("ViT-L-14"), "laion2b_s32b_b82k").preprocess["mean"] == (0.5, 0.5, 0.5)
