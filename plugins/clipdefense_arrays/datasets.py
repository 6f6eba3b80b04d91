"""``npz:``, ``folder:`` and ``arrays:``, and the function that writes what ``npz:`` reads."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipdefense.data import EncodedImages, FileImages, ImageDataset, find_file, from_arrays, read_arrays
from clipdefense.errors import UsageError
from clipdefense.files import write_atomically
from clipdefense_arrays.shards import PICTURES

SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
EXTENSIONS = frozenset(f".{ending}" for ending in PICTURES)
PACKED = ("blob", "offsets", "labels", "classes")


def load_packed(
    path: str, *, split: str | None = None, n: int | None = None, seed: int = 0, size: int | None = None
) -> ImageDataset:
    """``npz:path``: image files packed end to end by :func:`pack_images`.

    Args:
        path: absolute, or relative to the working folder or to ``CLIPDEFENSE_DATA``.
        split: must stay None; a pack has no splits.
        n: take so many images, evenly over the classes.
        seed: of that choice.
        size: side to resize and crop to; None keeps each image as it is.

    Raises:
        UsageError: no such file, a damaged one, or one of another format.
    """
    _no_split(split, "npz")
    file = _file(path, "packed images")
    arrays = read_arrays(file, "packed images")
    missing = [key for key in PACKED if key not in arrays]
    if missing:
        found = ", ".join(name or "one unnamed array" for name in arrays)
        raise UsageError(
            f"packed images {file} has no {', '.join(missing)}; it holds {found}. npz: reads what pack_images writes; "
            "plain arrays of pixels and labels load with arrays:."
        )
    blob, offsets = arrays["blob"], arrays["offsets"]
    _check_offsets(blob, offsets, file)
    paths = [str(name) for name in arrays["paths"]] if "paths" in arrays else []
    if paths and len(paths) != len(offsets) - 1:
        raise UsageError(f"packed images {file} has {len(paths)} paths for {len(offsets) - 1} images.")
    source = EncodedImages(blob, offsets, paths)
    dataset = ImageDataset(
        source,
        arrays["labels"],
        arrays["classes"].tolist(),
        name=file.stem,
        size=size,
        meta=_meta(arrays, file),
    )
    return dataset if n is None else dataset.sample(n, seed)


def load_folder(
    path: str, *, split: str | None = None, n: int | None = None, seed: int = 0, size: int | None = None
) -> ImageDataset:
    """``folder:path``: a folder of images, one sub-folder a class, classes and files in sorted order.

    Args:
        path: absolute, or relative to the working folder or to ``CLIPDEFENSE_DATA``.
        split: a folder inside, such as ``"val"``, that holds the class folders; None where path does.
        n, seed, size: as in :func:`load_packed`.

    Raises:
        UsageError: no such folder or split, a class without images, or sub-folders that are splits and not classes.
    """
    root = find_file(path, "image folder")
    name = root.name
    if split is not None:
        root, name = root / split, f"{root.name}/{split}"
    if not root.is_dir():
        what = f"has no folder {split!r}, which split= asks for" if split is not None else "is not a folder"
        raise UsageError(f"image folder {root if split is None else root.parent} {what}.")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UsageError(f"image folder {root} has no sub-folders; one a class is expected, named after it.")
    if all(folder.name.lower() in SPLITS for folder in folders):
        listed = ", ".join(folder.name for folder in folders)
        raise UsageError(
            f"image folder {root} holds the splits {listed}, where a sub-folder a class is expected; "
            f"pass split={folders[0].name!r} (--split {folders[0].name})."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = _images_below(folder)
        if not found:
            kinds = " ".join(sorted(EXTENSIONS))
            raise UsageError(f"image folder {root} has no image in its class {folder.name!r} ({kinds} are read).")
        files += found
        labels += [label] * len(found)
    dataset = ImageDataset(FileImages(files), labels, [folder.name for folder in folders], name=name, size=size)
    return dataset if n is None else dataset.sample(n, seed)


def load_arrays(
    path: str,
    *,
    labels: str | None = None,
    classes: Sequence[str] | None = None,
    layout: str | None = None,
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> ImageDataset:
    """``arrays:path``: pixels under ``x`` or ``images`` and labels under ``y`` or ``labels`` of an ``.npz`` file.

    Args:
        path: the ``.npz``, or an ``.npy`` with the pixels alone (memory-mapped); found as in :func:`load_packed`.
        labels: the ``.npy`` file of labels that goes with an ``.npy`` of pixels.
        classes: names; else the file's ``classes``, else ``class 0``, ``class 1``, ...
        layout: ``"NCHW"`` or ``"NHWC"`` where the shape leaves it open.
        split: must stay None; arrays have no splits.
        n, seed, size: as in :func:`load_packed`.

    Raises:
        UsageError: no such file, a damaged one, or arrays that are not images and labels.
    """
    _no_split(split, "arrays")
    file = _file(path, "arrays")
    arrays = read_arrays(file, "arrays")
    if "" in arrays:
        if labels is None:
            raise UsageError(f"arrays {file} is one array, the pixels; name the .npy file of labels with labels=.")
        y = read_arrays(_file(labels, "labels"), "labels")
        if "" not in y:
            raise UsageError(f"labels {labels!r} is an .npz file; an .npy file of (N,) integers is expected.")
        arrays = {"x": arrays[""], "y": y[""]}
    elif labels is not None:
        raise UsageError(f"labels is {labels!r}, but {file} is an .npz file, which brings its own.")
    x, y_key = _one_of(arrays, ("x", "images"), file), _one_of(arrays, ("y", "labels"), file)
    if classes is None and "classes" in arrays:
        classes = [str(name) for name in arrays["classes"]]
    dataset = from_arrays(arrays[x], arrays[y_key], classes, name=file.stem, size=size, layout=layout)
    return dataset if n is None else dataset.sample(n, seed)


def pack_images(
    path: str | Path,
    images: Iterable[bytes | Path | Image.Image],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    paths: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write the file that ``npz:`` reads.

    Args:
        path: the ``.npz`` to write, whole or not at all; missing folders are made.
        images: image files, their bytes, or images (stored as PNG, which loses nothing).
        labels: an integer an image, in [0, len(classes)).
        classes: names.
        paths: where the images came from, one each.
        meta: source, licence and the like; anything JSON can hold.

    Raises:
        UsageError: labels, paths or names that do not fit the images.
    """
    encoded = [_encoded(image) for image in images]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    if paths is not None and len(paths) != len(encoded):
        raise UsageError(f"paths has {len(paths)} entries for {len(encoded)} images; one an image is expected.")
    arrays: dict[str, Any] = {"blob": blob, "offsets": offsets, "labels": np.asarray(labels, dtype=np.int64)}
    arrays |= {"classes": np.array(list(classes), dtype=str), "meta": np.array(json.dumps(dict(meta or {})))}
    if paths is not None:
        arrays["paths"] = np.array(list(paths), dtype=str)
    ImageDataset(EncodedImages(blob, offsets), arrays["labels"], list(classes), name=str(path))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy appends .npz to it
            np.savez(file, **arrays)

    write_atomically(Path(path), write)


def _encoded(image: bytes | Path | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Path):
        return image.read_bytes()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _file(path: str, what: str) -> Path:
    file = find_file(path, what)
    if not file.is_file():
        raise UsageError(f"{what} {file} is a folder; a file is expected (image folders load with folder:).")
    return file


def _no_split(split: str | None, plugin: str) -> None:
    if split is not None:
        raise UsageError(f"split is {split!r}, but {plugin}: has no splits; leave it out, or name another file.")


def _check_offsets(blob: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], file: Path) -> None:
    whole = offsets.ndim == 1 and len(offsets) > 1 and np.issubdtype(offsets.dtype, np.integer)
    if blob.dtype != np.uint8 or blob.ndim != 1 or not whole:
        raise UsageError(
            f"packed images {file} has a blob of {blob.dtype} {blob.shape} and offsets of {offsets.dtype} "
            f"{offsets.shape}; one row of uint8 bytes and n + 1 whole numbers are expected."
        )
    if offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise UsageError(
            f"packed images {file} has offsets from {offsets[0]} to {offsets[-1]} for {len(blob)} bytes; they must "
            "rise from 0 to the number of bytes. The file is damaged; write it again with pack_images."
        )


def _meta(arrays: Mapping[str, np.ndarray[Any, Any]], file: Path) -> dict[str, Any]:
    if "meta" not in arrays:
        return {}
    try:
        meta = json.loads(str(arrays["meta"]))
    except json.JSONDecodeError as error:
        raise UsageError(f"packed images {file} has a meta entry that is not JSON ({error}).") from error
    return meta if isinstance(meta, dict) else {"meta": meta}


def _one_of(arrays: Mapping[str, Any], names: tuple[str, ...], file: Path) -> str:
    found = [name for name in names if name in arrays]
    if len(found) != 1:
        held = ", ".join(arrays) or "nothing"
        raise UsageError(f"arrays {file} holds {held}; exactly one of {' and '.join(names)} is expected.")
    return found[0]


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        found += [Path(parent, name) for name in sorted(names) if Path(name).suffix.lower() in EXTENSIONS]
    return found
