"""Model files: safetensors with a JSON sidecar ``<file>.json``, written whole or not at all."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdefense.errors import UsageError
from clipdefense.files import write_json
from clipdefense.weights import load_strictly, read_sidecar, read_state_dict, sha256_of_weights, write_tensors

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier


def save_model(model: ZeroShotClassifier, path: str | Path, **metadata: Any) -> Path:
    """Write a classifier's weights and head to ``path`` and what is needed to read them to ``<path>.json``.

    Args:
        model: the classifier; tower, class embeddings, transform and scale are all in its state dict.
        path: ends in ``.safetensors``; missing folders are made.
        metadata: JSON-ready facts for the sidecar, such as ``method``, ``variant``, ``hyper_parameters``,
            ``threat`` and ``base_weights_sha256``.

    Returns:
        The path.

    Raises:
        UsageError: another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"path is {str(path)!r}; a model file ends in .safetensors.")
    sidecar = {
        "format": "clipdefense-model",
        "version": 1,
        "source": model.source,
        "class_names": list(model.class_names),
        "logit_scale": float(model.head.scale),
        "image_size": model.image_size,
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "weights_sha256": sha256_of_weights(model),
        **metadata,
        "versions": {name: version(name) for name in ("clipdefense", "torch", "open_clip_torch", "timm")},
    }
    write_tensors(path, model.state_dict(), {"format": "pt"})
    write_json(sidecar_path(path), sidecar)
    return path


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def load_weights(model: ZeroShotClassifier, path: str | Path, *, keep_classes: bool = False) -> None:
    """Load what :func:`save_model` wrote into a classifier of the same architecture, in place.

    Args:
        model: the classifier.
        path: the ``.safetensors`` file.
        keep_classes: leave the model's class list and class embeddings alone and load the rest (tower, the head's
            transform and scale), for a hardened tower on other classes.

    Raises:
        UsageError: another class list (without ``keep_classes``), other preprocessing, keys or shapes that do not
            match (listed), a file that cannot be read.
    """
    path = Path(path)
    facts = read_sidecar(path)
    if not facts:
        raise UsageError(f"{sidecar_path(path)} is missing, or not of a clipdefense model file; copy it along with it.")
    ours = {"image_size": model.image_size, "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    differing = [f"{name} {facts[name]} (here {value})" for name, value in ours.items() if facts[name] != value]
    if differing:
        raise UsageError(f"{path} has other preprocessing: {'; '.join(differing)}; build the model with the file's.")
    if not keep_classes and tuple(facts["class_names"]) != model.class_names:
        raise UsageError(
            f"{path} has the {len(facts['class_names'])} classes {_shown(facts['class_names'])}, but the model has "
            f"{len(model.class_names)}: {_shown(model.class_names)}; build the model with the file's classes, or pass "
            "keep_classes=True to load everything but the class embeddings."
        )
    state = read_state_dict(path)
    if keep_classes:
        state["head.embeddings"] = model.head.embeddings
    load_strictly(model, state, str(path))


def _shown(names: Any) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
