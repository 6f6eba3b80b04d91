"""An open_clip model's configuration, from its name, a file, a folder or the hub; and the model it describes."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from clipdefense.errors import MissingPackageError, UsageError, unknown_name

HUB = "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
_WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Architecture:
    """A model configuration.

    Attributes:
        name: as the user gave it, or open_clip's own spelling.
        config: what open_clip calls ``model_cfg``.
        preprocess: what it calls ``preprocess_cfg``; empty for built-in names.
        folder: where configuration and tokenizer lie, for local ones.
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config.get("quick_gelu", False))

    @property
    def hub_id(self) -> str | None:
        return self.name.removeprefix(HUB) if self.name.startswith(HUB) else None


def find_architecture(name: str, cache_dir: str | None = None) -> Architecture:
    """The configuration behind a name: built-in, ``hf-hub:org/name``, a JSON file, or a folder with one.

    Raises:
        UsageError: an unknown name, a hub that cannot be reached, or a file that is no configuration.
    """
    if name.startswith(HUB):
        file = from_hub(name.removeprefix(HUB), CONFIG_FILE, cache_dir)
        config, preprocess = read_config(file)
        return Architecture(name, config, preprocess)
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        file = path / CONFIG_FILE if path.is_dir() else path
        config, preprocess = read_config(file)
        return Architecture(name, config, preprocess, file.parent)
    known = name.replace("/", "-")
    if known not in open_clip.list_models():
        advice = f"A local model is named by its CONFIG.json or its folder, one on the hub by {HUB}org/name."
        raise unknown_name("open_clip architecture", name, open_clip.list_models(), advice)
    return Architecture(known, open_clip.get_model_config(known))


def read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model_cfg`` and ``preprocess_cfg`` of an ``open_clip_config.json``, or of a bare model configuration.

    Raises:
        UsageError: no such file, or not a configuration.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"model configuration {file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UsageError(f"model configuration {file} is not JSON ({error}).") from error
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise UsageError(f"model configuration {file} lacks {', '.join(missing)}; an open_clip one has them all.")
    return dict(config), dict(content.get("preprocess_cfg", {}))


def weights_beside(folder: Path) -> Path:
    """The weights that lie in a model folder.

    Raises:
        UsageError: there are none, or several of which none has one of the usual names.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(others) == 1:
        return others[0]
    found = ", ".join(file.name for file in others) or "none"
    raise UsageError(f"folder {folder} should hold one file of weights; found: {found}; name it behind the @.")


def from_hub(model_id: str, filename: str | None, cache_dir: str | None) -> Path:
    """A file of a model on the Hugging Face hub (None: its weights), from the cache where it is there.

    Raises:
        UsageError: it is not there, or cannot be reached.
    """
    try:
        return Path(download_pretrained_from_hf(model_id, filename=filename, cache_dir=cache_dir))
    except Exception as error:  # network and hub errors of many libraries
        raise unreachable(f"{filename or 'the weights'} of {HUB}{model_id}", error) from error


def unreachable(what: str, error: Exception) -> UsageError:
    """The error for something that the network did not give."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = textwrap.shorten(reason, 160, placeholder=" ...")
    return UsageError(
        f"{what} could not be downloaded ({reason}); without a network, give a file instead: "
        "open_clip:ARCHITECTURE@/path/to/weights.safetensors."
    )


def build(architecture: Architecture) -> nn.Module:
    """The open_clip model with random weights, on the CPU, in float32; the caller's random state is untouched.

    Raises:
        UsageError: the configuration does not describe a model, or needs what is not installed.
    """
    config = copy.deepcopy(dict(architecture.config))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    cls = (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    try:
        with torch.random.fork_rng(devices=[]):
            return cls(**config)
    except (TypeError, AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"{architecture.name} is not a configuration that open_clip builds: {error}.") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise _needs(architecture, text.get("hf_model_name", "its text tower"), error) from error


def tokenizer(architecture: Architecture) -> Callable[[list[str]], Tensor]:
    """The tokenizer that belongs to the model.

    Raises:
        UsageError: it needs a package or files that are not there.
    """
    text = architecture.config["text_cfg"]
    named = text.get("hf_tokenizer_name")
    options = dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", 77)
    try:
        if architecture.folder is None:
            return open_clip.get_tokenizer(architecture.name)
        if named:
            place = architecture.folder if (architecture.folder / "tokenizer_config.json").is_file() else named
            mode = text.get("tokenizer_mode")
            return HFTokenizer(str(place), context_length=length, tokenizer_mode=mode, **options)
        return SimpleTokenizer(context_length=length, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise _needs(architecture, named or "its tokenizer", error) from error


def _needs(architecture: Architecture, what: str, error: Exception) -> UsageError:
    if isinstance(error, ImportError) or "pip install transformers" in str(error):
        return MissingPackageError(f"{architecture.name} needs transformers for {what}: pip install transformers")
    return unreachable(f"{what} of {architecture.name}", error)
