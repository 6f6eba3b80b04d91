"""Adaptive evaluation: everything that knows the defence is tried, and no transfer number stands alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks import AttackWarning
from clipdefense.attacks.adaptive import Adaptive, EmbeddingTarget
from clipdefense.attacks.context import predict
from clipdefense.evaluation import report
from clipdefense.evaluation.results import Evaluation

from .helpers import SUITE, THREAT, Blind, Nothing, Shuffle


class Steps(nn.Module):
    """A model that rounds its input: no gradient in its forward, and a view that says where it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 255).round() / 255)

    def adaptive(self) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("unrounded", lambda x, ids, seed: self.model(x)),)


def page_of(result: Evaluation, tmp_path: Path) -> str:
    report.write_html(tmp_path / "page.html", report.Page("title", [], [result]))
    return (tmp_path / "page.html").read_text()


def table_of(result: Evaluation) -> list[list[str]]:
    """The cells of the table, and what stands under it as one last row."""
    console = Console(width=200, file=io.StringIO(), no_color=True)
    console.print(report.table([result]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    return [*rows, [" ".join(line.strip() for line in lines if line[:1] not in "│┏┃┡└├" and line.strip())]]


def test_everything_that_knows_the_defence_is_tried(run: Callable[..., Evaluation]) -> None:
    result = run(defense=Shuffle())
    assert [(row.attack, row.attacked, row.kind, row.draws) for row in result.rows] == [
        ("pgd", "transfer from the undefended model", "transfer", 1),
        ("pgd", "adaptive view eot, 2 EOT draws", "view", 2),
        ("pgd", "defended model, straight-through gradient (BPDA)", "own gradient", 1),
        ("pgd", "defended model, straight-through gradient (BPDA), 3 EOT draws", "own gradient", 3),
        ("pgd,objective=drift", "transfer from the undefended model", "transfer", 1),
        ("pgd,objective=drift", "embedding through view eot, 2 EOT draws", "embedding", 2),
        ("square,queries=6", "defended model, outputs alone, 2 EOT draws", "black box", 2),
    ]
    assert all(row.correct.shape == (5, 6) for row in (result.clean, *result.rows))
    assert result.adaptive and not result.left_out and not result.caveat
    survived = np.concatenate([row.correct for row in (result.clean, *result.rows)]).all(axis=0)
    assert result.worst_case().correct[0].tolist() == survived.tolist()
    transfer, adaptive = result.compared()
    parts = (0, 4), (1, 2, 3, 5, 6)
    for row, indices in zip((transfer, adaptive), parts):
        those = [result.clean.correct, *(result.rows[i].correct for i in indices)]
        assert row.correct[0].tolist() == np.concatenate(those).all(axis=0).tolist()
    assert [draws for draws, _ in result.convergence()] == [1, 3]


def test_transfer_and_adaptive_stand_side_by_side(run: Callable[..., Evaluation], tmp_path: Path) -> None:
    result = run(defense=Shuffle())
    names = ["worst case, transfer", "worst case, adaptive", "worst case per image"]
    *rows, _ = table_of(result)
    assert [row[1] for row in rows[-3:]] == names
    read = json.loads(json.dumps(result.to_dict()))
    assert [read["transfer_worst_case"]["attack"], read["adaptive_worst_case"]["attack"]] == names[:2]
    keys = list(read)
    assert keys.index("adaptive_worst_case") == keys.index("transfer_worst_case") + 1
    assert [entry["draws"] for entry in read["eot_convergence"]] == [1, 3]
    for entry, (_, row) in zip(read["eot_convergence"], result.convergence()):
        assert entry["accuracy"] == row.accuracy and entry["interval_95"] == list(row.interval)
    page = page_of(result, tmp_path)
    assert page.index(names[0]) < page.index(names[1]) < page.index(names[2])


def test_without_views_every_number_says_transfer_only(run: Callable[..., Evaluation], tmp_path: Path) -> None:
    for adaptive in (SUITE, False):
        result = run(defense=Blind(), adaptive=adaptive)
        assert not result.adaptive and {row.kind for row in result.rows} == {"transfer"} and not result.compared()
        read = result.to_dict()
        robust = [*read["attacks"], read["transfer_worst_case"], read["worst_case"]]
        assert [entry["caveat"] for entry in robust] == ["transfer only"] * len(robust)
        assert read["caveat"] == "transfer only" and read["clean"]["caveat"] == ""
        assert read["adaptive_worst_case"] is None
        _, *rows, under = table_of(result)
        assert rows and all("(transfer only)" in row[1] + row[2] for row in rows)
        assert "no attacker who knows the defence" in under[0]
        page = page_of(result, tmp_path)
        assert page.count("(transfer only)") == len(rows) and "no attacker who knows the defence" in page
    assert run(defense=Blind()).left_out == ("every adaptive attack: the defence has no views",)


def test_each_number_of_eot_draws_costs_so_many_passes(
    run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counted(self: Shuffle, x: Tensor, *, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        counts.append(len(x) if torch.is_grad_enabled() else 0)
        return original(self, x, ids=ids, seed=seed)

    original = cd.InputDefense.defend
    monkeypatch.setattr(Shuffle, "defend", counted)
    few = run(defense=Shuffle(), adaptive=Adaptive(eot_draws=(1,), black_box="square,queries=1"))
    spent = sum(counts)
    counts.clear()
    run(defense=Shuffle(), adaptive=Adaptive(eot_draws=(1, 4), black_box="square,queries=1"))
    attacked = int(few.clean.correct.any(axis=0).sum())
    assert sum(counts) - spent == 4 * THREAT.steps * attacked


def test_the_label_free_attack_goes_for_embeddings(
    run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    result = run(defense=Nothing(), keep_adversarial=True)
    transferred, through = (row for row in result.rows if "drift" in row.attack)
    expected = cd.attacks.pgd(tiny_model, images[:6], labels[:6], THREAT, objective="drift", early_stop=False)
    for row in (transferred, through):  # the view is the model, and so is its embedding
        assert row.adversarial is not None and torch.equal(row.adversarial, expected)

    class Dimmed(Shuffle):
        def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
            return (cd.AttackView("dim", lambda x, ids, seed: model(x * 0.7)),)

    (row,) = (row for row in run(defense=Dimmed(), keep_adversarial=True).rows if row.kind == "embedding")

    class Dim(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tiny_model.embed(x * 0.7)

    kept = torch.from_numpy(row.correct.any(axis=0))
    expected = cd.attacks.pgd(EmbeddingTarget(Dim()), images[:6], labels[:6], THREAT, objective="drift")
    assert row.adversarial is not None and torch.equal(row.adversarial[kept], expected[kept])


def test_a_defence_that_takes_no_bare_encoder_says_so(run: Callable[..., Evaluation]) -> None:
    class Picky(Shuffle):
        def adaptive(self, model: Any) -> tuple[cd.AttackView, ...]:
            scale = float(model.head.scale)
            return (cd.AttackView("eot", lambda x, ids, seed: scale / 100 * self.bpda(model, x, ids, seed)),)

    result = run(defense=Picky())
    assert result.adaptive and not any(row.kind == "embedding" for row in result.rows)
    (reason,) = result.left_out
    assert "it takes no bare encoder" in reason and "'Embedder' object has no attribute 'head'" in reason
    assert reason in table_of(result)[-1][0] and result.to_dict()["left_out"] == [reason]


class TestModelsThatKnowHowTheyAreAttacked:
    def test_views_of_the_model_itself(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        with pytest.warns(AttackWarning, match="exactly zero on"):
            result = run(Steps(tiny_model), adaptive=False, threat=cd.ThreatModel("linf", 8 / 255, steps=8))
        itself, view = result.rows
        assert (itself.attacked, view.attacked) == ("the model itself", "adaptive view unrounded")
        assert (itself.kind, view.kind) == ("itself", "view") and result.adaptive
        assert itself.accuracy > 0.5 and view.accuracy == 0.0
        assert [row.attack for row in result.compared()] == ["worst case, the model itself", "worst case, adaptive"]
        assert result.worst_case().accuracy == 0.0

    def test_all_of_the_suite(self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier) -> None:
        with pytest.warns(AttackWarning):
            result = run(Steps(tiny_model))
        assert [row.kind for row in result.rows] == ["itself", "view", "black box"]
        assert result.left_out == ("the label-free attack: Steps has no embed(images)",)

    def test_leaving_its_views_out_is_said(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        with pytest.warns(AttackWarning):
            result = run(Steps(tiny_model), adaptive=False, views=[])
        assert result.caveat == "no adaptive views" and "(no adaptive views)" in result.worst_case().attack
        with pytest.raises(cd.UsageError, match="view 'rounded' is unknown; did you mean 'unrounded'"):
            run(Steps(tiny_model), views=["rounded"])

    def test_a_model_without_any(self, run: Callable[..., Evaluation]) -> None:
        result = run()
        assert [row.kind for row in result.rows] == ["itself", "itself", "black box"]
        assert result.adaptive and not result.caveat

    def test_reverse_attention(self, images: Tensor) -> None:
        from clipdefense_ancra.resnet import RAClassifier

        network = RAClassifier([f"thing {i}" for i in range(4)], width=4).eval()
        y = predict(network, images[:3]).argmax(dim=1)
        heads = ["final", "aux0", "aux1", "sum", "soft", "straight-through"]
        for defense in (None, cd.get_defense("reverse-attention")(network)):
            result = cd.evaluate(network, images[:3], y, THREAT, attacks=["pgd,steps=1"], defense=defense)
            assert [row.attacked for row in result.rows] == [
                "the model itself",
                *(f"adaptive view {head}" for head in heads),
            ]
            assert result.adaptive and [row.kind for row in result.rows][:2] == ["itself", "view"]


class TestWhatIsDeployed:
    def test_the_model_itself_is_not_called_transfer(
        self, run: Callable[..., Evaluation], tiny_model: cd.ZeroShotClassifier
    ) -> None:
        same = run(defense=Nothing(), adaptive=False)
        assert same.rows[0].attacked == "the model itself" and same.rows[0].kind == "itself"

    def test_nor_is_a_module_that_says_the_same(
        self, run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Nothing, "deployed", staticmethod(lambda model: nn.Sequential(model)))
        assert run(defense=Nothing(), adaptive=False).rows[0].attacked == "the model itself"

    def test_one_that_acts_on_attacked_images_alone_is_a_defence(
        self, run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch, images: Tensor
    ) -> None:
        class Detector(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                known = torch.stack([(x == clean).flatten(1).all(dim=1) for clean in images]).any(dim=0)
                logits: Tensor = self.model(x)
                return torch.where(known[:, None], logits, -logits)

        monkeypatch.setattr(Nothing, "deployed", staticmethod(Detector))
        row = run(defense=Nothing(), adaptive=False).rows[0]
        assert row.attacked == "transfer from the undefended model" and row.kind == "transfer"
