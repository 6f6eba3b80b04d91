"""The evaluation: who is attacked, what is judged, and how a randomised defence is counted."""

from __future__ import annotations

import json
from typing import Any, ClassVar

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
        return (cd.AttackView("eot", lambda x, ids, seed: self.bpda(model, x, ids, seed), eot=3),)


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


def test_cumulative_rows_count_what_is_left(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    weak, strong = "pgd,steps=1,step_size=0.001", "pgd,steps=8"
    options = {"attacks": [weak, strong], "keep_adversarial": True}
    alone = cd.evaluate(tiny_model, images, labels, THREAT, **options)
    result = cd.evaluate(tiny_model, images, labels, THREAT, **options, cumulative=True)
    first, second = result.rows
    assert first.correct.tolist() == alone.rows[0].correct.tolist()
    assert 0 < first.correct.sum() < len(images)
    assert not (second.correct & ~first.correct).any()
    assert (second.attack, first.attack) == (f"+ {strong}", weak)
    left = torch.from_numpy(first.correct[0])
    assert second.adversarial is not None and torch.equal(second.adversarial[~left], images[~left])
    assert result.worst_case().correct.tolist() == alone.worst_case().correct.tolist()


def test_views_are_chosen_by_name(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    ttc = TTC(tiny_model)
    options = {"attacks": ["pgd,steps=1"], "defense": ttc, "eot": 1, "verdict_seeds": 1}
    result = cd.evaluate(tiny_model, images, labels, THREAT, views=["smoothed"], **options)
    assert [row.attacked for row in result.rows][1:] == ["adaptive view smoothed"]
    with pytest.raises(cd.UsageError, match="view 'smooth' is unknown; did you mean 'smoothed'"):
        cd.evaluate(tiny_model, images, labels, THREAT, views=["smooth"], **options)
    nothing = cd.evaluate(tiny_model, images, labels, THREAT, views=[], **options)
    assert not nothing.adaptive


def test_a_view_does_not_decide_that_an_image_is_broken(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    """A view that calls everything wrong is only a stand-in: the images go through all steps all the same."""

    class Pessimist(Shuffle):
        def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
            return (cd.AttackView("inverted", lambda x, ids, seed: passes.append(len(x)) or -model(x), eot=2),)  # type: ignore[func-returns-value]

    passes: list[int] = []
    result = cd.evaluate(tiny_model, images, labels, THREAT, attacks=["pgd"], defense=Pessimist(), verdict_seeds=1)
    assert sum(passes) == result.clean.correct.sum() * 2 * THREAT.steps


def test_disjoint_parts_join(tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    options = {"attacks": ["pgd"], "keep_adversarial": True}
    ids = torch.arange(12)
    whole = cd.evaluate(tiny_model, images, labels, THREAT, ids=ids, **options)
    halves = [
        cd.evaluate(tiny_model, images[part], labels[part], THREAT, ids=ids[part], **options)
        for part in (slice(0, 5), slice(5, 12))
    ]
    joined = cd.evaluation.Evaluation.joined(halves)
    assert joined.ids == whole.ids and joined.n == 12
    assert joined.rows[0].correct.tolist() == whole.rows[0].correct.tolist()
    assert joined.rows[0].adversarial is not None and joined.rows[0].adversarial.shape == images.shape
    with pytest.raises(cd.UsageError, match="share images"):
        cd.evaluation.Evaluation.joined([halves[0], halves[0]])


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
        ({"eot": 0}, "eot is 0"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ESTIMATOR"}, "model is a CLIPClassifier; a torch module, .* is expected; pass its .model"),
        ({"threat": "linf"}, "threat is 'linf'; a ThreatModel is expected"),
        ({"defense": "ttc"}, r"defense is 'ttc'; an object is expected, such as get_defense\('NAME'\)\(model\)"),
        ({"defense": Shuffle}, "defense is Shuffle; an object is expected"),
        ({"views": ["eot"]}, r"views is \['eot'\], but no defence is judged"),
        ({"eot": 3}, "eot is 3, but no defence is judged"),
        ({"verdict_seeds": 0}, "verdict_seeds is 0; a whole number of at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0; a whole number of at least 1"),
        ({"attacks": "pgd"}, r"attacks is the string 'pgd'; a list is expected, such as \['pgd'\]"),
    ],
)
def test_what_is_not_where_it_belongs_is_named(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor, changes: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"model": tiny_model, "x": images, "y": labels, "threat": THREAT} | changes
    if given["model"] == "ESTIMATOR":
        given["model"] = cd.CLIPClassifier(tiny_model)
    with pytest.raises(cd.UsageError, match=message):
        cd.evaluate(**given)


def test_the_result_says_which_defence_was_judged_and_how(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    defense = cd.get_defense("ttc")(tiny_model, steps=1, threshold=0.3, reference=tiny_model)
    settings: dict[str, Any] = {"attacks": ["pgd,steps=1"], "eot": 1, "verdict_seeds": 2, "views": ["bpda-eot"]}
    facts = cd.evaluate(tiny_model, images, labels, THREAT, defense=defense, seed=3, **settings).fingerprint
    assert json.loads(json.dumps(facts)) == facts
    said = facts["defense"]
    assert said["class"] == "clipdefense_ttc.ttc.TTC"
    assert (said["steps"], said["threshold"], said["eps"], said["benign"]) == (1, 0.3, 4 / 255, "noise")
    assert said["reference_sha256"] == facts["weights_sha256"]
    assert facts["views"] == {"bpda-eot": 1} and facts["verdict_seeds"] == [3, 4]
    assert facts["attacked_at"] == list(images.shape[2:]) and facts["cumulative"] is False
    assert cd.evaluate(tiny_model, images, labels, THREAT, attacks=["pgd,steps=1"]).fingerprint["defense"] is None


def test_a_row_does_not_depend_on_the_attacks_before_it(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    def adaptive_row(*attacks: str) -> Tensor | None:
        settings: dict[str, Any] = {"attacks": attacks, "defense": Shuffle(), "keep_adversarial": True}
        return cd.evaluate(tiny_model, images, labels, THREAT, **settings).rows[-1].adversarial

    alone, after = adaptive_row("apgd-ce,steps=3"), adaptive_row("pgd,steps=2", "apgd-ce,steps=3")
    assert alone is not None and after is not None and torch.equal(alone, after)
