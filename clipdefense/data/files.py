"""Where data lie on disk, and NumPy files read without running anything that is in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from clipdefense.errors import UsageError

DATA_VARIABLE = "CLIPDEFENSE_DATA"
CACHE_VARIABLE = "CLIPDEFENSE_CACHE"


def find_file(path: str | Path, what: str) -> Path:
    """A file or folder by absolute path, or relative to the working folder and then to ``CLIPDEFENSE_DATA``.

    Args:
        path: as the user gave it; ``~`` is the home folder.
        what: what it should be, for the message, such as ``"data set"``.

    Raises:
        UsageError: it is in none of the places, which are listed.
    """
    wanted = Path(path).expanduser()
    places = [wanted] if wanted.is_absolute() else [Path.cwd() / wanted]
    shared = os.environ.get(DATA_VARIABLE)
    if shared and not wanted.is_absolute():
        places.append(Path(shared).expanduser() / wanted)
    for place in places:
        if place.exists():
            return place
    hint = "" if shared or wanted.is_absolute() else f" ({DATA_VARIABLE} may name a second folder to look in)"
    raise UsageError(f"{what} {str(path)!r} does not exist; looked for {' and '.join(map(str, places))}{hint}.")


def read_arrays(path: Path, what: str) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an ``.npz`` (by name) or ``.npy`` file (memory-mapped, under the name ``""``); never a pickle.

    Raises:
        UsageError: the file is truncated, of another format, or holds Python objects.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except MemoryError:
        raise
    except Exception as error:  # zip, zlib and NumPy's header parser raise anything for damaged bytes
        if "allow_pickle" in str(error) and "Object arrays" in str(error):
            reason = "it holds Python objects, which are not read; save plain arrays (names as dtype=str)"
        else:
            reason = f"it is truncated or not a NumPy file ({type(error).__name__}: {error})"
        raise UsageError(f"{what} {path} cannot be read: {reason}.") from error


def cache_folder(*parts: str) -> Path:
    """Where this library keeps what it trains or downloads, not created here.

    The folder that ``CLIPDEFENSE_CACHE`` names, or else ``~/.cache/clipdefense`` on Linux (``XDG_CACHE_HOME`` is
    respected), ``~/Library/Caches/clipdefense`` on macOS and ``%LOCALAPPDATA%\\clipdefense`` on Windows.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().joinpath(*parts)
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base.joinpath("clipdefense", *parts)
