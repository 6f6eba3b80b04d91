"""TGA-ZSR against numbers computed by its released code (README.md beside this file)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipdefense import ZeroShotClassifier
from clipdefense_openclip.tower import OpenClipTower
from clipdefense_tgazsr.tgazsr import TGAZSR

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(HERE / "parity.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def load(name: str, golden: dict[str, Tensor]) -> ZeroShotClassifier:
    clip = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "patch_size": 32, "image_size": 224},
        text_cfg={"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
        quick_gelu=True,
    )
    state = load_file(HERE / f"tiny_clip_{name}.safetensors")
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected and not [key for key in missing if key.startswith("visual.")]
    scale = float(golden["logit_scale_log"].double().exp())
    mean, std = golden["mean"].tolist(), golden["std"].tolist()
    tower = OpenClipTower(clip.visual)
    return ZeroShotClassifier(tower, golden["text"], logit_scale=scale, mean=mean, std=std).eval()


@pytest.fixture(scope="module")
def trained(golden: dict[str, Tensor]) -> dict[str, TGAZSR]:
    """The method in the middle of a fit: the original tower copied when it began, the student's weights now."""
    defenses = {}
    for variant in TGAZSR.variants:
        defense = TGAZSR(load("original", golden), variant=variant)
        defense.begin()
        defense.model.load_state_dict(load("student", golden).state_dict())
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
