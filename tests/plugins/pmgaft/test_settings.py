"""PMG-AFT: published settings, the statistics that belong to the weights, errors."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.trainer import Trainer
from torch import Tensor

import clipdefense as cd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training import load_weights
from clipdefense.training.schedule import learning_rate, warmup_steps
from clipdefense.weights import read_sidecar
from clipdefense_pmgaft.pmgaft import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PMGAFT,
)

from .helpers import CLIPS, IMAGENETS, QUIET, Make, begun, statistics

# the warning has a test of its own
pytestmark = pytest.mark.filterwarnings("ignore:pmg-aft, variant 'released', trains with ImageNet's:UserWarning")


def test_published_settings(tiny_model: ZeroShotClassifier) -> None:
    default, released = PMGAFT(tiny_model), PMGAFT(tiny_model, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 1 / 255, 1 / 255, 2)
        assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 5e-5, 0.9, 0.0)
        assert (config.batch_size, config.epochs, config.schedule) == (256, 10, "cosine")
        assert config.train == "tower" and config.mix == 1 and not config.bf16
    assert warmup_steps(released.config, 50) == 1000 and warmup_steps(default.config, 50) == 5
    assert learning_rate(released.config, 499, 0, 3910) == pytest.approx(5e-5 / 2)
    own = {"logit_scale": 100.0, "kl_weight": 1.0, "mean": CLIPS[0], "std": CLIPS[1]}
    assert default.hyper_parameters() == {"alpha": 1.0, "beta": 1.0, **own}
    theirs = {"logit_scale": 1.0, "kl_weight": 256.0, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    assert released.hyper_parameters() == {"alpha": 1.0, "beta": 1.0, **theirs}
    assert statistics(tiny_model) == CLIPS  # nothing changes before a fit


def test_it_is_an_art_trainer_and_found_by_name(tiny_model: ZeroShotClassifier) -> None:
    assert cd.get_defense("pmg-aft") is PMGAFT
    estimator = cd.CLIPClassifier(tiny_model)
    trainer = PMGAFT(estimator, **QUIET, batch_size=4)
    assert isinstance(trainer, Trainer) and trainer.get_classifier() is estimator
    x = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    before = estimator.predict(x)
    trainer.fit(x, np.eye(10, dtype=np.float32)[np.arange(8)], batch_size=8, nb_epochs=2, lr=1e-3, verbose=False)
    assert not np.allclose(estimator.predict(x), before)
    assert trainer.history is not None and len(trainer.history.steps) == 2


def test_released_changes_the_statistics_in_place_and_says_so(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    estimator = cd.CLIPClassifier(tiny_model)
    defense = PMGAFT(estimator, variant="released", **QUIET, batch_size=12, epochs=1)
    buffer, other = tiny_model.mean, tiny_model.with_classes(["thing 1", "thing 2"])
    with pytest.warns(UserWarning, match=r"mean was \(0\.4815, 0\.4578, 0\.4082\) .* now on they are \(0\.485, 0\.456"):
        defense.fit(images, torch.arange(12) % 10)
    assert tiny_model.mean is buffer and statistics(tiny_model) == IMAGENETS == statistics(defense.teacher)
    predicted = estimator.predict(images.numpy())
    normalised = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = tiny_model.head(tiny_model.tower(normalised))
    np.testing.assert_allclose(predicted, expected.numpy(), atol=1e-4)
    assert statistics(tiny_model.with_classes(["thing 1", "thing 2"])) == IMAGENETS == statistics(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defense.fit(images, torch.arange(12) % 10)  # they are there already
    assert statistics(tiny_model) == IMAGENETS


def test_a_saved_model_keeps_its_statistics(make_model: Make, tmp_path: Path, images: Tensor) -> None:
    model = make_model()
    options = {**QUIET, "batch_size": 6, "epochs": 1, "lr": 1e-3, "checkpoint": str(tmp_path)}
    PMGAFT(model, variant="released", **options).fit(images, torch.arange(12) % 10)
    path = tmp_path / "model.safetensors"
    facts = read_sidecar(path)
    assert (facts["mean"], facts["std"]) == statistics(model) == IMAGENETS
    assert (facts["method"], facts["variant"]) == ("pmg-aft", "released")
    assert facts["hyper_parameters"]["mean"] == list(IMAGENET_MEAN)
    with pytest.raises(UsageError, match=r"has other preprocessing: mean \[0\.48\d+, .* build the model with the file"):
        load_weights(make_model(), path)
    tower, embeddings = make_model().tower, make_model().head.embeddings
    build = {"class_names": facts["class_names"], "image_size": 32, "mean": facts["mean"], "std": facts["std"]}
    fresh = ZeroShotClassifier(tower, embeddings, **build).eval()
    load_weights(fresh, path)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_the_class_encoder_is_not_copied(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.class_encoder = lambda names: torch.ones(len(names), 32)
    assert begun(tiny_model).teacher.class_encoder is tiny_model.class_encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1.0}, r"scale is 1\.0, but the scale of the logits, the reduction .* belong together; choose all"),
        ({"logit_scale": 1, "variant": "released"}, "logit_scale is 1, but .* belong together"),
        ({"reduction": "sum"}, "reduction is 'sum', but .* variant='default' or variant='released'"),
        ({"mean": IMAGENET_MEAN}, r"mean is \(0\.485, 0\.456, 0\.406\), but .* belong together"),
        ({"alpha": 0.5, "variant": "released"}, r"alpha is 0\.5 with variant='released', whose code has no such"),
        ({"beta": 0, "variant": "released"}, "beta is 0 with variant='released', whose code has no such"),
        ({"alpha": -1}, "alpha is -1; a number of at least 0 is expected"),
        ({"beta": math.inf}, "beta is inf; a number of at least 0 is expected"),
        ({"alpha": True}, "alpha is True; a number"),
        ({"beta": "1"}, "beta is '1'; a number"),
        ({"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        ({"alhpa": 1}, "training option 'alhpa' is unknown"),
    ],
)
def test_bad_options(tiny_model: ZeroShotClassifier, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PMGAFT(tiny_model, **options)


def test_released_needs_three_channels(tiny_model: ZeroShotClassifier) -> None:
    grey = ZeroShotClassifier(tiny_model.tower, tiny_model.head.embeddings, image_size=32, mean=(0.5,), std=(0.5,))
    with pytest.raises(UsageError, match=r"the model takes 1 channels; variant='released' sets ImageNet's statistics"):
        PMGAFT(grey, variant="released")


def test_it_needs_labels(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with pytest.raises(UsageError, match="y is None, but this method learns from labels"):
        PMGAFT(tiny_model, **QUIET, batch_size=4).fit(images)
