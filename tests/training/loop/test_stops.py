"""What the loop does when something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.estimator import CLIPClassifier
from clipdefense.training.guard import DivergedError
from clipdefense_tecoa.tecoa import TeCoA

from .helpers import QUIET, Make, images_and_labels, weights_of


class Exploding(TeCoA):
    """The cross-entropy and a term that is not finite from the third update on."""

    def begin(self) -> None:
        self.calls = 0
        self.after_second: dict[str, Tensor] = {}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 2:
            self.after_second = weights_of(self.model)
        drift = self.model.embed(batch["x"]).square().mean()
        return {**super().losses(batch), "drift": drift * (float("inf") if self.calls == 3 else 0.0)}


def test_a_term_that_is_not_finite_stops_the_run_by_name(tiny_model: ZeroShotClassifier) -> None:
    defense = Exploding(tiny_model, **QUIET, batch_size=4, epochs=2, lr=1e-3)
    with pytest.raises(DivergedError, match=r"stopped at step 3: drift is inf; .* Lower lr \(it was 0.00") as caught:
        defense.fit(*images_and_labels(12))
    assert (caught.value.step, caught.value.term) == (3, "drift")
    assert len(defense.history.steps) == 2
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, defense.after_second[name])


def test_weights_that_blew_up_are_taken_back(make_model: Make) -> None:
    """The update overflows at this learning rate, which shows in the next inner attack only."""
    model, before = make_model(), make_model()
    defense = TeCoA(model, **QUIET, batch_size=4, epochs=2, lr=1e38, schedule="constant")
    with pytest.raises(DivergedError, match="stopped at step 2: inner attack is nan"):
        defense.fit(*images_and_labels(8))
    for weight, original in zip(model.parameters(), before.parameters()):
        assert torch.equal(weight, original)


def test_the_last_update_is_looked_at_too(make_model: Make) -> None:
    model, before = make_model(), make_model()
    with pytest.raises(DivergedError, match="the updated weights"):
        TeCoA(model, **QUIET, batch_size=4, epochs=1, lr=3e38, max_steps=1, schedule="constant").fit(
            *images_and_labels(8)
        )
    for weight, original in zip(model.parameters(), before.parameters()):
        assert torch.equal(weight, original)


class Greedy(nn.Module):
    """A tower that asks for a pebibyte as soon as it sees more than two images."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            torch.empty(2**50)
        return self.tower(x)


def test_out_of_memory_says_what_was_tried_and_what_to_try(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.tower = Greedy(tiny_model.tower)
    message = r"out of memory on cpu with 8 images at once \(batch_size 8, accumulate 1\); accumulate=2 makes the same"
    with pytest.raises(UsageError, match=message):
        TeCoA(tiny_model, **QUIET, batch_size=8).fit(*images_and_labels(8))
    TeCoA(tiny_model, **QUIET, batch_size=8, accumulate=4, epochs=1).fit(*images_and_labels(8))


def broken(kind: str) -> tuple[Any, Any]:
    x, y = images_and_labels(8)
    return {
        "range": (x * 255, y),
        "uint8": ((x * 255).byte(), y),
        "nan": (x.masked_fill(x > 0.99, float("nan")), y),
        "no labels": (x, None),
        "too many labels": (x, y + 5),
        "one-hot": (x, F.one_hot(y, 12)),
        "short": (x[:3], y[:3]),
        "list": (x.tolist(), y),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("range", "x has values in .* divide by 255"),
        ("uint8", "x has dtype torch.uint8"),
        ("nan", "x contains NaN"),
        ("no labels", "y is None, but this method learns from labels"),
        ("too many labels", r"y has labels in \[5, 12\]; \[0, 9\] is expected"),
        ("one-hot", "y is one-hot over 12 classes, but the model's head has 10"),
        ("short", "there are 3 training images, fewer than one batch of 4; pass batch_size=3"),
        ("list", "x is a list"),
    ],
)
def test_data_that_cannot_be_used(tiny_model: ZeroShotClassifier, kind: str, message: str) -> None:
    before = weights_of(tiny_model)
    with pytest.raises(UsageError, match=message):
        TeCoA(tiny_model, **QUIET, batch_size=4).fit(*broken(kind))
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_options_that_cannot_be_used(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(8)
    with pytest.raises(UsageError, match="training option 'epoch' is unknown; did you mean 'epochs'"):
        TeCoA(tiny_model, epoch=3)
    with pytest.raises(UsageError, match="training option 'learning_rate' is unknown"):
        TeCoA(tiny_model).fit(x, y, learning_rate=1.0)
    with pytest.raises(UsageError, match="a loader's images cannot be held out"):
        TeCoA(tiny_model, validation=0.5).fit_loader([(x, y)])
    with pytest.raises(UsageError, match="the loader has no length"):
        TeCoA(tiny_model).fit_loader(iter([(x, y)]))


def test_models_that_cannot_be_used(make_model: Make) -> None:
    with pytest.raises(UsageError, match=r"the model's weights are torch\.bfloat16, in which small updates are lost"):
        TeCoA(make_model(dtype=torch.bfloat16), **QUIET, batch_size=4).fit(*images_and_labels(8))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    estimator = CLIPClassifier(plain, input_shape=(3, 2, 2), nb_classes=3)
    with pytest.raises(UsageError, match="classifier holds a Sequential; a ZeroShotClassifier"):
        TeCoA(estimator)


def test_a_context_is_not_left_open_by_an_error(
    tiny_model: ZeroShotClassifier, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    with untouched(tiny_model), pytest.raises(DivergedError):
        Exploding(tiny_model, **QUIET, batch_size=4, epochs=2).fit(*images_and_labels(12))
