"""TGA-ZSR and Comp-TGA in a fit: updates by hand, resumes, what training does to the maps, CUDA."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.runtime import derive_seed
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
    attention_model_constraint_loss,
)

from .helpers import DOUBLE, METHODS, QUIET, Make, trainer

# Updates -------------------------------------------------------------------------------------------------------------


@METHODS
def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(method: type[TGAZSR], make_vit: Make) -> None:
    x, y = torch.rand(1, 3, 32, 32), torch.tensor([3])
    trained, plain = make_vit(), make_vit()
    trainer(method, trained, lr=1e-3, batch_size=1, epochs=1, warmup_steps=0).fit(x, y)

    by_hand = trainer(method, plain)
    by_hand.begin()
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(False)
    seed, ids = derive_seed(0, "attack", 0), torch.arange(1)
    x_adv = pgd(plain, x, y, by_hand.threat, early_stop=False, seed=seed, ids=ids)
    for weight in weights:
        weight.requires_grad_(True)
    terms = by_hand.losses({"x": x, "x_adv": x_adv, "y": y})
    gradients = torch.autograd.grad(sum(terms.values()), weights)
    for trained_weight, weight, gradient in zip(trained.tower.parameters(), weights, gradients):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-3))


@METHODS
def test_recomputing_and_cutting_make_the_same_update(method: type[TGAZSR], make_vit: Make, images: Tensor) -> None:
    runs = []
    for options in ({}, {"low_memory": True}, {"accumulate": 2}):
        model = make_vit(dtype=DOUBLE)
        defense = trainer(method, model, lr=1e-3, batch_size=6, epochs=2, warmup_steps=0, **options)
        defense.fit(images[:6].double(), torch.arange(6))
        runs.append((model, defense.history.steps))
    for model, steps in runs[1:]:
        for weight, other in zip(model.parameters(), runs[0][0].parameters()):
            torch.testing.assert_close(weight, other, rtol=1e-8, atol=1e-11)
        for record, other_record in zip(steps, runs[0][1]):
            assert record == pytest.approx(other_record, rel=1e-8, abs=1e-10)


class Stopped(Exception):
    pass


def test_a_resume_compares_with_the_original_tower(make_vit: Make, images: Tensor, tmp_path: Path) -> None:
    class Interrupted(TGAZSR):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            if len(self.history.steps) == 3 and not self.config.resume:  # type: ignore[union-attr]
                raise Stopped
            return super().losses(batch)

    options = {**QUIET, "lr": 1e-2, "batch_size": 6, "epochs": 2, "warmup_steps": 0, "checkpoint_every": 1}
    x, y = images, torch.arange(12) % 10
    whole, broken = make_vit(), make_vit()
    TGAZSR(whole, **options).fit(x, y)
    with pytest.raises(Stopped):
        Interrupted(broken, **options, checkpoint=str(tmp_path)).fit(x, y)
    again = make_vit()
    Interrupted(again, **options, checkpoint=str(tmp_path), resume=True).fit(x, y)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters()))
    with pytest.raises(UsageError, match=r"differs in 1 of its settings: hyper_parameters\.alpha is 0\.2, was 0\.08"):
        TGAZSR(make_vit(), **options, alpha=0.2, checkpoint=str(tmp_path), resume=True).fit(x, y)


@METHODS
def test_training_learns_the_images_and_keeps_the_head(method: type[TGAZSR], vit: ZeroShotClassifier) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8)
    options: dict[str, Any] = {"lr": 2e-4, "batch_size": 8, "epochs": 8, "warmup_steps": 0}
    defense = trainer(method, vit, **options)
    head = {name: value.clone() for name, value in vit.head.state_dict().items()}
    defense.fit(x, y)
    first, last = defense.history.steps[0], defense.history.steps[-1]
    assert last["ce"] < first["ce"] - 1
    assert all(torch.equal(value, head[name]) for name, value in vit.head.state_dict().items())


def test_the_attention_terms_hold_the_maps(make_vit: Make) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8)
    options: dict[str, Any] = {"lr": 2e-4, "batch_size": 8, "epochs": 8, "warmup_steps": 0}
    distances = {}
    for weight in (0.0, 0.05):
        model = make_vit()
        original = copy.deepcopy(model)
        defense = TGAZSR(model, **QUIET, **options, alpha=0, beta=weight)
        defense.fit(x, y)
        with torch.no_grad():
            maps = [defense.attention(m.embed_tokens(x), y) for m in (model, original)]
        distances[weight] = float(attention_model_constraint_loss(*maps))
    assert distances[0.05] < 0.8 * distances[0.0]


def test_bf16_and_other_parts_of_the_tower(vit: ZeroShotClassifier, images: Tensor) -> None:
    defense = TGAZSR(vit, **QUIET, lr=1e-3, batch_size=6, epochs=2, bf16=True, train="last_blocks:1")
    first = vit.tower.visual.conv1.weight.clone()
    defense.fit(images, torch.arange(12) % 10)
    assert all(math.isfinite(record["loss"]) for record in defense.history.steps)
    assert torch.equal(vit.tower.visual.conv1.weight, first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@METHODS
def test_repeats_bit_for_bit_on_cuda(method: type[TGAZSR], make_vit: Make, images: Tensor) -> None:
    runs = []
    for _ in range(2):
        model = make_vit()
        options: dict[str, Any] = {"lr": 1e-3, "batch_size": 12, "epochs": 3, "device": "cuda", "deterministic": True}
        trainer(method, model, **options).fit(images, torch.arange(12) % 10)
        runs.append(model)
    assert all(torch.equal(one, other) for one, other in zip(runs[0].parameters(), runs[1].parameters()))
