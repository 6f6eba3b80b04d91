"""AutoAttack through views, and what an adaptive evaluation costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks import Status
from clipdefense.attacks.adaptive import passes
from clipdefense.evaluation.cost import spell
from clipdefense.evaluation.results import Evaluation

from .helpers import Blind, Nothing, Shuffle


class TestAutoAttackThroughViews:
    def test_rand_completes(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        short = {name: {"steps": 1} for name in ("apgd-ce", "apgd-dlr")}
        spec = cd.evaluation.AttackSpec("autoattack", (("version", "rand"), ("stages", short)))
        ttc = cd.get_defense("ttc")(tiny_model)
        result = run(attacks=[spec], defense=ttc, eot=2, adaptive=False)
        names = [view.name for view in ttc.adaptive(tiny_model)]
        assert [row.attacked for row in result.rows[1:]] == [f"adaptive view {name}, 2 EOT draws" for name in names]
        assert all(row.correct.shape == (5, 6) for row in result.rows)

    def test_the_deployed_model_says_what_is_broken(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        """A view that calls every image wrong would have the ensemble attack none, or hand each back as it came."""

        class Pessimist(Nothing):
            def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
                return (cd.AttackView("wrong", lambda x, ids, seed: shifted(model(x))),)

        def shifted(logits: Tensor) -> Tensor:
            """Another class on top, whatever the image: the gradient leads towards the second of the real ones."""
            constant = logits.detach().amax(dim=1, keepdim=True) + 1
            return torch.cat([logits, constant], dim=1)

        stages = {"square": {"queries": 1}, "fab-t": {"steps": 1}, "apgd-t": {"steps": 1}, "apgd-ce": {"steps": 20}}
        spec = cd.evaluation.AttackSpec("autoattack", (("stages", stages),))
        big = cd.ThreatModel("linf", 16 / 255)
        result = run(attacks=[spec], defense=Pessimist(), adaptive=False, threat=big, keep_adversarial=True)
        view = result.rows[1]
        assert view.kind == "view" and view.accuracy == 0.0

    def test_standard_on_a_randomised_defence_stops_at_once(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        with pytest.raises(cd.UsageError, match=r"declared randomised; write autoattack,version=rand"):
            run(attacks=["autoattack"], defense=Shuffle())
        run(attacks=["autoattack,version=rand", "pgd"], defense=Blind(), adaptive=False, views=[])


class TestTime:
    def test_every_attack_is_told_from_its_start_to_its_end(self, run: Callable[..., Evaluation]) -> None:
        told: list[Status] = []
        text: list[str] = []
        result = run(defense=Shuffle(), watch=told.append, progress=text.append, name="noise")
        estimate, *begun = text
        assert estimate.startswith("noise: about ") and "for 7 attacks on 6 images; slowest: " in estimate
        assert begun == [f"noise: {row.attack} on {row.attacked}" for row in result.rows]
        for row in result.rows:
            steps = [status for status in told if status.stage == f"{row.attack} on {row.attacked}"]
            done = [status.done for status in steps]
            assert done[0] == 0 and done[-1] == steps[-1].total and done == sorted(done), row.attacked
            assert all(0 <= status.done <= status.total for status in steps)
            if row.kind in ("view", "own gradient"):  # no image leaves before the end, and still it moves
                assert any(0 < value < steps[-1].total for value in done), row.attacked
                assert all(status.seconds_left >= 0 for status in steps)

    def test_what_cannot_be_counted_is_named(self, run: Callable[..., Evaluation]) -> None:
        text: list[str] = []
        run(
            attacks=["art:FastGradientMethod", "pgd,steps=1"],
            defense=Shuffle(),
            adaptive=False,
            watch=lambda status: None,
            progress=text.append,
        )
        assert text[0].endswith("not counted: art:FastGradientMethod")

    def test_passes_of_an_attack(self) -> None:
        twice = cd.ThreatModel("linf", 1 / 255, steps=7, restarts=2)
        stages = {"square": {"queries": 7}, "apgd-t": {"targets": 1}}
        counted: list[tuple[str, dict[str, Any], tuple[int, int, int] | None]] = [
            ("pgd", {}, (14, 0, 1)),
            ("apgd-ce", {}, (101, 0, 1)),
            ("apgd-ce", {"restarts": 5}, (505, 0, 1)),
            ("apgd-t", {"steps": 5, "targets": 2}, (12, 0, 1)),
            ("apgd-t", {}, (303, 0, 1)),
            ("fab-t", {"steps": 5}, (15, 15, 1)),
            ("square", {"queries": 9}, (0, 9, 1)),
            ("autoattack", {}, (101 + 303 + 300, 300 + 5000, 1)),
            ("autoattack", {"version": "rand"}, (202, 0, 20)),
            ("autoattack", {"stages": "apgd-dlr+square"}, (101, 5000, 1)),
            ("autoattack", {"stages": stages}, (101 + 101 + 300, 300 + 7, 1)),
            ("art:DeepFool", {}, None),
        ]
        for name, options, count in counted:
            assert passes(name, twice, options, classes=4) == count, (name, options)
        assert [spell(seconds) for seconds in (0.2, 42, 130, 5399, 9000)] == ["1 s", "42 s", "2 min", "90 min", "2.5 h"]
