"""``open_clip:ARCHITECTURE@WEIGHTS`` -> a :class:`clipdefense.ZeroShotClassifier`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipdefense.checks import check_class_names
from clipdefense.classifier import ClassEncoder, EmbeddingTable, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.weights import load_strictly, parse_device, parse_dtype, restored_transform, stored_classes
from clipdefense_openclip.architecture import Architecture, build, find_architecture, tokenizer
from clipdefense_openclip.checkpoint import Parts, Weights, load_text, locate, read_weights, take_apart
from clipdefense_openclip.text import TEMPLATES, TextEncoder, check_templates
from clipdefense_openclip.tower import OpenClipTower


@dataclass(frozen=True)
class _Request:
    """What the caller asked for, checked."""

    architecture: Architecture
    names: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    device: torch.device
    dtype: torch.dtype
    quick_gelu: bool | None
    base: str | None
    class_encoder: ClassEncoder | None
    logit_scale: float | None
    transform: nn.Module | None
    cache_dir: str | None


def load(
    name: str,
    weights: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quick_gelu: bool | None = None,
    base: str | None = None,
    class_encoder: ClassEncoder | None = None,
    logit_scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    transform: nn.Module | None = None,
    cache_dir: str | None = None,
) -> ZeroShotClassifier:
    """Load any open_clip model as a zero-shot classifier, in eval mode.

    Args:
        name: an open_clip architecture (``ViT-B-32-quickgelu``), ``hf-hub:org/name``, an open_clip ``CONFIG.json``, or
            a folder with ``open_clip_config.json``.
        weights: a tag, a published robust checkpoint (``fare2``), a file (a whole CLIP, an image tower alone, or a
            model saved by this library), or ``hf-hub:org/name``; None takes what lies with the configuration.
        classes: class names; None takes those of a model saved by this library.
        templates: prompts with ``{}`` for the class name; None is ``"a photo of a {}."``.
        device: of the tower and the text tower; None is the CPU.
        dtype: of the tower, such as ``"bfloat16"``; None is float32. Class embeddings are computed in float32.
        quick_gelu: confirms which activation a local file was trained with, where that cannot be known.
        base: for weights of an image tower alone, the tag or file that has the text tower to it (``"openai"``).
        class_encoder: class names -> embeddings, instead of the text tower.
        logit_scale: factor on the cosines; None is that of the weights.
        mean, std: channel statistics; None is those of the weights.
        transform: the head's map on class embeddings; takes the weights of one that a saved model has.
        cache_dir: where the hub's files are kept; None is the hub's own choice.

    Raises:
        UsageError: an unknown name or tag; QuickGELU where the weights need GELU, or the reverse; a checkpoint that
            cannot be read or does not fit; no class names; a hub that cannot be reached.
    """
    request = _Request(
        architecture=find_architecture(name, cache_dir),
        names=None if classes is None else check_class_names(classes),
        templates=None if templates is None else check_templates(templates),
        device=parse_device(device),
        dtype=parse_dtype(dtype),
        quick_gelu=quick_gelu,
        base=base,
        class_encoder=class_encoder,
        logit_scale=logit_scale,
        transform=transform,
        cache_dir=cache_dir,
    )
    located = locate(request.architecture, weights, cache_dir)
    if request.names is None and "class_names" not in located.sidecar:
        raise UsageError(f"classes is None, but {located.name} brings no class names of its own; pass classes=[...].")
    weighted = read_weights(request.architecture, located, quick_gelu)
    model = _assemble(request, weighted, mean or weighted.preprocess["mean"], std or weighted.preprocess["std"])
    model.source = f"open_clip:{name}" + (f"@{weights}" if weights else "")
    return model.to(request.device).eval()


def _assemble(request: _Request, weights: Weights, mean: Sequence[float], std: Sequence[float]) -> ZeroShotClassifier:
    clip = build(request.architecture)
    visual = clip.visual
    assert isinstance(visual, nn.Module)
    parts = take_apart(weights.state, clip)
    load_strictly(visual, parts.visual or parts.clip, weights.name)
    saved = stored_classes(parts.head, weights.sidecar, weights.name)
    stored = None if saved is None else EmbeddingTable(*saved)
    names = request.names or (None if stored is None else stored.names)
    if names is None:
        raise UsageError(
            f"classes is None, but {weights.name} brings no class embeddings of its own; pass classes=[...]."
        )
    keep = stored is not None and request.class_encoder is None and request.templates is None
    if stored is not None and keep and set(names) <= set(stored.names):
        embeddings = stored(names)
        encoder, scale = _class_encoder(request, clip, parts, weights, stored)
    else:
        encoder, scale = _class_encoder(request, clip, parts, weights)
        embeddings = encoder(names)
    return ZeroShotClassifier(
        OpenClipTower(visual).to(dtype=request.dtype),
        embeddings,
        class_names=names,
        logit_scale=_logit_scale(request.logit_scale, parts, scale, weights),
        image_size=_image_size(visual, weights, request.architecture.name),
        mean=mean,
        std=std,
        transform=restored_transform(request.transform, parts.head, weights.name),
        class_encoder=encoder,
    )


def _class_encoder(
    request: _Request, clip: nn.Module, parts: Parts, weights: Weights, stored: EmbeddingTable | None = None
) -> tuple[ClassEncoder, float | None]:
    """Names -> embeddings, and the logit scale of the weights it comes from.

    In this order: the caller's own; the text tower of the weights; stored embeddings, where they are all that is
    asked for; the text tower of ``base``, or of what a saved model says it was made from.
    """
    if request.class_encoder is not None:
        return request.class_encoder, None
    base = request.base
    if not parts.text and stored is not None and base is None:
        return stored, None
    seen: set[str] = set()
    while not parts.text:
        base = base or str(weights.sidecar.get("source", "")).partition("@")[2]
        if not base or base in seen:
            raise UsageError(
                f"{weights.name} holds no text tower, which the class names need; name the weights that have it with "
                "base=, such as base='openai', or pass class_encoder=, names -> embeddings."
            )
        seen.add(base)
        located = locate(request.architecture, base, request.cache_dir)
        weights = read_weights(request.architecture, located, request.quick_gelu)
        parts, base = take_apart(weights.state, clip), None
    del clip.visual
    load_text(clip, parts, weights.name)
    templates = request.templates or TEMPLATES
    return TextEncoder(clip.to(request.device), tokenizer(request.architecture), templates), parts.scale


def _logit_scale(given: float | None, parts: Parts, of_base: float | None, weights: Weights) -> float:
    own = parts.head.get("scale")
    for scale in (given, own, parts.scale, weights.sidecar.get("logit_scale"), of_base):
        if scale is not None:
            return float(scale)
    raise UsageError(f"{weights.name} holds no logit scale; pass logit_scale=, which is 100 for OpenAI's weights.")


def _image_size(visual: nn.Module, weights: Weights, architecture: str) -> int:
    size: Any = weights.sidecar.get("image_size", visual.image_size)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise UsageError(f"{architecture} takes images of {height} x {width} pixels; a square is expected.")
    return int(height)
