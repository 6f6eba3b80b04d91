"""Which parameters train, and the modes and flags of a model while they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from clipdefense.attacks.context import gradients_kept, modes_kept, set_modes
from clipdefense.errors import UsageError
from clipdefense.training.config import check_selection

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier

# Names under which towers keep their last projection; open_clip's ViT: proj, ResNet: attnpool, timm: head or fc.
_HEADS = ("proj", "projection", "head", "attnpool", "fc", "classifier")


def select_parameters(tower: nn.Module, train: str = "tower") -> list[nn.Parameter]:
    """The tower's parameters that a selection names.

    Args:
        tower: any image tower.
        train: ``"tower"``, ``"last_blocks:k"``, ``"layernorm"`` or ``"head"``, as in :class:`TrainingConfig`.

    Returns:
        Parameters in the tower's own order, each once.

    Raises:
        UsageError: an unknown selection, or one that this tower has nothing of.
    """
    kind, count = check_selection(train)
    if kind == "tower":
        chosen = list(tower.parameters())
    elif kind == "layernorm":
        chosen = [weight for part in tower.modules() if isinstance(part, nn.LayerNorm) for weight in part.parameters()]
    elif kind == "head":
        chosen = _head(tower)
    else:
        chosen = _last_blocks(tower, count)
    if not chosen:
        raise UsageError(
            f"train is {train!r}, but the tower {type(tower).__name__} has none of it; train='tower' takes all of it, "
            "or override trainable_parameters() of the defence."
        )
    names = {id(weight) for weight in chosen}
    return [weight for weight in tower.parameters() if id(weight) in names]


def _head(tower: nn.Module) -> list[nn.Parameter]:
    """The last projection: the shallowest attribute that bears a name of :data:`_HEADS` and holds parameters."""
    level = [tower]
    while level:
        for part in level:
            for name in _HEADS:
                value = getattr(part, name, None)
                if isinstance(value, nn.Parameter):
                    return [value]
                if isinstance(value, nn.Module) and (weights := list(value.parameters())):
                    return weights
        level = [child for part in level for child in part.children()]
    return []


def _last_blocks(tower: nn.Module, count: int) -> list[nn.Parameter]:
    """The last ``count`` blocks of the tower's main sequence, what is registered after it, and the projection."""
    lists = [(name, part) for name, part in tower.named_modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in lists}
    largest = max(sizes.values(), default=0)
    # the innermost sequence that still holds most of the weights: the blocks, not a wrapper around them
    found = [(name, part) for name, part in lists if len(part) > 1 and 2 * sizes[name] > largest]
    if not found:
        return []
    path, blocks = max(found, key=lambda pair: pair[0].count("."))
    if count > len(blocks):
        raise UsageError(f"train is 'last_blocks:{count}', but the tower has {len(blocks)} blocks.")
    chosen = [weight for block in list(blocks)[len(blocks) - count :] for weight in block.parameters()]
    parent = tower
    for name in path.split("."):
        children = list(parent.named_children())
        place = [child for child, _ in children].index(name)
        chosen += [weight for _, child in children[place + 1 :] for weight in child.parameters()]
        parent = children[place][1]
    return chosen + _head(tower)


def all_used(model: ZeroShotClassifier, weights: Sequence[nn.Parameter]) -> bool:
    """Whether every one of the weights, which require gradients, has a part in the model's embeddings.

    Towers bring along layers that they do not use, such as a pooler; processes that share a gradient must know.
    """
    side = model.image_size
    blank = torch.zeros(1, model.mean.numel(), side, side, device=model.device)
    with modes_kept(model):
        set_modes(model, False)  # batch statistics of one image are none
        gradients = torch.autograd.grad(model.embed(blank).sum(), list(weights), allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def train_mode(module: nn.Module) -> None:
    """Train mode where something trains, eval mode where all parameters are frozen.

    A frozen BatchNorm keeps its statistics and a frozen block its determinism; a part without parameters (dropout,
    an activation) follows the part it belongs to.
    """
    module.training = any(weight.requires_grad for weight in module.parameters())
    for part in module.children():
        if any(True for _ in part.parameters()):
            train_mode(part)
        else:
            for inner in part.modules():
                inner.training = module.training


@contextmanager
def training_only(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only ``weights`` require gradients, from none; every flag, mode and ``.grad`` is afterwards what it was."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    chosen = {id(weight) for weight in weights}
    with modes_kept(model), gradients_kept(model):
        try:
            for weight, _ in flags:
                weight.requires_grad_(id(weight) in chosen)
                weight.grad = None
            train_mode(model)
            yield
        finally:
            for weight, flag in flags:
                weight.requires_grad_(flag)
