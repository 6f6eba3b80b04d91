"""Arrays, datasets, loaders and validation data in the forms they come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from clipdefense import TrainerDefense, ZeroShotClassifier, get_defense
from clipdefense.errors import UsageError
from clipdefense.training.data import MapStyle, Share
from clipdefense.weights import sha256_of_weights

X = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 10


def trainer(name: str, model: ZeroShotClassifier, **options: Any) -> TrainerDefense:
    quiet = {"show_progress": False, "measure_every": 0, "epochs": 1, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0}
    made = get_defense(name)(model, **{**quiet, **options})
    assert isinstance(made, TrainerDefense)
    return made


class Items(Dataset[Any]):
    """A dataset of whatever ``item(i)`` gives."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y)


def test_images_without_labels_come_bare_or_in_tuples_of_one(make_model: Any) -> None:
    results = set()
    for dataset in (X, list(X), TensorDataset(X)):
        model = make_model()
        trainer("fare", model).fit(dataset)
        results.add(sha256_of_weights(model))
    assert len(results) == 1


@pytest.mark.parametrize(
    "label",
    [
        lambda i: int(Y[i]),
        lambda i: Y[i],
        lambda i: np.int64(Y[i]),
        lambda i: Y[i : i + 1],
        lambda i: torch.eye(10)[Y[i]],
        lambda i: np.eye(10)[Y[i]],
    ],
)
def test_labels_of_items(label: Any) -> None:
    source = MapStyle(Items(lambda i: (X[i], label(i))), 10, True, batch_size=4, seed=0)
    for batch in source.batches(0, 0, Share()):
        assert batch["y"].dtype == torch.int64 and torch.equal(batch["y"], Y[batch["ids"]])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: (X[i], "cat"), "item 3 of the dataset has the label 'cat'; a whole number"),
        (lambda i: (X[i], 0.5), "y has dtype torch.float32; integer class labels are expected"),
        (
            lambda i: (X[i], Y[i], i),
            r"item 3 of the dataset has 3 entries; \(image, label\) or the image alone",
        ),
        (lambda i: {"image": X[i], "label": Y[i]}, "item 3 of the dataset is a dict with 'image', 'label'; "),
        (lambda i: (X[i].numpy().tolist(), 0), "item 3 of the dataset holds a list"),
    ],
)
def test_items_of_another_form(item: Any, message: str, workers: int) -> None:
    """One sentence, whether this process reads the item or a worker."""
    source = MapStyle(Items(item), 10, True, batch_size=4, seed=0, workers=workers)
    with pytest.raises(UsageError) as caught:
        next(iter(source.read([torch.tensor([3, 4, 5, 6])], 0)))
    assert "\n" not in str(caught.value)
    assert caught.match(message)


def test_batches_of_another_form(tiny_model: ZeroShotClassifier) -> None:
    defense = trainer("tecoa", tiny_model)
    with pytest.raises(UsageError, match="batch 1 of the loader has 3 entries"):
        defense.fit_loader(DataLoader(TensorDataset(X, Y, Y), batch_size=4))
    with pytest.raises(UsageError, match="batch 2 of the loader is a dict with 'x', 'y'"):
        defense.fit_loader([(X[:4], Y[:4]), {"x": X[4:8], "y": Y[4:8]}])
    with pytest.raises(UsageError, match="a batch of the loader is a str"):
        defense.fit_loader([("images", Y)])


def test_each_kind_of_data_names_the_method_that_takes_it(tiny_model: ZeroShotClassifier) -> None:
    defense, dataset = trainer("tecoa", tiny_model), TensorDataset(X, Y)
    loader = DataLoader(dataset, batch_size=4)
    for given in (loader, Stream()):
        with pytest.raises(
            UsageError, match=rf"x is a {type(given).__name__}, .* fit_loader\(loader\) takes what gives"
        ):
            defense.fit(given)
    with pytest.raises(UsageError, match=r"loader is a TensorDataset, .* pass it to fit\(dataset\), or as"):
        defense.fit_loader(dataset)
    with pytest.raises(UsageError, match=r"loader is a Tensor; fit\(x, y\) takes arrays"):
        defense.fit_loader(X)
    with pytest.raises(UsageError, match="loader is a int; an iterable of"):
        defense.fit_loader(3)
    with pytest.raises(UsageError, match="x is a int; an array or tensor"):
        defense.fit(3)


def test_an_iterable_dataset_trains_through_its_loader(tiny_model: ZeroShotClassifier) -> None:
    defense = trainer("tecoa", tiny_model)
    loader = DataLoader(Stream(), batch_size=4)
    with pytest.raises(UsageError, match="the loader has no length, which the cosine schedule needs; pass max_steps"):
        defense.fit_loader(loader)
    defense.fit_loader(loader, epochs=9, max_steps=5)
    assert [record["epoch"] for record in defense.history.steps] == [1, 1, 1, 2, 2]  # type: ignore[union-attr]


def test_validation_data_in_every_form(make_model: Any) -> None:
    seen = []
    x, y = X[:6], Y[:6]
    forms = [(x, y), [x.numpy(), y.numpy()], TensorDataset(x, y), list(zip(x, y))]
    for form in (*forms, DataLoader(TensorDataset(x, y), batch_size=4)):
        defense = trainer("tecoa", make_model())
        defense.fit(X, Y, validation_data=form)
        assert len(defense.history.steps) == 3  # type: ignore[union-attr]
        record = defense.history.epochs[0]  # type: ignore[union-attr]
        seen.append((record["validation_clean_accuracy"], record["validation_robust_accuracy"]))
    assert len(set(seen)) == 1
    two = trainer("tecoa", make_model())
    two.fit(X, Y, validation_data=[(X[0], 0), (X[1], 1)])  # a dataset of two items, and not arrays
    assert "validation_clean_accuracy" in two.history.epochs[0]  # type: ignore[union-attr]
    for form, message in (
        ((x,), "validation_data has 1 entries"),
        (list(x), "validation images have no labels"),
        (DataLoader(TensorDataset(x), batch_size=4), "validation images have no labels"),
        (iter([(x, y)]), "validation_data is a list_iterator, which can be read once"),
    ):
        with pytest.raises(UsageError, match=message):
            trainer("fare", make_model()).fit(X, Y, validation_data=form)


def test_held_out_images_pass_in_pieces_no_larger_than_training_ones(tiny_model: ZeroShotClassifier) -> None:
    """A loader brings its own batches; the config's size says nothing of what fits."""
    sizes: list[int] = []
    tiny_model.tower.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    defense = trainer("tecoa", tiny_model, batch_size=256)
    defense.fit_loader(DataLoader(TensorDataset(X, Y), batch_size=3), validation_data=(X, Y))
    assert max(sizes) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(make_model: Any, mode: Any) -> None:
    plain, inside = make_model(), make_model()
    trainer("tecoa", plain).fit(X, Y)
    with mode():
        trainer("tecoa", inside).fit(X, Y)
        assert not torch.is_grad_enabled()
    assert sha256_of_weights(plain) == sha256_of_weights(inside)


def test_seeding_is_torchs(tiny_model: ZeroShotClassifier) -> None:
    from clipdefense.training.runtime import seed_torch

    with torch.random.fork_rng():
        torch.manual_seed(2**62 - 1)
        expected: Tensor = torch.rand(5)
        seed_torch(2**62 - 1)
        assert torch.equal(torch.rand(5), expected)
