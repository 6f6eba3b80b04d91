"""ANCRA's contrast against numbers computed by the released code (README.md beside this file)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipdefense_ancra.contrast import asymmetric, confusion, negative_contrast


def test_the_same_pairs_are_confused(golden: dict[str, Tensor]) -> None:
    similarity = confusion(golden["anc_logits"], golden["anc_logits_neg"])
    assert torch.equal(similarity > 0, golden["anc_match"])
    assert 0 < golden["anc_match"].sum() < len(similarity)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_value_and_gradients(alpha: float, golden: dict[str, Tensor]) -> None:
    logits, logits_neg = (golden[name].clone().requires_grad_(True) for name in ("anc_logits", "anc_logits_neg"))
    value = negative_contrast(logits, logits_neg, alpha=alpha)
    prefix = f"anc_alpha{alpha:g}"
    torch.testing.assert_close(value.detach(), golden[f"{prefix}_mean"], atol=1e-6, rtol=0)
    # the recorded gradients are those of the sum over the pairs
    total = asymmetric(confusion, logits, logits_neg, alpha) * len(logits)
    torch.testing.assert_close(total.detach(), golden[f"{prefix}_sum"], atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(total, (logits, logits_neg), allow_unused=True)
    for name, gradient in zip(("logits", "logits_neg"), gradients):
        found = torch.zeros_like(logits) if gradient is None else gradient
        torch.testing.assert_close(found, golden[f"{prefix}_grad_{name}"], atol=1e-6, rtol=0)
