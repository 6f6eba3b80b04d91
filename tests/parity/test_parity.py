"""This library against numbers computed by the papers' released code (README.md beside this file)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.norms import box
from clipdefense_ttc.ttc import TTC, drift_ratio

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(HERE / "parity.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def tower(name: str, golden: dict[str, Tensor], dtype: torch.dtype) -> ZeroShotClassifier:
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
    return ZeroShotClassifier(clip.visual, golden["text"], logit_scale=scale, mean=mean, std=std).to(dtype).eval()


@pytest.mark.parametrize("name", ["original", "student"])
def test_embeddings(name: str, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        embedding = tower(name, golden, torch.float32).embed(golden["x"])
    torch.testing.assert_close(embedding, golden[f"emb_{name}"], atol=1e-5, rtol=0)


def test_pgd(golden: dict[str, Tensor]) -> None:
    model = tower("original", golden, torch.float64)
    x, y = golden["x"][:4].double(), golden["y"][:4]
    threat = ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=10)
    x_adv = attacks.pgd(model, x, y, threat, init=golden["pgd_init"].double(), early_stop=False)
    torch.testing.assert_close(x_adv - x, golden["pgd_delta"].double(), atol=1e-6, rtol=0)


def test_ttc_drift_ratio(golden: dict[str, Tensor]) -> None:
    # no sign in it, and the recorded numbers are float32 arithmetic on float32 embeddings: float32 it is. Embeddings
    # agree to 5e-6 and how well depends on the processor's matrix kernels, so the ratio of two cannot agree to 1e-6.
    model = tower("original", golden, torch.float32)
    x, d_0 = golden["x"][:4], golden["ttc_d0"]
    with torch.no_grad():
        r = drift_ratio(model.embed(x + d_0), model.embed(x))
    torch.testing.assert_close(r, golden["ttc_r"], atol=5e-6, rtol=0)
    torch.testing.assert_close(TTC(model).drift(x, noise=d_0), r, atol=1e-6, rtol=0)


def test_ttc(golden: dict[str, Tensor]) -> None:
    model = tower("original", golden, torch.float64)
    x, d_0 = golden["x"][:4].double(), golden["ttc_d0"].double()
    torch.testing.assert_close(box(x, d_0), d_0, atol=1e-7, rtol=0)  # injected already clipped to the box
    ttc = TTC(model, eps=4 / 255, step_size=1 / 255, steps=2, beta=2.0, threshold=0.2)
    delta = ttc.perturbation(x, noise=d_0)
    torch.testing.assert_close(delta, golden["ttc_delta"].double(), atol=1e-6, rtol=0)
    drift = ttc.drift(x, noise=d_0)
    assert (drift < 0.2).tolist() == [True, True, True, False]
    torch.testing.assert_close(delta[3], d_0[3], atol=1e-12, rtol=0)
