"""CLIPClassifier: its arguments are ART's, in ART's order, and can be set again."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense import CLIPClassifier, UsageError, ZeroShotClassifier

from .helpers import Darken, Logits, Make, logits_of

# --- what it is made of


def test_arguments_are_arts_in_arts_order() -> None:
    ours, theirs = (list(inspect.signature(one.__init__).parameters) for one in (CLIPClassifier, PyTorchClassifier))
    assert ours == theirs


def test_defaults_come_from_the_model(make_model: Make) -> None:
    classifier = CLIPClassifier(make_model(classes=7))
    assert isinstance(classifier, PyTorchClassifier)
    assert (classifier.input_shape, classifier.nb_classes) == ((3, 32, 32), 7)
    assert isinstance(classifier.loss, nn.CrossEntropyLoss)
    assert tuple(classifier.clip_values) == (0.0, 1.0)
    assert (classifier.preprocessing, classifier.device_type) == (None, "cpu")
    assert classifier.layer_names == ["tower", "head"]


def test_any_module_with_logits_will_do(images: Tensor) -> None:
    model = Logits().eval()
    classifier = CLIPClassifier(model, None, (3, 32, 32), 10)
    np.testing.assert_allclose(classifier.predict(images.double().numpy()), logits_of(model, images), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B-32"}, "model is a str"),
        ({"model": nn.Flatten()}, "Flatten, with which input_shape and nb_classes"),
        ({"model": nn.Flatten(), "input_shape": (3, 32, 32)}, "nb_classes must be given"),
        ({"model": nn.Flatten(), "input_shape": (32, 32), "nb_classes": 10}, r"input_shape is \(32, 32\)"),
        ({"model": nn.Flatten(), "input_shape": (3, 32, 32), "nb_classes": 1}, "nb_classes is 1"),
        ({"nb_classes": 11}, "nb_classes is 11, but model has 10"),
        ({"loss": "ce"}, "loss is a str"),
        ({"use_amp": True}, "apex"),
        ({"channels_first": False}, "channels_first"),
        ({"clip_values": (0, 255)}, r"clip_values is \(0, 255\)"),
        ({"clip_values": None}, "clip_values is None"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "no parameter of model"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str, tiny_model: ZeroShotClassifier) -> None:
    with pytest.raises(UsageError, match=message):
        CLIPClassifier(**{"model": tiny_model, **arguments})


def test_the_model_is_never_moved(make_model: Make) -> None:
    model = make_model().to("meta")  # ART's constructor would try to copy this to the CPU, and fail
    classifier = CLIPClassifier(model)
    assert classifier.device == next(model.parameters()).device == torch.device("meta")
    model = make_model()
    classifier = CLIPClassifier(model)
    model.to("meta")
    assert classifier.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_machine_with_a_gpu(make_model: Make, images: Tensor, labels: Tensor) -> None:
    model = make_model()
    assert CLIPClassifier(model).device.type == model.device.type == "cpu"
    on_cpu = CLIPClassifier(model).predict(images.numpy())
    classifier = CLIPClassifier(model, device_type="gpu")
    assert classifier.device.type == model.device.type == "cuda"
    np.testing.assert_allclose(classifier.predict(images.numpy()), on_cpu, atol=1e-3)
    attack = ProjectedGradientDescentPyTorch(classifier, eps=4 / 255, eps_step=1 / 255, max_iter=3, verbose=False)
    assert (classifier.predict(attack.generate(images.numpy())).argmax(1) != labels.numpy()).any()
    copied = pickle.loads(pickle.dumps(classifier))
    assert copied.device == copy.deepcopy(classifier).device == classifier.device
    classifier.set_params(device_type="cpu")
    assert model.device.type == "cpu"


# --- parameters


def test_setting_what_was_got_changes_nothing(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    classifier = CLIPClassifier(tiny_model, preprocessing_defences=Darken())
    before, expected = classifier.get_params(), classifier.predict(images.numpy())
    classifier.set_params(**before)
    assert np.array_equal(classifier.predict(images.numpy()), expected)
    assert list(classifier.get_params()) == list(before)
    assert classifier.model is tiny_model


def test_setting_another_model(make_model: Make, tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    other = make_model(classes=5)
    optimizer = torch.optim.SGD(tiny_model.parameters())
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer)
    with pytest.raises(UsageError, match="optimizer holds no parameter of model"):
        classifier.set_params(model=other)
    assert classifier.model is tiny_model
    classifier.set_params(model=other, optimizer=None)
    assert (classifier.model, classifier.nb_classes, classifier.optimizer) == (other, 5, None)
    np.testing.assert_allclose(classifier.predict(images.numpy()), logits_of(other, images), atol=2e-4)


def test_setting_defences_and_nonsense(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    classifier = CLIPClassifier(tiny_model)
    classifier.set_params(preprocessing_defences=Darken())
    np.testing.assert_allclose(classifier.predict(images.numpy()), logits_of(tiny_model, 0.75 * images), atol=2e-4)
    with pytest.raises(UsageError, match=r"'clip_value' is unknown; did you mean 'clip_values'"):
        classifier.set_params(clip_value=(0, 1))
