"""The native attacks: arguments and models that cannot be used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipdefense import CLIPClassifier, UsageError, ZeroShotClassifier, attacks

from .common import NATIVE, THREATS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x * 255}, "x has values in .*divide by 255"),
        ({"x": lambda x: (x * 255).byte()}, "dtype torch.uint8.*divide by 255"),
        ({"x": lambda x: x[0]}, r"x has shape .*x\[None\]"),
        ({"x": lambda x: x[:, :1]}, "1 channels.*3 are expected"),
        ({"x": lambda x: x[:0]}, "empty batch"),
        ({"x": lambda x: x.masked_fill(x > 0.5, float("nan"))}, "NaN"),
        ({"y": lambda y: y.float()}, "dtype torch.float32"),
        ({"y": lambda y: y + 10}, r"labels in .*\[0, 9\]"),
        ({"y": lambda y: y - 20}, r"labels in .*\[0, 9\]"),
        ({"y": lambda y: y[:3]}, "3 labels for 12 images"),
        ({"y": lambda y: torch.eye(10)[y]}, "dtype torch.float32"),
    ],
)
@pytest.mark.parametrize("name", NATIVE)
def test_bad_input_is_named_before_any_forward(
    name: str,
    change: dict[str, Callable[[Tensor], Tensor]],
    message: str,
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
) -> None:
    given = {"x": images, "y": labels}
    given |= {key: function(given[key]) for key, function in change.items()}
    ran: list[int] = []
    tiny_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UsageError, match=message):
        attacks.run(name, tiny_model, given["x"], given["y"], THREATS[0])
    assert not ran


def test_unknown_names_are_answered_with_the_nearest(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UsageError, match="attack 'pdg' is unknown; did you mean 'pgd'"):
        attacks.run("pdg", tiny_model, images, labels, THREATS[0])
    with pytest.raises(UsageError, match="option of attack 'pgd' 'objectiv' is unknown; did you mean 'objective'"):
        attacks.run("pgd", tiny_model, images, labels, THREATS[0], objectiv="ce")
    with pytest.raises(UsageError, match="objective 'cd' is unknown"):
        attacks.run("pgd", tiny_model, images, labels, THREATS[0], objective="cd")


@pytest.mark.parametrize("name", NATIVE)
def test_non_finite_logits_stop_and_name_the_images(
    name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = tiny_model(x)
            return logits.masked_fill((torch.arange(len(x)) == 2)[:, None], float("nan"))

    with pytest.raises(UsageError, match=r"ids 102"):
        attacks.run(name, Breaks(), images, labels, THREATS[0], ids=torch.arange(100, 112))


def test_a_model_that_returns_no_logits_is_refused(images: Tensor, labels: Tensor) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UsageError, match="model returned tuple"):
        attacks.pgd(Pair(), images, labels, THREATS[0])


def test_what_is_no_module_or_no_threat_model_is_refused(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UsageError, match=r"model is a CLIPClassifier.*pass its \.model"):
        attacks.run("pgd", CLIPClassifier(tiny_model), images, labels, THREATS[0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threat is 'linf'; a ThreatModel is expected"):
        attacks.run("pgd", tiny_model, images, labels, "linf")  # type: ignore[arg-type]
