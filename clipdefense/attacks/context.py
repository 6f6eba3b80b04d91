"""The state a model is in while it is attacked or judged, restored afterwards whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.errors import UsageError
from clipdefense.threat import ThreatModel


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on another device without waiting for that device: the host's copy is staged at once."""
    return tensor.to(device, non_blocking=True)


@contextmanager
def _fp32_precision(precision: str) -> Iterator[None]:
    """How float32 matrix products and convolutions are done: ``"ieee"`` or ``"tf32"``."""
    # all three together: torch refuses to answer legacy queries when conv and rnn differ
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn  # which rounds to bfloat16 or TF32 on processors that can
    knobs = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = precision
        yield
    finally:
        for knob, value in zip(knobs, before):
            knob.fp32_precision = value


@contextmanager
def full_fp32() -> Iterator[None]:
    """TF32 off for matrix products and convolutions, autocast off."""
    with _fp32_precision("ieee"), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def tf32(enabled: bool) -> AbstractContextManager[None]:
    """TF32 for what runs inside, where enabled."""
    return _fp32_precision("tf32") if enabled else nullcontext()


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Train and eval modes are afterwards what they were, submodule by submodule."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def set_modes(module: nn.Module, training: bool) -> None:
    """Train or eval mode for every submodule; not ``train()``, which may be overridden to do more or less than this."""
    for part in module.modules():
        part.training = training


@contextmanager
def gradients_kept(module: nn.Module) -> Iterator[None]:
    """The ``.grad`` of each parameter is afterwards what it was."""
    gradients = [(weight, weight.grad) for weight in module.parameters()]
    try:
        yield
    finally:
        for weight, gradient in gradients:
            weight.grad = gradient


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode and no parameter requiring gradients, each restored to what it was."""
    flags = [(weight, weight.requires_grad) for module in modules for weight in module.parameters()]
    with modes_kept(*modules):
        try:
            for module in modules:
                set_modes(module, False)
            for weight, _ in flags:
                weight.requires_grad_(False)
            yield
        finally:
            for weight, flag in flags:
                weight.requires_grad_(flag)


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Frozen weights in eval mode, full fp32, gradients on, whatever the caller's grad mode."""
    with torch.inference_mode(False), torch.enable_grad(), full_fp32(), frozen(model):
        yield


def logits_of(model: Callable[..., Any], x: Tensor, **keys: Any) -> Tensor:
    """``model(x, **keys)``, checked to be what an attack needs.

    Raises:
        UsageError: the output is not a float tensor of shape (N, C).
    """
    logits = model(x, **keys)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"model returned {got} for {x.shape[0]} images; logits of shape (N, classes) are expected.")
    return logits


def check_finite(logits: Tensor, ids: Tensor) -> None:
    """Stop when the model's output is not finite, naming the images: an attack on NaN proves nothing."""
    bad = ~torch.isfinite(logits).all(dim=1)
    if bad.any():
        raise non_finite(ids[bad])


def non_finite(ids: Tensor) -> UsageError:
    """The error that names the images whose logits are not finite."""
    shown = ", ".join(str(int(i)) for i in ids[:8])
    return UsageError(
        f"model returns NaN or infinite logits for {len(ids)} images (ids {shown}); an attack on them would "
        "prove nothing: look at the weights, the dtype (half precision overflows) and the images."
    )


def non_finite_gradient(ids: Tensor) -> UsageError:
    """The error that names the images at which the gradient is NaN or infinite though the logits are finite."""
    shown = ", ".join(str(int(i)) for i in ids[:8])
    return UsageError(
        f"model gives NaN or infinite input gradients for {len(ids)} images (ids {shown}); a gradient attack would "
        "stand still there and prove nothing: look for a square root, a norm, a logarithm or a division at zero."
    )


def no_gradient() -> UsageError:
    """The error for logits that do not hang on the images as far as autograd knows."""
    return UsageError(
        "model's output has no gradient to x: something between them is detached (a detach, no_grad, NumPy, "
        "rounding to integers); let gradients pass, straight through if need be, or use square, which needs none."
    )


def predict(model: nn.Module, x: Tensor, *, batch_size: int = 128, **per_image: Any) -> Tensor:
    """Verdict logits: full fp32, eval mode, no gradients, in chunks.

    Args:
        model: images -> logits.
        x: (N, C, H, W) in [0, 1].
        batch_size: images a forward.
        per_image: further keyword arguments of the model's forward; tensors are split as x is. A wrapped randomised
            defence takes ``ids`` (N,) and ``seed``, which make its draws repeatable.

    Returns:
        (N, classes), float32 (float64 for a float64 model), on x's device.
    """
    logits = []
    with attack_mode(model), torch.no_grad():
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            keys = {key: value[rows] if isinstance(value, Tensor) else value for key, value in per_image.items()}
            logits.append(logits_of(model, x[rows], **keys).detach())
    found = torch.cat(logits)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def check_target(model: Any, threat: Any) -> None:
    """A module to attack, and a budget.

    Raises:
        UsageError: something else stands in the place of either.
    """
    if not isinstance(model, nn.Module):
        advice = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UsageError(f"model is a {type(model).__name__}; a torch module, images -> logits, is expected{advice}.")
    if not isinstance(threat, ThreatModel):
        raise UsageError(f"threat is {threat!r}; a ThreatModel is expected, such as ThreatModel('linf', eps=1/255).")
