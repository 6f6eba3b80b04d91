"""CLIPClassifier's losses, gradients and layers are ART's, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense import CLIPClassifier, UsageError, ZeroShotClassifier

from .helpers import PLAIN, Logits, arts_own, state_of

# --- losses and gradients


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("of_model", [ZeroShotClassifier, Logits])
def test_loss_gradient_is_arts(
    of_model: type, reduction: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    model = tiny_model if of_model is ZeroShotClassifier else Logits().eval()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    one_hot = F.one_hot(labels, 10).float()
    expected = arts_own(model, loss).loss_gradient(images.numpy(), one_hot.numpy())
    assert np.abs(expected).max() > 1e-5
    classifier = CLIPClassifier(model, loss, **PLAIN)
    for y in (labels, labels[:, None], labels.int(), one_hot, one_hot.long()):
        np.testing.assert_allclose(classifier.loss_gradient(images.numpy(), y.numpy()), expected, atol=1e-7)
        found = classifier.loss_gradient(images.double(), y)
        assert isinstance(found, Tensor) and found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


def test_soft_labels(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    soft = torch.softmax(torch.randn(12, 10), dim=1)
    x = images.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(F.cross_entropy(tiny_model(x), soft), x)
    found = CLIPClassifier(tiny_model).loss_gradient(images.numpy(), soft.double().numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-7)


@pytest.mark.parametrize("label", [None, 3, [1, 2, 3, 4], np.array([4, 4, 0, 9])])
def test_class_gradient_is_arts(label: Any, tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    x = images[:4].numpy()
    expected = arts_own(tiny_model).class_gradient(x, label)
    np.testing.assert_allclose(CLIPClassifier(tiny_model).class_gradient(x, label), expected, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_compute_loss_is_cross_entropy(
    reduction: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    classifier, y = CLIPClassifier(tiny_model), labels.flip(0)
    expected = F.cross_entropy(tiny_model(images), y, reduction=reduction)
    for labelled in (y, F.one_hot(y, 10)):
        found = classifier.compute_loss(images.numpy(), labelled.numpy(), reduction=reduction)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
        torch.testing.assert_close(classifier.compute_loss(images, labelled, reduction=reduction), expected)
    assert classifier.loss.reduction == "mean"


def test_compute_loss_of_tensors_has_gradients(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    x, weight = images.clone().requires_grad_(True), tiny_model.tower.proj
    loss = CLIPClassifier(tiny_model).compute_loss(x, labels, reduction="mean")
    found = torch.autograd.grad(loss, [x, weight])
    expected = torch.autograd.grad(F.cross_entropy(tiny_model(x), labels), [x, weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.arange(11), "11 labels for 12 images"),
        (np.arange(12), r"labels in \[0, 11\]"),
        (np.full(12, -1), "labels in"),
        (np.zeros(12), "float64; integer class labels"),
        (np.eye(9)[np.zeros(12, int)], r"y has shape \(12, 9\)"),
    ],
)
def test_labels_that_cannot_be_used(
    y: np.ndarray, message: str, tiny_model: ZeroShotClassifier, images: Tensor
) -> None:
    for method in (CLIPClassifier(tiny_model).loss_gradient, CLIPClassifier(tiny_model).compute_loss):
        with pytest.raises(UsageError, match=message):
            method(images.numpy(), y)


# --- what stays as it was

CALLS: dict[str, Callable[[CLIPClassifier, Tensor, Tensor], Any]] = {
    "predict": lambda c, x, y: c.predict(x.numpy()),
    "predict in train mode": lambda c, x, y: c.predict(x.numpy(), training_mode=True),
    "loss_gradient": lambda c, x, y: c.loss_gradient(x.numpy(), y.numpy()),
    "loss_gradient in train mode": lambda c, x, y: c.loss_gradient(x, y, training_mode=True),
    "class_gradient": lambda c, x, y: c.class_gradient(x.numpy(), 1),
    "compute_loss": lambda c, x, y: c.compute_loss(x.numpy(), y.numpy()),
    "compute_loss of tensors": lambda c, x, y: c.compute_loss(x, y),
    "get_activations": lambda c, x, y: c.get_activations(x.numpy(), "head"),
    "custom_loss_gradient": lambda c, x, y: c.custom_loss_gradient(torch.norm, x.numpy(), x.flip(0).numpy(), "head"),
    "a failure": lambda c, x, y: fail(c, x[:, :, :5, :5]),
}


def fail(classifier: CLIPClassifier, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="Kernel size"):
        classifier.predict(x.numpy())


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_modes_and_gradients_stay_as_they_were(call: str, root: bool, images: Tensor, labels: Tensor) -> None:
    model = Logits().train(root)
    model.backbone[1].train(not root)
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = state_of(model)
    CALLS[call](CLIPClassifier(model, **PLAIN), images, labels)
    after = state_of(model)
    assert {name for name in before if before[name] is not after[name] and before[name] != after[name]} == set()
    assert model.head.weight.grad is not None and (model.head.weight.grad == 1).all()


def test_no_attack_pays_for_gradients_of_weights(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    needed = []
    tiny_model.register_forward_hook(lambda model, inputs, logits: needed.append(model.tower.proj.requires_grad))
    classifier = CLIPClassifier(tiny_model)
    classifier.loss_gradient(images.numpy(), labels.numpy())
    classifier.class_gradient(images.numpy(), 0)
    classifier.compute_loss(images.numpy(), labels.numpy())
    assert needed == [False] * 3
    assert tiny_model.tower.proj.requires_grad


def test_train_mode_is_train_mode(images: Tensor) -> None:
    classifier = CLIPClassifier(Logits().eval(), **PLAIN)
    settled = classifier.predict(images.numpy())
    assert np.array_equal(settled, classifier.predict(images.numpy()))
    assert not np.array_equal(
        classifier.predict(images.numpy(), training_mode=True), classifier.predict(images.numpy(), training_mode=True)
    )


def test_gradients_under_no_grad(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    classifier = CLIPClassifier(tiny_model)
    expected = classifier.loss_gradient(images.numpy(), labels.numpy())
    with torch.no_grad():
        assert np.array_equal(classifier.loss_gradient(images.numpy(), labels.numpy()), expected)


# --- layers


def test_activations_of_any_submodule(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    classifier, x = CLIPClassifier(tiny_model), images.numpy()
    expected = tiny_model.embed(images).detach().numpy()
    for layer in ("tower", 0):
        np.testing.assert_allclose(classifier.get_activations(x, layer, batch_size=5), expected, atol=1e-5)
    assert classifier.get_activations(x, "tower.transformer.resblocks.1", batch_size=5).shape == (12, 17, 64)
    leaf = images.clone().requires_grad_(True)
    found = classifier.get_activations(leaf, "tower", framework=True)
    assert torch.autograd.grad(found.sum(), leaf)[0].abs().max() > 0
    assert not any(part._forward_hooks for part in tiny_model.modules())


def test_layers_that_cannot_be_read(images: Tensor) -> None:
    classifier = CLIPClassifier(Logits(), **PLAIN)
    with pytest.raises(UsageError, match=r"layer 'unreached.tower' is not called"):
        classifier.get_activations(images.numpy(), "unreached.tower")
    with pytest.raises(UsageError, match=r"layer 'backbon' is unknown; did you mean 'backbone'"):
        classifier.get_activations(images.numpy(), "backbon")


def test_custom_loss_gradient(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    x, target = images[:3].clone().requires_grad_(True), images[3:6]
    (expected,) = torch.autograd.grad((tiny_model.embed(x) - tiny_model.embed(target)).norm(), x)
    found = CLIPClassifier(tiny_model).custom_loss_gradient(torch.norm, images[:3].numpy(), target.numpy(), "tower")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
