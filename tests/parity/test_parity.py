"""This library against numbers computed by the papers' released code (README.md beside this file)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.norms import box
from clipdefense_ttc.ttc import TTC, drift_ratio

Load = Callable[[str], ZeroShotClassifier]


@pytest.mark.parametrize("name", ["original", "student"])
def test_embeddings(name: str, recorded_model: Load, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        embedding = recorded_model(name).embed(golden["x"])
    torch.testing.assert_close(embedding, golden[f"emb_{name}"], atol=1e-5, rtol=0)


def test_pgd(recorded_model: Load, golden: dict[str, Tensor]) -> None:
    model = recorded_model("original").double()
    x, y = golden["x"][:4].double(), golden["y"][:4]
    threat = ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=10)
    x_adv = attacks.pgd(model, x, y, threat, init=golden["pgd_init"].double(), early_stop=False)
    torch.testing.assert_close(x_adv - x, golden["pgd_delta"].double(), atol=1e-6, rtol=0)


def test_ttc_drift_ratio(recorded_model: Load, golden: dict[str, Tensor]) -> None:
    # no sign in it, and the recorded numbers are float32 arithmetic on float32 embeddings: float32 it is. Embeddings
    # agree to 5e-6 and how well depends on the processor's matrix kernels, so the ratio of two cannot agree to 1e-6.
    model = recorded_model("original")
    x, d_0 = golden["x"][:4], golden["ttc_d0"]
    with torch.no_grad():
        r = drift_ratio(model.embed(x + d_0), model.embed(x))
    torch.testing.assert_close(r, golden["ttc_r"], atol=5e-6, rtol=0)
    torch.testing.assert_close(TTC(model).drift(x, noise=d_0), r, atol=1e-6, rtol=0)


def test_ttc(recorded_model: Load, golden: dict[str, Tensor]) -> None:
    model = recorded_model("original").double()
    x, d_0 = golden["x"][:4].double(), golden["ttc_d0"].double()
    torch.testing.assert_close(box(x, d_0), d_0, atol=1e-7, rtol=0)  # injected already clipped to the box
    ttc = TTC(model, eps=4 / 255, step_size=1 / 255, steps=2, beta=2.0, threshold=0.2)
    delta = ttc.perturbation(x, noise=d_0)
    torch.testing.assert_close(delta, golden["ttc_delta"].double(), atol=1e-6, rtol=0)
    drift = ttc.drift(x, noise=d_0)
    assert (drift < 0.2).tolist() == [True, True, True, False]
    torch.testing.assert_close(delta[3], d_0[3], atol=1e-12, rtol=0)
