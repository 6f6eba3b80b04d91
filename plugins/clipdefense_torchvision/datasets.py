"""``torchvision:NAME``: the rows of :data:`clipdefense_torchvision.table.TABLE`, loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from pathlib import Path

from clipdefense.data import ImageDataset, cache_folder
from clipdefense.errors import MissingPackageError, UsageError, unknown_name
from clipdefense_torchvision.folders import Content
from clipdefense_torchvision.names import table
from clipdefense_torchvision.table import TABLE, Row

__all__ = ["ROOT_VARIABLE", "TABLE", "default_root", "load"]

ROOT_VARIABLE = "CLIPDEFENSE_DATASETS"


def default_root() -> Path:
    """``CLIPDEFENSE_DATASETS``, or ``datasets`` in :func:`clipdefense.data.cache_folder`."""
    folder = os.environ.get(ROOT_VARIABLE)
    return Path(folder).expanduser() if folder else cache_folder("datasets")


def load(
    name: str,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
    names: str | None = None,
    n: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> ImageDataset:
    """``torchvision:NAME``, as torchvision lays it out on disk.

    Args:
        name: a key of :data:`TABLE`.
        split: such as ``"train"``; None is the one that evaluations use (test, else val, else all there is).
        root: the folder that torchvision calls root; None is :func:`default_root`.
        download: fetch it when it is not there; nothing is downloaded otherwise.
        names: a style of the class names, with its version or without: ``"plain"``, ``"tecoa/1"``, ``"ttc"``.
        n: take so many images, evenly over the classes.
        seed: of that choice.
        size: side to resize and crop to; None keeps the native one.

    Returns:
        A dataset whose ``meta`` says ``page``, ``names`` (style and version) and ``names_sha256`` (of the table).

    Raises:
        UsageError: an unknown name, split or style, or a data set that is not there, damaged, or cannot be downloaded.
        MissingPackageError: a package that only this data set needs is not installed.
    """
    row = TABLE.get(name)
    if row is None:
        raise unknown_name("torchvision data set", name, TABLE)
    split = row.splits[0] if split is None else split
    if split not in row.splits:
        raise unknown_name(f"split of {name}", split, row.splits)
    classes = table(name)
    classes.style(names)
    _check_packages(name, row)
    if download and not row.fetches:
        raise UsageError(f"download is True, but {name} cannot be fetched by a program; get it from {row.page}.")
    place = default_root() if root is None else Path(root).expanduser()
    folder = place / row.folder if download else _find(row, name, place, split)
    content = _read(row, name, place, folder, split, download)
    written, meta = classes.write(content.names, names)
    dataset = ImageDataset(
        content.images, content.labels, written, name=f"{name}/{split}", size=size, meta={"page": row.page, **meta}
    )
    return dataset if n is None else dataset.sample(n, seed)


def _check_packages(name: str, row: Row) -> None:
    missing = [package for package in row.requires if importlib.util.find_spec(package) is None]
    if missing:
        packages = " ".join(missing)
        raise MissingPackageError(f"{name} needs {packages}, which is not installed: pip install {packages}")


def _find(row: Row, name: str, root: Path, split: str) -> Path:
    """Where it lies: its usual folder, or the first other that holds the split."""
    usual = root / row.folder
    others = [root / other for other in row.also if (root / other / split).is_dir()]
    if usual.exists() or others:
        return usual if usual.exists() else others[0]
    also = "".join(f", nor {root / other / split}" for other in row.also)
    fetch = f", or fetch it once from the shell: {_command(row, name, root, split)}" if row.fetches else ""
    raise UsageError(
        f"{name} is not there: {usual} does not exist{also}. Unpack it from {row.page} into {root}, "
        f"name the folder that holds {row.folder} with root= or {ROOT_VARIABLE}{fetch}."
    )


def _command(row: Row, name: str, root: Path, split: str) -> str:
    """One line for the shell that downloads a data set to where it was looked for."""
    options = {} if root == default_root() else {"root": str(root.absolute())}
    options |= {} if split == row.splits[0] else {"split": split}
    # JSON's quotes are double ones, which leaves single ones to the shell
    given = "".join(f"{key}={json.dumps(value, ensure_ascii=False)}, " for key, value in options.items())
    code = f'import clipdefense; clipdefense.load_dataset("torchvision:{name}", {given}download=True)'
    return f"python -c {shlex.quote(code)}"


def _read(row: Row, name: str, root: Path, folder: Path, split: str, download: bool) -> Content:
    try:
        return row.read(root, folder, split, download)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # what torchvision, scipy and h5py raise for files that are cut or of another kind
        reason = f"{type(error).__name__}: {error}"
        if download:
            advice = f"could not be downloaded ({reason}); get it from {row.page} by hand and unpack it into {root}"
        else:
            again = ", or pass download=True" if row.fetches else ""
            advice = (
                f"in {folder} is incomplete or damaged ({reason}); delete it and unpack it afresh from "
                f"{row.page}{again}"
            )
        raise UsageError(f"{name} {advice}.") from error
