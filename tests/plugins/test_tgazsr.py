"""TGA-ZSR and Comp-TGA: maps and losses by hand, degenerate maps, towers of every kind, settings, updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from art.defences.trainer import Trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ClassHead, TokenEmbeddings, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.guard import DivergedError
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense.training.schedule import warmup_steps
from clipdefense_openclip.text import TextEncoder
from clipdefense_openclip.tower import OpenClipTower
from clipdefense_tgazsr.comptga import NEGATIVE_TEMPLATE, CompTGA, complementary_map, negated_embeddings
from clipdefense_tgazsr.tgazsr import (
    TGAZSR,
    attention_map,
    attention_model_constraint_loss,
    attention_refinement_loss,
    ce_loss,
    map_distance,
    min_max,
    resize_matrix,
    token_grid,
    token_similarity,
    upsample,
)
from clipdefense_timm.tower import TimmTower

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
DOUBLE = torch.float64
Make = Callable[..., ZeroShotClassifier]


@pytest.fixture
def make_vit(make_model: Make) -> Make:
    """The tests' tiny ViT with its patch tokens, 4 x 4."""

    def make(**options: Any) -> ZeroShotClassifier:
        model = make_model(**options)
        model.tower = OpenClipTower(model.tower).eval()
        return model

    return make


@pytest.fixture
def vit(make_vit: Make) -> ZeroShotClassifier:
    return make_vit()


def negatives(seed: int = 5, classes: int = 10) -> Tensor:
    return torch.randn(classes, 32, generator=torch.Generator().manual_seed(seed))


def trainer(method: type[TGAZSR], model: ZeroShotClassifier, **options: Any) -> TGAZSR:
    if method is CompTGA:
        options.setdefault("negative_embeddings", negatives(classes=len(model.class_names)))
    return method(model, **QUIET, **options)


METHODS = pytest.mark.parametrize("method", [TGAZSR, CompTGA])


def batch_of(images: Tensor, n: int = 3) -> dict[str, Tensor]:
    noise = torch.randn(images[:n].shape, generator=torch.Generator().manual_seed(1)).to(images)
    return {"x": images[:n], "x_adv": (images[:n] + 0.03 * noise).clamp(0, 1), "y": torch.arange(n) % 10}


# The map, by hand ----------------------------------------------------------------------------------------------------


def by_hand() -> tuple[TokenEmbeddings, Tensor]:
    """Two channels, both with norm 5 over the class token and four patches."""
    tokens = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [4.0, 0.0], [0.0, 4.0]]], dtype=DOUBLE)
    return TokenEmbeddings(torch.tensor([[2.0, 0.0]], dtype=DOUBLE), tokens), torch.tensor([[0.6, 0.8]], dtype=DOUBLE)


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


# Towers --------------------------------------------------------------------------------------------------------------


class PatchTower(nn.Module):
    """Each patch's mean colour, mapped linearly: no positions, no attention, so what a token shows is known."""

    def __init__(self, patch: tuple[int, int], dim: int = 3) -> None:
        super().__init__()
        self.cut = nn.AvgPool2d(patch)
        self.proj = nn.Linear(3, dim, bias=False)
        nn.init.eye_(self.proj.weight)

    def embed_tokens(self, images: Tensor) -> TokenEmbeddings:
        tokens = self.proj(self.cut(images).flatten(2).transpose(1, 2))
        return TokenEmbeddings(tokens.mean(dim=1), tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed_tokens(images).pooled


def colours(patch: tuple[int, int]) -> ZeroShotClassifier:
    plain: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return ZeroShotClassifier(PatchTower(patch), torch.eye(3), logit_scale=10.0, image_size=32, **plain)


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


def open_clip_model(vision: dict[str, Any], side: int) -> ZeroShotClassifier:
    clip = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=vision,
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 32, "heads": 1, "layers": 1},
    )
    return ZeroShotClassifier(OpenClipTower(clip.visual), negatives(1), image_size=side).eval()


def timm_model(name: str, side: int, **options: Any) -> ZeroShotClassifier:
    trunk = timm.create_model(name, num_classes=0, **options)
    tower = TimmTower(trunk, nn.Linear(trunk.num_features, 32))
    return ZeroShotClassifier(tower, negatives(1), image_size=side).eval()


TINY_TIMM_VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
TOWERS: dict[str, tuple[Callable[[], ZeroShotClassifier], tuple[int, int]]] = {
    "vit": (lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": 8, "image_size": 40}, 40), (5, 5)),
    "vit, oblong patches": (
        lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": (8, 16), "image_size": 32}, 32),
        (4, 2),
    ),
    "vit, oblong patches, square count": (
        lambda: open_clip_model({"layers": 1, "width": 64, "patch_size": (4, 16), "image_size": 32}, 32),
        (8, 2),
    ),
    "vit, average": (
        lambda: open_clip_model(
            {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "pool_type": "avg"},
            32,
        ),
        (4, 4),
    ),
    "resnet": (lambda: open_clip_model({"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, 64), (2, 2)),
    "timm cnn": (lambda: timm_model("mobilenetv2_035", 64), (2, 2)),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", 64, **TINY_TIMM_VIT), (4, 4)),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tower_with_tokens_trains(kind: str) -> None:
    make, grid = TOWERS[kind]
    model = make()
    before = copy.deepcopy(model.tower.state_dict())
    defense = TGAZSR(model, **QUIET, batch_size=4, epochs=2, lr=1e-3, warmup_steps=0)
    side = model.image_size
    defense.fit(torch.rand(4, 3, side, side), torch.arange(4))
    assert defense.grid == grid and defense.map_size == side
    first, second = defense.history.steps
    assert first["ar"] > 0 and second["ar"] > 0 and second["amc"] > 0
    changed = [name for name, value in model.tower.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2
    frozen = defense.frozen
    assert frozen is not None
    assert all(torch.equal(value, before[name]) for name, value in frozen.tower.state_dict().items())


def test_grids() -> None:
    tower = nn.Linear(1, 1)
    assert token_grid(tower, 49) == (7, 7)
    assert token_grid(tower, 8, (2, 4)) == (2, 4)
    assert token_grid(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_TIMM_VIT), 16) == (4, 4)
    with pytest.raises(UsageError, match=r"grid is \(3, 3\), but the tower Linear gives 8 tokens an image"):
        token_grid(tower, 8, (3, 3))
    with pytest.raises(UsageError, match=r"gives 8 tokens an image, which form no square; pass grid=\(rows, columns\)"):
        token_grid(tower, 8)
    with pytest.raises(UsageError, match="has 1 token an image, whose map is constant; give it larger images"):
        token_grid(tower, 1)


# The losses of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "released"])
def test_losses_are_made_of_the_public_functions(vit: ZeroShotClassifier, images: Tensor, variant: str) -> None:
    defense = TGAZSR(vit, variant=variant, alpha=0.3, beta=0.7)
    original = copy.deepcopy(vit)
    defense.begin()
    with torch.no_grad():
        for weight in vit.tower.parameters():
            weight += 0.02 * torch.randn_like(weight)
        batch = batch_of(images)
        x, x_adv, y = batch["x"], batch["x_adv"], batch["y"]
        size, per_pixel = (224, False) if variant == "released" else (32, True)

        def M(model: ZeroShotClassifier, x: Tensor) -> Tensor:
            pooled, tokens = model.embed_tokens(x)
            every = torch.cat([pooled[:, None], tokens], dim=1)
            S = torch.einsum("npd,nd->np", every / every.norm(dim=1, keepdim=True), vit.head.anchors[y])[:, 1:]
            S = (S - S.amin(1, True)) / (S.amax(1, True) - S.amin(1, True))
            return F.interpolate(S.view(-1, 1, 4, 4), (size, size), mode="bilinear")[:, 0]

        terms = defense.losses(batch)
        expected = {
            "ce": F.cross_entropy(vit(x_adv), y),
            "ar": 0.3 * map_distance(M(vit, x_adv), M(original, x), per_pixel=per_pixel),
            "amc": 0.7 * map_distance(M(vit, x), M(original, x), per_pixel=per_pixel),
        }
    assert list(terms) == list(expected)
    for name, value in terms.items():
        assert value.dim() == 0
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_comp_tga_compares_the_products(vit: ZeroShotClassifier, images: Tensor) -> None:
    given = negatives()
    defense = CompTGA(vit, negative_embeddings=given)
    defense.begin()
    torch.testing.assert_close(defense.negative_anchors, F.normalize(given, dim=1))
    y = torch.tensor([3, 1, 4])
    with torch.no_grad():
        embeddings = vit.embed_tokens(images[:3])
        maps = [
            attention_map(embeddings, anchors[y], (4, 4), 32, antialias=antialias)
            for antialias in (False, True)
            for anchors in (vit.head.anchors, F.normalize(given, dim=1))
        ]
        A = defense.attention(embeddings, y)
    torch.testing.assert_close(A, maps[0] * (1 - maps[1]))
    torch.testing.assert_close(maps[:2], maps[2:])  # antialiasing changes nothing when enlarging
    assert not torch.allclose(A, TGAZSR.attention(defense, embeddings, y), atol=0.1)


@pytest.mark.parametrize(
    ("weights", "student", "original", "names"),
    [
        ({}, 2, 1, ["ce", "ar", "amc"]),
        ({"beta": 0}, 1, 1, ["ce", "ar"]),
        ({"alpha": 0}, 2, 1, ["ce", "amc"]),
        ({"alpha": 0, "beta": 0}, 1, 0, ["ce"]),
    ],
)
@METHODS
def test_each_image_set_is_encoded_once(
    method: type[TGAZSR],
    weights: dict[str, float],
    student: int,
    original: int,
    names: list[str],
    vit: ZeroShotClassifier,
    images: Tensor,
) -> None:
    defense = trainer(method, vit, **weights)
    defense.begin()
    assert defense.frozen is not None
    passes: list[nn.Module] = []
    for model in (vit, defense.frozen):
        model.tower.visual.conv1.register_forward_hook(lambda module, *_: passes.append(module))
    assert list(defense.losses(batch_of(images))) == names
    assert passes.count(vit.tower.visual.conv1) == student
    assert passes.count(defense.frozen.tower.visual.conv1) == original


@METHODS
@pytest.mark.parametrize("train", ["tower", "last_blocks:1", "layernorm"])
def test_the_clean_maps_start_out_equal(
    method: type[TGAZSR], train: str, vit: ZeroShotClassifier, images: Tensor
) -> None:
    """To the last bit: a difference of rounding would have a gradient as long as any."""
    defense = trainer(method, vit)
    with training_only(vit, defense.trainable_parameters(train)):
        defense.begin()
        term = defense.losses(batch_of(images))["amc"]
        weights = [weight for weight in vit.tower.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(term, weights, allow_unused=True)
        assert defense.frozen is not None and all(weight.grad is None for weight in defense.frozen.parameters())
    assert float(term.detach()) == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@METHODS
@pytest.mark.parametrize("variant", ["default", "released"])
def test_gradient_through_the_model_agrees_with_finite_differences(
    method: type[TGAZSR], variant: str, make_vit: Make, images: Tensor
) -> None:
    model = make_vit(dtype=DOUBLE)
    defense = trainer(method, model, variant=variant)
    defense.begin()
    (weight,) = defense.trainable_parameters("head")
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)  # away from where L_AMC has a kink
    batch = batch_of(images.double())
    (gradient,) = torch.autograd.grad(sum(defense.losses(batch).values()), weight)
    direction, step, values = torch.randn_like(weight), 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(sum(defense.losses(batch).values())))
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_fit_with_constant_maps() -> None:
    """Grey images have no structure: the original tower's maps are constant."""
    x, y = torch.full((4, 3, 32, 32), 0.5), torch.tensor([0, 1, 2, 0])
    model, threat = colours((8, 8)), cd.ThreatModel("linf", eps=4 / 255, step_size=1 / 255, steps=1)
    defense = TGAZSR(model, threat=threat, **QUIET, batch_size=4, epochs=2, lr=1e-3, warmup_steps=0)
    defense.fit(x, y)
    assert [record["amc"] for record in defense.history.steps] == [0, 0]
    assert all(math.isfinite(record["gradient_norm"]) and record["ar"] > 0 for record in defense.history.steps)

    model = colours((8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match="training stopped at step 1: ar is nan; the weights are as they came"):
        TGAZSR(model, variant="released", **QUIET, batch_size=4, epochs=2).fit(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Updates -------------------------------------------------------------------------------------------------------------


@METHODS
def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(method: type[TGAZSR], make_vit: Make) -> None:
    x, y = torch.rand(1, 3, 32, 32), torch.tensor([3])
    trained, plain = make_vit(), make_vit()
    trainer(method, trained, lr=1e-3, batch_size=1, epochs=1, warmup_steps=0).fit(x, y)

    by_hand = trainer(method, plain)
    by_hand.begin()
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(False)
    seed, ids = derive_seed(0, "attack", 0), torch.arange(1)
    x_adv = pgd(plain, x, y, by_hand.threat, early_stop=False, seed=seed, ids=ids)
    for weight in weights:
        weight.requires_grad_(True)
    terms = by_hand.losses({"x": x, "x_adv": x_adv, "y": y})
    gradients = torch.autograd.grad(sum(terms.values()), weights)
    for trained_weight, weight, gradient in zip(trained.tower.parameters(), weights, gradients):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-3))


@METHODS
def test_recomputing_and_cutting_make_the_same_update(method: type[TGAZSR], make_vit: Make, images: Tensor) -> None:
    runs = []
    for options in ({}, {"low_memory": True}, {"accumulate": 2}):
        model = make_vit(dtype=DOUBLE)
        defense = trainer(method, model, lr=1e-3, batch_size=6, epochs=2, warmup_steps=0, **options)
        defense.fit(images[:6].double(), torch.arange(6))
        runs.append((model, defense.history.steps))
    for model, steps in runs[1:]:
        for weight, other in zip(model.parameters(), runs[0][0].parameters()):
            torch.testing.assert_close(weight, other, rtol=1e-8, atol=1e-11)
        for record, other_record in zip(steps, runs[0][1]):
            assert record == pytest.approx(other_record, rel=1e-8, abs=1e-10)


class Stopped(Exception):
    pass


def test_a_resume_compares_with_the_original_tower(make_vit: Make, images: Tensor, tmp_path: Path) -> None:
    class Interrupted(TGAZSR):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            if len(self.history.steps) == 3 and not self.config.resume:  # type: ignore[union-attr]
                raise Stopped
            return super().losses(batch)

    options = {**QUIET, "lr": 1e-2, "batch_size": 6, "epochs": 2, "warmup_steps": 0, "checkpoint_every": 1}
    x, y = images, torch.arange(12) % 10
    whole, broken = make_vit(), make_vit()
    TGAZSR(whole, **options).fit(x, y)
    with pytest.raises(Stopped):
        Interrupted(broken, **options, checkpoint=str(tmp_path)).fit(x, y)
    again = make_vit()
    Interrupted(again, **options, checkpoint=str(tmp_path), resume=True).fit(x, y)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters()))
    with pytest.raises(UsageError, match=r"differs in 1 of its settings: hyper_parameters\.alpha is 0\.2, was 0\.08"):
        TGAZSR(make_vit(), **options, alpha=0.2, checkpoint=str(tmp_path), resume=True).fit(x, y)


@METHODS
def test_training_learns_the_images_and_keeps_the_head(method: type[TGAZSR], vit: ZeroShotClassifier) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8)
    options: dict[str, Any] = {"lr": 2e-4, "batch_size": 8, "epochs": 8, "warmup_steps": 0}
    defense = trainer(method, vit, **options)
    head = {name: value.clone() for name, value in vit.head.state_dict().items()}
    defense.fit(x, y)
    first, last = defense.history.steps[0], defense.history.steps[-1]
    assert last["ce"] < first["ce"] - 1
    assert all(torch.equal(value, head[name]) for name, value in vit.head.state_dict().items())


def test_the_attention_terms_hold_the_maps(make_vit: Make) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8)
    options: dict[str, Any] = {"lr": 2e-4, "batch_size": 8, "epochs": 8, "warmup_steps": 0}
    distances = {}
    for weight in (0.0, 0.05):
        model = make_vit()
        original = copy.deepcopy(model)
        defense = TGAZSR(model, **QUIET, **options, alpha=0, beta=weight)
        defense.fit(x, y)
        with torch.no_grad():
            maps = [defense.attention(m.embed_tokens(x), y) for m in (model, original)]
        distances[weight] = float(attention_model_constraint_loss(*maps))
    assert distances[0.05] < 0.8 * distances[0.0]


def test_bf16_and_other_parts_of_the_tower(vit: ZeroShotClassifier, images: Tensor) -> None:
    defense = TGAZSR(vit, **QUIET, lr=1e-3, batch_size=6, epochs=2, bf16=True, train="last_blocks:1")
    first = vit.tower.visual.conv1.weight.clone()
    defense.fit(images, torch.arange(12) % 10)
    assert all(math.isfinite(record["loss"]) for record in defense.history.steps)
    assert torch.equal(vit.tower.visual.conv1.weight, first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@METHODS
def test_repeats_bit_for_bit_on_cuda(method: type[TGAZSR], make_vit: Make, images: Tensor) -> None:
    runs = []
    for _ in range(2):
        model = make_vit()
        options: dict[str, Any] = {"lr": 1e-3, "batch_size": 12, "epochs": 3, "device": "cuda", "deterministic": True}
        trainer(method, model, **options).fit(images, torch.arange(12) % 10)
        runs.append(model)
    assert all(torch.equal(one, other) for one, other in zip(runs[0].parameters(), runs[1].parameters()))


# Settings, names, errors ---------------------------------------------------------------------------------------------


@METHODS
def test_published_settings(method: type[TGAZSR], vit: ZeroShotClassifier) -> None:
    default, released = trainer(method, vit), trainer(method, vit, variant="released")
    for defense in (default, released):
        threat, config = defense.threat, defense.config
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 1 / 255, 1 / 255, 2)
        assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 1e-4, 0.9, 0.0)
        assert (config.batch_size, config.epochs, config.schedule, config.train) == (128, 10, "cosine", "tower")
        assert (defense.alpha, defense.beta) == ((0.08, 0.05) if method is TGAZSR else (0.10, 0.07))
    assert (default.map_size, released.map_size) == (32, 224)
    assert warmup_steps(released.config, 50) == 1000 and warmup_steps(default.config, 50) == 7
    published = 10 * (100_000 // 128)  # at the length it was published for, the two are one
    assert warmup_steps(default.config, published) == warmup_steps(released.config, published) == 1000
    with pytest.raises(UsageError, match="variant 'relased' is unknown; did you mean 'released'"):
        trainer(method, vit, variant="relased")


def test_they_are_art_trainers_found_by_name(vit: ZeroShotClassifier) -> None:
    assert cd.get_defense("tga-zsr") is TGAZSR and cd.get_defense("comp-tga") is CompTGA
    estimator = cd.CLIPClassifier(vit)
    defense = TGAZSR(estimator, alpha=0.1)
    assert isinstance(defense, Trainer) and defense.get_classifier() is estimator
    record = defense.record()
    assert (record["method"], record["hyper_parameters"]) == ("tga-zsr", {"alpha": 0.1, "beta": 0.05, "grid": None})
    comp = CompTGA(vit, negative_embeddings=negatives(), grid=(4, 4))
    facts = dict(comp.hyper_parameters())
    assert comp.record()["method"] == "comp-tga" and facts["grid"] == [4, 4]
    assert facts["negative_embeddings"].startswith("given, SHA-256 ")
    assert facts != dict(CompTGA(vit, negative_embeddings=negatives(6), grid=(4, 4)).hyper_parameters())


def text_encoder(templates: tuple[str, ...]) -> TextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(
            embed_dim=32,
            vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
        )
    return TextEncoder(clip, open_clip.SimpleTokenizer(context_length=16), templates)


def test_the_text_tower_encodes_the_negated_prompts(vit: ZeroShotClassifier, images: Tensor) -> None:
    assert NEGATIVE_TEMPLATE == "This is not a photo of a {}"
    encoder = text_encoder(("a photo of a {}.",))
    names = list(vit.class_names)
    model = ZeroShotClassifier(vit.tower, encoder(names), class_names=names, image_size=32, class_encoder=encoder)
    expected = text_encoder((NEGATIVE_TEMPLATE,))(names)
    torch.testing.assert_close(negated_embeddings(model), expected)
    defense = CompTGA(model, **QUIET, batch_size=4, epochs=1)
    torch.testing.assert_close(defense.negative_anchors, expected)
    assert defense.hyper_parameters()["negative_embeddings"] == NEGATIVE_TEMPLATE
    assert encoder.templates == ("a photo of a {}.",)
    assert (defense.negative_anchors - model.head.anchors).abs().max() > 0.01
    defense.fit(images[:4], torch.arange(4))
    assert defense.history.steps[0]["ar"] > 0


def test_the_copy_of_the_model_shares_the_class_encoder(vit: ZeroShotClassifier) -> None:
    vit.class_encoder = cd.EmbeddingTable(vit.class_names, vit.head.embeddings)
    defense = TGAZSR(vit)
    defense.begin()
    assert defense.frozen is not None and defense.frozen.class_encoder is vit.class_encoder
    assert defense.frozen.tower is not vit.tower


def test_a_heads_transform_applies_to_negated_embeddings(vit: ZeroShotClassifier) -> None:
    transform = nn.Linear(32, 32)
    vit.head = ClassHead(vit.class_names, vit.head.embeddings, transform)
    with torch.no_grad():
        expected = F.normalize(transform(negatives()), dim=1)
    torch.testing.assert_close(CompTGA(vit, negative_embeddings=negatives()).negative_anchors, expected)


def test_towers_without_tokens_are_refused_before_training(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    y, options = torch.arange(12) % 10, {**QUIET, "batch_size": 12}
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(UsageError, match="has no patch tokens; open_clip ViT and ResNet towers and timm towers"):
        TGAZSR(tiny_model, **options).fit(images, y)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    pooled = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "attentional_pool": True}
    with pytest.raises(UsageError, match="a tower with class-token, average or ResNet attention pooling is expected"):
        TGAZSR(open_clip_model(pooled, 32), **options).fit(images, y)
    with pytest.raises(UsageError, match="the tower TimmTower has 1 token an image, whose map is constant"):
        TGAZSR(timm_model("mobilenetv2_035", 32), **options).fit(images, y)
    with pytest.raises(UsageError, match="8 tokens an image, which form no square"):
        TGAZSR(colours((16, 8)), **options).fit(images, y % 3)


def test_bad_input(vit: ZeroShotClassifier, images: Tensor) -> None:
    for name in ("alpha", "beta"):
        for bad in (-0.1, math.nan, math.inf, "1", True):
            with pytest.raises(UsageError, match=rf"{name} is .*; a number of at least 0 is expected"):
                TGAZSR(vit, **{name: bad})
    for bad in (4, (4,), (4, 0), (4.0, 4.0), (True, 2)):
        with pytest.raises(UsageError, match=r"grid is .*; two positive whole numbers, rows and columns"):
            TGAZSR(vit, grid=bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"grid is \(2, 4\), but the tower OpenClipTower gives 16 tokens"):
        TGAZSR(vit, grid=(2, 4)).begin()
    with pytest.raises(UsageError, match=r"training option 'alhpa' is unknown"):
        TGAZSR(vit, alhpa=1)
    with pytest.raises(UsageError, match=r"call begin\(\) before it, as fit\(\) does"):
        TGAZSR(vit).losses(batch_of(images))


def test_bad_negative_embeddings(vit: ZeroShotClassifier) -> None:
    with pytest.raises(UsageError, match=r"the model has no class encoder, which cannot encode 'This is not a photo"):
        CompTGA(vit)
    vit.class_encoder = cd.EmbeddingTable(vit.class_names, vit.head.embeddings)
    with pytest.raises(UsageError, match=r"a class encoder of type EmbeddingTable, .* \(10, 32\), a row a class"):
        CompTGA(vit)
    with pytest.raises(UsageError, match=r"has shape \(9, 32\); a tensor of shape \(10, 32\) is expected"):
        CompTGA(vit, negative_embeddings=negatives(classes=9))
    with pytest.raises(UsageError, match=r"negative_embeddings is \[\[1\]\]; a tensor of shape"):
        CompTGA(vit, negative_embeddings=[[1]])  # type: ignore[arg-type]
    for row in (torch.zeros(32), torch.full((32,), math.nan)):
        bad = negatives()
        bad[2] = row
        with pytest.raises(UsageError, match="NaN, infinite or zero rows"):
            CompTGA(vit, negative_embeddings=bad)
