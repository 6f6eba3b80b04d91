"""Order, held-out images, labels and the loaders of others."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipdefense.errors import UsageError
from clipdefense.training.data import (
    Arrays,
    Batches,
    GeneratorEpochs,
    MapStyle,
    Share,
)
from clipdefense.training.items import as_labels, check_same_classes

ALONE = Share()


def arrays(n: int, batch_size: int = 4, seed: int = 0, validation: float = 0.0) -> Arrays:
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2) / n
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "validation": validation}
    return Arrays(x, torch.arange(n) % 3, 3, True, **options)


def ids_of(source: Any, epoch: int = 0, first: int = 0, share: Share = ALONE) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in source.batches(epoch, first, share)]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), batch_size=st.integers(1, 8), seed=st.integers(0, 10), share=st.floats(0, 0.5))
def test_an_epoch_is_whole_batches_of_distinct_training_images(
    n: int, batch_size: int, seed: int, share: float
) -> None:
    if n - max(round(share * n), bool(share)) < batch_size:
        return
    source = arrays(n, batch_size, seed, share)
    batches = ids_of(source)
    seen = [number for batch in batches for number in batch]
    assert all(len(batch) == batch_size for batch in batches) and len(batches) == source.steps
    assert len(set(seen)) == len(seen)
    held_out = {number for batch in source.held_out(3) for number in batch["ids"].tolist()}
    assert not held_out & set(seen) and len(held_out) + source.size == n


def test_order_is_fixed_by_seed_and_epoch_and_can_be_entered_anywhere() -> None:
    source = arrays(40)
    assert ids_of(source, 3) == ids_of(arrays(40), 3)
    assert ids_of(source, 3) != ids_of(source, 4)
    assert ids_of(source, 3) != ids_of(arrays(40, seed=1), 3)
    assert ids_of(source, 3, first=4) == ids_of(source, 3)[4:]
    assert sorted(number for batch in ids_of(source, 3) for number in batch) == list(range(40))


def test_images_and_labels_follow_their_ids() -> None:
    for batch in arrays(12).batches(0, 0, ALONE):
        assert torch.allclose(batch["x"][:, 0, 0, 0] * 12, batch["ids"].float())
        assert torch.equal(batch["y"], batch["ids"] % 3)


def test_processes_share_every_batch() -> None:
    source = arrays(24)
    halves = [ids_of(source, 1, share=Share(rank, 2)) for rank in range(2)]
    for whole, first, second in zip(ids_of(source, 1), *halves):
        assert (whole[::2], whole[1::2]) == (first, second)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Augments with all three global generators, as real datasets do."""

    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor(draws).view(3, 1, 1).expand(3, 2, 2), index % 3


def map_style(workers: int = 0, seed: int = 0) -> MapStyle:
    return MapStyle(Noisy(), 3, True, batch_size=4, seed=seed, workers=workers)


def test_augmentation_repeats_whoever_reads_the_item() -> None:
    def read(source: MapStyle, epoch: int, first: int = 0) -> dict[int, list[float]]:
        batches = list(source.batches(epoch, first, ALONE))
        return {int(i): x[:, 0, 0].tolist() for batch in batches for i, x in zip(batch["ids"], batch["x"])}

    here = read(map_style(), 2)
    assert read(map_style(workers=2), 2) == here
    later = read(map_style(), 2, first=1)
    assert later == {number: here[number] for number in later} and len(later) == 4
    other = read(map_style(), 3)
    assert all(other[number] != here[number] for number in here.keys() & other.keys())


def test_a_dataset_with_ids_of_its_own_is_ordered_by_them() -> None:
    class Selected(Noisy):
        ids = torch.arange(100, 110)

    batches = [batch["ids"] for batch in MapStyle(Selected(), 3, True, batch_size=5, seed=0).batches(0, 0, ALONE)]
    assert sorted(torch.cat(batches).tolist()) == list(range(100, 110))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("not an image", 0), "item . of the dataset holds a str"),
        (torch.rand(3, 2, 2), "this method learns from labels"),
        ((torch.full((3, 2, 2), 9.0), 0), "values in \\[9, 9\\]"),
        ((torch.rand(3, 2, 2), 7), "y has labels in \\[7, 7\\]"),
    ],
)
def test_items_that_cannot_be_used(item: Any, message: str) -> None:
    source = MapStyle([item] * 5, 3, True, batch_size=4, seed=0)
    with pytest.raises(UsageError, match=message):
        next(iter(source.batches(0, 0, ALONE)))


def test_images_of_several_shapes() -> None:
    items = [(torch.rand(3, size, size), 0) for size in (2, 3, 2, 3)]
    with pytest.raises(UsageError, match="images of the dataset differ in shape"):
        next(iter(MapStyle(items, 3, True, batch_size=4, seed=0).batches(0, 0, ALONE)))


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(UsageError, match="there are 3 training images, fewer than one batch of 4; pass batch_size=3"):
        arrays(3)
    with pytest.raises(UsageError, match=r"there are 3 training images \(1 more are held out\)"):
        arrays(4, validation=0.2)


def test_labels() -> None:
    eye = np.eye(3, dtype=np.float32)
    assert as_labels(eye[[2, 0]], 2, 3, True).tolist() == [2, 0]
    assert as_labels([1, 2], 2, 3, True).tolist() == [1, 2]
    assert as_labels(None, 2, 3, False) is None
    with pytest.raises(UsageError, match="y is None, but this method learns from labels"):
        as_labels(None, 2, 3, True)
    with pytest.raises(UsageError, match="y is one-hot over 3 classes, but the model's head has 10"):
        as_labels(eye, 3, 10, True)
    with pytest.raises(UsageError, match="rows that are not one-hot"):
        as_labels(np.full((2, 3), 1 / 3), 2, 3, True)
    with pytest.raises(UsageError, match="y has 2 labels for 3 images"):
        as_labels([0, 1], 3, 3, True)
    with pytest.raises(UsageError, match="integer class labels are expected"):
        as_labels([0.0, 1.0], 2, 3, True)


def test_a_loader_gives_its_own_batches() -> None:
    x, y = torch.rand(10, 3, 2, 2), torch.arange(10) % 3
    source = Batches(DataLoader(TensorDataset(x, y), batch_size=4), 3, True)
    assert source.steps == 3 and not source.exact
    batches = list(source.batches(0, 1, ALONE))
    assert [batch["ids"].tolist() for batch in batches] == [[4, 5, 6, 7], [8, 9]]
    assert torch.equal(batches[0]["x"], x[4:8]) and torch.equal(batches[1]["y"], y[8:])


def test_processes_share_a_loader() -> None:
    x, y = torch.rand(5, 3, 2, 2), torch.arange(5) % 3
    first, second = (next(iter(Batches([(x, y)], 3, True).batches(0, 0, Share(rank, 2)))) for rank in range(2))
    assert (first["ids"].tolist(), second["ids"].tolist()) == ([0, 2], [1, 3])
    with pytest.raises(UsageError, match="a batch has 5 images for 6 processes"):
        next(iter(Batches([(x, y)], 3, True).batches(0, 0, Share(0, 6))))


def test_a_loader_that_runs_dry() -> None:
    source = Batches(iter([(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))]), 3, True)
    assert source.steps is None
    assert len(list(source.batches(0, 0, ALONE))) == 1
    with pytest.raises(UsageError, match="no batches in epoch 2; one that can be iterated again"):
        list(source.batches(1, 0, ALONE))
    with pytest.raises(UsageError, match="the loader has no batches"):
        Batches([], 3, True)


def test_art_generators() -> None:
    x, y = np.random.default_rng(0).random((10, 3, 2, 2), dtype=np.float32), np.arange(10) % 3
    for generator in (
        NumpyDataGenerator(x, y, batch_size=4),
        PyTorchDataGenerator(
            DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=4), size=10, batch_size=4
        ),
    ):
        source = Batches(GeneratorEpochs(generator), 3, True)
        assert source.steps == 2
        first = next(iter(source.batches(0, 0, ALONE)))
        assert first["x"].shape == (4, 3, 2, 2) and first["y"].dtype == torch.int64
    with pytest.raises(UsageError, match="generator is a list without get_batch"):
        GeneratorEpochs([1, 2])


def test_class_lists() -> None:
    check_same_classes(Noisy(), ("a", "b", "c"))
    check_same_classes(Noisy(), ("a", "b", "another word for c"))
    check_same_classes(DataLoader(Noisy()), ("a", "b", "c"))
    with pytest.raises(UsageError, match="the dataset has 3 classes, but the model's head has 2"):
        check_same_classes(Noisy(), ("a", "b"))
    with pytest.raises(UsageError, match="class 'b' has label 1 in the dataset, 2 in the model's head"):
        check_same_classes(DataLoader(Noisy()), ("a", "c", "b"))
