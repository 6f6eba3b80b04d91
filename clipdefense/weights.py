"""Tensors written whole, and checkpoints read safely: never arbitrary pickles."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdefense.errors import UsageError, unknown_name
from clipdefense.files import write_atomically

# Where training scripts put the weights inside a checkpoint; the first that is there is taken.
CONTAINERS = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 8


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        state: parameter name -> tensor, on the CPU, without the prefixes of wrappers.
        container: the entry of :data:`CONTAINERS` that it was under, or ``""``.
    """

    state: dict[str, Tensor]
    container: str = ""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; see :func:`read_checkpoint`."""
    return read_checkpoint(path).state


def read_checkpoint(path: str | Path, *, trusted_script: bool = False) -> Checkpoint:
    """Read the weights in a file, on the CPU.

    Args:
        path: a safetensors file, or one that loads with ``torch.load(weights_only=True)``: a state dict, or a
            dictionary with one under a name of :data:`CONTAINERS`.
        trusted_script: the file is known to be one that may be opened with ``torch.jit.load``.

    Raises:
        UsageError: no such file; truncated; a pickle of Python objects, or TorchScript; no tensors in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"checkpoint {str(path)!r} {what}; a file is expected (looked for {file.absolute()}).")
    if _is_safetensors(file):
        content: Any = _read_safetensors(file)
    elif is_torchscript(file):
        content = _read_torchscript(file, trusted_script)
    else:
        content = _read_torch(file)
    return _find_state(content, file)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """``module.load_state_dict(state)`` where every name and shape fits.

    Args:
        module: takes the weights, in its own dtype.
        state: the weights.
        what: the weights' name in the message, such as ``"checkpoint model.safetensors"``.

    Raises:
        UsageError: names or shapes that do not fit, listed up to eight, with their number.
    """
    own = module.state_dict()
    problems = {
        "of another shape": [
            f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
        # BatchNorm's step counter is not a weight, and older checkpoints lack it
        "missing": [f"{n} is missing" for n in own if n not in state and not n.endswith("num_batches_tracked")],
        "unknown": [f"{name} is not in the model" for name in state if name not in own],
    }
    listed = [problem for found in problems.values() for problem in found]
    if listed:
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in problems.items() if found)
        more = f"; and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise UsageError(
            f"{what} does not fit {type(module).__name__}: {len(listed)} of {len(own.keys() | state.keys())} entries "
            f"do not match ({counts}): {'; '.join(listed[:_SHOWN])}{more}. Are they of another architecture?"
        )
    module.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """The JSON description next to a model file, ``<file>.json``; empty where there is none.

    Raises:
        UsageError: it is not JSON, or of a version that this library does not know.
    """
    sidecar = Path(f"{Path(path).expanduser()}.json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{sidecar}, which describes the weights next to it, is not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != "clipdefense-model":
        return {}
    if content.get("version") != 1:
        raise UsageError(f"{sidecar} has version {content.get('version')!r}; 1 is known; update clipdefense.")
    return content


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with the prefix, such as ``"head."``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def stored_classes(
    head: Mapping[str, Tensor], sidecar: Mapping[str, Any], what: str
) -> tuple[list[str], Tensor] | None:
    """The class names and embeddings (C, D) that a model saved by this library brings; None for other weights.

    Args:
        head: the state of its class head.
        sidecar: its description.
        what: the weights' name in the message.

    Raises:
        UsageError: another number of names than embeddings.
    """
    if "embeddings" not in head or "class_names" not in sidecar:
        return None
    names, embeddings = [str(name) for name in sidecar["class_names"]], head["embeddings"]
    if len(names) != len(embeddings):
        raise UsageError(
            f"{what} has {len(embeddings)} class embeddings, but its description has {len(names)} names; they do not "
            "belong together."
        )
    return names, embeddings


def restored_transform(transform: nn.Module | None, head: Mapping[str, Tensor], what: str) -> nn.Module | None:
    """The caller's transform with the weights that a saved head has for it.

    Raises:
        UsageError: the head has a transform and the caller gave none, or one that they do not fit.
    """
    prefix = "transform."
    state = below(prefix, head)
    if state and transform is None:
        raise UsageError(
            f"{what} has a class head with a transform ({', '.join(state)}); pass transform=, a module of that kind, "
            "which then takes these weights."
        )
    if state and transform is not None:
        load_strictly(transform, state, f"{what} (transform)")
    return transform


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """``"bfloat16"``, ``torch.bfloat16`` or None (float32) as a dtype.

    Raises:
        UsageError: not a floating dtype.
    """
    known = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
    if dtype is None:
        return torch.float32
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise unknown_name("dtype", str(dtype), known)
    return found


def parse_device(device: str | torch.device | None) -> torch.device:
    """``"cuda:1"``, a device, or None (the CPU) as a device that is there.

    Raises:
        UsageError: no such device here.
    """
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device is {str(device)!r}, which cannot be used here ({reason}); 'cpu' always can."
        ) from error


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive (as OpenAI's downloads are) and not a plain checkpoint."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"checkpoint {path} is truncated or not a safetensors file ({error}).") from error


def _read_torchscript(path: Path, trusted: bool) -> Any:
    if not trusted:
        raise UsageError(
            f"checkpoint {path} is a TorchScript archive, which holds a program besides the weights and is not opened. "
            "If you trust it, convert it once: "
            "safetensors.torch.save_file(torch.jit.load(PATH, 'cpu').state_dict(), 'weights.safetensors')."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; the errors below say more
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises anything for bytes that are no checkpoint
        with path.open("rb") as file:
            is_pickle = file.read(1) in (b"P", b"\x80")  # a zip archive with one, or one by itself
        if is_pickle and isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            culprit = re.search(r"GLOBAL (\S+)", str(error))
            raise UsageError(
                f"checkpoint {path} is a pickle with Python objects{f' ({culprit[1]})' if culprit else ''}, which may "
                "run code and is not opened. If you trust it, convert it once: content = torch.load(PATH, "
                "weights_only=False); torch.save(dict(content['state_dict']), 'weights.pt')."
            ) from error
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UsageError(
            f"checkpoint {path} cannot be read: it is truncated or not a checkpoint ({type(error).__name__}: {reason})."
        ) from error


def _find_state(content: Any, path: Path) -> Checkpoint:
    container = ""
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        container = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), "")
        content = content.get(container, content)
    state = {}
    if isinstance(content, Mapping):
        state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        held = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise UsageError(
            f"checkpoint {path} holds no state dict: {held or 'nothing'}; tensors by parameter name are expected, at "
            f"the top or under {', '.join(CONTAINERS)}."
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Checkpoint(state, container)


def sha256_of_weights(model: nn.Module) -> str:
    """A hash over names, shapes, dtypes and bytes of every parameter and buffer of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically; the tensors may lie on any device and be views.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(owned, temporary, dict(metadata))
        except SafetensorError as error:  # what its own writer makes of a full disk
            raise OSError(str(error)) from error

    write_atomically(path, write)
