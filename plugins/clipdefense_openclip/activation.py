"""QuickGELU: which activation weights were trained with, as far as it can be known, and whether the model has it.

OpenAI's weights, and everything fine-tuned from them, need QuickGELU; with GELU they load without a complaint and give
embeddings that are slightly wrong. open_clip has both under two names (``ViT-B-32-quickgelu``, ``ViT-B-32``) and only
warns, and for local files not even that. Here a mismatch is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained

from clipdefense.errors import UsageError
from clipdefense.weights import Checkpoint, is_torchscript

SUFFIX = "-quickgelu"
# Entries that only the state dict of OpenAI's own archives has.
_OPENAI_ENTRIES = frozenset({"input_resolution", "context_length", "vocab_size"})


@dataclass(frozen=True)
class Evidence:
    """What is known of the weights' activation.

    Attributes:
        quick_gelu: they were trained with QuickGELU.
        why: how that is known, as the rest of a sentence that begins with "because".
        certain: False where only a name suggests it; a caller's ``quick_gelu=`` then decides.
    """

    quick_gelu: bool
    why: str
    certain: bool = True


@dataclass(frozen=True)
class Release:
    """A published checkpoint file: its name, the beginning of its SHA-256, and open_clip's entry for it."""

    filename: str
    digest: str
    tag: str
    settings: Mapping[str, Any]


def sibling(architecture: str) -> str | None:
    """The same architecture with the other activation, where open_clip has one."""
    other = architecture.removesuffix(SUFFIX) if architecture.endswith(SUFFIX) else architecture + SUFFIX
    return other if other in open_clip.list_models() else None


def evidence_of_tag(architecture: str, tag: str) -> tuple[Evidence | None, dict[str, Any]]:
    """What open_clip's table says of a tag, looked up for both activations; ({} where it is no tag of either)."""
    other = sibling(architecture)
    settings = get_pretrained_cfg(architecture, tag) or (get_pretrained_cfg(other, tag) if other else {})
    if not settings or ("quick_gelu" not in settings and other is None):
        return None, settings
    quick = bool(settings.get("quick_gelu", False))
    return Evidence(quick, f"open_clip's tag {tag!r} was trained {_with(quick)}"), settings


@cache
def releases() -> tuple[Release, ...]:
    """Files whose SHA-256 is part of the address at which open_clip's table finds them."""
    found: dict[str, Release] = {}
    for architecture, tag in list_pretrained():
        settings = get_pretrained_cfg(architecture, tag)
        parts = settings.get("url", "").split("/")
        if "openaipublic" in settings.get("url", ""):
            digest = parts[-2]
        elif "mlfoundations" in settings.get("url", ""):
            digest = Path(parts[-1]).stem.split("-")[-1]
        else:
            continue
        found.setdefault(parts[-1], Release(parts[-1], digest, tag, settings))
    return tuple(found.values())


def identify(path: Path, known: Iterable[Release]) -> Release | None:
    """The release that a local file is, byte for byte; hashes only files of a known name and TorchScript archives."""
    candidates = list(known)
    if path.name not in {release.filename for release in candidates} and not is_torchscript(path):
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next((release for release in candidates if digest.startswith(release.digest)), None)


def evidence_of_file(path: Path, checkpoint: Checkpoint, sidecar: Mapping[str, Any]) -> Evidence | None:
    """What a local file tells of its activation: our own description, OpenAI's or TeCoA's layout, its name."""
    source = str(sidecar.get("source", "")).removeprefix("open_clip:").partition("@")[0]
    if source in open_clip.list_models():
        quick = bool((open_clip.get_model_config(source) or {}).get("quick_gelu", False))
        return Evidence(quick, f"{path}.json says that they come from {source}, which has {_name(quick)}")
    if checkpoint.state.keys() >= _OPENAI_ENTRIES:
        return Evidence(True, f"{path} has the entries {', '.join(sorted(_OPENAI_ENTRIES))} of OpenAI's archives")
    if checkpoint.container == "vision_encoder_state_dict":
        return Evidence(True, f"{path} is a TeCoA-style checkpoint, fine-tuned from OpenAI's weights")
    hub_folders = [part for part in path.parts if part.startswith("models--")]
    if any("openai" in part.lower() for part in (path.name, *hub_folders)):
        return Evidence(True, f"the name of {path} says OpenAI", certain=False)
    return None


def check_activation(
    architecture: str, built: bool, evidence: Evidence | None, confirmed: bool | None, weights: str
) -> None:
    """Require that the model's activation is the weights'.

    Args:
        architecture: as the user named it.
        built: the architecture has QuickGELU.
        evidence: what is known of the weights.
        confirmed: what the caller says of the weights (``quick_gelu=``), or None.
        weights: as the user named them.

    Raises:
        UsageError: a mismatch, naming the right architecture; or plain GELU where nothing is known and a QuickGELU
            twin exists, so that either may be meant.
    """
    if confirmed is not None and evidence is not None and evidence.certain and confirmed != evidence.quick_gelu:
        raise UsageError(f"quick_gelu is {confirmed}, but {evidence.why}; leave quick_gelu= out.")
    why = "quick_gelu= says so"
    wanted = confirmed
    if wanted is None and evidence is not None:
        wanted, why = evidence.quick_gelu, evidence.why
    other = sibling(architecture)
    if wanted is None and not built and other is not None:
        raise UsageError(
            f"it cannot be told whether the weights {weights} were trained with QuickGELU (OpenAI's, and all that are "
            f"fine-tuned from them, were); use {other} if so, or confirm {architecture}'s plain GELU with "
            "quick_gelu=False."
        )
    if wanted is not None and wanted != built:
        right = f"use {other}" if other else f'set "quick_gelu": {str(wanted).lower()} in the model\'s configuration'
        override = "" if evidence is None or evidence.certain else f", or pass quick_gelu={built} if the name misleads"
        raise UsageError(
            f"{architecture} has {_name(built)}, but the weights {weights} need {_name(wanted)}: {why}; "
            f"{right}{override}."
        )


def _name(quick: bool) -> str:
    return "QuickGELU" if quick else "plain GELU"


def _with(quick: bool) -> str:
    return f"with {_name(quick)}"
