"""Restarts: fresh starts for what still stands, and options that would mean nothing are refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.doubts import Doubts
from clipdefense.evaluation import AttackSpec
from clipdefense.plugins import get_attack

THREAT = cd.ThreatModel("linf", 1.5 / 255)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_each_restart_attacks_what_stands_from_another_start(
    name: str, early_stop: bool, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    attack, ids = get_attack(name), torch.arange(12)
    options = {"steps": 3, "early_stop": early_stop}
    spent = [Doubts() for _ in range(4)]
    found = [
        attack(tiny_model, images, labels, THREAT, ids=ids, restarts=count, doubts=spent[count], **options)
        for count in range(1, 4)
    ]
    stands = [predict(tiny_model, x_adv).argmax(dim=1) == labels for x_adv in found]
    for fewer, more in pairwise(stands):
        assert not (more & ~fewer).any()  # no restart gives back what another broke
    for count in range(2, 4):
        before, after = found[count - 2], found[count - 1]
        assert torch.equal(after[~stands[count - 2]], before[~stands[count - 2]])
        again = spent[count].steps(ids) - spent[count - 1].steps(ids)
        assert again[~stands[count - 2]].sum() == 0 and (again[stands[count - 2]] > 0).all()
        assert (after != before).flatten(1).any(dim=1)[stands[count - 2]].all()  # and it was another start
    assert (found[2] - images).abs().max() <= THREAT.eps + 1e-6
    alone = attack(tiny_model, images[3:5], labels[3:5], THREAT, ids=ids[3:5], restarts=3, **options)
    torch.testing.assert_close(alone, found[2][3:5], atol=1e-6, rtol=0)


def test_restarts_are_a_whole_number(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(cd.UsageError, match="restarts is 0; a whole number of at least 1"):
        get_attack("apgd-ce")(tiny_model, images, labels, THREAT, restarts=0)


@pytest.mark.parametrize(
    "text", ["autoattack,steps=10", "square,restarts=3", "fab-t,step_size=1/255", "apgd-t,restarts=2"]
)
def test_an_option_that_would_change_nothing_is_refused(text: str) -> None:
    name, _, option = text.partition(",")
    with pytest.raises(cd.UsageError, match=f"option of attack '{name}' '{option.partition('=')[0]}' is unknown"):
        AttackSpec.parse(text).bind(THREAT)
    assert AttackSpec.parse("pgd,restarts=3").bind(THREAT)[1].restarts == 3
    assert AttackSpec.parse("apgd-ce,restarts=3").bind(THREAT)[2] == {"restarts": 3}
