"""TeCoA: its loss by hand, its settings, its place in ART."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.trainer import Trainer
from torch import Tensor

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.schedule import learning_rate, warmup_steps
from clipdefense_tecoa.tecoa import TeCoA, tecoa_loss

QUIET: dict[str, Any] = {"show_progress": False}


def test_loss_by_hand() -> None:
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(3.0), math.log(4.0)]], dtype=torch.float64)
    # rows of exponentials: (2, 1, 1) and (1, 3, 4)
    expected = (-math.log(2 / 4) - math.log(3 / 8)) / 2
    assert float(tecoa_loss(logits, torch.tensor([0, 1]))) == pytest.approx(expected, abs=1e-15)


def test_loss_gradient() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda z: tecoa_loss(z, y), logits)
    (gradient,) = torch.autograd.grad(tecoa_loss(logits, y), logits)
    expected = (logits.softmax(dim=1) - torch.nn.functional.one_hot(y, 5)) / 3
    torch.testing.assert_close(gradient, expected.detach())


def test_gradient_through_the_model_agrees_with_finite_differences(make_model: Any, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    x, y = images[:3].double(), torch.tensor([1, 5, 7])
    defense = TeCoA(model)
    (weight,) = defense.trainable_parameters("head")
    (gradient,) = torch.autograd.grad(defense.losses({"x_adv": x, "y": y})["ce"], weight)
    direction = torch.randn_like(weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(defense.losses({"x_adv": x, "y": y})["ce"]))
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_published_settings(tiny_model: ZeroShotClassifier) -> None:
    default, released = TeCoA(tiny_model), TeCoA(tiny_model, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 1 / 255, 1 / 255, 2)
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 0.0)
        assert (config.batch_size, config.epochs, config.schedule) == (256, 10, "cosine")
        assert config.train == "tower" and config.mix == 1 and not config.bf16
    assert (default.config.lr, released.config.lr) == (1e-5, 1e-7)
    assert warmup_steps(released.config, 50) == 1000 and warmup_steps(default.config, 50) == 5
    # at the length it was published for, the two schedules are one
    rates = [
        [learning_rate(c, s, 0, 50_050) / c.lr for s in (0, 999, 1000, 9000)] for c in (default.config, released.config)
    ]
    assert rates[0] == pytest.approx(rates[1])
    with pytest.raises(UsageError, match="variant 'relased' is unknown; did you mean 'released'"):
        TeCoA(tiny_model, variant="relased")


def test_it_is_an_art_trainer_and_found_by_name(tiny_model: ZeroShotClassifier) -> None:
    assert cd.get_defense("tecoa") is TeCoA
    estimator = cd.CLIPClassifier(tiny_model)
    trainer = TeCoA(estimator, **QUIET, batch_size=4)
    assert isinstance(trainer, Trainer)
    assert trainer.get_classifier() is estimator and trainer.classifier is estimator
    x = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    kept = x.copy()
    before = estimator.predict(x)
    trainer.fit(x, np.eye(10, dtype=np.float32)[np.arange(8)], batch_size=8, nb_epochs=2, lr=1e-2, verbose=False)
    assert np.array_equal(x, kept)
    assert not np.allclose(estimator.predict(x), before)
    assert len(trainer.history.steps) == 2


def test_the_head_and_the_scale_stay(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    before = {name: value.clone() for name, value in tiny_model.head.state_dict().items()}
    TeCoA(tiny_model, **QUIET, batch_size=12, epochs=2, lr=1e-2).fit(images, torch.arange(12) % 10)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.head.state_dict().items())
    assert not any(weight.requires_grad for weight in tiny_model.head.parameters())


def test_a_few_steps_lower_the_loss_of_a_fixed_batch(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    defense = TeCoA(tiny_model, **QUIET, batch_size=12, epochs=6, lr=3e-4, measure_every=0)
    defense.fit(images, torch.arange(12) % 10)
    loss = [record["ce"] for record in defense.history.steps]
    assert loss[-1] < loss[0] - 1


def learnable(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Red images and blue ones, further apart than eps, under noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.3 + 0.3 * torch.rand(n, 3, 32, 32, generator=generator)
    x[y == 0, 0] += 0.2
    x[y == 1, 2] += 0.2
    return x, y


def test_robust_accuracy_rises_on_a_learnable_set(make_model: Any) -> None:
    model = make_model(classes=2)
    threat = cd.ThreatModel("linf", eps=4 / 255, steps=5)
    x, y = learnable(40, seed=9)

    def robust() -> float:
        x_adv = pgd(model, x, y, threat, seed=1)
        return float((predict(model, x_adv).argmax(dim=1) == y).double().mean())

    before = robust()
    TeCoA(model, threat=threat, **QUIET, batch_size=16, epochs=5, lr=1e-3).fit(*learnable(64, seed=2))
    assert before <= 0.5
    assert robust() >= 0.9
