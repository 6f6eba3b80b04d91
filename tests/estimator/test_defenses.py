"""Defences in a CLIPClassifier, and ART's attacks on them."""

from __future__ import annotations

import numpy as np
import torch
from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor

from clipdefense import CLIPClassifier, ZeroShotClassifier

from .helpers import Darken, Make, logits_of

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
