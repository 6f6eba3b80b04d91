"""Image networks that LAAT trains from scratch towards stored text anchors; ``laat:conv4-512`` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import DropBlock2d
from torch import Tensor, nn

from clipdefense.checks import check_class_names
from clipdefense.classifier import CLIP_MEAN, CLIP_STD, ClassEncoder, EmbeddingTable, ZeroShotClassifier
from clipdefense.errors import UsageError, check_number, check_whole, unknown_name
from clipdefense.weights import (
    load_strictly,
    parse_device,
    parse_dtype,
    read_sidecar,
    read_state_dict,
    restored_transform,
    stored_classes,
)
from clipdefense_laat.expansion import AnchorExpansion, another_dimension
from clipdefense_timm.anchors import read_embedding_table
from clipdefense_timm.tower import TimmTower


class Preprocessing(NamedTuple):
    """What the images of a data set are resized to and normalised with; ``load(..., **CIFAR_FS._asdict())``."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR_FS = Preprocessing(32, (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))
MINI_IMAGENET = Preprocessing(
    80, (120.396 / 255, 115.594 / 255, 104.540 / 255), (70.682 / 255, 68.276 / 255, 72.545 / 255)
)


class _Trunk(nn.Module):
    """Blocks and global average pooling, under the names that timm gives the parts of a network."""

    num_classes = 0

    def __init__(self, blocks: Sequence[nn.Module], num_features: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.num_features = num_features

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> the final map (N, F, S / 16, S / 16)."""
        if min(images.shape[-2:]) < 16:
            raise UsageError(f"images are {tuple(images.shape[-2:])} pixels; four halvings need at least 16.")
        features: Tensor = self.blocks(images)
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class Conv4(_Trunk):
    """Conv4: four times 3 x 3 convolution, BatchNorm, ReLU, 2 x 2 max-pooling; then the average, (N, width)."""

    def __init__(self, width: int = 512) -> None:
        super().__init__([_conv_block(3 if k == 0 else width, width) for k in range(4)], width)


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


class ResNet12(_Trunk):
    """ResNet-12: four residual blocks of three convolutions and 2 x 2 max-pooling; then the average, (N, widths[-1]).

    LeakyReLU(0.1), a 1 x 1 convolution with BatchNorm on each shortcut. The weights are drawn as in He et al. (fan
    out), as is usual for this network.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 160, 320, 640), *, drop_rate: float = 0.0, drop_size: int = 2
    ) -> None:
        """
        Args:
            widths: channels of the four blocks.
            drop_rate: share of the last two blocks' outputs that DropBlock (Ghiasi et al., NeurIPS 2018, arXiv
                1810.12890) zeroes in train mode, in each channel by itself, from the first step on; 0 as published.
            drop_size: side of the squares that it drops: 2 on CIFAR-FS, 5 on miniImageNet.

        Raises:
            UsageError: a rate outside [0, 1), a size below 1.
        """
        check_number("drop_rate", drop_rate, 0, 1, open_high=True)
        check_whole("drop_size", drop_size, 1)
        rates = [drop_rate if number >= len(widths) - 2 else 0.0 for number in range(len(widths))]
        blocks = [_Residual(i, o, rate, drop_size) for i, o, rate in zip((3, *widths), widths, rates)]
        super().__init__(blocks, widths[-1])
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, drop_rate: float, drop_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed(inputs, outputs, 3),
            nn.LeakyReLU(0.1),
            *_normed(outputs, outputs, 3),
            nn.LeakyReLU(0.1),
            *_normed(outputs, outputs, 3),
        )
        self.shortcut = nn.Sequential(*_normed(inputs, outputs, 1))
        drop = DropBlock2d(drop_rate, drop_size, couple_channels=False)
        self.after = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2), drop)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.after(self.body(x) + self.shortcut(x))
        return pooled


def _normed(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)


TRUNKS: dict[str, Callable[..., nn.Module]] = {"conv4-512": Conv4, "resnet12": ResNet12}


def make_tower(name: str, dim: int, *, seed: int = 0, **trunk_options: Any) -> TimmTower:
    """An untrained network with a bias-free linear map to the anchors' space, which gives its features signs.

    Args:
        name: ``"conv4-512"``, ``"resnet12"`` or any timm model.
        dim: D, the anchors' dimension.
        seed: of the weights; the global generator is left alone.
        trunk_options: of the network (``width``; or ``widths``, ``drop_rate`` and ``drop_size``), or of
            ``timm.create_model``.

    Returns:
        A tower of clipdefense_timm: embeddings and, of each cell of the final map, tokens.

    Raises:
        UsageError: an unknown network, or options that it does not take.
    """
    if name not in TRUNKS and not timm.is_model(name):
        raise unknown_name("network", name, [*TRUNKS, *timm.list_models()])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            if name in TRUNKS:
                trunk = TRUNKS[name](**trunk_options)
            else:
                trunk = timm.create_model(name, pretrained=False, num_classes=0, **trunk_options)
        except TypeError as error:
            raise UsageError(f"trunk_options is {trunk_options}, which {name} does not take ({error}).") from error
        width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
        return TimmTower(trunk, nn.Linear(width, dim, bias=False))


def load(
    name: str,
    weights: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    embeddings: str | ClassEncoder | None = None,
    names_key: str = "names",
    embeddings_key: str = "embeddings",
    tau: float | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trunk_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> ZeroShotClassifier:
    """``laat:NETWORK`` is untrained, ``laat:NETWORK@FILE`` a model saved by this library, with its expansion.

    Args:
        name: see :func:`make_tower`.
        weights: a saved model's file.
        classes: class names; None takes a saved model's. Its expansion, that of its training classes, applies to any.
        embeddings: file of class embeddings (``.npz``, safetensors) or function of names; None: a saved model's.
        names_key, embeddings_key: their keys in that file.
        tau: temperature of the head; None is a saved model's, or 1.
        image_size, mean, std: preprocessing, in pixels and [0, 1]; None is a saved model's, or timm's, or that of
            CIFAR-FS for the two networks of the paper.
        trunk_options, seed: see :func:`make_tower`; None is what the sidecar says.
        device, dtype: of the tower; None is the CPU and float32.

    Raises:
        UsageError: an unknown network; no class names or embeddings, or of another dimension than a saved tower's; a
            file that cannot be read or does not fit; a tau of 0 or below.
    """
    chosen, place = None if classes is None else check_class_names(classes), parse_device(device)
    if tau is not None and not tau > 0:
        raise UsageError(f"tau is {tau!r}; a number above 0 is expected.")
    saved = _read(name, weights)
    encoder = _encoder(embeddings, names_key, embeddings_key, saved)
    names = chosen or saved.names()
    anchors = encoder(names)
    options = dict(saved.sidecar.get("trunk_options", {}) if trunk_options is None else trunk_options)
    tower = make_tower(name, anchors.shape[1], seed=seed, **options)
    if saved.tower:
        _check_projection(saved, anchors.shape[1])
        load_strictly(tower, saved.tower, saved.what)
    fitted = AnchorExpansion.identity(anchors.shape[1]) if "transform.m" in saved.head else None
    model = ZeroShotClassifier(
        tower.to(dtype=parse_dtype(dtype)),
        anchors,
        class_names=names,
        logit_scale=1 / tau if tau is not None else float(saved.head.get("scale", 1.0)),
        transform=restored_transform(fitted, saved.head, saved.what),
        class_encoder=encoder,
        source=f"laat:{name}" + (f"@{weights}" if weights else ""),
        **_preprocessing(name, saved.sidecar, tower.trunk, image_size=image_size, mean=mean, std=std),
    )
    return model.to(place).eval()


class _Saved(NamedTuple):
    """A saved model, taken apart; all empty for an untrained one."""

    what: str
    sidecar: Mapping[str, Any]
    tower: dict[str, Tensor]
    head: dict[str, Tensor]
    classes: EmbeddingTable | None

    def names(self) -> tuple[str, ...]:
        if self.classes is None:
            raise UsageError(f"classes is None, but {self.what} brings no class names of its own; pass classes=[...].")
        return self.classes.names


def _read(name: str, weights: str | None) -> _Saved:
    if weights is None:
        return _Saved(f"laat:{name}", {}, {}, {}, None)
    what, sidecar, state = f"checkpoint {weights}", read_sidecar(weights), read_state_dict(weights)
    tower, head = _below("tower.", state), _below("head.", state)
    if not tower:
        raise UsageError(f"{what} is not a model saved by this library: it has no tower.* entries.")
    stored = stored_classes(head, sidecar, what)
    return _Saved(what, sidecar, tower, head, None if stored is None else EmbeddingTable(*stored))


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _encoder(given: str | ClassEncoder | None, names: str, embeddings: str, saved: _Saved) -> ClassEncoder:
    if isinstance(given, (str, Path)):
        return read_embedding_table(given, names=names, embeddings=embeddings)
    if given is not None:
        return given
    if saved.classes is None:
        raise UsageError(f"{saved.what} brings no class embeddings; name the file that has them with embeddings=.")
    return saved.classes


def _preprocessing(name: str, sidecar: Mapping[str, Any], trunk: nn.Module, **given: Any) -> dict[str, Any]:
    """Side, mean and std: the caller's, the saved model's, or the network's usual ones."""
    default: Mapping[str, Any] = CIFAR_FS._asdict()
    if name not in TRUNKS:
        usual: Any = getattr(trunk, "pretrained_cfg", None) or {}
        side = usual.get("input_size", (3, 224, 224))[-1]
        default = {"image_size": side, "mean": usual.get("mean", CLIP_MEAN), "std": usual.get("std", CLIP_STD)}
    return {
        key: next(value for value in (given[key], sidecar.get(key), default[key]) if value is not None)
        for key in default
    }


def _check_projection(saved: _Saved, dim: int) -> None:
    weight = saved.tower.get("projection.weight")
    if weight is not None and weight.dim() == 2 and len(weight) != dim:
        raise another_dimension(dim, len(weight), saved.what)
