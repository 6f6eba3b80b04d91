"""The loop against updates made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.data_generators import NumpyDataGenerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense_tecoa.tecoa import TeCoA

from .helpers import QUIET, Make, TwoPasses, images_and_labels, rows_of_epoch, weights_of


def test_two_updates_equal_plain_torch(make_model: Make) -> None:
    """SGD with momentum, weight decay and clipping on PGD images of the same seed, bit for bit."""
    x, y = images_and_labels(8)
    trained, plain = make_model(), make_model()
    options = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "schedule": "constant"}
    TeCoA(trained, **QUIET, **options, batch_size=8, epochs=2).fit(x, y)

    threat = TeCoA(plain).threat
    velocity: dict[str, Tensor] = {}
    for epoch in range(2):
        # the order within the batch enters through rounding only, but it does enter
        rows = rows_of_epoch(8, 8, epoch)[0]
        seed = derive_seed(0, "attack", epoch)
        x_adv = pgd(plain, x[rows], y[rows], threat, early_stop=False, seed=seed, ids=rows)
        for weight in plain.parameters():
            weight.grad = None
        F.cross_entropy(plain(x_adv), y[rows]).backward()
        norm = torch.sqrt(sum(weight.grad.square().sum() for weight in plain.tower.parameters()))
        for name, weight in plain.tower.named_parameters():
            gradient = weight.grad / norm + 0.1 * weight.detach()
            velocity[name] = 0.9 * velocity[name] + gradient if epoch else gradient
            weight.data -= 1e-3 * velocity[name]
    for name, weight in plain.tower.named_parameters():
        torch.testing.assert_close(dict(trained.tower.named_parameters())[name], weight, rtol=1e-5, atol=1e-7)


def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(make_model: Make) -> None:
    x, y = images_and_labels(8)
    trained, plain = make_model(), make_model()
    TeCoA(trained, **QUIET, lr=1e-3, batch_size=8, epochs=1).fit(x, y)
    rows = rows_of_epoch(8, 8, 0)[0]
    for weight in plain.parameters():
        weight.requires_grad_(False)
    x_adv = pgd(
        plain, x[rows], y[rows], TeCoA(plain).threat, early_stop=False, seed=derive_seed(0, "attack", 0), ids=rows
    )
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(F.cross_entropy(plain(x_adv), y[rows]), weights)
    for trained_weight, weight, gradient in zip(trained.tower.parameters(), weights, gradients):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-3))


def test_the_attack_leaves_nothing_in_the_weights(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(4)
    defense = TeCoA(tiny_model)
    with training_only(tiny_model, tiny_model.tower.parameters()):
        batch = {"x": x, "y": y, "ids": torch.arange(4)}
        x_adv = defense.inner_attack(batch, seed=0)["x_adv"]
        assert all(weight.grad is None and weight.requires_grad for weight in tiny_model.tower.parameters())
        assert tiny_model.tower.training
    assert not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= 1 / 255 + 1e-7 and not torch.equal(x_adv, x)


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_accumulation_makes_the_same_update(make_model: Make, pieces: int) -> None:
    x, y = images_and_labels(10, torch.float64)
    whole, cut = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    options = {**QUIET, "lr": 1e-3, "batch_size": 5, "epochs": 2}
    first, second = TeCoA(whole, **options), TeCoA(cut, **options, accumulate=pieces)
    first.fit(x, y)
    second.fit(x, y)
    for weight, other in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)
    for record, other_record in zip(first.history.steps, second.history.steps):
        assert record == pytest.approx(other_record, rel=1e-9)


@pytest.mark.parametrize("train", ["last_blocks:1", "layernorm", "head"])
def test_what_is_not_selected_stays_bit_for_bit(make_model: Make, train: str) -> None:
    model = make_model()
    before = weights_of(model)
    defense = TeCoA(model, **QUIET, lr=1e-2, batch_size=4, epochs=1, train=train)
    chosen = {id(weight) for weight in defense.trainable_parameters(train)}
    names = {name for name, weight in model.named_parameters() if id(weight) in chosen}
    defense.fit(*images_and_labels(4))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


def test_nothing_else_is_touched(tiny_model: ZeroShotClassifier, untouched: Callable[..., Any]) -> None:
    with untouched(tiny_model):
        TeCoA(tiny_model, show_progress=False, batch_size=4, epochs=1, validation=0.3).fit(*images_and_labels(12))


def test_adamw_and_bf16(make_model: Make) -> None:
    model, plain = make_model(), make_model()
    options = {**QUIET, "lr": 1e-3, "batch_size": 6, "epochs": 1, "optimizer": "adamw", "weight_decay": 0.1}
    seen: list[torch.dtype] = []
    attacked: list[torch.dtype] = []
    block = model.tower.transformer.resblocks[0].mlp.c_fc
    block.register_forward_hook(lambda m, i, out: (seen if m.weight.requires_grad else attacked).append(out.dtype))
    TeCoA(model, **options, bf16=True).fit(*images_and_labels(6))
    TeCoA(plain, **options).fit(*images_and_labels(6))
    assert set(seen) == {torch.bfloat16} and set(attacked) == {torch.float32}
    # AdamW's first step has size lr wherever the gradient is not tiny: bf16 noise flips few signs
    moved = [(a - b).abs().max() for a, b in zip(model.tower.parameters(), plain.tower.parameters())]
    assert max(moved) <= 2.01e-3 and any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    before = make_model()
    for name, weight in plain.tower.named_parameters():
        step = weight - dict(before.tower.named_parameters())[name] * (1 - 1e-3 * 0.1)
        assert step.abs().max() <= 1e-3 * 1.001


def test_loaders_arrays_and_datasets_train_alike(make_model: Make) -> None:
    """One batch an epoch: the sources differ in the order within it only."""
    x, y = images_and_labels(8, torch.float64)
    options = {**QUIET, "lr": 1e-3, "epochs": 1, "batch_size": 8}
    models = [make_model(dtype=torch.float64) for _ in range(5)]
    TeCoA(models[0], **options).fit(x.numpy(), np.eye(10)[y])
    TeCoA(models[1], **options).fit(TensorDataset(x, y))
    TeCoA(models[2], **options).fit_loader(DataLoader(TensorDataset(x, y), batch_size=8))
    TeCoA(models[3], **options).fit_loader([(x, y)])
    TeCoA(models[4], **options).fit_generator(NumpyDataGenerator(x.numpy(), y.numpy(), batch_size=8, shuffle=False))
    for model in models[1:]:
        for weight, other in zip(models[0].parameters(), model.parameters()):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)


def test_max_steps_ends_a_run(tiny_model: ZeroShotClassifier) -> None:
    defense = TeCoA(tiny_model, **QUIET, batch_size=4, epochs=9, max_steps=5)
    defense.fit(*images_and_labels(12))
    assert [record["epoch"] for record in defense.history.steps] == [1, 1, 1, 2, 2]
    assert defense.history.steps[-1]["lr"] < defense.history.steps[0]["lr"] / 5


def test_low_memory_gives_the_same_weights_for_one_more_forward_each(
    make_model: Callable[..., ZeroShotClassifier], images: Tensor, labels: Tensor
) -> None:
    models, passes = [make_model(), make_model()], [0, 0]
    for number, model in enumerate(models):

        def count(*_: Any, number: int = number) -> None:
            passes[number] += 1

        model.tower.register_forward_pre_hook(count)  # a recomputation ends once all that was saved is there again
        TwoPasses(model).fit(images[:6], labels[:6], low_memory=bool(number))
    for plain, recomputed in zip(models[0].tower.parameters(), models[1].tower.parameters()):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert passes == [4, 6]


def test_low_memory_counts_batch_statistics_once(images: Tensor) -> None:
    towers = []
    for low_memory in (False, True):
        torch.manual_seed(0)
        tower = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))
        model = ZeroShotClassifier(tower, torch.randn(4, 16), image_size=32)
        TwoPasses(model).fit(images[:6], torch.arange(6) % 4, low_memory=low_memory)
        towers.append(tower)
    for plain, recomputed in zip(towers[0].state_dict().values(), towers[1].state_dict().values()):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-7)
    assert int(towers[1][1].num_batches_tracked) == 2
