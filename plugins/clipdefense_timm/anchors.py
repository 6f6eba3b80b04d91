"""Class embeddings that are stored in a file, instead of a text tower."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from clipdefense.classifier import EmbeddingTable
from clipdefense.data import read_arrays
from clipdefense.errors import UsageError
from clipdefense.weights import read_state_dict


def read_embedding_table(path: str | Path, *, names: str = "names", embeddings: str = "embeddings") -> EmbeddingTable:
    """Class names with their stored embeddings.

    Args:
        path: an ``.npz`` with (C,) strings under ``names`` and a (C, D) array under ``embeddings``; or a safetensors
            file with that tensor and, in its metadata, the names as a JSON list.
        names, embeddings: the keys.

    Raises:
        UsageError: no such file or keys, or another number of names than rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"class embeddings {str(path)!r} do not exist (looked for {file.absolute()}).")
    if file.suffix == ".safetensors":
        tensors = read_state_dict(file)
        with safe_open(file, "pt") as opened:
            stored = (opened.metadata() or {}).get(names)
        listed = None if stored is None else _listed(stored, file)
    else:
        arrays = read_arrays(file, "class embeddings")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}
        listed = [str(name) for name in arrays[names]] if names in arrays else None
    if listed is None or embeddings not in tensors:
        raise UsageError(
            f"class embeddings {file} has no {names!r} with {embeddings!r}; its arrays are {', '.join(tensors)}. "
            "Say which with names_key= and embeddings_key=."
        )
    return EmbeddingTable(listed, tensors[embeddings].float())


def _listed(stored: str, file: Path) -> list[str]:
    try:
        content = json.loads(stored)
    except json.JSONDecodeError as error:
        raise UsageError(f"class embeddings {file} has names that are not a JSON list ({error}).") from error
    return [str(name) for name in content]
