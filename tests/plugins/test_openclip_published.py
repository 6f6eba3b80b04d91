"""Published checkpoints by name: the table, the architecture each needs, and loading from a stand-in for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from clipdefense import list_plugins, load_model
from clipdefense.commands import doctor
from clipdefense.errors import UsageError
from clipdefense_openclip import checkpoint, published
from clipdefense_openclip.published import find_published, published_for

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the hub's own layout with a small stand-in for fare2, and the small architecture's names."""
    configs = dict(factory._MODEL_CONFIGS)
    for name, quick in (("small-clip", False), ("small-clip-quickgelu", True)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(CONFIG | ({"quick_gelu": True} if quick else {})))
        open_clip.add_model_config(file)
    entry = published.published()["fare2"]
    stand_in = {"fare2": replace(entry, architecture="small-clip-quickgelu")}
    monkeypatch.setattr(published, "published", lambda: stand_in)
    repository = tmp_path / "hub" / f"models--{entry.hub.replace('/', '--')}"
    snapshot = repository / "snapshots" / "00000000"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    clip = open_clip.CLIP(**CONFIG, quick_gelu=True)
    save_file(clip.state_dict(), snapshot / "open_clip_model.safetensors")
    # the repositories' own configuration does not say QuickGELU
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield tmp_path / "hub"
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)
    factory._rescan_model_configs()


def test_every_entry_names_an_architecture_with_its_activation() -> None:
    entries = published.published()
    assert {"fare2", "fare4", "tecoa2", "tecoa4"} <= entries.keys()
    assert {entry.method for entry in entries.values()} == {"FARE", "TeCoA"}
    for entry in entries.values():
        config: Any = open_clip.get_model_config(entry.architecture)
        assert bool(config.get("quick_gelu", False)) == entry.quick_gelu == (entry.origin == "OpenAI")
        assert entry.hub.count("/") == 1
    assert len({entry.hub for entry in entries.values()}) == len(entries)


def test_the_page_has_the_table() -> None:
    """One row a checkpoint, in the table's order, with everything that the table knows of it."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = []
    for entry in published.published().values():
        activation = "QuickGELU" if entry.quick_gelu else "GELU"
        paper = entry.source.partition(",")[0]
        source = entry.source.replace(paper, f"[{paper}](https://arxiv.org/abs/{paper})")
        training = f"{entry.method} from {entry.origin}, {entry.data}, {entry.eps}"
        hub = f"[{entry.hub}](https://huggingface.co/{entry.hub})"
        cells = (f"`{entry.name}`", f"`{entry.architecture}`", activation, training, hub, source)
        expected.append(f"| {' | '.join(cells)} |")
    assert rows == expected
    unseen = [entry for entry in published.published().values() if not entry.checked]
    assert ("None of these names has been looked up on the hub" in page) == (len(unseen) == len(expected))


def test_what_lists_the_models_names_every_checkpoint_with_its_architecture() -> None:
    """`clipdefense plugins` and `doctor` show the plugin's own line, which reads no table."""
    (plugin,) = [each for each in list_plugins() if "open_clip" in {c.name for c in each.contributions}]
    (summary,) = [c.summary for c in plugin.contributions if c.name == "open_clip"]
    named = {}
    for group in summary.partition("published robust ones: ")[2].split("; "):
        architecture, *names = group.replace(", ", "").split("@")
        named |= dict.fromkeys(names, architecture)
    assert named == {name: entry.architecture for name, entry in published.published().items()}
    assert summary in {finding.detail for finding in doctor.plugins()}


def test_a_name_loads_with_quick_gelu(hub: Path) -> None:
    model = load_model("open_clip:small-clip-quickgelu@fare2", classes=["cat", "dog"], cache_dir=str(hub))
    assert any(isinstance(module, QuickGELU) for module in model.modules())
    assert model.source == "open_clip:small-clip-quickgelu@fare2"
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    assert model.mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_the_wrong_activation_is_refused_before_anything_is_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "from_hub", lambda *_: pytest.fail("fetched"))
    with pytest.raises(UsageError, match=r"small-clip has plain GELU.*need QuickGELU.*use small-clip-quickgelu"):
        load_model("open_clip:small-clip@fare2", classes=["cat", "dog"], cache_dir=str(hub))


def test_the_repository_under_its_own_name_is_refused_too(hub: Path) -> None:
    """Its configuration builds plain GELU, which is how these checkpoints are silently loaded wrong."""
    name = published.published()["fare2"].hub
    expected = "plain GELU, but the weights .* need QuickGELU.*open_clip:small-clip-quickgelu@fare2 loads it"
    for spec in (f"open_clip:hf-hub:{name}", f"open_clip:small-clip@hf-hub:{name}"):
        with pytest.raises(UsageError, match=expected):
            load_model(spec, classes=["cat", "dog"], cache_dir=str(hub))
    model = load_model(f"open_clip:small-clip-quickgelu@hf-hub:{name}", classes=["cat", "dog"], cache_dir=str(hub))
    assert any(isinstance(module, QuickGELU) for module in model.modules())


def test_another_architecture_is_named_the_right_one() -> None:
    with pytest.raises(UsageError, match="fare2 is a ViT-L-14-quickgelu, not a ViT-B-16; load it as open_clip:ViT-L"):
        find_published("ViT-B-16", "fare2")
    assert find_published("ViT-B-16", "openai") is None
    assert set(published_for("ViT-L-14")) == {"fare2", "fare4", "tecoa2", "tecoa4"}
    with pytest.raises(UsageError, match=r"^ViT-L-14-quickgelu: pretrained tag 'fare3' is unknown; did you mean"):
        load_model("open_clip:ViT-L-14-quickgelu@fare3", classes=["cat", "dog"])


def test_a_hub_that_does_not_answer_is_one_sentence(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the weights of hf-hub:chs20/fare2-clip could not be downloaded"):
        load_model("open_clip:small-clip-quickgelu@fare2", classes=["a", "b"], cache_dir=str(tmp_path / "empty"))
