"""Every data set from a small tree in its real layout on disk; of the code that reads them only checksums change."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo
from torchvision import datasets

from clipdefense import ZeroShotClassifier, evaluate, load_dataset
from clipdefense.attacks import predict
from clipdefense.checks import check_class_names
from clipdefense.data import Subset, get_protocol
from clipdefense.errors import MissingPackageError, UsageError
from clipdefense_torchvision.datasets import load
from clipdefense_torchvision.folders import imagenet_names
from clipdefense_torchvision.names import RULES, TABLES, Style, table
from clipdefense_torchvision.table import TABLE

# Of names/*.json at version 1. A change of a table needs a new version, and new presets that name it.
PINNED = "pinned_names.json"


def picture(path: Path, level: int = 100, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 50, 150)).save(path, quality=100)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for name, n in (("data_batch_1", 3), ("test_batch", 4)):
        content = {"data": np.full((n, 3072), 40 * n, np.uint8), "labels": [i % 2 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = [[name, md5(folder / name)]]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    for key, value in (("train_list", sums["data_batch_1"]), ("test_list", sums["test_batch"]), ("meta", meta)):
        monkeypatch.setattr(datasets.CIFAR10, key, value)


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    text(folder / "class_names.txt", "airplane", "bird")
    sums = {}
    for part, n in (("train", 3), ("test", 2), ("unlabeled", 1)):
        np.full((n, 3, 96, 96), 7 * n, np.uint8).tofile(folder / f"{part}_X.bin")
        (folder / f"{part}_y.bin").write_bytes(bytes(1 + i % 2 for i in range(n)))
        sums |= {f"{part}_{kind}.bin": md5(folder / f"{part}_{kind}.bin") for kind in "Xy"}
    named = {
        key: [[name, sums[name]] for name, _ in getattr(datasets.STL10, key)] for key in ("train_list", "test_list")
    }
    for key, value in named.items():
        monkeypatch.setattr(datasets.STL10, key, value)


def imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, synset in enumerate(ImageNetInfo().label_names()):
        picture(root / "imagenet" / "val" / synset / f"ILSVRC2012_val_{number + 1:08d}.JPEG", 0, (2, 2))


def tiny_words(folder: Path) -> None:
    text(folder / "wnids.txt", "n02124075", "n01443537", "n04067472")
    text(
        folder / "words.txt",
        "n00001740\tentity",
        "n01443537\tgoldfish, Carassius auratus",
        "n02124075\tEgyptian cat",
        "n04067472\treel",
    )


def tiny_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "tiny-imagenet-200"
    tiny_words(folder)
    labels = ["n02124075", "n01443537", "n04067472", "n01443537"] + ["n02124075"] * 8
    lines = [f"val_{i}.JPEG\t{synset}\t0\t32\t44\t62" for i, synset in enumerate(labels)]
    text(folder / "val" / "val_annotations.txt", *lines)
    for i in range(len(labels)):
        picture(folder / "val" / "images" / f"val_{i}.JPEG", 10 * i, (64, 64))
    for synset in set(labels):
        text(folder / "train" / synset / f"{synset}_boxes.txt", f"{synset}_0.JPEG\t0\t10\t63\t58")
        for i in range(2):
            picture(folder / "train" / synset / "images" / f"{synset}_{i}.JPEG", 0, (64, 64))


def caltech101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in (("BACKGROUND_Google", 2), ("Faces", 1), ("Faces_easy", 2), ("cougar_body", 1)):
        for i in range(n):
            picture(root / "caltech101" / "101_ObjectCategories" / name / f"image_{i + 1:04d}.jpg")


def caltech256(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("001.ak47", "224.touring-bike", "251.airplanes-101", "257.clutter"):
        picture(root / "caltech256" / "256_ObjectCategories" / name / f"{name[:3]}_0001.jpg")


def oxford_pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    breeds = ("Abyssinian", "american_bulldog", "Birman")
    for split in ("test", "trainval"):
        text(
            folder / "annotations" / f"{split}.txt",
            *(f"{b}_{i} {k + 1} 1 1" for k, b in enumerate(breeds) for i in (1, 2)),
        )
    for breed in breeds:
        for i in (1, 2):
            picture(folder / "images" / f"{breed}_{i}.jpg")


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    for i in range(1, 7):
        picture(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 60, 1, 2, 60]], np.uint8)})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    sums = dict(datasets.Flowers102._file_dict)
    sums |= {
        "label": ("imagelabels.mat", md5(folder / "imagelabels.mat")),
        "setid": ("setid.mat", md5(folder / "setid.mat")),
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", sums)


def fgvc_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "A300B4", "Cessna 172")
    for split in ("train", "val", "trainval", "test"):
        text(data / f"images_variant_{split}.txt", "0034309 707-320", "0034958 Cessna 172")
    for name in ("0034309", "0034958"):
        picture(data / "images" / f"{name}.jpg")


def stanford_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["Acura TL Sedan 2012", "Audi S4 Sedan 2012", "Audi S4 Sedan 2007"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = np.dtype([("class", "O"), ("fname", "O")])
    rows = np.array([(2, "00001.jpg"), (3, "00002.jpg"), (1, "00003.jpg")], dtype=kind)
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for i in (1, 2, 3):
        picture(folder / "cars_test" / f"{i:05d}.jpg")


def sun397(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text(root / "SUN397" / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    for name in ("a/apartment_building/outdoor/sun_b", "a/abbey/sun_c", "a/abbey/sun_a"):
        picture(root / "SUN397" / f"{name}.jpg")


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    listed = {"apple_pie": ["apple_pie/10", "apple_pie/20"], "waffles": ["waffles/30"]}
    for split in ("train", "test"):
        text(folder / "meta" / f"{split}.json", json.dumps(listed))
    for name in (name for names in listed.values() for name in names):
        picture(folder / "images" / f"{name}.jpg")


def eurosat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AnnualCrop", "SeaLake", "Forest"):
        for i in (1, 2, 10):
            picture(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", 30 * i % 250, (64, 64))


def dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    files = ("banded/banded_0002.jpg", "polka-dotted/polka-dotted_0001.jpg")
    for split in ("train", "val", "test"):
        text(folder / "labels" / f"{split}1.txt", *files)
    for name in files:
        picture(folder / "images" / name)


def country211(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "valid", "test"):
        for code in ("DE", "AD", "XK"):
            picture(root / "country211" / split / code / "1.jpg")


Build = Callable[[Path, pytest.MonkeyPatch], None]
# data set -> (builder, labels of the default split, names in the styles plain, tecoa and ttc)
CASES: dict[str, tuple[Build, list[int], dict[str, list[str]]]] = {
    "stl10": (stl10, [0, 1], {"plain": ["airplane", "bird"]}),
    "caltech101": (
        caltech101,
        [0, 1, 1, 2],
        {"plain": ["faces", "faces easy", "cougar body"], "ttc": ["Faces", "Faces_easy", "cougar_body"]},
    ),
    "caltech256": (
        caltech256,
        [0, 1, 2, 3],
        {
            "plain": ["ak47", "touring bike", "airplanes", "clutter"],
            "tecoa": ["ak47", "touring-bike", "airplanes-101", "clutter"],
        },
    ),
    "oxford-pets": (oxford_pets, [0, 0, 1, 1, 2, 2], {"plain": ["Abyssinian", "American Bulldog", "Birman"]}),
    "fgvc-aircraft": (fgvc_aircraft, [0, 2], {"plain": ["Boeing 707-320", "A300B4", "Cessna 172"]}),
    "stanford-cars": (
        stanford_cars,
        [1, 2, 0],
        {
            "plain": ["Acura TL Sedan 2012", "Audi S4 Sedan 2012", "Audi S4 Sedan 2007"],
            "tecoa": ["Acura TL Sedan", "Audi S4 Sedan 2012", "Audi S4 Sedan 2007"],  # alike without their years
        },
    ),
    "sun397": (
        sun397,
        [0, 0, 1],
        {"plain": ["abbey", "apartment building outdoor"], "ttc": ["abbey", "apartment_building/outdoor"]},
    ),
    "food101": (food101, [0, 0, 1], {"plain": ["apple pie", "waffles"]}),
    "eurosat": (
        eurosat,
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
        {"tecoa": ["annual crop land", "a forest", "a sea or a lake"]},
    ),
    "dtd": (dtd, [0, 1], {"ttc": ["banded", "polka-dotted"]}),
    "country211": (country211, [0, 1, 2], {"plain": ["Andorra", "Germany", "Kosovo"]}),
    "tiny-imagenet": (
        tiny_imagenet,
        [1, 0, 2, 0] + [1] * 8,
        {"plain": ["goldfish", "Egyptian cat", "reel"], "tecoa": ["goldfish", "egyptian cat", "reel"]},
    ),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_labels_names_images_and_paths(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, labels, names = CASES[name]
    build(root, monkeypatch)
    dataset = load_dataset(f"torchvision:{name}")
    assert dataset.name == f"{name}/{TABLE[name].splits[0]}"
    assert dataset.labels.tolist() == labels
    for style, expected in names.items():
        assert list(load(name, names=style).classes) == expected
    x, _ = load(name, size=8).tensors()
    assert x.shape == (len(labels), 3, 8, 8)
    if name != "stl10":  # its images are no files of their own
        assert Path(dataset.where(0)).is_file()
    assert dataset.meta["names"] == "plain/1" and dataset.meta["names_sha256"] == table(name).sha256


@pytest.mark.parametrize("name", CASES)
def test_every_protocol_reads_it_end_to_end(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, labels, _ = CASES[name]
    build(root, monkeypatch)
    for preset in ("tecoa-native", "tga-224", "ttc-224", "clipdefense-1"):
        protocol = get_protocol(preset)
        if name not in protocol.datasets:
            continue
        images = protocol.dataset(name, root)
        assert images.labels.tolist() == labels and len(set(images.classes)) == len(images.classes)
        side = protocol.rule(name).resize.attack_at
        assert side == 224 or (side is None and name == "stl10")
        assert images[0][0].shape[1:] == ((96, 96) if side is None else (224, 224))
        assert protocol.templates(images) == protocol.templates(name)
        assert images.meta["protocol_sha256"] == protocol.hash and images.meta["names"] == protocol.rule(name).names


@pytest.mark.parametrize("name", sorted(TABLE))
def test_what_is_missing_says_where_to_get_it_and_where_it_was_looked_for(name: str, root: Path) -> None:
    if importlib.util.find_spec("h5py") is None and name == "pcam":
        with pytest.raises(MissingPackageError, match="pcam needs h5py, which is not installed: pip install h5py"):
            load(name)
        return
    with pytest.raises(UsageError) as caught:
        load(name)
    message = str(caught.value)
    assert f"{root / TABLE[name].folder} does not exist" in message and TABLE[name].page in message
    assert ("download=True" in message) == TABLE[name].fetches
    assert not any(root.iterdir())  # looking for it makes nothing


@pytest.mark.parametrize("name", ["imagenet", "tiny-imagenet", "stanford-cars"])
def test_what_no_program_can_fetch_is_not_tried(name: str, root: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be fetched by a program; get it from http"):
        load(name, download=True)


FIRST: dict[str, Build] = {
    "cifar10": cifar10,
    "tiny-imagenet": tiny_imagenet,
    "caltech101": caltech101,
    "oxford-pets": oxford_pets,
    "eurosat": eurosat,
    "imagenet": imagenet,
}


@pytest.mark.parametrize("name", FIRST)
def test_from_the_tree_on_disk_to_a_robust_accuracy(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., ZeroShotClassifier]
) -> None:
    FIRST[name](root, monkeypatch)
    protocol = get_protocol("tecoa-native")
    images = Subset(4, "uniform").of(protocol.dataset(name))
    x, labels = images.tensors()
    model = make_model(classes=len(check_class_names(images.classes)))
    clean = evaluate(model, x, labels, protocol.threats[0], attacks=["pgd,steps=1"], ids=images.ids).clean
    y = predict(model, x).argmax(dim=1)
    assert clean.accuracy == (y == labels).float().mean()
    # a random model is rarely right, so the attack is shown on its own predictions
    attacks = protocol.attacks_on(name)[:1]
    result = evaluate(model, x, y, protocol.threats[0], attacks=attacks, ids=images.ids, keep_adversarial=True)
    adversarial = result.rows[0].adversarial
    assert adversarial is not None and adversarial.shape[2:] == ((32, 32) if name == "cifar10" else (224, 224))
    assert 0.9 / 255 < (adversarial - x).abs().amax() <= 1 / 255 + 1e-6
    assert result.clean.accuracy == 1 and result.worst_case().accuracy <= 1


def test_imagenet_in_its_usual_places(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet(root, monkeypatch)
    dataset = load("imagenet")
    assert dataset.labels.tolist() == list(range(1000))
    assert dataset.classes[:2] == ("tench", "goldfish") and dataset.classes[657] == "missile"
    assert len(set(dataset.classes)) == 1000
    assert load("imagenet", root=root / "imagenet").where(5) == dataset.where(5)
    lower = get_protocol("tecoa-native").dataset("imagenet", root).classes
    assert len(set(lower)) == 1000 and "american robin" in lower
    (root / "imagenet" / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG").unlink()
    (root / "imagenet" / "val" / "n01440764").rmdir()
    with pytest.raises(UsageError, match=r"1000 synset folders; missing: n01440764; unknown: none"):
        load("imagenet")


def test_imagenet_as_the_archive_unpacks(root: Path) -> None:
    picture(root / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match="one folder a synset is expected"):
        load("imagenet")


def test_imagenet_names_are_curated_and_distinct() -> None:
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert [names[i] for i in (657, 744, 836, 837)] == ["missile", "projectile", "sunglass", "sunglasses"]


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_is_the_same_in_all_its_layouts(inner: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_imagenet(root, monkeypatch)
    original = load("tiny-imagenet")
    folder = root / "tiny-imagenet-200" / "val"
    for index in range(len(original)):
        file = Path(original.where(index))
        assert file.name == f"val_{index}.JPEG"  # val_10 after val_9
        target = folder / sorted(["n02124075", "n01443537", "n04067472"])[int(original.labels[index])] / inner
        target.mkdir(parents=True, exist_ok=True)
        file.rename(target / file.name)
    if inner:
        (folder / "images").rmdir()
        (folder / "val_annotations.txt").unlink()
    arranged = load("tiny-imagenet")
    assert arranged.labels.tolist() == original.labels.tolist() and arranged.classes == original.classes
    assert [Path(arranged.where(i)).name for i in range(12)] == [f"val_{i}.JPEG" for i in range(12)]
    assert load("tiny-imagenet", split="train").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_damaged_tiny_imagenet_says_what_is_wrong(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_imagenet(root, monkeypatch)
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(UsageError, match=r"val_annotations\.txt differ in val_3\.JPEG"):
        load("tiny-imagenet")
    text(folder / "val" / "val_annotations.txt", "val_0.JPEG\tn99999999\t0\t0\t1\t1")
    with pytest.raises(UsageError, match=r"n99999999.*a synset of wnids\.txt"):
        load("tiny-imagenet")
    text(folder / "words.txt", "n01443537\tgoldfish")
    with pytest.raises(UsageError, match=r"words\.txt has no entry for n02124075"):
        load("tiny-imagenet")


def test_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowers102(root, monkeypatch)
    dataset = load("flowers102")
    assert dataset.labels.tolist() == [1, 59] and len(dataset.classes) == 102
    assert dataset.classes[59] == "pink-yellow dahlia"
    assert load("flowers102", names="tecoa").classes[59] == "pink-yellow dahlia?"
    assert load("flowers102", split="val").labels.tolist() == [59, 0]
    assert get_protocol("ttc-224").dataset("flowers102", root)[0][0].shape == (3, 224, 224)


def test_pcam(root: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="PCAM: pip install h5py")
    (root / "pcam").mkdir()
    for key, content in (("x", np.full((3, 96, 96, 3), 9, np.uint8)), ("y", np.array([0, 1, 1]).reshape(3, 1, 1, 1))):
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_test_{key}.h5", "w") as file:
            file[key] = content
    dataset = pickle.loads(pickle.dumps(load("pcam")))
    assert dataset.labels.tolist() == [0, 1, 1] and torch.all(dataset[0][0] == 9 / 255)
    assert dataset.classes == ("healthy lymph node tissue", "lymph node tumor tissue")
    assert get_protocol("tecoa-native").dataset("pcam", root).classes[0].startswith("Tthis is a photo")


@pytest.mark.parametrize(
    "name", ["caltech101", "oxford-pets", "flowers102", "stanford-cars", "food101", "dtd", "sun397"]
)
def test_a_tree_with_holes_is_told_from_an_absent_one(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "caltech101":
        (root / TABLE[name].folder / "Faces").mkdir(parents=True)
        expected = "no image in its class folder 'Faces'"
    else:
        (root / TABLE[name].folder).mkdir(parents=True)
        expected = f"{name} in .* is incomplete or damaged .*unpack it afresh from"
    with pytest.raises(UsageError, match=expected):
        load(name)


def test_an_image_that_cannot_be_decoded_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eurosat(root, monkeypatch)
    bad = root / "eurosat" / "2750" / "Forest" / "Forest_1.jpg"
    bad.write_bytes(b"cut")
    images = get_protocol("ttc-224").dataset("eurosat", root)
    with pytest.raises(UsageError, match=r"image 3 of data set 'eurosat/all' \(.*Forest_1\.jpg\) cannot be decoded"):
        images.tensors()


def test_names_in_a_style_or_version_that_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtd(root, monkeypatch)
    assert load("dtd", names="tecoa/1").meta["names"] == "tecoa/1"
    with pytest.raises(UsageError, match="style of the class names of dtd 'tecoaa' is unknown; did you mean 'tecoa'"):
        load("dtd", names="tecoaa")
    with pytest.raises(UsageError, match="names is 'tecoa/2', but the class names of dtd are of version 1"):
        load("dtd", names="tecoa/2")


def test_tables_are_versioned_and_whole() -> None:
    pinned = json.loads((Path(__file__).parent / PINNED).read_text())
    found = {file.stem: [table(file.stem).version, table(file.stem).sha256] for file in TABLES.glob("*.json")}
    assert found.keys() == TABLE.keys()
    assert found == pinned, "a table has changed: raise its version and pin the new hash"
    for name in TABLE:
        assert table(name).styles.keys() == {"plain", "tecoa", "ttc"} and table(name).source
        assert {rule for style in table(name).styles.values() for rule in style.rules} <= RULES.keys()


def test_names_that_rules_make_alike_keep_their_own() -> None:
    assert Style(rules=("lower",)).write(["Cat", "cat", "Dog"]) == ["Cat", "cat", "dog"]
    assert Style({"DE": "Germany"}, ("lower",)).write(["DE", "FR"]) == ["Germany", "fr"]
