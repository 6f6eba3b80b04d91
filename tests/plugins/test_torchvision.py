"""torchvision:cifar10 and cifar100 from a small tree in CIFAR's own layout; only the checksums are of these files."""

from __future__ import annotations

import hashlib
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from clipdefense import load_dataset
from clipdefense.errors import UsageError
from clipdefense_torchvision.datasets import TABLE, default_root, load

NAMES = {
    "cifar10": ["airplane", "automobile", "bird"],
    "cifar100": ["apple", "aquarium_fish", "baby"],
}


def write(path: Path, content: object) -> str:
    """A pickle as CIFAR's are; returns its MD5."""
    data = pickle.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def pixels(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, cls, batches, labels, names in (
        ("cifar10", datasets.CIFAR10, {"data_batch_1": 4, "data_batch_2": 3, "test_batch": 5}, "labels", "label_names"),
        ("cifar100", datasets.CIFAR100, {"train": 4, "test": 5}, "fine_labels", "fine_label_names"),
    ):
        folder = tmp_path / TABLE[name].folder
        sums = [
            [file, write(folder / file, {"data": pixels(n, n), labels: [i % 3 for i in range(n)]})]
            for file, n in batches.items()
        ]
        meta = {"filename": cls.meta["filename"], "key": names}
        meta["md5"] = write(folder / meta["filename"], {names: NAMES[name]})
        monkeypatch.setattr(cls, "train_list", [entry for entry in sums if "test" not in entry[0]])
        monkeypatch.setattr(cls, "test_list", [entry for entry in sums if "test" in entry[0]])
        monkeypatch.setattr(cls, "meta", meta)
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pixels_labels_and_readable_names(name: str) -> None:
    dataset = load_dataset(f"torchvision:{name}")
    assert dataset.name == f"{name}/test"
    assert dataset.classes == tuple(each.replace("_", " ") for each in NAMES[name])
    x, y = dataset.tensors()
    assert torch.equal(x, torch.from_numpy(pixels(5, 5)).view(5, 3, 32, 32).float() / 255)
    assert y.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.usefixtures("root")
def test_splits_samples_and_sizes() -> None:
    train = load_dataset("torchvision:cifar10", split="train")
    assert len(train) == 7 and train.labels.tolist() == [0, 1, 2, 0, 0, 1, 2]
    part = load_dataset("torchvision:cifar10", split="train", n=3, seed=2, size=16)
    assert sorted(part.labels.tolist()) == [0, 1, 2] and part[0][0].shape == (3, 16, 16)
    with pytest.raises(UsageError, match="split of cifar10 'val' is unknown"):
        load_dataset("torchvision:cifar10", split="val")


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path / "elsewhere"))
    expected = rf"{tmp_path / 'elsewhere' / 'cifar-10-batches-py'} does not exist.*kriz/cifar\.html.*download=True"
    with pytest.raises(UsageError, match=expected):
        load_dataset("torchvision:cifar10")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UsageError, match=rf"{tmp_path / 'cifar-100-python'} does not exist"):
        load("cifar100", root=tmp_path)
    with pytest.raises(UsageError, match="'cifar11' is unknown; did you mean 'cifar10'"):
        load_dataset("torchvision:cifar11")


def test_what_is_not_there_says_how_to_fetch_it_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message says is run as it stands; the address fails, which shows that it was asked to download."""
    place = tmp_path / "it's here"
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError) as told:
        load("cifar10")
    said = re.search(r"from the shell: (python -c '.*')\.$", str(told.value))
    expected = """import clipdefense; clipdefense.load_dataset("torchvision:cifar10", download=True)"""
    assert said is not None and shlex.split(said[1]) == ["python", "-c", expected]
    with pytest.raises(UsageError, match="from the shell") as told:
        load("cifar10", root=place, split="train")
    code = shlex.split(str(told.value).partition("from the shell: ")[2].removesuffix("."))[2]
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "no.tar.gz").as_uri())
    with pytest.raises(UsageError, match=f"could not be downloaded.*unpack it into {place}"):
        exec(code, {})
    with pytest.raises(UsageError) as told:
        load("imagenet", root=tmp_path)  # nobody may fetch it
    assert "from the shell" not in str(told.value)


def test_a_damaged_file_is_told_from_an_absent_one(root: Path) -> None:
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(UsageError, match=r"cifar10 in .* is incomplete or damaged"):
        load_dataset("torchvision:cifar10")


def test_the_default_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPDEFENSE_DATASETS", raising=False)
    monkeypatch.delenv("CLIPDEFENSE_CACHE", raising=False)
    assert default_root().parts[-2:] == ("clipdefense", "datasets")
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path))
    assert default_root() == tmp_path


def test_a_download_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "no.tar.gz").as_uri())
    with pytest.raises(UsageError, match=r"could not be downloaded.*by hand"):
        load("cifar10", root=tmp_path / "new", download=True)
