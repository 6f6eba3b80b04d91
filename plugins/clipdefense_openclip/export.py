"""A classifier back into plain open_clip: one safetensors file, and a refusal where that would change its answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.weights import load_strictly, write_tensors
from clipdefense_openclip.architecture import build, find_architecture
from clipdefense_openclip.checkpoint import locate, read_weights, take_apart
from clipdefense_openclip.loader import load
from clipdefense_openclip.text import TextEncoder
from clipdefense_openclip.tower import OpenClipTower, tower_state_dict

_VISUAL = "visual."


def export_open_clip(model: ZeroShotClassifier, path: str | Path, *, tower_only: bool = False) -> Path:
    """Write a classifier for plain open_clip.

    The whole CLIP, image tower and text tower, loads with ``open_clip.create_model(architecture, pretrained=path)``;
    with its prompts and the same images it then gives the classifier's logits. The image tower alone loads over other
    weights with ``open_clip.create_model(architecture, pretrained=..., pretrained_image_path=path)``, or with
    ``clip.visual.load_state_dict``.

    Args:
        model: its tower is open_clip's; for the whole CLIP its class encoder is the text tower, as in a model loaded
            with its text tower or with ``base=``.
        path: ends in ``.safetensors``; missing folders are made.
        tower_only: write the image tower alone, and leave everything else behind. Channel statistics or an image size
            other than open_clip's usual are then a warning.

    Returns:
        The path.

    Raises:
        UsageError: another suffix; a tower that is not open_clip's; and, for the whole CLIP, what open_clip has no
            place for, each named: no text tower, a head with a transform, another logit scale, class embeddings that
            are not the text tower's, other channel statistics or another image size.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"path is {str(path)!r}; an exported checkpoint ends in .safetensors.")
    tower, outside = tower_state_dict(model), list(_preprocessing(model))
    if tower_only:
        if outside:
            warnings.warn(
                f"the exported tower is only right with {' and '.join(outside)}; the file cannot say so.", stacklevel=2
            )
        tensors = {name.removeprefix(_VISUAL): value for name, value in tower.items()}
    else:
        encoder = model.class_encoder
        refuse([*_head(model), *outside])
        assert isinstance(encoder, TextEncoder)
        text = {name: value for name, value in encoder.model.state_dict().items() if not name.startswith(_VISUAL)}
        tensors = {**tower, **text}
    write_tensors(path, tensors, {"format": "pt", "source": model.source})
    return path


def refuse(lost: list[str]) -> None:
    """
    Raises:
        UsageError: something would be lost.
    """
    if lost:
        raise UsageError(
            f"exporting to open_clip would lose {'; '.join(lost)}. Pass tower_only=True (--tower-only) for the image "
            "tower alone."
        )


def _head(model: ZeroShotClassifier) -> Iterator[str]:
    """What the head has that the text tower and its logit scale do not give."""
    head, encoder = model.head, model.class_encoder
    if head.transform is not None:
        yield f"the head's transform of class embeddings ({type(head.transform).__name__})"
    if not isinstance(encoder, TextEncoder):
        got = "it has no class encoder" if encoder is None else f"its class encoder is of type {type(encoder).__name__}"
        yield f"the class embeddings, which no text tower of the model gives ({got}; base= loads one with the weights)"
        return
    stored, own = math.exp(float(encoder.model.logit_scale)), float(head.scale)  # type: ignore[arg-type]
    if not math.isclose(stored, own, rel_tol=1e-5):
        yield f"the head's logit scale {own:.6g} (the checkpoint's is {stored:.6g})"
    given, computed = (F.normalize(e.double().cpu(), dim=1) for e in (head.embeddings, encoder(head.names)))
    if given.shape != computed.shape or not torch.allclose(given, computed, atol=1e-4, rtol=0):
        prompts = ", ".join(map(repr, encoder.templates[:2])) + (", ..." if len(encoder.templates) > 2 else "")
        yield f"the class embeddings, which are not the text tower's for {prompts} (templates= loads it with others)"


def _preprocessing(model: ZeroShotClassifier) -> Iterator[str]:
    """What differs from how open_clip would prepare images for this architecture with weights from a file."""
    usual: dict[str, Any] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    plugin, _, name = model.source.partition("@")[0].partition(":")
    if plugin == "open_clip":
        with suppress(UsageError):  # a configuration that is not there any more
            usual |= find_architecture(name).preprocess
    for statistic, value in (("mean", model.mean), ("std", model.std)):
        if not torch.allclose(value.flatten().double().cpu(), torch.tensor(usual[statistic]).double(), atol=1e-6):
            shown, expected = (tuple(round(float(v), 4) for v in part) for part in (value.flatten(), usual[statistic]))
            yield f"the channel {statistic} {shown} (open_clip's is {expected})"
    visual: Any = model.tower.visual if isinstance(model.tower, OpenClipTower) else model.tower
    size = visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if (height, width) != (model.image_size, model.image_size):
        yield f"the image size {model.image_size} (the tower's is {height} x {width})"


def read_for_export(
    spec: str, *, base: str | None = None, templates: list[str] | None = None, tower_only: bool = False
) -> ZeroShotClassifier:
    """A saved model, with its text tower unless only the image tower is wanted, for :func:`export_open_clip`.

    Args:
        spec: ``open_clip:ARCHITECTURE@FILE``.
        base: the tag or file that has the text tower; None is what the file says it was made from.
        templates: prompts of the file's class embeddings; None is the loader's own.
        tower_only: read the image tower alone; the classes then stand for nothing.

    Raises:
        UsageError: not a spec of this plugin, weights that cannot be loaded, or a head that would be lost.
    """
    plugin, _, rest = spec.partition(":")
    name, _, weights = rest.partition("@")
    if plugin != "open_clip" or not name:
        raise UsageError(f"model {spec!r} is not of the form open_clip:ARCHITECTURE@FILE; only those can be exported.")
    architecture = find_architecture(name)
    located = locate(architecture, weights or None)
    weighted = read_weights(architecture, located, None)
    clip: Any = build(architecture)
    parts = take_apart(weighted.state, clip)
    if not tower_only:
        transform = [name for name in parts.head if name.startswith("transform.")]
        refuse([f"the head's transform of class embeddings ({', '.join(transform)})"] if transform else [])
        named = None if "class_names" in located.sidecar else ("image", "photo")  # any: they are no part of a CLIP
        base = base or (None if parts.text else str(located.sidecar.get("source", "")).partition("@")[2] or None)
        return load(name, weights or None, classes=named, base=base, templates=templates)
    load_strictly(clip.visual, parts.visual or parts.clip, weighted.name)
    size = located.sidecar.get("image_size", clip.visual.image_size)
    return ZeroShotClassifier(
        OpenClipTower(clip.visual),
        torch.eye(2),
        image_size=size if isinstance(size, int) else int(size[0]),
        mean=weighted.preprocess["mean"],
        std=weighted.preprocess["std"],
        source=spec,
    )
