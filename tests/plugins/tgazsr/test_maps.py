"""The text-guided attention map: by hand, against torch, its properties, degenerate maps, where it lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipdefense.classifier import TokenEmbeddings
from clipdefense_tgazsr.comptga import complementary_map
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
    attention_map,
    attention_model_constraint_loss,
    attention_refinement_loss,
    ce_loss,
    map_distance,
    min_max,
    resize_matrix,
    token_similarity,
    upsample,
)

from .helpers import DOUBLE, by_hand, colours


def test_similarity_and_min_max_by_hand() -> None:
    embeddings, t = by_hand()
    S = token_similarity(embeddings, t)
    torch.testing.assert_close(S, torch.tensor([[0.6, 0.24, 0.48, 0.64]], dtype=DOUBLE))
    M = min_max(S)
    torch.testing.assert_close(M, torch.tensor([[0.9, 0.0, 0.6, 1.0]], dtype=DOUBLE))
    for guarded in (True, False):
        torch.testing.assert_close(token_similarity(embeddings, t, guarded=guarded), S, rtol=0, atol=0)
        torch.testing.assert_close(min_max(S, guarded=guarded), M, rtol=0, atol=0)


def test_up_sampling_by_hand() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]], dtype=DOUBLE)
    quarter = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]], dtype=DOUBLE)
    assert torch.equal(resize_matrix(2, 4, like=maps), quarter)
    expected = torch.tensor(
        [
            [0.0, 0.25, 0.75, 1.0],
            [0.125, 0.28125, 0.59375, 0.75],
            [0.375, 0.34375, 0.28125, 0.25],
            [0.5, 0.375, 0.125, 0.0],
        ],
        dtype=DOUBLE,
    )
    torch.testing.assert_close(upsample(maps, 4)[0], expected, rtol=0, atol=1e-15)


def test_the_map_is_min_maxed_first_and_up_sampled_row_by_row() -> None:
    embeddings, t = by_hand()
    M = attention_map(embeddings, t, (2, 2), 4)
    expected = upsample(torch.tensor([[[0.9, 0.0], [0.6, 1.0]]], dtype=DOUBLE), 4)
    torch.testing.assert_close(M, expected)
    torch.testing.assert_close(M[0, [0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([0.9, 0.0, 0.6, 1.0], dtype=DOUBLE))
    long = attention_map(embeddings, t, (1, 4), 4)
    torch.testing.assert_close(long[0], torch.tensor([[0.9, 0.0, 0.6, 1.0]], dtype=DOUBLE).expand(4, 4))


def test_the_complementary_map_by_hand() -> None:
    M = torch.tensor([[[0.9, 0.0], [0.6, 1.0]]])
    M_negative = torch.tensor([[[1.0, 0.5], [0.5, 0.0]]])
    torch.testing.assert_close(complementary_map(M, M_negative), torch.tensor([[[0.0, 0.0], [0.3, 1.0]]]))


def test_distances_by_hand() -> None:
    M_ori = torch.zeros(2, 2, 2)
    M = torch.tensor([[[0.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.5]]])  # norms 3 and 1/2 over 4 pixels
    for loss in (map_distance, attention_refinement_loss, attention_model_constraint_loss):
        assert float(loss(M, M_ori, per_pixel=False)) == pytest.approx(1.75)
        assert float(loss(M, M_ori)) == pytest.approx(224 * 1.75 / 2)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(3.0), math.log(4.0)]], dtype=DOUBLE)
    assert float(ce_loss(logits, torch.tensor([0, 1]))) == pytest.approx((math.log(2) + math.log(8 / 3)) / 2)


# Up-sampling against torch -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    size=st.integers(1, 90),
    antialias=st.booleans(),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_up_sampling_is_torchs(h: int, w: int, size: int, antialias: bool, dtype: torch.dtype) -> None:
    maps = torch.rand(2, h, w, generator=torch.Generator().manual_seed(h * w), dtype=dtype)
    theirs = F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False, antialias=antialias)
    # float32: torch computes its weights in float32, too, and rounds them more than once
    ours, tolerance = upsample(maps, size, antialias=antialias), 5e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs[:, 0], rtol=0, atol=tolerance)
    if size >= max(h, w):
        torch.testing.assert_close(upsample(maps, size), ours, rtol=0, atol=1e-15)


@pytest.mark.parametrize("side", [2, 7, 14, 16, 24])
@pytest.mark.parametrize("antialias", [False, True])
def test_up_sampling_to_the_published_size(side: int, antialias: bool) -> None:
    maps = torch.rand(4, side, side)

    def theirs(maps: Tensor) -> Tensor:
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
        return F.interpolate(maps[:, None], (224, 224), **options)[:, 0]

    ours = upsample(maps, 224, antialias=antialias)
    torch.testing.assert_close(ours.double(), theirs(maps.double()), rtol=0, atol=3e-7)
    # where 224 is no power of two times the grid, torch's own float32 weights are off by more than 1e-6
    torch.testing.assert_close(ours, theirs(maps), rtol=0, atol=1e-6 if side in (2, 7, 14) else 3e-6)


def test_the_gradient_of_up_sampling_is_torchs() -> None:
    maps = torch.rand(2, 7, 5, dtype=DOUBLE, requires_grad=True)
    weights = torch.rand(2, 30, 30, dtype=DOUBLE)
    theirs = F.interpolate(maps[:, None], (30, 30), mode="bilinear", align_corners=False)[:, 0]
    gradients = [torch.autograd.grad((out * weights).sum(), maps)[0] for out in (upsample(maps, 30), theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# Properties ----------------------------------------------------------------------------------------------------------


def random_embeddings(n: int = 2, p: int = 6, d: int = 5, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Any:
    draw = torch.Generator().manual_seed(seed)
    pooled, tokens = torch.randn(n, d, generator=draw, dtype=dtype), torch.randn(n, p, d, generator=draw, dtype=dtype)
    return pooled, tokens, F.normalize(torch.randn(n, d, generator=draw, dtype=dtype), dim=1)


def test_channels_are_normalised_over_tokens_and_tokens_are_not() -> None:
    pooled, tokens, t = random_embeddings()
    S = token_similarity(TokenEmbeddings(pooled, tokens), t)
    channels = torch.rand(5, dtype=DOUBLE) + 0.5
    torch.testing.assert_close(token_similarity(TokenEmbeddings(pooled * channels, tokens * channels), t), S)
    scaled = tokens * (torch.rand(2, 6, 1, dtype=DOUBLE) + 0.5)
    assert (token_similarity(TokenEmbeddings(pooled, scaled), t) - S).abs().max() > 0.05
    # the class token has a part in the norm
    assert (token_similarity(TokenEmbeddings(3 * pooled, tokens), t) - S).abs().max() > 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3), guarded=st.booleans())
def test_a_map_spans_0_to_1_and_does_not_depend_on_the_texts_length(seed: int, factor: float, guarded: bool) -> None:
    pooled, tokens, t = random_embeddings(seed=seed)
    M = min_max(token_similarity(TokenEmbeddings(pooled, tokens), t), guarded=guarded)
    assert M.amin(dim=1).tolist() == [0, 0] and M.amax(dim=1).tolist() == [1, 1]
    other = min_max(token_similarity(TokenEmbeddings(pooled, tokens), factor * t), guarded=guarded)
    torch.testing.assert_close(other, M, rtol=0, atol=1e-9)
    big = attention_map(TokenEmbeddings(pooled, tokens), t, (2, 3), 12, guarded=guarded)
    assert big.shape == (2, 12, 12) and float(big.min()) >= 0 and float(big.max()) <= 1 + 1e-12


def test_distances_per_pixel_do_not_grow_with_the_size() -> None:
    M, M_ori = torch.rand(3, 14, 14, dtype=DOUBLE), torch.rand(3, 14, 14, dtype=DOUBLE)
    larger = [maps.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2) for maps in (M, M_ori)]  # 224 x 224
    torch.testing.assert_close(map_distance(M, M_ori), map_distance(*larger))
    torch.testing.assert_close(map_distance(*larger), map_distance(*larger, per_pixel=False))
    torch.testing.assert_close(map_distance(*larger, per_pixel=False), 16 * map_distance(M, M_ori, per_pixel=False))


@pytest.mark.parametrize("guarded", [True, False])
def test_gradients(guarded: bool) -> None:
    inputs = [part.requires_grad_() for part in random_embeddings()]
    target = torch.rand(2, 8, 8, dtype=DOUBLE)

    def loss(pooled: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        M = attention_map(TokenEmbeddings(pooled, tokens), t, (2, 3), 8, guarded=guarded)
        M_negative = attention_map(TokenEmbeddings(pooled, tokens), -t.flip(1), (3, 2), 8, guarded=guarded)
        return map_distance(M, target) + 0.3 * map_distance(complementary_map(M, M_negative), target, per_pixel=False)

    assert torch.autograd.gradcheck(loss, inputs)


def test_maps_are_float32_under_autocast() -> None:
    pooled, tokens, t = random_embeddings(p=16, d=32, dtype=torch.float32)
    exact = attention_map(TokenEmbeddings(pooled, tokens), t, (4, 4), 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_map(TokenEmbeddings(pooled, tokens), t, (4, 4), 32)
    assert inside.dtype == torch.float32 and torch.equal(inside, exact)


# Degenerate maps -----------------------------------------------------------------------------------------------------


def test_a_constant_map_is_zero_without_gradient_or_nan_as_released() -> None:
    S = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]], requires_grad=True)
    M = min_max(S)
    torch.testing.assert_close(M, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(M[:, 1].sum(), S)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0], [-2.5, 5.0, -2.5], [0.0, 0.0, 0.0]]))
    released = min_max(S, guarded=False)
    assert released[0].isnan().all() and released[2].isnan().all()
    torch.testing.assert_close(released[1], M[1])


def test_rounding_is_no_map_but_little_more_is() -> None:
    S = 1 + torch.finfo(torch.float32).eps * torch.tensor([[0.0, 4.0, 8.0], [0.0, 32.0, 64.0]])
    torch.testing.assert_close(min_max(S), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0]]))


def test_a_channel_that_is_zero_everywhere_is_left_out() -> None:
    pooled, tokens, t = random_embeddings()
    pooled[:, 2], tokens[..., 2] = 0, 0
    tokens.requires_grad_()
    S = token_similarity(TokenEmbeddings(pooled, tokens), t)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(S, token_similarity(TokenEmbeddings(pooled[:, kept], tokens[..., kept]), t[:, kept]))
    (gradient,) = torch.autograd.grad(S.square().sum(), tokens)
    assert torch.isfinite(gradient).all() and not gradient[..., 2].any() and gradient[..., kept].any()
    assert token_similarity(TokenEmbeddings(pooled, tokens), t, guarded=False).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_guards_hide_nothing_that_diverged(bad: float) -> None:
    pooled, tokens, t = random_embeddings()
    tokens[0, 0, 0] = bad
    S = token_similarity(TokenEmbeddings(pooled, tokens), t)
    assert S[0].isnan().any() and min_max(S)[0].isnan().all()
    assert torch.isfinite(min_max(S)[1]).all()


def test_equal_maps_have_no_distance_and_no_gradient() -> None:
    M_ori = torch.rand(2, 4, 4)
    M = M_ori.clone().requires_grad_()
    loss = map_distance(M, M_ori)
    (gradient,) = torch.autograd.grad(loss, M)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_the_map_is_where_the_class_is() -> None:
    defense = TGAZSR(colours((16, 8)), grid=(2, 4))  # rows of four
    defense.begin()
    x = torch.full((3, 3, 32, 32), 0.1)
    x[0, 0, :16, 24:] = 0.9  # red at the upper right
    x[1, 1, 16:, 8:16] = 0.9  # green at the lower left, second column
    x[2, 2, 16:, :8] = 0.9
    M = defense.attention(defense.model.embed_tokens(x), torch.arange(3))
    M = M.detach()
    assert M.shape == (3, 32, 32)
    places = [divmod(int(m.argmax()), 32) for m in M]
    inside = [(range(16), range(24, 32)), (range(16, 32), range(8, 16)), (range(16, 32), range(8))]
    assert all(row in rows and column in columns for (row, column), (rows, columns) in zip(places, inside))
    assert float(M[0, :, :12].max()) == 0 and float(M[0, 0, 31]) == 1
