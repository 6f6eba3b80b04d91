"""Weights of an open_clip model: found, read, checked for their activation, and put under open_clip's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained
from torch import Tensor, nn

from clipdefense.errors import UsageError, unknown_name
from clipdefense.weights import below, load_strictly, read_checkpoint, read_sidecar
from clipdefense_openclip.activation import (
    Evidence,
    check_activation,
    evidence_of_file,
    evidence_of_tag,
    identify,
    releases,
    sibling,
)
from clipdefense_openclip.architecture import (
    CONFIG_FILE,
    HUB,
    Architecture,
    from_hub,
    read_config,
    unreachable,
    weights_beside,
)
from clipdefense_openclip.published import find_published, published_at, published_for

_VISUAL = "visual."
_NOT_WEIGHTS = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "text.transformer.embeddings.position_ids",
)


@dataclass(frozen=True)
class Located:
    """Weights that have been found but not read.

    Attributes:
        name: for messages.
        fetch: gives the file, downloading it where it must.
        sidecar: this library's own description of a local file, or empty.
        evidence: what is known of their activation beforehand.
        preprocess: mean and std, where they are known.
        trusted: a published file, recognised by its hash.
    """

    name: str
    fetch: Callable[[], Path]
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = False


class Weights(NamedTuple):
    """Weights as read.

    Attributes:
        name: for messages.
        state: as in the file.
        sidecar: this library's own description of them, or empty.
        preprocess: mean and std, where they are known.
    """

    name: str
    state: dict[str, Tensor]
    sidecar: Mapping[str, Any]
    preprocess: Mapping[str, Any]


class Parts(NamedTuple):
    """A state dict taken apart.

    Attributes:
        clip: open_clip's names.
        head: this library's class head, without the ``head.``.
    """

    clip: dict[str, Tensor]
    head: dict[str, Tensor]

    @property
    def visual(self) -> dict[str, Tensor]:
        return below(_VISUAL, self.clip)

    @property
    def text(self) -> dict[str, Tensor]:
        """Everything but the image tower; empty where there is no text tower."""
        rest = {name: v for name, v in self.clip.items() if not name.startswith(_VISUAL)}
        return rest if rest.keys() - {"logit_scale", "logit_bias"} else {}

    @property
    def scale(self) -> float | None:
        """CLIP's logit scale, as a factor."""
        stored = self.clip.get("logit_scale")
        return None if stored is None else math.exp(float(stored))


def locate(architecture: Architecture, weights: str | None, cache_dir: str | None = None) -> Located:
    """Find weights: a tag, a published name, a file, ``hf-hub:org/name``, or (None) the configuration's own.

    Raises:
        UsageError: nothing of that name.
    """
    if weights is None and architecture.hub_id is not None:
        weights = architecture.name
    if weights is None and architecture.folder is not None:
        return _local(weights_beside(architecture.folder))
    if weights is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture.name)[:8])
        raise UsageError(
            f"open_clip:{architecture.name} names no weights; put a tag ({tags or 'none is known'}) or a file behind "
            f"an @: open_clip:{architecture.name}@/path/to/weights.safetensors."
        )
    if weights.startswith(HUB):
        fetch = partial(from_hub, weights.removeprefix(HUB), None, cache_dir)
        listed = published_at(weights.removeprefix(HUB))
        if weights == architecture.name:
            evidence = None if listed is None else listed.evidence
            return Located(weights, fetch, evidence=evidence, preprocess=architecture.preprocess)
        if listed is not None:
            return Located(weights, fetch, evidence=listed.evidence)
        config, preprocess = read_config(from_hub(weights.removeprefix(HUB), CONFIG_FILE, cache_dir))
        declared = _declared(config, f"{CONFIG_FILE} of {weights}")
        return Located(weights, fetch, evidence=declared, preprocess=preprocess)
    evidence, settings = evidence_of_tag(architecture.name, weights)
    if settings:
        fetch = partial(_download, settings, cache_dir)
        return Located(repr(weights), fetch, evidence=evidence, preprocess=settings)
    path = Path(weights).expanduser()
    known = None if path.exists() else find_published(architecture.name, weights)
    if known is not None:
        fetch = partial(from_hub, known.hub, None, cache_dir)
        return Located(f"{weights!r} ({HUB}{known.hub})", fetch, evidence=known.evidence)
    if path.is_dir():
        path = weights_beside(path)
    if path.is_file():
        return _local(path)
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"weights {weights!r} do not exist (looked for {path.absolute()}).")
    tags = open_clip.list_pretrained_tags_by_model(architecture.name) + published_for(architecture.name)
    raise unknown_name(f"{architecture.name}: pretrained tag", weights, tags, "A path to a file works too.")


def _local(path: Path) -> Located:
    release, sidecar = identify(path, releases()), read_sidecar(path)
    if release is not None:
        quick = bool(release.settings.get("quick_gelu", False))
        evidence = Evidence(quick, f"its hash is that of {release.filename}, tag {release.tag!r}")
        return Located(str(path), lambda: path, sidecar, evidence, release.settings, trusted=True)
    beside = path.parent / CONFIG_FILE
    if beside.is_file():
        config, preprocess = read_config(beside)
        return Located(str(path), lambda: path, sidecar, _declared(config, str(beside)), preprocess)
    return Located(str(path), lambda: path, sidecar)


def _declared(config: Mapping[str, Any], where: str) -> Evidence:
    quick = bool(config.get("quick_gelu", False))
    return Evidence(quick, f"{where} {'says' if 'quick_gelu' in config else 'does not say'} quick_gelu", certain=False)


def _download(settings: Mapping[str, Any], cache_dir: str | None) -> Path:
    try:
        return Path(download_pretrained(dict(settings), cache_dir=cache_dir))
    except Exception as error:  # network and hub errors of many libraries
        place = settings.get("hf_hub", "").rstrip("/") or settings.get("url")
        raise unreachable(f"weights {place}", error) from error


def read_weights(architecture: Architecture, located: Located, quick_gelu: bool | None) -> Weights:
    """Check and read weights; a mismatch that can be known beforehand is found before any download.

    Raises:
        UsageError: unreadable, or trained with another activation than the architecture has.
    """
    known = located.evidence
    if known is not None and known.certain:
        check_activation(architecture.name, architecture.quick_gelu, known, quick_gelu, located.name)
    path, sidecar = located.fetch(), located.sidecar
    checkpoint = read_checkpoint(path, trusted_script=located.trusted)
    if known is None or not known.certain:
        found = evidence_of_file(path, checkpoint, sidecar)
        known = found if found is not None and (found.certain or known is None) else known
        check_activation(architecture.name, architecture.quick_gelu, known, quick_gelu, located.name)
    candidates = (sidecar, located.preprocess, architecture.preprocess, _usual_preprocess(architecture.name))
    preprocess = next(settings for settings in candidates if {"mean", "std"} <= settings.keys())
    return Weights(f"checkpoint {located.name}", checkpoint.state, sidecar, preprocess)


def _usual_preprocess(architecture: str) -> dict[str, Any]:
    """Mean and std of an architecture's tags where they all agree (SigLIP's 0.5, say), else CLIP's own."""
    named = [architecture, sibling(architecture)]
    tags = [
        evidence_of_tag(name, tag)[1] for name in named if name for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    if len({(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags}) == 1:
        return tags[0]
    return {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


def take_apart(state: Mapping[str, Tensor], model: nn.Module) -> Parts:
    """Put the entries of any of the layouts in use under open_clip's names, as they are in ``model``.

    Known are: open_clip's and OpenAI's state dicts; the image tower alone, with or without ``visual.`` (FARE, TeCoA);
    and this library's own (``tower.*``, ``head.*``).
    """
    if tower := below("tower.", state):
        return Parts({_VISUAL + name.removeprefix(_VISUAL): v for name, v in tower.items()}, below("head.", state))
    clip = dict(convert_state_dict(model, dict(state)))
    for name in _NOT_WEIGHTS:
        if name not in model.state_dict():
            clip.pop(name, None)
    visual: Any = model.visual
    if not any(name.startswith(_VISUAL) for name in clip) and clip.keys() & visual.state_dict().keys():
        clip = {_VISUAL + name: v for name, v in clip.items()}
    elif "positional_embedding" in clip and not hasattr(model, "positional_embedding"):
        clip = convert_to_custom_text_state_dict(clip)
    return Parts(clip, {})


def load_text(model: nn.Module, parts: Parts, what: str) -> None:
    """Everything but the image tower into a model whose image tower is gone."""
    own, state = model.state_dict(), dict(parts.text)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)  # a scalar, or a vector of one
    if "logit_bias" in own:
        state.setdefault(
            "logit_bias", torch.zeros_like(own["logit_bias"])
        )  # the same to all classes, it decides nothing
    load_strictly(model, state, what)
