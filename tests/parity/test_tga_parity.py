"""TGA-ZSR against numbers computed by its released code (README.md beside this file)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipdefense import ZeroShotClassifier
from clipdefense_openclip.tower import OpenClipTower
from clipdefense_tgazsr.tgazsr import TGAZSR

Load = Callable[[str], ZeroShotClassifier]


@pytest.fixture(scope="module")
def load(recorded_model: Load) -> Load:
    """Those classifiers with a tower that has tokens."""

    def with_tokens(name: str) -> ZeroShotClassifier:
        model = recorded_model(name)
        model.tower = OpenClipTower(model.tower).eval()
        return model

    return with_tokens


@pytest.fixture(scope="module")
def trained(load: Load) -> dict[str, TGAZSR]:
    """The method in the middle of a fit: the original tower copied when it began, the student's weights now."""
    defenses = {}
    for variant in TGAZSR.variants:
        defense = TGAZSR(load("original"), variant=variant)
        defense.begin()
        defense.model.load_state_dict(load("student").state_dict())
        defenses[variant] = defense
    return defenses


@pytest.mark.parametrize("variant", TGAZSR.variants)
def test_maps(variant: str, golden: dict[str, Tensor], trained: dict[str, TGAZSR]) -> None:
    defense = trained[variant]
    assert defense.frozen is not None and defense.grid == (7, 7)
    with torch.no_grad():
        maps = defense.attention(defense.frozen.embed_tokens(golden["x"][:2]), golden["y"][:2])
    torch.testing.assert_close(maps[:, None], golden["tga_map_ori"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", TGAZSR.variants)
def test_losses(variant: str, golden: dict[str, Tensor], trained: dict[str, TGAZSR]) -> None:
    # at 224 pixels the default is the released method
    batch = {"x": golden["x"][:4], "x_adv": golden["tga_x_adv"], "y": golden["y"][:4]}
    with torch.no_grad():
        terms = trained[variant].losses(batch)
    assert list(terms) == ["ce", "ar", "amc"]
    torch.testing.assert_close(terms["ce"], golden["tga_loss_ce"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["ar"], golden["tga_loss_ar_weighted"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["amc"], golden["tga_loss_amc_weighted"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(terms.values()), golden["tga_loss_total"], rtol=1e-5, atol=0)
