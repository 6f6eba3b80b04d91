"""The ensemble: who is attacked by what, which models it refuses, and how randomised ones are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdefense import ThreatModel, UsageError, ZeroShotClassifier, attacks
from clipdefense.attacks.autoattack import VERSIONS, stages_of
from clipdefense.attacks.context import predict
from clipdefense.attacks.options import Status
from clipdefense.defenses import Traits
from clipdefense.evaluation import evaluate
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


PAIR = "apgd-ce+apgd-dlr"


def test_stages_choose_the_attacks_and_the_version_says_how_they_run() -> None:
    chosen = [(name, options) for name, _, options in stages_of("standard", PAIR)]
    assert chosen == [("apgd-ce", {"steps": 100}), ("apgd-dlr", {"steps": 100})]
    assert stages_of("rand", PAIR) == VERSIONS["rand"]
    assert stages_of("standard", "apgd-ce + apgd-t+fab-t+square") == VERSIONS["standard"] == stages_of()
    assert stages_of(stages=("square", "apgd-ce"))[0][0] == "square"  # in the order that is asked for
    assert stages_of("rand", ["square"])[0][2] == {"queries": 5000, "eot": 20, "early_stop": False}
    assert stages_of(stages={"square": {"queries": 3}}) == VERSIONS["standard"]


def test_chosen_stages_are_the_two_attacks_one_on_what_the_other_left(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    """The published number of TeCoA, TGA-ZSR and TTC: what APGD-CE and APGD-DLR both leave standing."""
    threat, told = ThreatModel("linf", 0.5 / 255), list[Status]()
    together = attacks.autoattack(tiny_model, images, labels, threat, stages=PAIR, seed=3, progress=told.append)
    assert {status.stage for status in told} == {"apgd-ce", "apgd-dlr"}
    stand = predict(tiny_model, images).argmax(1) == labels
    expected, left = images.clone(), stand.nonzero()[:, 0]
    for name in ("apgd-ce", "apgd-dlr"):
        x_adv = attacks.run(name, tiny_model, images[left], labels[left], threat, seed=3, ids=left)
        broken = predict(tiny_model, x_adv).argmax(1) != labels[left]
        expected[left[broken]], left = x_adv[broken], left[~broken]
    assert torch.equal(together, expected) and 0 < len(left) < len(stand)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("apgd-ce+apgd_dlr", "stage of autoattack 'apgd_dlr' is unknown; did you mean 'apgd-dlr'"),
        ("a", "stage of autoattack 'a' is unknown"),
        ("apgd-ce+", r"stages is 'apgd-ce\+'; names of attacks joined by \+ are expected, such as 'apgd-ce\+apgd-dlr'"),
        ((), r"stages is \(\); names of attacks joined by \+ are expected"),
        (3, "stages is 3; names of attacks"),
        (["apgd-ce", 5], "names of attacks"),
        ("apgd-ce+apgd-ce", "has a name twice"),
    ],
)
def test_stages_that_cannot_be_are_named_before_anything_runs(
    stages: Any, message: str, images: Tensor, labels: Tensor
) -> None:
    class Unasked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model was asked")

    with pytest.raises(UsageError, match=message):
        stages_of("standard", stages)
    with pytest.raises(UsageError, match=message):
        attacks.autoattack(Unasked(), images, labels, THREAT, stages=stages)


def test_a_spec_names_stages(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    threat = ThreatModel("linf", 0.5 / 255)
    spec, alone = f"autoattack,stages={PAIR}", ("apgd-ce", "apgd-dlr")
    evaluation = evaluate(tiny_model, images, labels, threat, attacks=[*alone, spec], seed=3)
    ce, dlr, both = evaluation.rows
    assert both.attack == spec and both.correct.tolist() == (ce.correct & dlr.correct).tolist()
    assert 0 < both.accuracy < evaluation.clean.accuracy
