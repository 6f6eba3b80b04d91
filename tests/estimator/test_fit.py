"""CLIPClassifier.fit, and ART's trainers on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.data_generators import NumpyDataGenerator
from art.defences.trainer import AdversarialTrainer
from torch import Tensor

from clipdefense import CLIPClassifier, UsageError, ZeroShotClassifier

from .helpers import PLAIN, Logits, Make, state_of

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
