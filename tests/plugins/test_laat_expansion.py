"""LAAT's expansion of text anchors: angles by hand, limits, the published rotation, facts of real text embeddings."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipdefense.classifier import ClassHead, EmbeddingTable, ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import load_weights, save_model
from clipdefense_laat.expansion import AnchorExpansion, dilate, mean_direction, polar

RIGHT = math.pi / 2


def at(*degrees: float) -> Tensor:
    """Unit vectors of the plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def bank(n: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Directions around a common one, as text embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) + 2


def pairwise(anchors: Tensor) -> Tensor:
    """The cosines of all pairs of different rows."""
    unit = F.normalize(anchors.double(), dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


def by_rotation(embeddings: Tensor, m: Tensor, theta_max: float) -> Tensor:
    """The published way: m to the first axis, the polar angle stretched, and back (here with a reflection)."""
    a = F.normalize(embeddings.double(), dim=1)
    axis = torch.eye(1, len(m), dtype=torch.float64)[0]
    normal = F.normalize(m - axis, dim=0)
    rotation = torch.eye(len(m), dtype=torch.float64) - 2 * torch.outer(normal, normal)
    turned = a @ rotation.T
    theta = turned[:, 0].arccos()
    wider = RIGHT * theta / theta_max
    stretched = turned * (wider.sin() / theta.sin())[:, None]
    stretched[:, 0] = wider.cos()
    return stretched @ rotation


def test_angles_by_hand() -> None:
    expansion = AnchorExpansion.fit(at(20, -20, 40, -40) * torch.tensor([[1.0], [3], [0.1], [7]]))
    torch.testing.assert_close(expansion.m, at(0)[0])
    assert math.degrees(expansion.theta_max) == pytest.approx(40)
    # novel classes: between, at the mean, and beyond the outermost, which nothing stops
    torch.testing.assert_close(expansion(at(20, -40, 10, 0, 60)), at(45, -90, 22.5, 0, 135))


def test_two_classes_end_up_opposite() -> None:
    first, second = AnchorExpansion.fit(bank(2))(bank(2))
    torch.testing.assert_close(first, -second)


def test_it_is_the_published_rotation() -> None:
    train, novel = bank(20), bank(10, seed=1)
    expansion = AnchorExpansion.fit(train)
    expected = by_rotation(torch.cat([train, novel]), expansion.m, float(expansion.theta_max))
    torch.testing.assert_close(expansion(torch.cat([train, novel])), expected, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 10_000))
def test_properties(n: int, dim: int, seed: int) -> None:
    train, novel = bank(n, dim, seed), bank(5, dim, seed + 1)
    expansion = AnchorExpansion.fit(train)
    theta, across = polar(train, expansion.m)
    anchors = expansion(train)
    wider, further = polar(anchors, expansion.m)
    assert float(wider.max()) == pytest.approx(RIGHT, abs=1e-9)
    torch.testing.assert_close(wider, theta * RIGHT / theta.max(), atol=1e-9, rtol=0)
    torch.testing.assert_close(F.normalize(further, dim=1), F.normalize(across, dim=1), atol=1e-7, rtol=0)  # azimuths
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(n, dtype=torch.float64))
    turn = torch.linalg.qr(bank(dim, dim, seed + 2)).Q
    turned = AnchorExpansion.fit(train @ turn * 3)
    torch.testing.assert_close(turned(novel @ turn), expansion(novel) @ turn, atol=1e-9, rtol=0)


def test_an_anchor_at_the_mean_stays_there_with_the_limit_of_the_gradient() -> None:
    expansion = AnchorExpansion.fit(at(-40, 0, 40))
    k = 90 / 40
    here = expansion.m[None].clone().requires_grad_()
    found = expansion(here)
    torch.testing.assert_close(found, at(0))
    (gradient,) = torch.autograd.grad(found[0, 1], here)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, k]], dtype=torch.float64))
    near = at(1e-6, 1e-10)
    torch.testing.assert_close(expansion(near), at(k * 1e-6, k * 1e-10), atol=1e-18, rtol=1e-9)


def test_it_is_differentiable() -> None:
    expansion = AnchorExpansion.fit(bank(6))
    x = bank(3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(expansion, x)
    state = (expansion.m, expansion.theta_max, expansion.limit)
    assert torch.autograd.gradcheck(lambda t: dilate(t, *state), x)


def test_a_quantile_bounds_what_one_odd_class_name_does() -> None:
    degrees = (-10, 10, -10, 10, -10, 10, -10, 10, -70, 70)
    published = AnchorExpansion.fit(at(*degrees))
    assert math.degrees(published.theta_max) == pytest.approx(70)
    bounded = AnchorExpansion.fit(at(*degrees), quantile=0.5)
    assert math.degrees(bounded.theta_max) == pytest.approx(10)
    torch.testing.assert_close(bounded(at(5, -10, 70)), at(45, -90, 90))
    assert math.isinf(published.limit)


def test_dtypes() -> None:
    train = bank(9)
    expansion = AnchorExpansion.fit(train.float())
    exact = AnchorExpansion.fit(train)(train)
    single = expansion(train.float())
    assert single.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(single.double(), exact, atol=3e-7, rtol=0)
    assert expansion(train.half()).dtype == torch.float32
    before = {name: value.clone() for name, value in expansion.state_dict().items()}
    assert before.keys() == {"m", "theta_max", "limit"}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        expansion.to(dtype)
        assert all(torch.equal(value, before[name]) for name, value in expansion.state_dict().items())
        assert all(value.dtype == torch.float64 for value in expansion.buffers())


def test_the_identity_changes_lengths_alone() -> None:
    expansion, x = AnchorExpansion.identity(8), bank(5)
    torch.testing.assert_close(expansion(x), F.normalize(x, dim=1), atol=1e-15, rtol=0)
    assert "dim=8, theta_max=90.00 degrees" in repr(expansion)


@pytest.mark.parametrize(
    "same",
    [torch.ones(1, 4), torch.ones(3, 4), torch.tensor([[1.0, 2], [3, 6]]), torch.empty(0, 4)],
    ids=["one class", "all equal", "one direction", "none"],
)
def test_fewer_than_two_distinct_embeddings(same: Tensor) -> None:
    with pytest.raises(UsageError, match="expansion fitted on fewer than two distinct embeddings"):
        AnchorExpansion.fit(same)


def test_what_cannot_be_expanded() -> None:
    with pytest.raises(UsageError, match="2 embeddings whose mean is zero"):
        AnchorExpansion.fit(torch.tensor([[1.0, 0], [-1, 0]]))
    with pytest.raises(UsageError, match=r"is a Tensor of shape \(3,\); a float tensor \(K, D\)"):
        AnchorExpansion.fit(torch.ones(3))
    with pytest.raises(UsageError, match="is a list; a float tensor"):
        AnchorExpansion.fit([[1.0, 2.0]])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="zero rows"):
        AnchorExpansion.fit(torch.eye(3)[:, :2])
    for quantile in (0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="quantile is"):
            AnchorExpansion.fit(bank(3), quantile=quantile)
    with pytest.raises(UsageError, match="3 embeddings equal their mean direction"):
        AnchorExpansion.fit(at(0, -40, 40), quantile=1e-9)
    expansion = AnchorExpansion.fit(bank(3))
    with pytest.raises(UsageError, match="embeddings has dimension 5, but the expansion was fitted on 8"):
        expansion(torch.ones(2, 5))
    with pytest.raises(UsageError, match="a row opposite to the mean direction"):
        expansion(torch.stack([expansion.m, -expansion.m]))
    with pytest.raises(UsageError, match="NaN, infinite or zero rows"):
        expansion(torch.full((1, 8), float("nan")))
    with pytest.raises(UsageError, match=r"theta_max is 0\.0"):
        AnchorExpansion(torch.ones(3), 0.0)
    with pytest.raises(UsageError, match=r"m has shape \(3,\); a finite, non-zero"):
        AnchorExpansion(torch.zeros(3), 1.0)
    with pytest.raises(UsageError, match="limit is -1"):
        AnchorExpansion(torch.ones(3), 1.0, limit=-1)


def test_a_head_serialises_it_and_novel_names_go_through_it(tmp_path: Path, make_model: object) -> None:
    names = [f"thing {i}" for i in range(9)]
    table = EmbeddingTable(names, bank(9, 32).float())
    tower = make_model().tower  # type: ignore[operator]
    expansion = AnchorExpansion.fit(table(names[:6]))
    options = {"class_names": names[:6], "image_size": 32, "class_encoder": table}
    model = ZeroShotClassifier(tower, table(names[:6]), transform=expansion, **options).eval()
    torch.testing.assert_close(model.head.anchors, expansion(table(names[:6])))
    novel = model.with_classes(names[6:])
    torch.testing.assert_close(novel.head.anchors, expansion(table(names[6:])))
    assert novel.head.transform is expansion

    def unfitted(classes: list[str], transform: AnchorExpansion | None) -> ZeroShotClassifier:
        own = options | {"class_names": classes}
        return ZeroShotClassifier(copy.deepcopy(tower), table(classes), transform=transform, **own).eval()

    path = save_model(model, tmp_path / "saved.safetensors")
    with pytest.raises(UsageError, match=r"head\.transform\.m is not in the model"):
        load_weights(unfitted(names[:6], None), path)
    fresh = unfitted(names[:6], AnchorExpansion.identity(32))
    load_weights(fresh, path)
    assert torch.equal(fresh.head.anchors, model.head.anchors)
    assert torch.equal(fresh.with_classes(names[6:]).head.anchors, novel.head.anchors)
    other = unfitted(names[6:], AnchorExpansion.identity(32))
    load_weights(other, path, keep_classes=True)
    assert torch.equal(other.head.anchors, novel.head.anchors)


def test_a_cast_of_the_head_keeps_its_anchors(make_model: object) -> None:
    head = ClassHead([f"thing {i}" for i in range(5)], bank(5).float(), AnchorExpansion.fit(bank(5).float()))
    expected = head.transform(head.embeddings)
    assert float((head.double().anchors - expected).abs().max()) < 1e-6
    assert head.anchors.dtype == torch.float64


# What a computation of the released conversion was found to give, in degrees and cosines: largest angle of the training
# and of the novel classes, k, and the mean cosine of all pairs and of those of the test classes, before and after.
FACTS = {
    "laat_cifar100": (40.47, 39.27, 2.224, (0.759, 0.175), (0.767, 0.203), -0.21),
    "laat_mini": (62.57, 53.87, 1.438, (0.632, 0.353), (0.647, 0.375), -0.14),
}


@pytest.mark.parametrize("key", FACTS)
def test_real_anchors(key: str, data_folder: Path) -> None:
    with np.load(data_folder / "clip_text_anchors.npz") as archive:
        raw = torch.from_numpy(archive[f"{key}_emb"])
    largest, novel, k, every, test, least = FACTS[key]
    expansion = AnchorExpansion.fit(raw[:64])
    theta, across = polar(raw, expansion.m)
    assert math.degrees(expansion.theta_max) == pytest.approx(largest, abs=0.006)
    assert math.degrees(theta[64:].max()) == pytest.approx(novel, abs=0.006)
    assert RIGHT / float(expansion.theta_max) == pytest.approx(k, abs=6e-4)

    anchors = expansion(raw)
    assert anchors.dtype == torch.float32
    outermost = int(theta[:64].argmax())
    assert float(anchors[outermost].double() @ expansion.m) == pytest.approx(0, abs=1e-7)
    _, further = polar(anchors, expansion.m)
    torch.testing.assert_close(F.normalize(further, dim=1), F.normalize(across, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(100), atol=1.5e-6, rtol=0)
    rotated = by_rotation(raw, expansion.m, float(expansion.theta_max))
    torch.testing.assert_close(anchors.double(), rotated, atol=5e-8, rtol=0)
    for rows, (before, after) in ((slice(None), every), (slice(80, 100), test)):
        assert float(pairwise(raw[rows]).mean()) == pytest.approx(before, abs=6e-4)
        assert float(pairwise(anchors[rows]).mean()) == pytest.approx(after, abs=6e-4)
    assert float(pairwise(anchors).min()) == pytest.approx(least, abs=6e-3)
    torch.testing.assert_close(expansion.m, mean_direction(raw[:64]))
