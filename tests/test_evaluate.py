"""The evaluation: who is attacked, what is judged, and how a randomised defence is counted."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.evaluation import AttackSpec, wilson
from clipdefense.evaluation.runner import literal
from clipdefense.randomness import draw_seed, uniform
from clipdefense_ttc.ttc import TTC

THREAT = cd.ThreatModel("linf", 2 / 255, steps=4)


class Shuffle(cd.InputDefense):
    """Noise alone: the smallest randomised defence, with a view."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return ((x + noise).clamp(0, 1) - x).detach()

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed) - 0.5) * 0.2

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, g: self.bpda(model, x, g), eot=3),)


class Blind(Shuffle):
    """The same without views: transfer only."""

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return ()


def test_a_model_by_itself(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    y = labels.clone()
    y[:3] = (y[:3] + 1) % 10  # three images are wrong from the start
    result = cd.evaluate(tiny_model, images, y, THREAT, attacks=["pgd", "apgd-ce,steps=5"], keep_adversarial=True)
    assert result.adaptive and result.n == 12
    assert result.clean.correct.tolist() == [[False] * 3 + [True] * 9]
    for row in result.rows:
        assert not row.correct[0, :3].any()
        assert row.adversarial is not None and torch.equal(row.adversarial[:3], images[:3])  # nothing to attack
        verdict = predict(tiny_model, row.adversarial).argmax(1) == y
        assert row.correct[0].tolist() == verdict.tolist()
        assert row.accuracy == pytest.approx(verdict.float().mean().item())
    worst = result.worst_case()
    both = result.rows[0].correct[0] & result.rows[1].correct[0]
    assert worst.correct[0].tolist() == both.tolist() and "transfer" not in worst.attack


def test_a_defence_is_judged_under_transfer_and_under_its_views(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    result = cd.evaluate(tiny_model, images, labels, THREAT, attacks=["pgd"], defense=Shuffle(), eot=2, verdict_seeds=4)
    assert [row.attacked for row in result.rows] == [
        "transfer from the undefended model",
        "adaptive view eot, 2 EOT draws",
    ]
    assert all(row.correct.shape == (4, 12) for row in (result.clean, *result.rows))
    survivors = np.concatenate([row.correct for row in (result.clean, *result.rows)]).all(axis=0)
    assert result.worst_case().correct[0].tolist() == survivors.tolist()
    assert result.rows[0].accuracy == pytest.approx(result.rows[0].correct.mean())


def test_transfer_images_are_the_undefended_models_and_go_through_all_steps(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    result = cd.evaluate(
        tiny_model, images, labels, THREAT, attacks=["pgd"], defense=Blind(), keep_adversarial=True, verdict_seeds=2
    )
    (row,) = result.rows
    right = torch.from_numpy(result.clean.correct.any(axis=0))
    expected = cd.attacks.pgd(
        tiny_model, images[right], labels[right], THREAT, ids=torch.arange(12)[right], early_stop=False
    )
    assert row.adversarial is not None
    torch.testing.assert_close(row.adversarial[right], expected, atol=0, rtol=0)
    assert not result.adaptive
    assert "transfer only" in result.worst_case().attack


def test_verdicts_are_repeatable_and_differ_between_seeds(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    options = {"attacks": ["pgd"], "verdict_seeds": 6}
    first = cd.evaluate(tiny_model, images, labels, THREAT, defense=Blind(), **options)
    again = cd.evaluate(tiny_model, images, labels, THREAT, defense=Blind(), **options, batch_size=5)
    assert first.clean.correct.tolist() == again.clean.correct.tolist()
    assert any((row.correct != row.correct[0]).any() for row in (first.clean, *first.rows))


def test_json_says_everything(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    result = cd.evaluate(tiny_model, images, labels, THREAT, attacks=["pgd"], defense=TTC(tiny_model), eot=1)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["eps"] == THREAT.eps and content["adaptive"] is True
    for entry in (content["clean"], *content["attacks"], content["worst_case"]):
        assert entry["n"] == 12 and len(entry["correct"]) == entry["verdict_seeds"]
        assert entry["interval_95"] == pytest.approx(list(wilson(entry["accuracy"], 12)))
        share = sum(seed.count("1") for seed in entry["correct"]) / (12 * entry["verdict_seeds"])
        assert entry["accuracy"] == pytest.approx(share)
    assert len(content["fingerprint"]["weights_sha256"]) == 64


def test_a_view_module_draws_afresh_and_repeats_by_seed(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    (view,) = Shuffle().adaptive(tiny_model)
    one, two = cd.ViewModule(view, tiny_model, seed=5), cd.ViewModule(view, tiny_model, seed=5)
    with torch.no_grad():
        a, b = one(images), one(images)
        assert not torch.equal(a, b)
        assert torch.equal(two(images), a) and torch.equal(two(images), b)
    assert draw_seed(torch.Generator().manual_seed(1)) == draw_seed(torch.Generator().manual_seed(1))


def test_attack_specs() -> None:
    spec = AttackSpec.parse("pgd, steps=100, objective=margin")
    assert (spec.name, spec.options) == ("pgd", (("steps", 100), ("objective", "margin")))
    assert str(spec) == "pgd,steps=100,objective=margin"
    _, threat, options = spec.bind(THREAT)
    assert threat.steps == 100 and options == {"objective": "margin"}
    _, threat, options = AttackSpec.parse("apgd-ce,steps=7").bind(THREAT)  # the attack's own steps
    assert threat == THREAT and options == {"steps": 7}
    assert [literal(text) for text in ("3", "0.5", "4/255", "true", "none", "margin", "1/0")] == [
        3,
        0.5,
        4 / 255,
        True,
        None,
        "margin",
        "1/0",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": []}, "attacks is empty"),
        ({"attacks": ["pgd,steps"]}, "name,key=value"),
        ({"attacks": ["pgd,step=5"]}, "option of attack 'pgd' 'step' is unknown; did you mean"),
        ({"attacks": ["pgdd"]}, "attack 'pgdd' is unknown; did you mean 'pgd'"),
        ({"attacks": ["pgd,steps=-1"]}, "steps is -1"),
        ({"verdict_seeds": 0}, "verdict_seeds is 0"),
        ({"eot": 0}, "eot 0"),
    ],
)
def test_bad_requests_stop_before_any_forward(
    change: dict[str, object], message: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    ran: list[int] = []
    tiny_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(cd.UsageError, match=message):
        cd.evaluate(tiny_model, images, labels, THREAT, **change)  # type: ignore[arg-type]
    assert not ran
