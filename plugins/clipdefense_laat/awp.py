"""Adversarial weight perturbation (AWP; Wu et al., NeurIPS 2020, arXiv 2004.05884), the option of LAAT's released code.

Before a step each weight tensor W of two dimensions or more is moved to where the loss on adversarial images is higher,

    W + gamma ||W|| g / ||g||,   g = dL(x') / dW,

and the gradient taken there is applied to W. Norms are those of whole tensors; biases and normalisation stay. The
released code takes g by one SGD step of a copy; its learning rate cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Result = TypeVar("Result")


def perturbed_weights(tower: nn.Module) -> tuple[str, ...]:
    """Names of what is perturbed: the tensors of at least two dimensions among the parameters that train."""
    return tuple(name for name, weight in tower.named_parameters() if weight.requires_grad and weight.dim() > 1)


def step_uphill(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """``gamma ||W|| g / ||g||``, of W's shape; zero where g is."""
    length = gradient.norm()
    return torch.where(length > 0, gamma * weight.norm() / length, torch.zeros_like(length)) * gradient


def perturbation(
    tower: nn.Module, names: tuple[str, ...], loss: Callable[[], Tensor], gamma: float
) -> dict[str, Tensor]:
    """By name, how far each weight moves.

    Args:
        tower: the network that ``loss`` runs; its own weights need no gradient and get none.
        names: see :func:`perturbed_weights`.
        loss: gives the scalar to ascend, through the tower.
        gamma: size of a move relative to the weight.
    """
    weights = dict(tower.named_parameters())
    leaves = {name: weights[name].detach().requires_grad_(True) for name in names}
    gradients = torch.autograd.grad(with_weights(tower, leaves, loss), list(leaves.values()))
    return {
        name: step_uphill(leaf.detach(), gradient, gamma) for (name, leaf), gradient in zip(leaves.items(), gradients)
    }


def moved(tower: nn.Module, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``W + v`` of each weight with an offset; a gradient at W + v is one at W."""
    weights = dict(tower.named_parameters())
    return {name: weights[name] + offset for name, offset in offsets.items()}


def with_weights(tower: nn.Module, weights: Mapping[str, Tensor], function: Callable[[], Result]) -> Result:
    """What the function gives while the tower has these weights; its buffers are its own, and move as ever."""
    found: Result = functional_call(_Around(tower), {f"tower.{k}": w for k, w in weights.items()}, (function,))
    return found


class _Around(nn.Module):
    """A module whose forward calls a function, so that ``functional_call`` lends the tower other weights meanwhile."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, function: Callable[[], Result]) -> Result:
        return function()
