"""npz:, folder: and arrays: read from real files; the packer writes what npz: reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdefense import load_dataset
from clipdefense.errors import UsageError
from clipdefense_arrays.datasets import pack_images


def picture(seed: int, width: int = 9, height: int = 7) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Six pictures of three classes: images, files and bytes."""
    picture(1).save(tmp_path / "one.webp", lossless=True)
    buffer = io.BytesIO()
    picture(2).save(buffer, "PNG")
    images = [picture(0), tmp_path / "one.webp", buffer.getvalue(), picture(3), picture(4), picture(5)]
    names = [f"set/photo/{i}.png" for i in range(6)]
    path = tmp_path / "pack.npz"
    pack_images(
        path, images, [0, 1, 2, 0, 1, 2], ["cat", "dog", "aquarium fish"], paths=names, meta={"licence": "mine"}
    )
    return path


def rewritten(path: Path, **changes: object) -> str:
    """The pack with entries replaced, or left out where None."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    other = path.with_name("changed.npz")
    np.savez(other, **{name: value for name, value in arrays.items() if value is not None})
    return f"npz:{other}"


def test_a_pack_comes_back_as_it_went_in(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(f"npz:{pack}")
    assert dataset.classes == ("cat", "dog", "aquarium fish")
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.name == "pack" and dataset.meta == {"licence": "mine"}
    assert dataset.where(4) == "set/photo/4.png"
    x, _ = dataset.tensors()
    assert torch.equal(x, torch.stack([as_tensor(picture(i)) for i in range(6)]))
    monkeypatch.chdir(pack.parent)
    assert len(load_dataset("npz:pack.npz", n=3)) == 3
    assert load_dataset("npz:pack.npz", size=4)[0][0].shape == (3, 4, 4)
    assert load_dataset("npz:pack.npz", n=3, seed=1).ids.tolist() == dataset.sample(3, 1).ids.tolist()


def test_a_new_pack_takes_the_place_of_the_old_one_in_one_step(pack: Path) -> None:
    before = pack.read_bytes()
    with pack.open("rb") as reader:
        pack_images(pack, [picture(6), picture(7)], [0, 1], ["cat", "dog"])
        assert reader.read() == before  # whoever reads the old one reads all of it
    assert len(load_dataset(f"npz:{pack}")) == 2
    deeper = pack.parent / "made" / "on the way" / "pack.npz"
    pack_images(deeper, [picture(0), picture(1)], [0, 1], ["cat", "dog"])
    assert [entry.name for entry in deeper.parent.iterdir()] == ["pack.npz"]


def test_a_pack_needs_neither_paths_nor_meta(pack: Path) -> None:
    dataset = load_dataset(rewritten(pack, paths=None, meta=None))
    assert dataset.where(0) == "" and dataset.meta == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blob": None, "labels": None}, "has no blob, labels; it holds offsets, classes"),
        ({"offsets": np.arange(7)}, "offsets from 0 to 6 for"),
        ({"offsets": np.array([0, 5, 3])}, "must rise from 0"),
        ({"offsets": np.zeros((2, 2))}, "whole numbers are expected"),
        ({"blob": np.zeros(3, np.float32)}, "blob of float32"),
        ({"labels": np.arange(6)}, r"labels in \[0, 5\]; \[0, 2\]"),
        ({"labels": np.zeros(5, np.int16)}, "5 labels for 6 images"),
        ({"paths": np.array(["a"])}, "1 paths for 6 images"),
        ({"meta": np.array("{")}, "meta entry that is not JSON"),
        ({"classes": np.array(["cat", None, "fish"], dtype=object)}, "Python objects"),
    ],
)
def test_a_pack_that_is_none_says_what_is_wrong(pack: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(rewritten(pack, **changes))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_pack(pack: Path, share: float) -> None:
    content = pack.read_bytes()
    pack.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=r"pack\.npz cannot be read: it is truncated or not a NumPy file"):
        load_dataset(f"npz:{pack}")


def test_flipped_bytes_are_an_error_or_another_pack_but_no_crash(pack: Path) -> None:
    with np.load(pack) as archive:
        np.savez_compressed(pack, **{name: archive[name] for name in archive.files})
    content, failed = pack.read_bytes(), 0
    for place in range(0, len(content), 37):
        pack.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            load_dataset(f"npz:{pack}").tensors()
        except UsageError:
            failed += 1
    assert failed > 20


def test_foreign_files_and_absent_ones(pack: Path) -> None:
    (pack.parent / "text.npz").write_text("not a pack")
    with pytest.raises(UsageError, match="truncated or not a NumPy file"):
        load_dataset(f"npz:{pack.parent / 'text.npz'}")
    with pytest.raises(UsageError, match=r"is a folder.*folder:"):
        load_dataset(f"npz:{pack.parent}")
    with pytest.raises(UsageError, match=r"'nowhere\.npz' does not exist; looked for"):
        load_dataset("npz:nowhere.npz")
    with pytest.raises(UsageError, match="npz: has no splits"):
        load_dataset(f"npz:{pack}", split="test")


def test_the_packer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for labels, paths, message in [
        ([0], None, "1 labels for 2"),
        ([0, 2], None, r"\[0, 2\]"),
        ([0, 1], ["a"], "1 entr"),
    ]:
        with pytest.raises(UsageError, match=message):
            pack_images(tmp_path / "p.npz", [picture(0), picture(1)], labels, ["a", "b"], paths=paths)
    assert not (tmp_path / "p.npz").exists()


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name, folder in [
        ("b.png", "dog"),
        ("a.JPG", "dog"),
        ("c.png", "cat/deep"),
        (".hidden.txt", "cat"),
        ("x", ".git"),
    ]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        if name.endswith(("png", "JPG")):
            picture(0).save(root / folder / name, "PNG")
        else:
            (root / folder / name).write_text("no image")
    dataset = load_dataset(f"folder:{root}")
    assert dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0, 1, 1]
    assert [Path(dataset.where(i)).name for i in range(3)] == ["c.png", "a.JPG", "b.png"]
    assert torch.equal(dataset[1][0], as_tensor(picture(0)))
    for deep in reversed("abcdefgh"):
        (tmp_path / "nested" / "cat" / deep).mkdir(parents=True)
        picture(0).save(tmp_path / "nested" / "cat" / deep / "x.png")
    nested = load_dataset(f"folder:{tmp_path / 'nested'}")
    assert [Path(nested.where(i)).parent.name for i in range(8)] == list("abcdefgh")
    assert load_dataset(f"folder:{tmp_path}", split="photos").ids.tolist() == [0, 1, 2]
    assert len(load_dataset(f"folder:{root}", n=2).labels.unique()) == 2
    with pytest.raises(UsageError, match="no folder 'val'"):
        load_dataset(f"folder:{root}", split="val")
    with pytest.raises(UsageError, match="has no sub-folders"):
        load_dataset(f"folder:{root / 'dog'}")
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset(f"folder:{root / 'dog' / 'b.png'}")
    (root / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in its class 'empty'"):
        load_dataset(f"folder:{root}")


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(0).save(tmp_path / split / name / "one.png")
    with pytest.raises(UsageError, match=r"holds the splits train, val.*--split train"):
        load_dataset(f"folder:{tmp_path}")
    assert load_dataset(f"folder:{tmp_path}", split="val").classes == ("cat", "dog")


def test_arrays_come_from_one_file_or_two(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1, 0], dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    np.savez(tmp_path / "a.npz", x=pixels, y=labels, classes=np.array(["p", "q", "r"]))
    np.savez(tmp_path / "b.npz", images=(pixels / 255).astype(np.float32), labels=labels)
    np.save(tmp_path / "x.npy", pixels), np.save(tmp_path / "y.npy", labels)
    for dataset, names in [
        (load_dataset(f"arrays:{tmp_path / 'a.npz'}"), ("p", "q", "r")),
        (load_dataset(f"arrays:{tmp_path / 'a.npz'}", classes=["s", "t", "u"]), ("s", "t", "u")),
        (load_dataset(f"arrays:{tmp_path / 'b.npz'}"), ("class 0", "class 1", "class 2")),
        (
            load_dataset(f"arrays:{tmp_path / 'x.npy'}", labels=str(tmp_path / "y.npy")),
            ("class 0", "class 1", "class 2"),
        ),
    ]:
        assert dataset.classes == names
        x, y = dataset.tensors()
        assert torch.allclose(x, expected, atol=1e-7) and y.tolist() == labels.tolist()
    assert len(load_dataset(f"arrays:{tmp_path / 'a.npz'}", n=3)) == 3


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4, 5), np.uint8)
    for content, message in [
        ({"x": pixels, "images": pixels, "y": [0, 1]}, "exactly one of x and images"),
        ({"x": pixels}, "exactly one of y and labels"),
        ({"x": pixels, "y": [0, 1, 1]}, "3 labels for 2 images"),
        ({"x": pixels, "y": np.eye(2)}, "integer class labels"),
        ({"x": pixels, "y": np.eye(2, dtype=int)}, r"one-hot.*argmax"),
        ({"x": pixels.astype(np.float32) + 200, "y": [0, 1]}, "divide by 255"),
    ]:
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(UsageError, match=message):
            load_dataset(f"arrays:{tmp_path / 'a.npz'}")
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(UsageError, match=r"name the \.npy file of labels"):
        load_dataset(f"arrays:{tmp_path / 'x.npy'}")
    with pytest.raises(UsageError, match=r"an \.npy file of \(N,\) integers"):
        load_dataset(f"arrays:{tmp_path / 'x.npy'}", labels=str(tmp_path / "a.npz"))
    with pytest.raises(UsageError, match="brings its own"):
        load_dataset(f"arrays:{tmp_path / 'a.npz'}", labels="y.npy")
    with pytest.raises(UsageError, match="arrays: has no splits"):
        load_dataset(f"arrays:{tmp_path / 'a.npz'}", split="train")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="Python objects"):
        load_dataset(f"arrays:{tmp_path / 'o.npy'}")


@pytest.mark.parametrize(
    ("name", "images", "classes", "size"),
    [
        ("caltech101_64", 1200, 100, 64),
        ("cifar10_png4000", 4000, 10, 32),
        ("pacs_64", 1120, 7, 64),
        ("nips17_64", 1000, 1000, 64),
        ("nips17_224_q95_150", 150, 1000, 224),
        ("tiny_imagenet_val4k", 4000, 200, 64),
    ],
)
def test_the_real_packs(data_folder: Path, name: str, images: int, classes: int, size: int) -> None:
    dataset = load_dataset(f"npz:{name}.npz")
    assert (len(dataset), len(dataset.classes)) == (images, classes)
    x, y = dataset.sample(7, seed=1).tensors()
    assert x.shape == (7, 3, size, size) and len(set(y.tolist())) == 7
    assert 0.05 < x.std() < 0.5 and x.min() >= 0 and x.max() <= 1
    assert json.dumps(dataset.meta)
    if name == "caltech101_64":
        assert torch.bincount(dataset.labels).tolist() == [12] * 100
        assert "ceiling fan" in dataset.classes
