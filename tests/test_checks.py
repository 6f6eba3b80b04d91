"""What is said of images, labels and class names that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import clipdefense as cd
from clipdefense.checks import check_class_names, check_images, check_labels
from clipdefense.errors import MissingPackageError, UsageError, unknown_name

GOOD = torch.rand(2, 3, 4, 4)


def with_value(value: float) -> Tensor:
    x = GOOD.clone()
    x[1, 2, 3, 0] = value
    return x


@pytest.mark.parametrize(
    "x",
    [
        GOOD,
        GOOD.half(),
        GOOD.double(),
        GOOD[:1].expand(5, 3, 4, 4),
        torch.zeros(1, 3, 1, 1),
        torch.ones(1, 3, 2, 2),
        with_value(1 + 5e-7),
        with_value(-5e-7),
        GOOD.clone().requires_grad_(True),
    ],
)
def test_good_images_pass(x: Tensor) -> None:
    check_images(x, channels=3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD.numpy(), "x is a ndarray; a torch tensor is expected"),
        ((GOOD * 255).byte(), r"x has dtype torch.uint8; .*divide by 255: x.float\(\) / 255"),
        ((GOOD * 255).int(), r"x has dtype torch.int32; .*x.float\(\)"),
        (GOOD[0], r"x has shape \(3, 4, 4\); \(N, C, H, W\) is expected; add the batch dimension with x\[None\]"),
        (GOOD[None], r"x has shape \(1, 2, 3, 4, 4\); \(N, C, H, W\) is expected"),
        (GOOD[:0], r"x is an empty batch, shape \(0, 3, 4, 4\); at least one image"),
        (GOOD[:, :1], r"x has 1 channels, shape \(2, 1, 4, 4\); 3 are expected"),
        (GOOD.permute(0, 2, 3, 1), r"x has 4 channels.*NHWC, permute with x.permute\(0, 3, 1, 2\)"),
        (with_value(float("nan")), "x contains NaN or infinite values; finite pixels"),
        (with_value(float("inf")), "x contains NaN or infinite values"),
        (with_value(-float("inf")), "x contains NaN or infinite values"),
        (GOOD * 255, r"x has values in \[.*\]; \[0, 1\] is expected; divide by 255"),
        (GOOD * 4 - 2, r"\[0, 1\] is expected; normalisation belongs inside the model"),
        (with_value(1.001), r"x has values in \[.*, 1.001\]; \[0, 1\] is expected"),
        (with_value(-0.001), r"x has values in \[-0.001, .*\]; \[0, 1\] is expected"),
    ],
)
def test_bad_images_are_named(x: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_images(x, channels=3)


def test_any_number_of_channels_where_the_model_does_not_say() -> None:
    check_images(GOOD[:, :1])
    with pytest.raises(UsageError, match=r"^adversarial images is an empty batch"):
        check_images(GOOD[:0], "adversarial images")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_good_labels_pass(dtype: torch.dtype) -> None:
    check_labels(torch.tensor([0, 9, 4]).to(dtype), 3, 10)
    check_labels(torch.tensor([10**6]), 1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, 1, 2]), "y is a ndarray; a torch tensor of integer labels"),
        ([0, 1, 2], "y is a list"),
        (torch.tensor([0.0, 1.0, 2.0]), r"y has dtype torch.float32; integer class labels are expected \(y.long\(\)\)"),
        (torch.tensor([True, False, True]), "y has dtype torch.bool"),
        (torch.eye(3, 4).long(), r"y has shape \(3, 4\); .*one-hot labels convert with y.argmax\(1\)"),
        (torch.tensor(1), r"y has shape \(\); one integer a sample, \(3,\)"),
        (torch.tensor([0, 1]), "y has 2 labels for 3 images; one label an image"),
        (torch.tensor([], dtype=torch.long), "y has 0 labels for 3 images"),
        (torch.tensor([0, 1, 4]), r"y has labels in \[0, 4\]; \[0, 3\] is expected"),
        (torch.tensor([0, -1, 2]), r"y has labels in \[-1, 2\]; \[0, 3\] is expected"),
    ],
)
def test_bad_labels_are_named(y: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_labels(y, 3, 4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "classes is empty; a classifier needs at least two"),
        (["cat"], "classes has the one class 'cat'; a classifier needs at least two"),
        (["cat", "dog", "cat"], "classes contains 'cat' more than once; class names must be distinct"),
        (["cat", " "], "classes contains ' '; every class name must be a non-empty string"),
        (["cat", 3], "classes contains 3; every class name"),
        ("cat", r"classes is the string 'cat'; a list of names is expected, such as \['cat', 'dog'\]"),
    ],
)
def test_bad_class_lists_are_named(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_class_names(names)


def test_good_class_lists_become_tuples() -> None:
    assert check_class_names(name for name in ("a", "b")) == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (GOOD * 255, torch.tensor([0, 1]), "divide by 255"),
        (GOOD[:, :1], torch.tensor([0, 1]), "x has 1 channels"),
        (GOOD, torch.tensor([0, 10]), r"y has labels in \[0, 10\]; \[0, 9\]"),
        (GOOD, torch.tensor([0.0, 1.0]), "integer class labels"),
        (GOOD, torch.tensor([0]), "y has 1 labels for 2 images"),
    ],
)
@pytest.mark.parametrize("entry", ["attack", "evaluate"])
def test_nothing_runs_on_bad_input(
    tiny_model: cd.ZeroShotClassifier, entry: str, x: Tensor, y: Tensor, message: str
) -> None:
    passes: list[object] = []
    tiny_model.tower.register_forward_hook(lambda *_: passes.append(1))
    threat = cd.ThreatModel("linf", eps=1 / 255)
    with pytest.raises(UsageError, match=message):
        if entry == "attack":
            cd.attacks.run("pgd", tiny_model, x, y, threat)
        else:
            cd.evaluate(tiny_model, x, y, threat)
    assert not passes


def test_unknown_names_come_with_the_nearest() -> None:
    known = ["pgd", "apgd-ce", "square", "SquareAttack"]
    assert str(unknown_name("attack", "pdg", known)) == "attack 'pdg' is unknown; did you mean 'pgd'?"
    assert "did you mean 'pgd'" in str(unknown_name("attack", "PGD", known))
    assert "'SquareAttack'" in str(unknown_name("attack", "squareatack", known))
    assert "'apgd-ce'" in str(unknown_name("attack", "ap", known))  # what it begins
    nothing_near = str(unknown_name("attack", "zzz", known, "See the list."))
    assert nothing_near.endswith("known: SquareAttack, apgd-ce, pgd, square. See the list.")
    assert "none is registered" in str(unknown_name("attack", "pgd", []))
    many = str(unknown_name("attack", "zzz", [f"name{i:02}" for i in range(30)]))
    assert "name11, ... (30 in all)" in many and "name12" not in many


def test_errors_are_what_callers_already_catch() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(MissingPackageError, UsageError) and issubclass(MissingPackageError, ImportError)
