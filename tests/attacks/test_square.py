"""Square: its schedule and shapes by hand, its search by what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.context import predict
from clipdefense.attacks.objectives import margin
from clipdefense.attacks.square import _window, pyramid, window_sides

THREATS = [ThreatModel("linf", 1 / 255), ThreatModel("l2", 0.5)]


def test_window_sides_follow_the_published_schedule() -> None:
    # 10,000 queries, 20 x 20 pixels, p = 0.8: sqrt(320) = 17.9, below 20 - 1; p is halved after 10, 50, 200, ...
    sides = window_sides(0.8, 10_000, 20, 20)
    assert len(sides) == 10_000
    assert [sides[k] for k in (0, 11, 51, 201, 501, 1001)] == [18, 13, 9, 6, 4, 3]


def test_window_sides_stretch_over_fewer_queries() -> None:
    # 5,000 queries: the limits 10, 50, ... of 10,000 come at half the query
    sides = window_sides(0.8, 5000, 224, 224)
    assert sides[:6] == [200] * 6 and sides[6] == 142  # sqrt(0.8 / 2) * 224 = 141.7
    assert min(sides) >= 1 and sides == sorted(sides, reverse=True)


def test_window_sides_of_tiny_images() -> None:
    assert window_sides(0.8, 3, 1, 1) == [1, 1, 1]
    assert max(window_sides(1.0, 3, 2, 5)) == 1  # never the whole image


def test_window_sides_of_l2_stay_above_what_cancels() -> None:
    assert window_sides(0.8, 10_000, 20, 20, least=3)[-1] == 3


def test_window() -> None:
    like = torch.zeros(2, 3, 4, 4)
    mask = _window(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([2, 1]), like)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert mask[1, 0].nonzero().tolist() == [[2, 2]]


def test_pyramid_of_side_two() -> None:
    # heaps of 2 x 1: n = 1, (r, s) = (2, 1) is the centre row, so 1/4 at the top and 1/4 + 1 below; halves of
    # opposite sign, norm sqrt(2 (1/16 + 25/16)) = sqrt(13) / 2
    expected = torch.tensor([[0.25, -0.25], [1.25, -1.25]]) / (13**0.5 / 2)
    torch.testing.assert_close(pyramid(2), expected)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 10])
def test_pyramid_has_norm_one_and_two_signs(side: int) -> None:
    eta = pyramid(side)
    assert eta.shape == (side, side)
    torch.testing.assert_close(eta.norm(), torch.tensor(1.0))
    if side > 1:
        assert (eta[:, : side // 2] > 0).all() and (eta[:, side // 2 :] < 0).all()


class Counted(nn.Module):
    """The margin seen at every query, per image id found from its clean pixel sum."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.queries = 0

    def forward(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        return self.model(x)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_queries_are_counted_exactly(
    threat: ThreatModel, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    model = Counted(tiny_model)
    attacks.square(model, images, labels, threat, queries=17, early_stop=False, batch_size=5)
    assert model.queries == 17 * len(images)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_more_queries_are_never_worse_and_soon_better(
    threat: ThreatModel, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    def reached(queries: int) -> Tensor:
        x_adv = attacks.square(tiny_model, images, labels, threat, queries=queries, early_stop=False)
        delta = (x_adv - images).flatten(1)
        assert (delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)).max() <= threat.eps * (1 + 1e-5)
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        return margin(predict(tiny_model, x_adv), labels)

    # the schedule depends on the number of queries, so only the first proposal is shared
    first, many = reached(1), reached(200)
    assert (many >= first - 1e-4).all() and many.mean() > first.mean() + 0.3


def test_linf_moves_every_pixel_by_eps_or_to_the_box(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    eps = 4 / 255
    x_adv = attacks.square(tiny_model, images, labels, ThreatModel("linf", eps), queries=30, early_stop=False)
    at_eps = ((x_adv - images).abs() - eps).abs() < 1e-6
    assert (at_eps | (x_adv == 0) | (x_adv == 1)).all()


def test_l2_spends_its_budget(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    inner = images * 0.5 + 0.25  # away from the box, which would clip some of it off
    x_adv = attacks.square(tiny_model, inner, labels, ThreatModel("l2", 0.2), queries=30, early_stop=False)
    torch.testing.assert_close(
        (x_adv - inner).flatten(1).norm(dim=1), torch.full((len(inner),), 0.2), atol=1e-5, rtol=0
    )
