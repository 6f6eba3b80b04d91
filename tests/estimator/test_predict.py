"""CLIPClassifier.predict, and the images that it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.attacks.attack import EvasionAttack
from art.defences.postprocessor import ReverseSigmoid
from art.defences.preprocessor import FeatureSqueezing
from art.estimators import BaseEstimator
from torch import Tensor, nn

from clipdefense import CLIPClassifier, UsageError, ZeroShotClassifier

from .helpers import PLAIN, Darken, Make, arts_own, logits_of

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
