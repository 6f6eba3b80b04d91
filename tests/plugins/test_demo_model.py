"""The demo's digits and the small CLIP trained on them: the split, the images, the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import clipdefense as cd
from clipdefense.checks import check_images
from clipdefense_demo.digits import CLASSES, SPLITS, load, load_digits_images, split_indices
from clipdefense_demo.model import CachedModel, cached_model, digits_clip
from clipdefense_demo.pretraining import TEMPLATES, Recipe, open_clip_config, train

SHORT = Recipe(epochs=1, batch_size=128)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CachedModel]:
    """A cache with a model of a very short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPDEFENSE_CACHE", str(tmp_path_factory.mktemp("trained")))
        digits_clip(progress=False, recipe=SHORT)
        yield cached_model()


def test_the_split_covers_every_image_once_with_every_class_in_proportion() -> None:
    labels = torch.as_tensor(load_digits().target)
    rows = {split: split_indices(labels, split) for split in SPLITS}
    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(1797))
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 1075, "val": 268, "test": 454}
    whole = labels.bincount() / len(labels)
    for split in SPLITS:
        share = labels[rows[split]].bincount() / len(rows[split])
        assert (share - whole).abs().max() < 0.005


def test_no_image_is_in_two_parts() -> None:
    flat = {split: load_digits_images(split)[0].flatten(1) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert torch.cdist(flat[one], flat[other]).min() > 0


def test_images_are_the_originals_enlarged() -> None:
    x, y = load_digits_images("test")
    check_images(x, channels=3)
    assert x.shape == (454, 3, 32, 32) and x.dtype == torch.float32
    assert (x[:, 0] == x[:, 1]).all() and (x[:, 0] == x[:, 2]).all()
    raw = load_digits()
    rows = split_indices(torch.as_tensor(raw.target), "test")
    original = torch.as_tensor(raw.images)[rows].float() / 16
    # the four pixels around the centre of each original one; 0.2 or more when mirrored or out of order
    centres = F.avg_pool2d(x[:, :1, 1:-1, 1:-1], kernel_size=2, stride=4)[:, 0]
    assert (centres - original).abs().mean() < 0.03
    assert (y == torch.as_tensor(raw.target)[rows]).all()


def test_dataset_by_name() -> None:
    dataset = cd.load_dataset("digits:val", n=50)
    x, y = dataset.tensors()
    assert dataset.classes == CLASSES and dataset.name == "digits/val"
    assert x.shape == (50, 3, 32, 32) and y.bincount().tolist() == [5] * 10
    everything = load("val").tensors()[0]
    assert (everything == load_digits_images("val")[0]).all()


def test_dataset_mistakes_are_named() -> None:
    with pytest.raises(cd.UsageError, match="'tset' is unknown; did you mean 'test'"):
        cd.load_dataset("digits:tset")
    with pytest.raises(cd.UsageError, match="split is 'train', but the data set is digits:test"):
        cd.load_dataset("digits:test", split="train")
    with pytest.raises(cd.UsageError, match="'validation' is unknown"):
        load_digits_images("validation")  # type: ignore[arg-type]


def test_training_repeats_and_leaves_the_callers_generator_and_threads_alone() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    clip = train(SHORT, progress=False)
    torch.set_num_threads(threads + 1)
    again = train(SHORT, progress=False)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert (torch.get_rng_state() == before).all()
    assert all(torch.equal(a, b) for a, b in zip(clip.state_dict().values(), again.state_dict().values()))
    other = train(Recipe(epochs=1, batch_size=128, seed=1), progress=False)
    assert not torch.equal(clip.visual.proj, other.visual.proj)
    assert not clip.training and not any(weight.requires_grad for weight in clip.parameters())


def test_a_few_epochs_beat_chance_by_far(cache: Path) -> None:
    model = digits_clip(progress=False, recipe=Recipe(epochs=10))
    x, y = load_digits_images("val")
    with torch.no_grad():
        assert (model(x).argmax(dim=1) == y).float().mean() > 0.5


def test_the_second_call_reads_what_the_first_wrote(cache: Path) -> None:
    first = digits_clip(progress=False, recipe=SHORT)
    files = cached_model()
    assert files.folder == cache / "digits-clip"
    stamps = {file: file.stat() for file in sorted(files.folder.iterdir())}
    second = digits_clip(progress=False, recipe=SHORT)
    assert [file.name for file in stamps] == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert all((file.stat().st_mtime_ns, file.stat().st_ino) == (s.st_mtime_ns, s.st_ino) for file, s in stamps.items())
    x, _ = load_digits_images("val")
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
    assert second.source == "demo:digits" and second.class_names == CLASSES and not second.training


def _truncate(files: CachedModel) -> None:
    whole = files.weights.read_bytes()
    files.weights.write_bytes(whole[: len(whole) // 2])


def _text_instead(files: CachedModel) -> None:
    files.weights.write_text("not a model")


def _another_model(files: CachedModel) -> None:
    save_file({"weight": torch.ones(3)}, files.weights)


def _right_label_on_wrong_weights(files: CachedModel) -> None:
    save_file({"weight": torch.ones(3)}, files.weights, {"identity": json.dumps(SHORT.identity())})


def _empty_config(files: CachedModel) -> None:
    files.config.write_text("")


@pytest.mark.parametrize(
    "damage", [_truncate, _text_instead, _another_model, _right_label_on_wrong_weights, _empty_config]
)
def test_a_damaged_cache_is_trained_afresh_and_said_so(
    damage: object, trained: CachedModel, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = cached_model()
    files.folder.mkdir(parents=True)
    for file in trained.folder.iterdir():
        (files.folder / file.name).write_bytes(file.read_bytes())
    assert files.problem(SHORT) == ""
    damage(files)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        digits_clip(progress=False, recipe=SHORT)
    assert "it is trained afresh" in caplog.text and str(files.weights) in caplog.text
    assert files.problem(SHORT) == ""
    wanted, got = load_file(trained.weights), load_file(files.weights)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_another_recipe_does_not_take_the_cached_weights(trained: CachedModel) -> None:
    assert trained.problem(SHORT) == ""
    assert "not made by this recipe" in trained.problem(Recipe(epochs=2, batch_size=128))


def test_a_cache_that_cannot_be_written_costs_only_the_next_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        model = digits_clip(progress=False, recipe=SHORT)
    assert "cannot be kept" in caplog.text and "CLIPDEFENSE_CACHE" in caplog.text
    assert model(load_digits_images("val")[0][:2]).shape == (2, 10)


@pytest.mark.skipif(open_clip.__version__.startswith("2."), reason="local-dir: came with open_clip 3")
def test_plain_open_clip_builds_the_same_model(trained: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(trained.folder.parent))
    place = f"local-dir:{trained.folder}"
    clip, _, preprocess = open_clip.create_model_and_transforms(place)
    tokenizer = open_clip.get_tokenizer(place)
    clip.eval()
    x, _ = load_digits_images("val")
    mean, std = (torch.tensor(open_clip_config()["preprocess_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        prompts = tokenizer([template.format(name) for name in CLASSES for template in TEMPLATES])
        text = F.normalize(clip.encode_text(prompts), dim=1).view(10, len(TEMPLATES), -1).mean(1)
        image = F.normalize(clip.encode_image((x - mean) / std), dim=1)
        expected = clip.logit_scale.exp() * image @ F.normalize(text, dim=1).T
        got = digits_clip(progress=False, recipe=SHORT)(x)
    assert torch.allclose(got, expected, atol=1e-5)
    assert list(preprocess.transforms[-1].mean) == open_clip_config()["preprocess_cfg"]["mean"]


def test_the_cached_files_load_through_the_open_clip_plugin(trained: CachedModel) -> None:
    spec = f"open_clip:{trained.config}@{trained.weights}"
    model = cd.load_model(spec, classes=CLASSES, templates=TEMPLATES)
    clip = load_file(trained.weights)
    assert torch.equal(model.tower.state_dict()["visual.proj"], clip["visual.proj"])
    assert float(model.head.scale) == pytest.approx(clip["logit_scale"].exp().item())


def test_classes_can_be_chosen(trained: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(trained.folder.parent))
    whole = digits_clip(progress=False, recipe=SHORT)
    few = digits_clip(("three", "eight"), progress=False, recipe=SHORT)
    x, _ = load_digits_images("val")
    with torch.no_grad():
        assert torch.allclose(few(x), whole(x)[:, [3, 8]], atol=1e-5)
        assert torch.allclose(whole.with_classes(["three", "eight"])(x), few(x), atol=1e-5)


def test_model_mistakes_are_named_before_any_training(cache: Path) -> None:
    with pytest.raises(cd.UsageError, match="demo model 'digit' is unknown; did you mean 'digits'"):
        cd.load_model("demo:digit")
    with pytest.raises(cd.UsageError, match="demo:digits has its own"):
        cd.load_model("demo:digits@some.safetensors")
    with pytest.raises(cd.UsageError, match="more than once"):
        cd.load_model("demo:digits", classes=["one", "one"])
    with pytest.raises(cd.UsageError, match="templates"):
        cd.load_model("demo:digits", templates=["no place for the name"])
    assert not cache.exists()


def test_the_users_cache_folder_is_used_when_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPDEFENSE_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_model().folder == tmp_path / "clipdefense" / "digits-clip"
