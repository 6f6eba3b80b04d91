"""The resize as two matrix products: ``F.interpolate``'s values, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdefense.resize import bicubic, bicubic_matrix, by_matrices


def interpolated(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 70), width=st.integers(1, 70), rows=st.integers(1, 90), columns=st.integers(1, 90))
def test_any_size_equals_interpolate(height: int, width: int, rows: int, columns: int) -> None:
    x = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width))
    ours, theirs = by_matrices(x, (rows, columns)), interpolated(x, (rows, columns))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), [(32, 224), (64, 224), (64, 128), (224, 336), (500, 224), (224, 32)])
def test_float32_rounds_positions_as_interpolate_does(source: int, target: int) -> None:
    """Its float32 result is up to 1e-5 from its float64 one; ours follows it."""
    x = torch.rand(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    size = (target, target)
    torch.testing.assert_close(by_matrices(x, size), interpolated(x, size), rtol=0, atol=1.1e-6)


def test_the_gradient_is_that_of_interpolate() -> None:
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 20, 7, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((f(x, (20, 7)) * weights).sum(), x)[0] for f in (by_matrices, interpolated))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_weights_by_hand() -> None:
    """Doubling two pixels: centres at -0.25, 0.25, 0.75, 1.25; the kernel at 0.25 and 0.75 with a = -0.75."""
    w = {0.25: 1.25 * 0.25**3 - 2.25 * 0.25**2 + 1, 0.75: 1.25 * 0.75**3 - 2.25 * 0.75**2 + 1}
    far = {d: -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 for d in (1.25, 1.75)}
    left = torch.tensor([w[0.25] + w[0.75] + far[1.75], far[1.25]], dtype=torch.float64)  # two taps beyond the border
    inner = torch.tensor([w[0.25] + far[1.25], w[0.75] + far[1.75]], dtype=torch.float64)
    expected = torch.stack([left, inner, inner.flip(0), left.flip(0)])
    matrix = bicubic_matrix(2, 4, like=expected)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-15)
    assert matrix.sum(dim=1) == pytest.approx([1.0] * 4, abs=1e-15)


def test_a_batch_under_autocast_keeps_float32(tiny_model) -> None:  # type: ignore[no-untyped-def]
    x = torch.rand(2, 3, 20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tiny_model.preprocess(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, tiny_model.preprocess(x))


def test_the_matrices_serve_where_repetition_is_asked_for() -> None:
    x = torch.rand(1, 3, 9, 9)
    assert torch.equal(bicubic(x, (20, 20)), interpolated(x, (20, 20)))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(bicubic(x, (20, 20)), by_matrices(x, (20, 20)))
    finally:
        torch.use_deterministic_algorithms(False)
