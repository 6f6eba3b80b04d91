"""PMG-AFT's released variant against numbers computed by the paper's released code (README.md beside this file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipdefense import ZeroShotClassifier
from clipdefense_pmgaft.pmgaft import PMGAFT, clean_loss, generalisation_loss, robust_loss

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(HERE / "parity.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def visual(name: str) -> dict[str, Tensor]:
    state = load_file(HERE / f"tiny_clip_{name}.safetensors")
    return {key.removeprefix("visual."): value for key, value in state.items()}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def setting(request: Any, golden: dict[str, Tensor]) -> tuple[PMGAFT, dict[str, Tensor]]:
    """The defence in the middle of a fit (teacher: the original tower; trained: the student's), and a batch.

    The model starts with CLIP's statistics and a scale of 100; the variant has to change both by itself.
    """
    clip = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "patch_size": 32, "image_size": 224},
        text_cfg={"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
        quick_gelu=True,
    )
    clip.visual.load_state_dict(visual("original"))
    scale = float(golden["logit_scale_log"].double().exp())
    mean, std = golden["mean"].tolist(), golden["std"].tolist()
    model = ZeroShotClassifier(clip.visual, golden["text"], logit_scale=scale, mean=mean, std=std)
    defense = PMGAFT(model.to(request.param).eval(), variant="released")
    with pytest.warns(UserWarning, match="ImageNet's channel statistics"):
        defense.begin()
    model.tower.load_state_dict(visual("student"))
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
