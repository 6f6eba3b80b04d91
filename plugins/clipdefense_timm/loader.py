"""``timm:MODEL@FILE`` -> a :class:`clipdefense.ZeroShotClassifier`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from clipdefense.checks import check_class_names
from clipdefense.classifier import CLIP_MEAN, CLIP_STD, ClassEncoder, EmbeddingTable, ZeroShotClassifier
from clipdefense.errors import UsageError, unknown_name
from clipdefense.weights import (
    below,
    load_strictly,
    parse_device,
    parse_dtype,
    read_sidecar,
    read_state_dict,
    restored_transform,
    stored_classes,
)
from clipdefense_timm.anchors import read_embedding_table
from clipdefense_timm.tower import MeanCentring, TimmTower

LOGIT_SCALE = 100.0


class _Saved(NamedTuple):
    """A file of weights, taken apart.

    Attributes:
        what: its name in messages.
        sidecar: this library's own description of it, or empty.
        trunk, tower, head: the trunk's state, the rest of the tower's, the class head's; those not there are empty.
        classes: the class embeddings that it brings, if any.
    """

    what: str
    sidecar: Mapping[str, Any]
    trunk: dict[str, Tensor]
    tower: dict[str, Tensor]
    head: dict[str, Tensor]
    classes: EmbeddingTable | None


def load(
    name: str,
    weights: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    embeddings: str | ClassEncoder | None = None,
    names_key: str = "names",
    embeddings_key: str = "embeddings",
    centre: bool = False,
    projection: str | None = None,
    trunk_options: Mapping[str, Any] | None = None,
    logit_scale: float | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    transform: nn.Module | None = None,
) -> ZeroShotClassifier:
    """Load a timm trunk with a projection into the space of stored class embeddings, in eval mode.

    Args:
        name: a timm model, such as ``mobilenetv2_100``.
        weights: a model saved by this library, the weights of a :class:`TimmTower`, or those of the trunk alone.
        classes: class names; None takes those of a saved model.
        embeddings: file of class embeddings (``.npz``, safetensors) or function of names; None: a saved model's.
        names_key, embeddings_key: their keys in that file.
        centre: take class anchors relative to the mean of the whole file.
        projection: for a trunk alone, the file with ``weight`` (D, F); ``bias``, ``feature_mean``, ``feature_std``.
        trunk_options: for ``timm.create_model``, as ``{"pad_type": "same"}``; None is what the sidecar says.
        logit_scale: factor on the cosines; None is a saved model's, or 100.
        image_size, mean, std: preprocessing, in pixels and [0, 1]; None is a saved model's, or timm's for the trunk.
        device, dtype: of the tower; None is the CPU and float32.
        transform: the head's map on class embeddings; takes a saved model's weights for it.

    Raises:
        UsageError: an unknown model; weights that cannot be read or do not fit; no projection or class embeddings.
    """
    if weights is None:
        raise UsageError(f"timm:{name} names no weights; put a file behind an @: timm:{name}@/path/to/weights.pt.")
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    chosen, place = None if classes is None else check_class_names(classes), parse_device(device)
    saved = _read(weights)
    tower = _tower(name, trunk_options, saved, projection).to(dtype=parse_dtype(dtype))
    encoder = _encoder(embeddings, names_key, embeddings_key, saved)
    names = chosen or (None if saved.classes is None else saved.classes.names)
    if names is None:
        raise UsageError(f"classes is None, but {saved.what} brings no class names of its own; pass classes=[...].")
    model = ZeroShotClassifier(
        tower,
        encoder(names),
        class_names=names,
        logit_scale=next(float(s) for s in (logit_scale, saved.head.get("scale"), LOGIT_SCALE) if s is not None),
        transform=_transform(transform, centre, encoder, saved),
        class_encoder=encoder,
        source=f"timm:{name}@{weights}",
        **_preprocessing(saved.sidecar, tower.trunk, image_size=image_size, mean=mean, std=std),
    )
    return model.to(place).eval()


def _preprocessing(sidecar: Mapping[str, Any], trunk: nn.Module, **given: Any) -> dict[str, Any]:
    """Side, mean and std: the caller's, the saved model's, or timm's for this trunk."""
    usual = getattr(trunk, "pretrained_cfg", None) or {}
    side = usual.get("input_size", (3, 224, 224))[-1]
    default = {"image_size": side, "mean": usual.get("mean", CLIP_MEAN), "std": usual.get("std", CLIP_STD)}
    return {
        name: next(value for value in (given[name], sidecar.get(name), default[name]) if value is not None)
        for name in default
    }


def _read(weights: str) -> _Saved:
    """A saved model (``tower.*``, ``head.*``), a tower (``trunk.*``, ``projection.*``) or a bare trunk."""
    what, sidecar, state = f"checkpoint {weights}", read_sidecar(weights), read_state_dict(weights)
    head: dict[str, Tensor] = {}
    if tower := below("tower.", state):
        state, head = tower, below("head.", state)
    trunk = below("trunk.", state)
    rest = {name: value for name, value in state.items() if trunk and not name.startswith("trunk.")}
    stored = stored_classes(head, sidecar, what)
    return _Saved(what, sidecar, trunk or state, rest, head, None if stored is None else EmbeddingTable(*stored))


def _tower(name: str, options: Mapping[str, Any] | None, saved: _Saved, projection: str | None) -> TimmTower:
    options = dict(saved.sidecar.get("trunk_options", {}) if options is None else options)
    rest, what = saved.tower, saved.what
    if projection is not None:
        rest = {_tower_key(key): value for key, value in read_state_dict(projection).items()}
        what = f"{what} with projection {projection}"
    weight = rest.get("projection.weight")
    if weight is None or weight.dim() != 2:
        raise UsageError(
            f"{what} has no projection into the space of the class embeddings; name the file that has it with "
            "projection=, or build the model in Python with clipdefense_timm.tower.TimmTower."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            trunk = timm.create_model(name, pretrained=False, num_classes=0, **options)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias="projection.bias" in rest)
    except TypeError as error:
        raise UsageError(f"trunk_options is {options}, which timm's {name} does not take ({error}).") from error
    tower = TimmTower(trunk, linear, feature_mean=rest.get("feature_mean"), feature_std=rest.get("feature_std"))
    load_strictly(tower, _without_classifier(saved.trunk, trunk) | rest, what)
    return tower


def _tower_key(key: str) -> str:
    return key if key.startswith("feature_") else f"projection.{key}"


def _without_classifier(state: Mapping[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """The trunk's weights under the tower's names, less those of the classifier that it has not."""
    named = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    unused = tuple(f"{part}." for part in ((named,) if isinstance(named, str) else named))
    own = trunk.state_dict().keys()
    return {f"trunk.{key}": value for key, value in state.items() if key in own or not key.startswith(unused)}


def _encoder(given: str | ClassEncoder | None, names: str, embeddings: str, saved: _Saved) -> ClassEncoder:
    if isinstance(given, (str, Path)):
        return read_embedding_table(given, names=names, embeddings=embeddings)
    if given is not None:
        return given
    if saved.classes is None:
        raise UsageError(f"{saved.what} brings no class embeddings; name the file that has them with embeddings=.")
    return saved.classes


def _transform(given: nn.Module | None, centre: bool, encoder: ClassEncoder, saved: _Saved) -> nn.Module | None:
    if centre and given is not None:
        raise UsageError("centre and transform are both given; a head has one transform.")
    if centre:
        if not isinstance(encoder, EmbeddingTable):
            raise UsageError(
                "centre is True, but embeddings is a function; a stored table has the mean that is needed."
            )
        return MeanCentring(encoder.embeddings)
    centring = below("transform.", saved.head)
    if given is None and centring.keys() == {"centre"}:
        given = MeanCentring(centring["centre"][None])
    return restored_transform(given, saved.head, saved.what)
