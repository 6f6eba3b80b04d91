"""PGD towards a target, and away from the clean embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipdefense import ThreatModel, UsageError, ZeroShotClassifier, attacks
from clipdefense.attacks.context import predict
from clipdefense.attacks.objectives import drift

THREAT = ThreatModel("linf", 8 / 255, step_size=2 / 255, steps=20)


@pytest.mark.parametrize("objective", ["ce", "margin", "dlr"])
def test_a_targeted_run_ends_at_its_target(
    objective: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    target = predict(tiny_model, images).topk(4).indices[:, 3]
    x_adv = attacks.pgd(tiny_model, images, labels, THREAT, target=target, objective=objective)
    assert (predict(tiny_model, x_adv).argmax(1) == target).float().mean() > 0.8


def test_a_targeted_run_goes_on_past_other_classes(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    # labels that are wrong from the start would end an untargeted run at once
    target = predict(tiny_model, images).topk(2).indices[:, 1]
    elsewhere = (labels + 1) % 10
    x_adv = attacks.pgd(tiny_model, images, elsewhere, THREAT, target=target)
    assert (predict(tiny_model, x_adv).argmax(1) == target).float().mean() > 0.8


def test_drift_needs_no_labels_and_moves_the_embedding(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    threat = ThreatModel("linf", 2 / 255, steps=8)
    options = {"objective": "drift", "seed": 3}
    first = attacks.pgd(tiny_model, images, torch.zeros(12, dtype=torch.long), threat, **options)
    second = attacks.pgd(tiny_model, images, torch.arange(12) % 10, threat, **options)
    assert torch.equal(first, second)
    with torch.no_grad():
        clean = tiny_model.embed(images)
        noise = (images + 2 / 255 * torch.randn_like(images).sign()).clamp(0, 1)
        moved, shaken = (drift(tiny_model.embed(z), torch.zeros(12), clean) for z in (first, noise))
    assert (moved > 4 * shaken).all()
    assert (first - images).abs().max() <= 2 / 255 + 1e-7 and first.min() >= 0 and first.max() <= 1


def test_drift_runs_in_bf16_too(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    x_adv = attacks.pgd(tiny_model, images, labels, THREAT, objective="drift", gradient_dtype="bf16")
    assert x_adv.dtype == torch.float32 and not torch.equal(x_adv, images)


def test_drift_goes_on_restarting_where_the_image_stands(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    one = attacks.pgd(tiny_model, images, labels, ThreatModel("linf", 1 / 255, steps=2), objective="drift")
    two = attacks.pgd(tiny_model, images, labels, ThreatModel("linf", 1 / 255, steps=2, restarts=2), objective="drift")
    broken = predict(tiny_model, one).argmax(1) != labels
    assert 0 < broken.sum() < 12
    same = (one == two).flatten(1).all(1)
    assert torch.equal(same, broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "drift", "random_start": False}, "no gradient at x itself"),
        ({"objective": "drift", "target": torch.zeros(12, dtype=torch.long)}, "given a target"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "target has 3 labels for 12 images"),
        ({"init": torch.zeros(1, 3, 32, 32)}, "init has shape"),
    ],
)
def test_bad_options(
    options: dict[str, object], message: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UsageError, match=message):
        attacks.pgd(tiny_model, images, labels, THREAT, **options)  # type: ignore[arg-type]


def test_drift_of_a_model_without_embeddings(images: Tensor, labels: Tensor) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with pytest.raises(UsageError, match="a Sequential without embed"):
        attacks.pgd(model, images, labels, THREAT, objective="drift")
