"""The template's tests: everything clipdefense promises of a defence, and what this one computes."""

from __future__ import annotations

import pytest
import torch

import clipdefense as cd


def test_it_keeps_every_promise() -> None:
    cd.check_defense("smoothing")


def test_a_point_is_spread_over_its_neighbours() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 0.9
    defense = cd.get_defense("smoothing")(strength=1.0)
    whole = torch.ones_like(x)  # a draw that takes the blur alone
    moved = x + defense.perturbation(x, noise=whole)
    torch.testing.assert_close(moved[0, 0, 1:4, 1:4], torch.full((3, 3), 0.1))


def test_a_strength_of_nothing_changes_nothing() -> None:
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(cd.get_defense("smoothing")(strength=0.0).defend(x), x)
    with pytest.raises(cd.UsageError, match=r"strength is 2; a share in \[0, 1\]"):
        cd.get_defense("smoothing")(strength=2)
