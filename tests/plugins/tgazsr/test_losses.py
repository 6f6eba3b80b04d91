"""The losses of a batch: what they are made of, how many passes they cost, their gradients, constant maps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.training.guard import DivergedError
from clipdefense.training.parameters import training_only
from clipdefense_tgazsr.comptga import CompTGA
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
    attention_map,
    map_distance,
)

from .helpers import DOUBLE, METHODS, QUIET, Make, batch_of, colours, negatives, trainer

# The losses of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "released"])
def test_losses_are_made_of_the_public_functions(vit: ZeroShotClassifier, images: Tensor, variant: str) -> None:
    defense = TGAZSR(vit, variant=variant, alpha=0.3, beta=0.7)
    original = copy.deepcopy(vit)
    defense.begin()
    with torch.no_grad():
        for weight in vit.tower.parameters():
            weight += 0.02 * torch.randn_like(weight)
        batch = batch_of(images)
        x, x_adv, y = batch["x"], batch["x_adv"], batch["y"]
        size, per_pixel = (224, False) if variant == "released" else (32, True)

        def M(model: ZeroShotClassifier, x: Tensor) -> Tensor:
            pooled, tokens = model.embed_tokens(x)
            every = torch.cat([pooled[:, None], tokens], dim=1)
            S = torch.einsum("npd,nd->np", every / every.norm(dim=1, keepdim=True), vit.head.anchors[y])[:, 1:]
            S = (S - S.amin(1, True)) / (S.amax(1, True) - S.amin(1, True))
            return F.interpolate(S.view(-1, 1, 4, 4), (size, size), mode="bilinear")[:, 0]

        terms = defense.losses(batch)
        expected = {
            "ce": F.cross_entropy(vit(x_adv), y),
            "ar": 0.3 * map_distance(M(vit, x_adv), M(original, x), per_pixel=per_pixel),
            "amc": 0.7 * map_distance(M(vit, x), M(original, x), per_pixel=per_pixel),
        }
    assert list(terms) == list(expected)
    for name, value in terms.items():
        assert value.dim() == 0
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_comp_tga_compares_the_products(vit: ZeroShotClassifier, images: Tensor) -> None:
    given = negatives()
    defense = CompTGA(vit, negative_embeddings=given)
    defense.begin()
    torch.testing.assert_close(defense.negative_anchors, F.normalize(given, dim=1))
    y = torch.tensor([3, 1, 4])
    with torch.no_grad():
        embeddings = vit.embed_tokens(images[:3])
        maps = [
            attention_map(embeddings, anchors[y], (4, 4), 32, antialias=antialias)
            for antialias in (False, True)
            for anchors in (vit.head.anchors, F.normalize(given, dim=1))
        ]
        A = defense.attention(embeddings, y)
    torch.testing.assert_close(A, maps[0] * (1 - maps[1]))
    torch.testing.assert_close(maps[:2], maps[2:])  # antialiasing changes nothing when enlarging
    assert not torch.allclose(A, TGAZSR.attention(defense, embeddings, y), atol=0.1)


@pytest.mark.parametrize(
    ("weights", "student", "original", "names"),
    [
        ({}, 2, 1, ["ce", "ar", "amc"]),
        ({"beta": 0}, 1, 1, ["ce", "ar"]),
        ({"alpha": 0}, 2, 1, ["ce", "amc"]),
        ({"alpha": 0, "beta": 0}, 1, 0, ["ce"]),
    ],
)
@METHODS
def test_each_image_set_is_encoded_once(
    method: type[TGAZSR],
    weights: dict[str, float],
    student: int,
    original: int,
    names: list[str],
    vit: ZeroShotClassifier,
    images: Tensor,
) -> None:
    defense = trainer(method, vit, **weights)
    defense.begin()
    assert defense.frozen is not None
    passes: list[nn.Module] = []
    for model in (vit, defense.frozen):
        model.tower.visual.conv1.register_forward_hook(lambda module, *_: passes.append(module))
    assert list(defense.losses(batch_of(images))) == names
    assert passes.count(vit.tower.visual.conv1) == student
    assert passes.count(defense.frozen.tower.visual.conv1) == original


@METHODS
@pytest.mark.parametrize("train", ["tower", "last_blocks:1", "layernorm"])
def test_the_clean_maps_start_out_equal(
    method: type[TGAZSR], train: str, vit: ZeroShotClassifier, images: Tensor
) -> None:
    """To the last bit: a difference of rounding would have a gradient as long as any."""
    defense = trainer(method, vit)
    with training_only(vit, defense.trainable_parameters(train)):
        defense.begin()
        term = defense.losses(batch_of(images))["amc"]
        weights = [weight for weight in vit.tower.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(term, weights, allow_unused=True)
        assert defense.frozen is not None and all(weight.grad is None for weight in defense.frozen.parameters())
    assert float(term.detach()) == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@METHODS
@pytest.mark.parametrize("variant", ["default", "released"])
def test_gradient_through_the_model_agrees_with_finite_differences(
    method: type[TGAZSR], variant: str, make_vit: Make, images: Tensor
) -> None:
    model = make_vit(dtype=DOUBLE)
    defense = trainer(method, model, variant=variant)
    defense.begin()
    (weight,) = defense.trainable_parameters("head")
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)  # away from where L_AMC has a kink
    batch = batch_of(images.double())
    (gradient,) = torch.autograd.grad(sum(defense.losses(batch).values()), weight)
    direction, step, values = torch.randn_like(weight), 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(sum(defense.losses(batch).values())))
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_fit_with_constant_maps() -> None:
    """Grey images have no structure: the original tower's maps are constant."""
    x, y = torch.full((4, 3, 32, 32), 0.5), torch.tensor([0, 1, 2, 0])
    model, threat = colours((8, 8)), cd.ThreatModel("linf", eps=4 / 255, step_size=1 / 255, steps=1)
    defense = TGAZSR(model, threat=threat, **QUIET, batch_size=4, epochs=2, lr=1e-3, warmup_steps=0)
    defense.fit(x, y)
    assert [record["amc"] for record in defense.history.steps] == [0, 0]
    assert all(math.isfinite(record["gradient_norm"]) and record["ar"] > 0 for record in defense.history.steps)

    model = colours((8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match="training stopped at step 1: ar is nan; the weights are as they came"):
        TGAZSR(model, variant="released", **QUIET, batch_size=4, epochs=2).fit(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
