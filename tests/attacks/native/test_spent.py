"""Evaluations an image: what an attack says it spent is what went through the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.doubts import Doubts
from clipdefense.attacks.options import attack, takes_doubts
from clipdefense.plugins import get_attack

OPTIONS = {
    "pgd": {},
    "apgd-ce": {"steps": 5},
    "apgd-dlr": {"steps": 5},
    "apgd-t": {"steps": 4, "targets": 2},
    "fab-t": {"steps": 4, "targets": 2},
    "square": {"queries": 12},
}


def passed(model: nn.Module) -> list[int]:
    """Images of each forward from here on."""
    counts: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    return counts


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_spent_is_what_passed(
    name: str, early_stop: bool, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    function, spent, threat = get_attack(name), Doubts(), cd.ThreatModel("linf", 2 / 255, steps=4)
    # no evaluations of the attack's: the clean image, to choose targets by, and where no image leaves, which of them
    # each target broke
    looks = (1 if early_stop else 3) if name in ("apgd-t", "fab-t") else 0
    ids = torch.arange(12).flip(0) * 3
    counts = passed(tiny_model)
    function(
        tiny_model, images, labels, threat, ids=ids, batch_size=5, doubts=spent, early_stop=early_stop, **OPTIONS[name]
    )
    steps = spent.steps(ids)
    assert int(steps.sum()) + looks * len(images) == sum(counts)
    if early_stop and name == "pgd":
        assert int(steps.min()) < int(steps.max())
    if not early_stop:
        assert len(set(steps.tolist())) == 1
    assert spent.steps(torch.tensor([1, 9, 0])).tolist() == [0, int(steps[8]), int(steps[11])]


def test_only_this_librarys_own_kind_can_be_asked(tiny_model: cd.ZeroShotClassifier) -> None:
    @attack
    def nothing(model: nn.Module, x: Tensor, y: Tensor, threat: cd.ThreatModel, **options: object) -> Tensor:
        return x

    assert takes_doubts(nothing) and takes_doubts(get_attack("autoattack"))
    assert not takes_doubts(lambda model, x, y, threat: x)


def test_a_row_says_what_its_attack_spent(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    y = labels.clone()
    y[:3] = (y[:3] + 1) % 10
    threat = cd.ThreatModel("linf", 4 / 255, steps=6)
    options = {"attacks": ["pgd,random_start=false"], "ids": torch.arange(12) + 5}
    (row,) = cd.evaluate(tiny_model, images, y, threat, **options).rows
    assert row.steps is not None and row.steps[:3].tolist() == [0, 0, 0]
    # an image falls at the evaluation at which it is first seen misclassified: so do that many steps and no fewer
    for index in range(3, 12):
        one, label = images[index : index + 1], y[index : index + 1]
        for steps in range(row.steps[index] - 1, row.steps[index]):
            less = cd.ThreatModel("linf", 4 / 255, threat.alpha, steps)
            x_adv = cd.attacks.pgd(tiny_model, one, label, less, random_start=False)
            fell = bool((predict(tiny_model, x_adv).argmax(dim=1) != label).item())
            assert fell == (not row.correct[0, index])
