"""Training options: ranges, overrides, and what a resume must agree in."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from clipdefense.errors import UsageError
from clipdefense.training.config import TrainingConfig
from clipdefense.training.schedule import learning_rate, total_steps, warmup_steps


def test_importing_the_options_imports_neither_torch_nor_accelerate() -> None:
    code = "import sys, clipdefense.training.config; print([m for m in ('torch', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_override_changes_a_copy() -> None:
    config = TrainingConfig(lr=0.1)
    changed = config.override(lr=0.2, epochs=3)
    assert (config.lr, config.epochs) == (0.1, 10)
    assert (changed.lr, changed.epochs) == (0.2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_override_names_the_nearest_option() -> None:
    with pytest.raises(UsageError, match="training option 'epoch' is unknown; did you mean 'epochs'"):
        TrainingConfig().override(epoch=3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs is 0; a whole number of at least 1"),
        ("epochs", 2.5, "epochs is 2.5; a whole number"),
        ("batch_size", True, "batch_size is True; a whole number"),
        ("lr", 0.0, "lr is 0.0; a number above 0"),
        ("lr", math.nan, "lr is nan"),
        ("lr", "fast", "lr is 'fast'"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("mix", 1.5, "at least 0 and at most 1"),
        ("validation", 1.0, "validation is 1.0"),
        ("max_grad_norm", 0, "max_grad_norm is 0"),
        ("max_steps", 0, "max_steps is 0"),
        ("optimizer", "adam", "optimizer 'adam' is unknown; did you mean 'adamw'"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("train", "layernorms", "did you mean 'layernorm'"),
        ("train", "last_blocks", "write the number of blocks as last_blocks:2"),
        ("train", "last_blocks:0", "write the number of blocks"),
        ("train", "head:1", "train 'head:1' is unknown"),
        ("accumulate", 300, "accumulate is 300 with batch_size 256"),
        ("milestones", (3,), "belong to schedule='milestones'"),
        ("milestones", "30,soon", "milestones is 'soon'; a whole number"),
        ("milestones", None, "milestones is None; a whole number"),
        ("resume", True, "resume is True but checkpoint is None"),
        ("resume", "no", "resume is 'no'; True or False is expected"),
        ("bf16", 1, "bf16 is 1; True or False"),
    ],
)
def test_values_outside_their_range_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig().override(**{field: value})


def test_arithmetic_leaves_out_what_only_says_where_a_run_happens() -> None:
    here = TrainingConfig(checkpoint="a", checkpoint_every=5, resume=True, show_progress=False, workers=2, device="cpu")
    assert here.arithmetic() == TrainingConfig().arithmetic()
    assert TrainingConfig(lr=1.0).arithmetic() != TrainingConfig().arithmetic()


def test_warm_up_then_cosine() -> None:
    config = TrainingConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(config, step, 0, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)  # half of the eight cosine steps
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))


def test_warm_up_is_capped_unless_it_was_asked_for() -> None:
    published = TrainingConfig(warmup_steps=1000, warmup_cap=0.1)
    assert warmup_steps(published, 55) == 6
    assert warmup_steps(published, 50_000) == 1000
    assert warmup_steps(published.override(warmup_steps=30), 55) == 30
    assert warmup_steps(published.override(warmup_cap=1.0), 55) == 1000
    swallowed = [learning_rate(published.override(warmup_cap=1.0), step, 0, 55) for step in range(55)]
    assert swallowed[-1] == pytest.approx(1e-5 * 55 / 1000)


def test_milestones_count_epochs() -> None:
    config = TrainingConfig(lr=1.0, schedule="milestones", milestones=(2, 3), gamma=0.1)
    assert [learning_rate(config, 0, epoch, None) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert learning_rate(TrainingConfig(lr=1.0, schedule="constant"), 7, 3, None) == 1.0


def test_total_steps() -> None:
    assert total_steps(TrainingConfig(epochs=3), 7) == 21
    assert total_steps(TrainingConfig(epochs=3, max_steps=10), 7) == 10
    assert total_steps(TrainingConfig(max_steps=10), None) == 10
    assert total_steps(TrainingConfig(schedule="constant"), None) is None
    with pytest.raises(UsageError, match="the loader has no length"):
        total_steps(TrainingConfig(), None)


@pytest.mark.parametrize(("given", "kept"), [(60, (60,)), ([60, 80], (60, 80)), ("60, 80", (60, 80)), ("60", (60,))])
def test_milestones_as_they_are_typed(given: Any, kept: tuple[int, ...]) -> None:
    assert TrainingConfig(schedule="milestones", milestones=given).milestones == kept
