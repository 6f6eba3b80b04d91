"""The ensemble: who is attacked by what, which models it refuses, and how randomised ones are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdefense import ThreatModel, UsageError, ZeroShotClassifier, attacks
from clipdefense.attacks.autoattack import VERSIONS
from clipdefense.attacks.context import predict
from clipdefense.attacks.options import Status
from clipdefense.defenses import Traits
from clipdefense_art.native import EstimatorModule
from clipdefense_ttc.ttc import TTC

FEW: dict[str, dict[str, Any]] = {
    "apgd-ce": {"steps": 2},
    "apgd-t": {"steps": 4, "targets": 2},
    "fab-t": {"steps": 4, "targets": 2},
    "square": {"queries": 20},
}
RAND: dict[str, dict[str, Any]] = {"apgd-ce": {"steps": 3}, "apgd-dlr": {"steps": 3}}
THREAT = ThreatModel("linf", 0.6 / 255)


def test_the_published_ensemble() -> None:
    standard = {name: options for name, _, options in VERSIONS["standard"]}
    assert standard == {
        "apgd-ce": {"steps": 100},
        "apgd-t": {"steps": 100, "targets": 9},
        "fab-t": {"steps": 100, "targets": 9},
        "square": {"queries": 5000},
    }
    assert [(name, options["eot"]) for name, _, options in VERSIONS["rand"]] == [("apgd-ce", 20), ("apgd-dlr", 20)]


def test_each_stage_gets_what_the_ones_before_left_standing(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    told: list[Status] = []
    y = labels.clone()
    y[0] = (y[0] + 1) % 10  # wrong from the start
    x_adv = attacks.autoattack(tiny_model, images, y, THREAT, stages=FEW, progress=told.append, seed=1)
    standing = predict(tiny_model, images).argmax(1) == y
    for name, function, _ in VERSIONS["standard"]:
        stage = [status for status in told if status.stage.startswith(name)]
        assert stage[0].total == int(standing.sum())
        alone = function(
            tiny_model, images[standing], y[standing], THREAT, seed=1, ids=torch.arange(12)[standing], **FEW[name]
        )
        broken = predict(tiny_model, alone).argmax(1) != y[standing]
        rows = standing.nonzero()[:, 0]
        assert torch.equal(x_adv[rows[broken]], alone[broken])
        standing[rows[broken]] = False
    assert 0 < standing.sum() < 11
    # what nothing broke, and what was wrong from the start, comes back as it came
    untouched = standing.clone()
    untouched[0] = True
    assert torch.equal(x_adv[untouched], images[untouched])


def test_never_more_optimistic_than_a_part(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    whole = predict(tiny_model, attacks.autoattack(tiny_model, images, labels, THREAT, stages=FEW)).argmax(1) == labels
    for name, options in FEW.items():
        part = predict(tiny_model, attacks.run(name, tiny_model, images, labels, THREAT, **options)).argmax(1) == labels
        assert not (whole & ~part).any() or name != "apgd-ce"
        assert whole.sum() <= part.sum()


class Noisy(nn.Module):
    """A classifier whose logits jitter by themselves."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + self.scale * torch.randn(logits.shape, generator=self.generator)


class Declared(nn.Module):
    """It says that it is random, and looks as if it were not."""

    traits = Traits(randomized=True)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_standard_refuses_what_is_or_calls_itself_random(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    for model, reason in [
        (Noisy(tiny_model, 0.1), "gives other logits when asked again"),
        (Declared(tiny_model), "is declared randomised"),
        (nn.Sequential(Declared(tiny_model)), "is declared randomised"),
        (TTC(tiny_model).wrap(tiny_model), "is declared randomised"),
    ]:
        with pytest.raises(UsageError, match=f"model {reason}.*version='rand'"):
            attacks.autoattack(model, images, labels, THREAT, stages=FEW)


def test_standard_refuses_an_art_estimator_with_a_random_defence(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    from clipdefense import CLIPClassifier

    estimator = CLIPClassifier(tiny_model, preprocessing_defences=[TTC(tiny_model, eps=0.0)])
    with pytest.raises(UsageError, match="is declared randomised"):
        attacks.autoattack(EstimatorModule(estimator), images, labels, THREAT, stages=FEW)


def test_rand_judges_by_most_of_several_draws(images: Tensor) -> None:
    class Flips(nn.Module):
        """Wrong on one draw in three, whatever the pixels."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            score = x.flatten(1).mean(1) * 1e-4 + (1.0 if self.calls % 3 == 0 else -1.0)
            return torch.stack([torch.zeros_like(score), score], dim=1)

    y = torch.zeros(len(images), dtype=torch.long)
    x_adv = attacks.autoattack(Flips(), images, y, THREAT, version="rand", eot=1, verdict_draws=3, stages=RAND)
    assert torch.equal(x_adv, images)  # nothing was ever broken


def test_rand_breaks_a_random_model_and_repeats_itself(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    defense = TTC(tiny_model, eps=1 / 255, steps=0)

    def attack() -> Tensor:
        threat = ThreatModel("linf", 4 / 255)
        return attacks.autoattack(
            defense.wrap(tiny_model), images, labels, threat, version="rand", eot=2, verdict_draws=3, stages=RAND
        )

    x_adv = attack()
    moved = (x_adv != images).flatten(1).any(1)
    assert moved.sum() > 6
    wrong = [predict(defense.wrap(tiny_model), x_adv[moved]).argmax(1) != labels[moved] for _ in range(5)]
    assert torch.stack(wrong).float().mean() > 0.8
    assert torch.equal(attack(), x_adv)  # although the defence has counted on meanwhile


def test_probabilities_warn(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    model = nn.Sequential(tiny_model, nn.Softmax(dim=1))
    with pytest.warns(attacks.AttackWarning, match="probabilities.*return logits"):
        attacks.autoattack(model, images, labels, ThreatModel("linf", 0.0))


def test_bad_options(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    for options, message in [
        ({"version": "plus"}, "version 'plus' is unknown"),
        ({"stages": {"apgd_t": {}}}, "'apgd_t' is unknown; did you mean 'apgd-t'"),
        ({"stages": {"apgd-dlr": {}}}, "'apgd-dlr' is unknown"),
        ({"verdict_draws": 0}, "verdict_draws is 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            attacks.run("autoattack", tiny_model, images, labels, THREAT, **options)
