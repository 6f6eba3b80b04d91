"""The losses of the attacks, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from clipdefense import UsageError
from clipdefense.attacks.objectives import (
    dlr,
    drift,
    get_objective,
    likely_targets,
    targeted_cross_entropy,
    targeted_dlr,
    targeted_margin,
)

LOGITS = torch.tensor([[1.0, 4.0, 2.0, -1.0], [1.0, 4.0, 2.0, -1.0]])
Y = torch.tensor([1, 0])


def test_dlr() -> None:
    # sorted 4, 2, 1, -1: right by 2 over 4 - 1; wrong by 3 over the same
    torch.testing.assert_close(dlr(LOGITS, Y), torch.tensor([-2 / 3, 3 / 3]))


def test_dlr_does_not_see_shift_and_scale() -> None:
    torch.testing.assert_close(dlr(5 * LOGITS - 7, Y), dlr(LOGITS, Y))


def test_dlr_of_two_classes_is_the_margin() -> None:
    torch.testing.assert_close(dlr(LOGITS[:, :2], Y), torch.tensor([-3.0, 3.0]))


def test_targeted_dlr() -> None:
    # (z_t - z_y) / (4 - (1 - 1) / 2)
    target = torch.tensor([2, 3])
    torch.testing.assert_close(targeted_dlr(LOGITS, Y, target), torch.tensor([-2 / 4, -2 / 4]))
    torch.testing.assert_close(targeted_margin(LOGITS, Y, target), torch.tensor([-2.0, -2.0]))


def test_targeted_dlr_of_three_classes_is_the_targeted_margin() -> None:
    torch.testing.assert_close(targeted_dlr(LOGITS[:, :3], Y, torch.tensor([2, 2])), torch.tensor([-2.0, 1.0]))


def test_targeted_cross_entropy_is_the_log_likelihood() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    value = targeted_cross_entropy(logits, torch.tensor([1]), torch.tensor([2]))
    torch.testing.assert_close(value, torch.tensor([1 - 3.16984602]))  # 1 - log(1 + e^3 + e)


def test_equal_logits_give_a_finite_gradient() -> None:
    logits = torch.zeros(1, 5, requires_grad=True)
    for loss in (dlr(logits, Y[:1]), targeted_dlr(logits, Y[:1], torch.tensor([3]))):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()


def test_drift_is_the_squared_distance() -> None:
    f, clean = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(drift(f, Y, clean), torch.tensor([4.0, 25.0]))


def test_likely_targets_leave_the_label_out() -> None:
    assert likely_targets(LOGITS, Y, 2).tolist() == [[2, 0], [1, 2]]
    assert likely_targets(LOGITS, Y, 9).tolist() == [[2, 0, 3], [1, 2, 3]]
    with pytest.raises(UsageError, match="targets is 0"):
        likely_targets(LOGITS, Y, 0)


def test_an_unknown_objective_is_named() -> None:
    with pytest.raises(UsageError, match="objective 'dlrr' is unknown; did you mean 'dlr'"):
        get_objective("dlrr", targeted=True)
