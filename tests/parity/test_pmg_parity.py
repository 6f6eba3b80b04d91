"""PMG-AFT's released variant against numbers computed by the paper's released code (README.md beside this file)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdefense import ZeroShotClassifier
from clipdefense_pmgaft.pmgaft import PMGAFT, clean_loss, generalisation_loss, robust_loss

Load = Callable[[str], ZeroShotClassifier]


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def setting(request: Any, recorded_model: Load, golden: dict[str, Tensor]) -> tuple[PMGAFT, dict[str, Tensor]]:
    """The defence in the middle of a fit (teacher: the original tower; trained: the student's), and a batch.

    The model starts with CLIP's statistics and a scale of 100; the variant has to change both by itself.
    """
    model = recorded_model("original").to(request.param)
    defense = PMGAFT(model, variant="released")
    with pytest.warns(UserWarning, match="ImageNet's channel statistics"):
        defense.begin()
    model.tower.load_state_dict(recorded_model("student").tower.state_dict())
    x = golden["x"].to(request.param)
    return defense, {"x": x, "x_adv": x + golden["pmg_delta"].to(request.param), "y": golden["y"]}


def near(value: Tensor, expected: Tensor, rel: float) -> bool:
    return float(value) == pytest.approx(float(expected), rel=rel, abs=0)


def test_statistics(setting: tuple[PMGAFT, dict[str, Tensor]], golden: dict[str, Tensor]) -> None:
    defense, _ = setting
    for module in (defense.model, defense.teacher):
        assert torch.equal(module.mean.flatten(), golden["pmg_mean"])
        assert torch.equal(module.std.flatten(), golden["pmg_std"])


def test_losses(setting: tuple[PMGAFT, dict[str, Tensor]], golden: dict[str, Tensor]) -> None:
    """The recorded divergences are summed over the 8 images; the variant's have the weight of a batch of 256."""
    defense, batch = setting
    with torch.no_grad():
        terms = defense.losses(batch)
    assert terms.keys() == {"robust", "general", "clean"}
    assert near(terms["robust"], golden["pmg_loss_robust_ce"], 1e-5)
    summed = {name: terms[name] * 8 / 256 for name in ("general", "clean")}
    assert near(summed["general"], golden["pmg_loss_general_klsum"], 1e-3)
    assert near(summed["clean"], golden["pmg_loss_clean_klsum"], 1e-3)
    assert near(terms["robust"] + summed["general"] + summed["clean"], golden["pmg_loss_total"], 1e-5)


def test_terms_and_their_directions(setting: tuple[PMGAFT, dict[str, Tensor]], golden: dict[str, Tensor]) -> None:
    """From cosines computed here; the other direction, or other statistics, are off by more than the tolerance."""
    defense, batch = setting
    text = torch.nn.functional.normalize(golden["text"].to(batch["x"]), dim=1)

    def cosines(model: ZeroShotClassifier, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(model.embed(x), dim=1) @ text.T

    A, K = cosines(defense.model, batch["x_adv"]), cosines(defense.model, batch["x"])
    O = cosines(defense.teacher, batch["x_adv"])  # noqa: E741
    assert near(robust_loss(A, batch["y"]), golden["pmg_loss_robust_ce"], 1e-5)
    assert near(8 * generalisation_loss(A, O), golden["pmg_loss_general_klsum"], 1e-3)
    assert near(8 * clean_loss(A, K), golden["pmg_loss_clean_klsum"], 1e-3)
    assert not near(8 * generalisation_loss(O, A), golden["pmg_loss_general_klsum"], 2e-3)
    assert not near(8 * clean_loss(K, A), golden["pmg_loss_clean_klsum"], 2e-3)
    defense.teacher.mean.copy_(golden["mean"].view(1, 3, 1, 1))
    defense.teacher.std.copy_(golden["std"].view(1, 3, 1, 1))
    other = cosines(defense.teacher, batch["x_adv"])
    assert not near(8 * generalisation_loss(A, other), golden["pmg_loss_general_klsum"], 1e-2)
