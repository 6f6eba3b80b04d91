"""ImageDataset: what pixels an image becomes, and what selections keep."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode

from clipdefense.data import ArrayImages, EncodedImages, FileImages, ImageDataset, cache_folder, find_file, from_arrays
from clipdefense.data.dataset import _Kept
from clipdefense.errors import UsageError
from clipdefense_torchvision.datasets import default_root


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


PIXELS = noise(40, 30, 3)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def packed(files: list[bytes], labels: list[int], classes: list[str], **options: object) -> ImageDataset:
    blob = np.frombuffer(b"".join(files), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    return ImageDataset(EncodedImages(blob, offsets), labels, classes, **options)  # type: ignore[arg-type]


class Counted(ArrayImages):
    """Real pixels, and how often each was asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(pixels)
        self.reads: Counter[int] = Counter()

    def __getitem__(self, row: int) -> Image.Image | torch.Tensor:
        self.reads[row] += 1
        return super().__getitem__(row)


def numbered(n: int = 12, classes: int = 3) -> ImageDataset:
    """Image i is grey level i; labels 0, 1, 2, 0, 1, 2, ..."""
    pixels = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(3, 3).repeat(5, 1).repeat(6, 2)
    return ImageDataset(Counted(pixels), [i % classes for i in range(n)], [f"c{i}" for i in range(classes)])


def level(dataset: ImageDataset) -> list[int]:
    return [round(float(dataset[i][0][0, 0, 0]) * 255) for i in range(len(dataset))]


def test_an_item_is_the_image_in_unit_range_and_its_label() -> None:
    dataset = packed([encoded(Image.fromarray(PIXELS))], [0], ["cat"])
    x, y = dataset[0]
    assert x.dtype == torch.float32 and y == 0 and isinstance(y, int)
    assert torch.equal(x, torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255)
    assert dataset.labels.dtype == torch.int64 and dataset.classes == ("cat",)
    with pytest.raises(IndexError):
        dataset[1]


def test_every_kind_of_image_becomes_rgb() -> None:
    grey = PIXELS[:, :, 0]
    alpha = np.dstack([PIXELS, np.full((40, 30), 7, dtype=np.uint8)])
    few = PIXELS // 128 * 128  # eight colours fit a palette exactly
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    files = [
        encoded(Image.fromarray(grey)),
        encoded(Image.fromarray(alpha)),
        encoded(palette),
        encoded(palette, transparency=b"\x00\x80"),
        encoded(Image.fromarray(grey > 127)),
        encoded(deep),
        encoded(Image.fromarray(np.dstack([grey, grey]), "LA")),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = packed(files, [0] * len(files), ["a"]).tensors()
    threefold = np.dstack([grey] * 3)
    expected = [threefold, PIXELS, few, few, np.dstack([(grey > 127) * 255] * 3), threefold, threefold]
    for image, pixels in zip(x, expected):
        assert torch.equal(image, torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(("width", "height"), [(30, 40), (41, 23), (32, 32), (100, 33), (17, 90), (8, 8)])
def test_the_resize_rule_is_that_of_clip_preprocessing(width: int, height: int) -> None:
    image = Image.fromarray(noise(height, width, 3))
    x, _ = packed([encoded(image)], [0], ["a"], size=32)[0]
    expected = TF.center_crop(TF.resize(image, [32], InterpolationMode.BICUBIC), [32])
    assert torch.equal(x, TF.to_tensor(expected))


def test_float_pixels_are_resized_alike() -> None:
    smooth = Image.fromarray(noise(6, 5, 3)).resize((90, 60), Image.Resampling.BILINEAR)
    as_float = np.asarray(smooth)[None].astype(np.float64) / 255
    ours, _ = from_arrays(as_float, [0], size=32)[0]
    rounded, _ = packed([encoded(smooth)], [0], ["a"], size=32)[0]
    assert ours.shape == (3, 32, 32)
    assert (ours - rounded).abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits after each of its two passes
    assert from_arrays(np.zeros((1, 3, 40, 32)), [0], size=32)[0][0].shape == (3, 32, 32)


def test_nothing_is_decoded_before_it_is_asked_for_and_tensors_decode_once() -> None:
    dataset = numbered()
    source = dataset._images
    assert isinstance(source, Counted)
    part = dataset.only(["c1", "c2"]).sample(4, seed=3)
    assert not source.reads
    x, y = part.tensors()
    assert x.shape == (4, 3, 5, 6) and y.tolist() == part.labels.tolist()
    assert source.reads == Counter(part.ids.tolist())
    x, y = dataset.tensors([5, 5, 0])
    assert [round(float(v) * 255) for v in x[:, 0, 0, 0]] == [5, 5, 0] and y.tolist() == [2, 2, 0]
    dataset.tensors()
    dataset[0]
    assert set(source.reads.values()) == {1} and len(source.reads) == 12
    x, _ = dataset.tensors()
    x.zero_()  # what a caller does to his copy stays his
    assert level(dataset) == list(range(12))


def test_what_is_kept_in_memory_is_bounded() -> None:
    dataset = numbered()
    dataset._kept = _Kept(limit=2 * 3 * 5 * 6 + 1)
    for _ in range(3):
        assert [round(float(v) * 255) for v in dataset.tensors()[0][:, 0, 0, 0]] == list(range(12))
    source = dataset._images
    assert isinstance(source, Counted)
    assert source.reads == Counter({0: 1, 1: 1} | dict.fromkeys(range(2, 12), 3))


def test_selections_keep_the_images_their_labels_and_their_ids() -> None:
    dataset = numbered()
    part = dataset.select([4, 2, 2])
    assert level(part) == [4, 2, 2] and part.labels.tolist() == [1, 2, 2] and part.ids.tolist() == [4, 2, 2]
    assert part.classes == dataset.classes
    again = part.select(torch.tensor([2, 0]))
    assert again.ids.tolist() == [2, 4]
    other = dataset.only(["c2", "c0"])
    assert other.classes == ("c2", "c0")
    assert level(other) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert other.labels.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert level(dataset.only(["c1"])) == [1, 4, 7, 10]
    assert len(dataset) == 12 and dataset.labels.tolist() == [0, 1, 2] * 4  # views change nothing


def test_names_change_one_by_one_or_all_together() -> None:
    dataset = numbered()
    assert dataset.renamed({"c1": "car"}).classes == ("c0", "car", "c2")
    assert dataset.renamed(["x", "y", "z"]).only(["z"]).ids.tolist() == [2, 5, 8, 11]
    twice = dataset.renamed(["crane", "bird", "crane"])
    assert twice.only(["bird"]).ids.tolist() == [1, 4, 7, 10]
    with pytest.raises(UsageError, match=r"'crane' at the labels \[0, 2\]"):
        twice.only(["crane"])
    with pytest.raises(UsageError, match="2 names; 3"):
        dataset.renamed(["x", "y"])
    with pytest.raises(UsageError, match="'c9' is unknown"):
        dataset.renamed({"c9": "car"})


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), data=st.data(), seed=st.integers(0, 2**40))
def test_a_sample_is_balanced_sorted_repeatable_and_nested(labels: list[int], data: st.DataObject, seed: int) -> None:
    dataset = ImageDataset(ArrayImages(np.zeros((len(labels), 1, 2, 2), np.uint8)), labels, list("abcde"))
    n = data.draw(st.integers(1, len(labels)))
    sample = dataset.sample(n, seed)
    ids = sample.ids.tolist()
    assert ids == sorted(set(ids)) and len(ids) == n
    assert sample.labels.tolist() == [labels[i] for i in ids]
    assert dataset.sample(n, seed).ids.tolist() == ids
    assert set(dataset.sample(max(n - 1, 1), seed).ids.tolist()) <= set(ids)
    taken, there = Counter(sample.labels.tolist()), Counter(labels)
    most = max(taken.values())
    assert all(taken[label] >= min(there[label], most - 1) for label in there)


def test_samples_of_other_seeds_differ() -> None:
    dataset = numbered(60)
    assert len({tuple(dataset.sample(6, seed).ids.tolist()) for seed in range(8)}) == 8
    assert {dataset.sample(1, seed).labels.item() for seed in range(30)} == {0, 1, 2}  # no class has the first turn


def test_workers_read_it() -> None:
    dataset = pickle.loads(pickle.dumps(numbered()))
    loader = DataLoader(dataset, batch_size=5, num_workers=1)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), dataset.tensors()[0])


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "absent"])
def test_a_damaged_image_is_named(tmp_path: Path, damage: str) -> None:
    good = encoded(Image.fromarray(PIXELS), "JPEG")
    bad = {"cut": good[: len(good) // 2], "empty": b"", "garbage": bytes(range(256)), "absent": b""}[damage]
    files = [tmp_path / "good.jpg", tmp_path / "bad.jpg"]
    for path, content in zip(files, (good, bad)):
        path.write_bytes(content)
    if damage == "absent":
        files[1].unlink()
    for dataset in (
        packed([good, bad], [0, 0], ["a"], name="photos"),
        ImageDataset(FileImages(files), [0, 0], ["a"], name="photos"),
    ):
        assert dataset[0][0].shape == (3, 40, 30)
        with pytest.raises(UsageError, match=r"image 1 of data set 'photos'.* cannot be decoded"):
            dataset[1]
        with pytest.raises(UsageError, match="image 1 of data set 'photos'"):
            dataset.select([1, 0]).tensors()  # the number is that of the whole data set


def test_images_of_several_shapes_need_a_size() -> None:
    files = [encoded(Image.fromarray(PIXELS)), encoded(Image.fromarray(PIXELS[:20]))]
    with pytest.raises(UsageError, match=r"\(3, 40, 30\) and \(3, 20, 30\).*size="):
        packed(files, [0, 0], ["a"]).tensors()
    assert packed(files, [0, 0], ["a"], size=16).tensors()[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 3, 0]}, r"labels in \[0, 3\]; \[0, 1\]"),
        ({"labels": [0, 1]}, "2 labels for 3 images"),
        ({"labels": [0.0, 1.0, 0.0]}, "integer class labels"),
        ({"classes": "ab"}, "is the string 'ab'"),
        ({"classes": []}, "at least one name"),
        ({"classes": ["a", " "]}, "none empty"),
        ({"size": 0}, "size is 0"),
        ({"size": 32.0}, "size is 32.0"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments: dict[str, object], message: str) -> None:
    given = {"labels": [0, 1, 0], "classes": ["a", "b"]} | arguments
    source = ArrayImages(np.zeros((3, 2, 2), np.uint8))
    with pytest.raises(UsageError, match=message):
        ImageDataset(source, given["labels"], given["classes"], size=given.get("size"))  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [
    lambda d: d.select([]), lambda d: d.select([12]), lambda d: d.select([-1]), lambda d: d.select([0.5]),
    lambda d: d.select(torch.ones(12, dtype=torch.bool)), lambda d: d.sample(0), lambda d: d.sample(13),
    lambda d: d.only(["c0", "c0"]), lambda d: d.only(["c7"]), lambda d: d.only("c0"), lambda d: d.tensors([12]),
    lambda d: d.select([0]).only(["c1"]),
])  # fmt: skip
def test_bad_selections_are_errors(call: object) -> None:
    with pytest.raises(UsageError):
        call(numbered())  # type: ignore[operator]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, torch.uint8, torch.float64])
def test_arrays_of_any_layout_and_dtype(layout: str, dtype: object) -> None:
    pixels = noise(4, 6, 5, 3)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if layout == "NHW":
        pixels = pixels[..., 0]
        expected = expected[:, :1].repeat(1, 3, 1, 1)
    array = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if layout == "NCHW" else pixels
    if isinstance(dtype, torch.dtype):
        given = torch.from_numpy(array) if dtype == torch.uint8 else torch.from_numpy(array).to(dtype) / 255
    else:
        given = array if dtype == np.uint8 else (array / 255).astype(dtype)
    x, y = from_arrays(given, np.array([0, 1, 1, 0], dtype=np.uint16)).tensors()
    assert y.tolist() == [0, 1, 1, 0]
    assert torch.allclose(x, expected, atol=1e-3 if dtype == np.float16 else 1e-7)


def test_arrays_that_are_not_images_are_errors() -> None:
    zeros = np.zeros
    for x, layout, message in [
        (zeros((2, 3, 4, 3), np.uint8), None, "may be NCHW or NHWC; say which with layout="),
        (zeros((2, 5, 4, 6), np.uint8), None, "without a dimension of 1, 3 or 4 channels"),
        (zeros((2, 3, 4, 5), np.uint8), "NHWC", "at the place that NHWC says"),
        (zeros((2, 3, 4, 4), np.uint8), "CHWN", "layout is 'CHWN'"),
        (zeros((2, 3, 4, 4), np.int64), None, "dtype int64"),
        (zeros((2, 12), np.uint8), None, r"shape \(2, 12\)"),
        (zeros((0, 3, 4, 4), np.uint8), None, r"shape \(0, 3, 4, 4\)"),
        (np.full((2, 3, 4, 4), 128.0), None, r"\[128, 128\].*divide by 255"),
        (np.full((2, 3, 4, 4), -1.0), None, "normalisation belongs inside the model"),
        (np.full((2, 3, 4, 4), np.nan), None, "NaN"),
    ]:
        with pytest.raises(UsageError, match=message):
            from_arrays(x, [0, 1], layout=layout)
    with pytest.raises(UsageError, match="3 labels for 2 images"):
        from_arrays(zeros((2, 3, 4, 4)), [0, 1, 1])
    assert from_arrays(zeros((2, 3, 4, 3), np.uint8), [0, 1], layout="NHWC")[0][0].shape == (3, 3, 4)


def test_files_are_looked_for_in_the_working_folder_and_then_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir(), shared.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("CLIPDEFENSE_DATA", raising=False)
    with pytest.raises(UsageError, match=rf"looked for {here / 'a.npz'} \(CLIPDEFENSE_DATA may name"):
        find_file("a.npz", "pack")
    monkeypatch.setenv("CLIPDEFENSE_DATA", str(shared))
    with pytest.raises(UsageError, match=rf"looked for {here / 'a.npz'} and {shared / 'a.npz'}"):
        find_file("a.npz", "pack")
    (shared / "a.npz").touch()
    assert find_file("a.npz", "pack") == shared / "a.npz"
    (here / "a.npz").touch()
    assert find_file("a.npz", "pack") == here / "a.npz"
    assert find_file(shared / "a.npz", "pack") == shared / "a.npz"


@pytest.mark.skipif(os.name == "nt", reason="XDG_CACHE_HOME is Unix's")
def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("CLIPDEFENSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("datasets") == tmp_path / "clipdefense" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "clipdefense"


def test_the_environment_moves_the_whole_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPDEFENSE_DATASETS", raising=False)
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and cache_folder("a", "b") == tmp_path / "a" / "b"
    assert default_root() == tmp_path / "datasets"
    monkeypatch.setenv("CLIPDEFENSE_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
