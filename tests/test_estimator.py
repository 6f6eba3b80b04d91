"""CLIPClassifier: an ART classifier that means what ART's means, and keeps its hands off the model."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import art.config
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.attacks.attack import EvasionAttack
from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
from art.data_generators import NumpyDataGenerator
from art.defences.postprocessor import ReverseSigmoid
from art.defences.preprocessor import FeatureSqueezing
from art.defences.trainer import AdversarialTrainer
from art.estimators import BaseEstimator
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense import CLIPClassifier, InputDefense, UsageError, ZeroShotClassifier

Make = Callable[..., ZeroShotClassifier]


class Darken(InputDefense):
    """A defence with a closed form: each pixel loses a quarter of its value. It remembers what it was shown."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.model = model
        self.shown: list[int] = []

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.shown.append(len(x))
        return -0.25 * x


class Logits(nn.Module):
    """A plain network with dropout, whose backbone is reached through a method."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))
        self.unreached = nn.ModuleDict({"tower": nn.Linear(64, 64)})
        self.head = nn.Linear(64, 10)

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(self.backbone(x), self.unreached["tower"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


PLAIN = {"input_shape": (3, 32, 32), "nb_classes": 10}


def arts_own(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> PyTorchClassifier:
    settings = {**PLAIN, "clip_values": (0, 1), "device_type": "cpu", **options}
    return PyTorchClassifier(model, loss or nn.CrossEntropyLoss(), **settings)


def logits_of(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def state_of(model: nn.Module) -> dict[str, Any]:
    weights = {name: (weight.requires_grad, weight.grad) for name, weight in model.named_parameters()}
    return {**weights, **{f"mode of {name}": part.training for name, part in model.named_modules()}}


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


# --- predict


def test_predict_gives_the_models_logits(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    classifier, expected = CLIPClassifier(tiny_model), logits_of(tiny_model, images)
    for x in (images.numpy(), images.double().numpy(), images.numpy()[::-1][::-1], images):
        for batch_size in (1, 5, 12, 128):
            found = classifier.predict(x, batch_size=batch_size)
            assert isinstance(found, np.ndarray) and found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=2e-4)


def test_predict_takes_arrays_that_must_not_be_written(
    tiny_model: ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    x = np.broadcast_to(images[:1].numpy(), (4, 3, 32, 32))
    np.testing.assert_allclose(CLIPClassifier(tiny_model).predict(x), logits_of(tiny_model, torch.tensor(x)), atol=2e-4)
    assert not recwarn.list


def test_a_float64_model_sees_float64_pixels(make_model: Make, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    x = images.double() * 0.999999999  # a change that float32 does not see
    expected = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(model(x), torch.arange(10)), x[:10])
    found = CLIPClassifier(model).loss_gradient(x[:10].numpy(), np.arange(10))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-12)


def test_defences_see_a_batch_at_a_time(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    darken = Darken(batch_size=100)
    classifier = CLIPClassifier(tiny_model, preprocessing_defences=[darken])
    found = classifier.predict(images.numpy(), batch_size=5)
    assert darken.shown == [5, 5, 2]
    np.testing.assert_allclose(found, logits_of(tiny_model, 0.75 * images), atol=2e-4)


def test_defences_on_arrays_work_too(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    squeeze = FeatureSqueezing(clip_values=(0, 1), bit_depth=2)
    ours = CLIPClassifier(tiny_model, preprocessing_defences=squeeze)
    theirs = arts_own(tiny_model, preprocessing_defences=squeeze, preprocessing=None)
    x, one_hot = images.numpy(), np.eye(10, dtype=np.float32)[labels]
    np.testing.assert_allclose(ours.predict(x, batch_size=5), theirs.predict(x), atol=2e-4)
    np.testing.assert_allclose(ours.loss_gradient(x, labels.numpy()), theirs.loss_gradient(x, one_hot), atol=1e-6)


def test_postprocessing_defences_are_applied(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Softmax(dim=1))
    defence = ReverseSigmoid()
    found = CLIPClassifier(model, postprocessing_defences=defence, **PLAIN).predict(images.numpy())
    np.testing.assert_allclose(found, defence(logits_of(model, images)), atol=1e-6)


BAD = {
    "uint8": (lambda x: (x * 255).astype(np.uint8), "dtype torch.uint8.*divide by 255"),
    "integers": (lambda x: (x * 255).astype(np.int64), "dtype torch.int64"),
    "booleans": (lambda x: x > 0.5, "dtype torch.bool"),
    "text": (lambda x: x.astype(str), "x has dtype <U32"),
    "0-255": (lambda x: x * 255, "divide by 255"),
    "normalised": (lambda x: (x - x.mean()) / x.std(), "normalisation belongs inside the model"),
    "-1 to 1": (lambda x: 2 * x - 1, r"\[0, 1\] is expected"),
    "NaN": (lambda x: np.where(x > 0.9, np.nan, x), "NaN"),
    "infinite": (lambda x: np.where(x > 0.9, np.inf, x), "infinite"),
    "one image": (lambda x: x[0], r"x\[None\]"),
    "number": (lambda x: x[0, 0, 0, 0], r"\(N, C, H, W\) is expected"),
    "channels last": (lambda x: x.transpose(0, 2, 3, 1), "looks like NHWC"),
    "grey": (lambda x: x[:, :1], "1 channels"),
    "none": (lambda x: x[:0], "empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_images_that_cannot_be_used(kind: str, tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    spoil, message = BAD[kind]
    with pytest.raises(UsageError, match=message):
        CLIPClassifier(tiny_model).predict(spoil(images.numpy()))


class Wander(EvasionAttack):
    """An attack that reports what the model says a step away from the images."""

    _estimator_requirements = (BaseEstimator,)

    def __init__(self, estimator: CLIPClassifier, step: float) -> None:
        super().__init__(estimator=estimator)
        self.step = step

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        return self.estimator.predict(x + x.dtype.type(self.step))


def test_attacks_may_look_beyond_the_pixels(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    classifier, x = CLIPClassifier(tiny_model), images.numpy()
    np.testing.assert_allclose(Wander(classifier, -0.1).generate(x), logits_of(tiny_model, images - 0.1), atol=2e-4)
    assert np.isnan(Wander(classifier, np.nan).generate(x)).all()  # as Square does, which never takes such a point
    with pytest.raises(UsageError, match=r"\[0, 1\] is expected"):
        classifier.predict(x - 0.1)


@pytest.mark.parametrize("kind", ["uint8", "0-255", "normalised", "channels last", "one image", "none"])
def test_attacks_do_not_hide_images_that_cannot_be_used(
    kind: str, tiny_model: ZeroShotClassifier, images: Tensor
) -> None:
    spoil, message = BAD[kind]
    with pytest.raises(UsageError, match=message):
        Wander(CLIPClassifier(tiny_model), 0).generate(spoil(images.numpy()))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_bad_batch_size(batch_size: Any, tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        CLIPClassifier(tiny_model).predict(images.numpy(), batch_size=batch_size)


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


# --- copies


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the home folder and of ART's data folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(art.config, "ART_DATA_PATH", str(tmp_path))
    return tmp_path


def through_pickle(classifier: CLIPClassifier) -> CLIPClassifier:
    return pickle.loads(pickle.dumps(classifier))


COPIES = [copy.deepcopy, through_pickle, CLIPClassifier.clone_for_refitting]


@pytest.mark.parametrize("copied_by", COPIES)
def test_copies_are_plain_and_whole(
    copied_by: Callable[[CLIPClassifier], CLIPClassifier], tiny_model: ZeroShotClassifier, images: Tensor, empty: Path
) -> None:
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.003)
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer, preprocessing_defences=[Darken(tiny_model)])
    classifier.get_activations(images, "tower", framework=True)
    found = copied_by(classifier)
    assert type(found) is CLIPClassifier
    assert np.array_equal(found.predict(images.numpy()), classifier.predict(images.numpy()))
    assert found.device == classifier.device
    # one model: the defence and the optimizer hold the copy's, and nothing is shared with the original
    assert found.model is not tiny_model
    assert found.preprocessing_operations[0] is found.preprocessing_defences[0]
    assert found.preprocessing_defences[0].model is found.model
    weights = {id(weight) for weight in found.model.parameters()}
    assert {id(weight) for weight in found.optimizer.param_groups[0]["params"]} == weights
    assert weights.isdisjoint(map(id, tiny_model.parameters()))
    assert list(empty.iterdir()) == []


def test_arts_own_copies_do_write_files(tiny_model: ZeroShotClassifier, empty: Path) -> None:
    copy.deepcopy(arts_own(tiny_model))
    assert [path.suffix for path in empty.iterdir()] == [".model"]


def test_a_pickle_holds_the_weights_once(tiny_model: ZeroShotClassifier) -> None:
    defence = Darken(tiny_model)
    size = sum(tensor.nbytes for tensor in (*tiny_model.parameters(), *tiny_model.buffers()))
    assert size < len(pickle.dumps(CLIPClassifier(tiny_model, preprocessing_defences=defence))) < 1.2 * size


def test_a_clone_trains_on_from_the_pretrained_weights(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.003, weight_decay=0.125, betas=(0.5, 0.75))
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer)
    classifier.fit(images.numpy(), labels.numpy(), nb_epochs=1)
    clone = classifier.clone_for_refitting()
    (group,) = clone.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.003, 0.125, (0.5, 0.75))
    assert len(optimizer.state) > 0 and len(clone.optimizer.state) == 0
    expected = classifier.predict(images.numpy())
    assert np.array_equal(clone.predict(images.numpy()), expected)
    clone.fit(images.numpy(), labels.numpy(), nb_epochs=1)
    assert not np.array_equal(clone.predict(images.numpy()), expected)
    assert np.array_equal(classifier.predict(images.numpy()), expected)
    assert CLIPClassifier(tiny_model).clone_for_refitting().optimizer is None


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


# --- training


def test_fit_trains_on_integers_and_one_hot(make_model: Make, images: Tensor) -> None:
    y = np.arange(12) % 10
    weights = []
    for labels in (y, np.eye(10)[y]):
        model = make_model()
        classifier = CLIPClassifier(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-4))
        before = classifier.compute_loss(images.numpy(), y, reduction="mean")
        torch.manual_seed(0)
        classifier.fit(images.double().numpy(), labels, batch_size=5, nb_epochs=3)
        assert classifier.compute_loss(images.numpy(), y, reduction="mean") < before
        weights.append(model.tower.proj)
    assert torch.equal(*weights)


def modes_during(model: Logits, train: Callable[[CLIPClassifier], None]) -> list[str]:
    """The submodules that are in train mode in the forward passes of a training."""
    seen: set[str] = set()
    handle = model.register_forward_pre_hook(
        lambda model, inputs: seen.update(name for name, part in model.named_modules() if part.training)
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = state_of(model)
    train(CLIPClassifier(model, optimizer=torch.optim.SGD(weights, lr=0.01), **PLAIN))
    handle.remove()
    assert [name for name in before if name.startswith("mode") and state_of(model)[name] != before[name]] == []
    return sorted(seen)


X, Y = np.full((6, 3, 32, 32), 0.5, np.float32), np.arange(6)
TRAININGS: dict[str, Callable[[CLIPClassifier], None]] = {
    "fit": lambda c: c.fit(X, Y, nb_epochs=1),
    "fit_generator": lambda c: c.fit_generator(NumpyDataGenerator(X, np.eye(10)[Y], batch_size=6), nb_epochs=1),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_frozen_towers_stay_in_eval_mode_while_the_rest_trains(training: str) -> None:
    everything = sorted(name for name, _ in Logits().named_modules())
    assert modes_during(Logits().eval(), TRAININGS[training]) == everything

    frozen = Logits().eval()
    frozen.backbone.requires_grad_(False)
    statistics = frozen.backbone[1].running_mean.clone()
    assert modes_during(frozen, TRAININGS[training]) == ["", "head", "unreached", "unreached.tower"]
    assert torch.equal(frozen.backbone[1].running_mean, statistics)

    chosen = Logits().train()
    chosen.backbone[1].eval()
    assert modes_during(chosen, TRAININGS[training]) == [name for name in everything if name != "backbone.1"]


def test_training_without_an_optimizer(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(UsageError, match="optimizer is None"):
        CLIPClassifier(tiny_model).fit(images.numpy(), labels.numpy())


def test_arts_adversarial_trainer(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-4)
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer)
    before = tiny_model.tower.proj.detach().clone()
    attack = ProjectedGradientDescentPyTorch(classifier, eps=4 / 255, eps_step=2 / 255, max_iter=2, verbose=False)
    attacked = attack.generate(images.numpy(), labels.numpy())
    loss = classifier.compute_loss(attacked, labels.numpy(), reduction="mean")
    AdversarialTrainer(classifier, attack, ratio=1.0).fit(images.numpy(), labels.numpy(), batch_size=12, nb_epochs=1)
    assert not torch.equal(tiny_model.tower.proj, before)
    assert classifier.compute_loss(attacked, labels.numpy(), reduction="mean") < loss
    assert not any(part.training for part in tiny_model.modules())


# --- defences, and ART's attacks on them


def test_an_input_defence_in_predict_gradients_and_pgd(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    defended, plain = CLIPClassifier(tiny_model, preprocessing_defences=[Darken()]), CLIPClassifier(tiny_model)
    x, y, dark = images.numpy(), labels.numpy(), 0.75 * images.numpy()
    np.testing.assert_allclose(defended.predict(x), plain.predict(dark), atol=2e-4)
    # straight through: the gradient at the defended image, as it is
    np.testing.assert_allclose(defended.loss_gradient(x, y), plain.loss_gradient(dark, y), atol=1e-6)
    np.testing.assert_allclose(defended.class_gradient(x, 1), plain.class_gradient(dark, 1), atol=1e-5)
    np.testing.assert_allclose(defended.compute_loss(x, y), plain.compute_loss(dark, y), rtol=1e-3, atol=1e-4)
    y = defended.predict(x).argmax(axis=1)
    attack = ProjectedGradientDescentPyTorch(defended, eps=8 / 255, eps_step=4 / 255, max_iter=3, verbose=False)
    x_adv = attack.generate(x, y)
    assert np.abs(x_adv - x).max() <= 8 / 255 + 1e-6
    assert (defended.predict(x_adv).argmax(axis=1) != y).all()


def test_what_art_rebuilds_gives_the_same_logits(make_model: Make) -> None:
    """Resizing, normalisation, head and scale are in the module; ART's private classifiers see nothing else."""
    model = make_model(classes=7)
    x = torch.rand(4, 3, 24, 40).numpy()
    classifier = CLIPClassifier(model, input_shape=(3, 24, 40), preprocessing_defences=[Darken()])
    expected = classifier.predict(x)
    np.testing.assert_allclose(expected, logits_of(model, 0.75 * torch.from_numpy(x)), atol=2e-4)
    rebuilt = [AutoProjectedGradientDescent(classifier, loss_type="cross_entropy").estimator]
    rebuilt += [part.estimator for part in AutoAttack(classifier).attacks if part.estimator is not classifier]
    assert len(rebuilt) == 3
    for private in rebuilt:
        assert type(private) is PyTorchClassifier
        np.testing.assert_allclose(private.predict(x), expected, atol=2e-4)
