"""What a run of the loop records, shows and tells the defence."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.trainers import TrainerDefense
from clipdefense.training.runtime import derive_seed
from clipdefense_tecoa.tecoa import TeCoA

from .helpers import QUIET, Make, TwoPasses, images_and_labels, rows_of_epoch


def test_mix_interpolates_with_the_original_weights(make_model: Make) -> None:
    mixed, trained, original = make_model(), make_model(), make_model()
    options = {**QUIET, "lr": 1e-2, "batch_size": 4, "epochs": 1}
    TeCoA(trained, **options).fit(*images_and_labels(8))
    TeCoA(mixed, **options, mix=0.3).fit(*images_and_labels(8))
    for a, b, c in zip(original.parameters(), trained.parameters(), mixed.parameters()):
        torch.testing.assert_close(c, 0.7 * a + 0.3 * b)


def test_history_and_validation(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(20)
    defense = TeCoA(tiny_model, show_progress=False, measure_every=2, batch_size=4, epochs=2, validation=0.2, lr=1e-3)
    defense.fit(x, y)
    steps, epochs = defense.history.steps, defense.history.epochs
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["epoch"] for record in steps] == [1] * 4 + [2] * 4
    assert ["clean_accuracy" in record for record in steps] == [True, False] * 4
    assert all(record["loss"] == record["ce"] and record["gradient_norm"] > 0 for record in steps)
    assert steps[0]["lr"] == 1e-3 and steps[-1]["lr"] < 1e-4
    assert epochs[0]["ce"] == pytest.approx(np.mean([record["ce"] for record in steps[:4]]))
    assert {record["epoch"] for record in epochs} == {1, 2}
    assert all(
        0 <= record["validation_robust_accuracy"] <= record["validation_clean_accuracy"] <= 1 for record in epochs
    )


def test_validation_on_a_passed_set_measures_the_trained_model(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(8)
    defense = TeCoA(tiny_model, **QUIET, batch_size=4, epochs=1, lr=1e-3)
    held_out, answers = images_and_labels(6)
    defense.fit(x, y, validation_data=(held_out, answers))
    with torch.no_grad():
        right = (tiny_model(held_out).argmax(dim=1) == answers).double().mean()
    assert defense.history.epochs[0]["validation_clean_accuracy"] == pytest.approx(float(right))
    assert len(defense.history.steps) == 2  # none of the eight is held out


def test_progress_names_the_terms_and_quiet_is_quiet(
    tiny_model: ZeroShotClassifier, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    TeCoA(tiny_model, batch_size=4, epochs=1, show_progress=False).fit(*images_and_labels(8))
    assert capsys.readouterr() == ("", "")
    TeCoA(tiny_model, batch_size=4, epochs=1).fit(*images_and_labels(8))
    shown = capsys.readouterr().err
    assert shown.startswith("tecoa epoch 1/1  2 updates  ce ") and "batch accuracy: clean" in shown


def test_a_narrow_terminal_shows_everything(
    tiny_model: ZeroShotClassifier, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    defense = TwoPasses(tiny_model)
    defense.fit(*images_and_labels(12), validation=0.25, measure_every=1, batch_size=3, epochs=2, show_progress=True)
    shown = capsys.readouterr().err.replace("\n", " ")
    assert "6/6" in shown and "epoch 2  " in shown
    for word in ("clean ", "robust ", "loss ", "batch accuracy: ", "held out: clean "):
        assert word in shown


def test_an_epochs_record_has_the_accuracies_of_the_steps_that_measured(tiny_model: ZeroShotClassifier) -> None:
    defense = TeCoA(tiny_model, show_progress=False, measure_every=2, batch_size=4, epochs=1)
    defense.fit(*images_and_labels(12))  # the last of the three steps measures, the second does not
    steps, (epoch,) = defense.history.steps, defense.history.epochs
    assert epoch["clean_accuracy"] == pytest.approx((steps[0]["clean_accuracy"] + steps[2]["clean_accuracy"]) / 2)
    defense.fit(*images_and_labels(8))
    steps, (epoch,) = defense.history.steps, defense.history.epochs
    assert "clean_accuracy" not in steps[1] and epoch["clean_accuracy"] == steps[0]["clean_accuracy"]


class Unlabelled(TrainerDefense):
    """Embeddings of attacked images near those of clean ones; what a plugin without labels looks like."""

    needs_labels = False

    def default_threat(self) -> Any:
        return TeCoA.default_threat(self)  # type: ignore[arg-type]

    def default_config(self) -> Any:
        return TeCoA.default_config(self)  # type: ignore[arg-type]

    def begin(self) -> None:
        self.frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        target = self.frozen.embed(batch["x"])

        class Embedding(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return self.model.embed(x)

        def distance(embedding: Tensor, row: Tensor) -> Tensor:
            return (embedding - target[row]).square().sum(dim=1)

        rows = torch.arange(len(target))
        options = {"early_stop": False, "seed": seed, "ids": batch["ids"]}
        x_adv = pgd(Embedding(self.model), batch["x"], rows, self.threat, objective=distance, **options)
        return {"x_adv": x_adv, "target": target}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"drift": (self.model.embed(batch["x_adv"]) - batch["target"]).square().sum(dim=1).mean()}


def test_a_method_without_labels_or_logits_fits_the_same_loop(tiny_model: ZeroShotClassifier) -> None:
    x, _ = images_and_labels(8)
    original = copy.deepcopy(tiny_model)
    defense = Unlabelled(tiny_model, show_progress=False, measure_every=1, batch_size=8, epochs=2, lr=1e-4)
    defense.fit(x)
    rows = rows_of_epoch(8, 8, 0)[0]
    by_hand = Unlabelled(original)
    by_hand.begin()
    batch = {"x": x[rows], "ids": rows}
    first = by_hand.losses(by_hand.inner_attack(batch, seed=derive_seed(0, "attack", 0)))["drift"].detach()
    assert defense.history.steps[0]["drift"] == pytest.approx(float(first), rel=1e-6)
    assert "clean_accuracy" not in defense.history.steps[0]
    assert not torch.equal(tiny_model.tower.proj, original.tower.proj)
    defense.fit_loader([x])


def test_a_defence_is_told_when_the_fit_is_over(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    calls: list[str] = []

    class Told(TwoPasses):
        def begin(self) -> None:
            calls.append("begin")

        def end(self) -> None:
            calls.append("end")

    Told(tiny_model).fit(images, labels, batch_size=12)
    with pytest.raises(UsageError, match="training stopped at step"):
        Told(tiny_model).fit(images, labels, batch_size=12, lr=1e30, epochs=3)
    assert calls == ["begin", "end", "begin", "end"]
