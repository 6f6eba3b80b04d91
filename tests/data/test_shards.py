"""webdataset: shards by index, the layout of CLIP_benchmark, and every way in which a shard can be wrong."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdefense import load_dataset
from clipdefense.data import get_protocol
from clipdefense.errors import UsageError


def png(level: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, 0, 255 - level)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, label: int, side: int = 8) -> list[tuple[str, bytes]]:
    return [(f"s{number:07d}.cls", str(label).encode()), (f"s{number:07d}.png", png(number, side))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve shards of two samples: 10.tar and 11.tar come after 9.tar."""
    for k in range(12):
        shard(tmp_path / "wds_photos" / "test" / f"{k}.tar", sample(2 * k, 0) + sample(2 * k + 1, 1))
    (tmp_path / "wds_photos" / "classnames.txt").write_text("cat\ndog\n")
    templates = tmp_path / "wds_photos" / "zeroshot_classification_templates.txt"
    templates.write_text("a photo of a {c}.\na blurry photo of a {c}.\n")
    return tmp_path / "wds_photos"


def test_images_labels_names_and_prompts(folder: Path) -> None:
    dataset = load_dataset(f"webdataset:{folder}", split="test")
    assert len(dataset) == 24 and dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0, 1] * 12
    assert [round(float(dataset[i][0][0, 0, 0]) * 255) for i in range(24)] == list(range(24))
    assert dataset.meta["templates"] == ["a photo of a {}.", "a blurry photo of a {}."]
    assert re.search(r"10\.tar at byte \d+", dataset.where(20))
    small = load_dataset(f"webdataset:{folder}", split="test", n=4, size=4, classes=["one", "two"])
    assert small[0][0].shape == (3, 4, 4) and small.classes == ("one", "two")
    shards_themselves = load_dataset(f"webdataset:{folder / 'test'}", classes=["cat", "dog"])
    assert torch.equal(shards_themselves.tensors()[0], dataset.tensors()[0])


def test_worker_processes_read_any_part(folder: Path) -> None:
    dataset = load_dataset(f"webdataset:{folder}", split="test").select([23, 3])
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=2, num_workers=1)
    x, y = next(iter(loader))
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [23, 3] and y.tolist() == [1, 1]


def test_a_preset_takes_names_and_prompts_from_the_images(tmp_path: Path) -> None:
    for name, side in (("wds_cifar10", 32), ("wds_vtab-pets", 300)):
        shard(tmp_path / name / "test" / "0.tar", sample(0, 1, side) + sample(1, 0, side))
        (tmp_path / name / "classnames.txt").write_text("left\nright\n")
        (tmp_path / name / "zeroshot_classification_templates.txt").write_text("the {c}\n")
    protocol = get_protocol("robustvlm-1k")
    native, cropped = protocol.dataset("cifar10", tmp_path), protocol.dataset("pets", tmp_path)
    assert native[0][0].shape == (3, 32, 32) and cropped[0][0].shape == (3, 224, 224)
    assert protocol.templates(cropped) == ("the {}",) and cropped.classes == ("left", "right")
    with pytest.raises(UsageError, match=r"'dtd' is not there: looked for .*wds_vtab-dtd.*huggingface\.co/clip-benchm"):
        protocol.dataset("dtd", tmp_path)
    (tmp_path / "wds_cifar10" / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(UsageError, match="brings no prompts, which protocol 'robustvlm-1k' takes from it"):
        protocol.dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.cls", b"0")], r"sample 'a' of .* has the parts cls; one image"),
        ([("a.png", png(1))], r"sample 'a' of .* has the parts png"),
        ([("a.png", png(1)), ("a.jpg", png(1)), ("a.cls", b"0")], r"the parts cls, jpg, png"),
        ([("a.png", png(1)), ("a.cls", b"cat")], r"label b'cat'; a whole number is expected"),
        (sample(0, 2), r"labels in \[2, 2\] for 2 class names"),
        ([], "hold no sample"),
    ],
)
def test_a_sample_that_is_not_whole(members: list[tuple[str, bytes]], expected: str, tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", members)
    with pytest.raises(UsageError, match=expected):
        load_dataset(f"webdataset:{tmp_path}", classes=["cat", "dog"])


def test_a_shard_that_is_cut_or_compressed(tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", sample(0, 0, 64) + sample(1, 1, 64))
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 4 + 700], b"\x1f\x8b" + whole, whole[:1700]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"shard .*0\.tar is truncated, compressed or no tar file|has the parts"):
            load_dataset(f"webdataset:{tmp_path}", classes=["cat", "dog"])


def test_folders_and_names_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \.tar shards; .* holds the splits test, name one with split="):
        load_dataset(f"webdataset:{folder}")
    with pytest.raises(UsageError, match=r"wds_photos/val holds no \.tar shards; .* holds the splits test"):
        load_dataset(f"webdataset:{folder}", split="val")
    (folder / "classnames.txt").unlink()
    with pytest.raises(UsageError, match=r"brings no class names; write them into classnames\.txt"):
        load_dataset(f"webdataset:{folder}", split="test")
    with pytest.raises(UsageError, match=r"folder of shards .* does not exist"):
        load_dataset(f"webdataset:{tmp_path / 'nowhere'}")
