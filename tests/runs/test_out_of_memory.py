"""Out of memory: the batch is halved, nothing is counted twice, and the failed attempt is gone by then."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdefense.errors import UsageError
from clipdefense.runs.build import Builder
from clipdefense.runs.compare import transfer
from clipdefense.runs.config import RunConfig
from clipdefense.runs.memory import halved, sufficed
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.verify import verify

MakeConfig = Callable[..., RunConfig]
Limit = Callable[[int], list[int]]
FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """``limit(n)``: models raise above n images a forward; returns the sizes of the forwards that they then see."""
    real = Builder.model

    def set_limit(largest: int) -> list[int]:
        seen: list[int] = []

        def small(self: Builder, cell: Any) -> Any:
            def refuse(module: Any, inputs: Any) -> None:
                seen.append(len(inputs[0]))
                if len(inputs[0]) > largest:
                    raise torch.OutOfMemoryError(FULL)

            model = real(self, cell)
            model.register_forward_pre_hook(refuse)
            return model

        monkeypatch.setattr(Builder, "model", small)
        return seen

    return set_limit


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), MemoryError(), RuntimeError(FULL)])
def test_the_batch_is_halved_until_it_fits(error: Exception) -> None:
    tried: list[int] = []

    def task(size: int) -> None:
        tried.append(size)
        if size > 3:
            raise error

    with pytest.warns(UserWarning, match="out of memory: going on with") as caught:
        assert halved(task, 13, "x") == (None, 2)  # a task may well return None
    assert tried == [13, 7, 4, 2]
    said = [str(warning.message) for warning in caught]
    assert said == [f"out of memory: going on with {size} images a forward." for size in (7, 4, 2)]
    assert {warning.filename for warning in caught} == {__file__}  # who called, not the library


def test_what_is_no_lack_of_memory_passes() -> None:
    def task(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        halved(task, 4, "x")


def test_where_one_image_does_not_fit_it_says_of_what_and_what_to_do() -> None:
    def task(size: int) -> None:
        raise torch.OutOfMemoryError(FULL)

    expected = "memory does not suffice for one image at a time of 'a cell'; take another device."
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        halved(task, 2, "'a cell'", "take another device")


def test_the_failed_attempts_tensors_are_gone_before_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    collect = gc.collect

    def collecting() -> int:  # what comes right before the cache is emptied
        alive.append(sum(reference() is not None for reference in kept))
        return collect()

    def task(size: int) -> int:
        held = torch.zeros(size)
        kept.append(weakref.ref(held))
        if size > 1:
            raise torch.OutOfMemoryError(FULL)
        return len(held)

    monkeypatch.setattr(gc, "collect", collecting)
    with pytest.warns(UserWarning):
        assert halved(task, 4, "x") == (1, 1)
    assert alive == [0, 0]


def test_verify_goes_on_with_fewer_images_a_forward(make_config: MakeConfig, folder: Path, limit: Limit) -> None:
    # two cells: the second begins with what sufficed for the first
    threats = [{"eps": "4/255", "steps": 3}, {"eps": "3/255", "steps": 3}]
    run(make_config(save_adv=True, exhibits=False, threats=threats, batch_size=16), folder, device="cpu")
    plain = verify(folder, device="cpu")
    seen = limit(6)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        found = verify(folder, device="cpu")
    assert [proof.counts for proof in found] == [proof.counts for proof in plain] and found == plain
    said = [str(warning.message) for warning in caught]
    assert said == [f"out of memory: going on with {size} images a forward." for size in (8, 4)]
    assert {warning.filename for warning in caught} == {__file__}
    assert sum(size > 6 for size in seen) == 2
    limit(0)
    cell = read(folder).cells[0].cell.name
    expected = re.escape(f"memory does not suffice for one image at a time of {cell!r}; take a smaller model or size")
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=f"^{expected}"):
        verify(folder, device="cpu")


def test_a_transfer_goes_on_with_fewer_images_a_forward(make_config: MakeConfig, tmp_path: Path, limit: Limit) -> None:
    changes = {"save_adv": True, "exhibits": False, "batch_size": 16}
    run(make_config(**changes), tmp_path / "a", device="cpu")
    run(make_config(attacks=["pgd,steps=1,step_size=1e-5"], **changes), tmp_path / "b", device="cpu")
    (plain,) = transfer(tmp_path / "a", tmp_path / "b", device="cpu")
    limit(1)
    with pytest.warns(UserWarning, match="out of memory: going on with 1 image a forward") as caught:
        (found,) = transfer(tmp_path / "a", tmp_path / "b", device="cpu", batch_size=8)
    assert found == plain and plain.broken
    assert len(caught) == 3 and {warning.filename for warning in caught} == {__file__}


def test_both_begin_with_what_sufficed_in_the_run(make_config: MakeConfig, tmp_path: Path, limit: Limit) -> None:
    limit(2)
    with pytest.warns(UserWarning, match="going on with 2 images"):
        run(make_config(save_adv=True, exhibits=False, batch_size=8), tmp_path / "a", device="cpu")
    with pytest.warns(UserWarning, match="going on with 2 images"):
        weak = make_config(attacks=["pgd,steps=1,step_size=1e-5"], exhibits=False, batch_size=8)
        run(weak, tmp_path / "b", device="cpu")
    result = read(tmp_path / "a")
    assert result.config.batch_size == 8 and sufficed(result.cells) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (proof,) = verify(tmp_path / "a", device="cpu")
        (found,) = transfer(tmp_path / "a", tmp_path / "b", device="cpu")
    assert proof.holds and proof.claims > 5 and found.tried > 2
