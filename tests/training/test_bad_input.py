"""What a user can get wrong about a fit: each mistake is one sentence that says what to do, and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipdefense import TrainerDefense, ZeroShotClassifier, get_defense, list_plugins
from clipdefense.errors import UsageError
from clipdefense.training.config import TrainingConfig

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0, "warmup_steps": 0, "epochs": 1}
Make = Callable[..., ZeroShotClassifier]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def trainer(name: str, model: ZeroShotClassifier, **options: Any) -> TrainerDefense:
    made = get_defense(name)(model, **{**QUIET, "batch_size": 4, **options})
    assert isinstance(made, TrainerDefense)
    return made


def refused(defense: TrainerDefense, message: str, fit: Callable[[], None]) -> None:
    """The fit fails with the message, and the model is what it was."""
    before = {name: value.clone() for name, value in defense.model.state_dict().items()}
    modes = [part.training for part in defense.model.modules()]
    with pytest.raises(UsageError, match=message):
        fit()
    after = defense.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert modes == [part.training for part in defense.model.modules()]
    assert all(weight.grad is None for weight in defense.model.parameters())


class Named(Dataset[tuple[Tensor, int]]):
    """Images with a class list, as data sets bring one."""

    def __init__(self, images: Tensor, classes: list[str]) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 2


# A class list that does not match the head


def test_data_of_another_number_of_classes(make_model: Make, images: Tensor) -> None:
    defense = trainer("tecoa", make_model(classes=4))
    many = Named(images, [f"thing {i}" for i in range(6)])
    message = r"the dataset has 6 classes, but the model's head has 4; .* model\.with_classes\(dataset\.classes\)"
    refused(defense, message, lambda: defense.fit(many))
    refused(defense, message, lambda: defense.fit_loader(DataLoader(many, batch_size=4)))
    few = Named(images, [f"thing {i}" for i in range(4)])
    refused(defense, message, lambda: defense.fit(few, validation_data=many))
    answers = torch.arange(8)
    message = (
        r"y has labels in \[0, 7\]; \[0, 3\] is expected, since the model's head has 4 classes; load the model with"
    )
    refused(defense, message, lambda: defense.fit(images, answers))
    refused(defense, message, lambda: defense.fit_loader([(images, answers)]))
    one_hot = torch.eye(8)
    message = "y is one-hot over 8 classes, but the model's head has 4; load the model with the class list"
    refused(defense, message, lambda: defense.fit(images, one_hot))
    generator = NumpyDataGenerator(images.numpy(), one_hot.numpy(), batch_size=4)
    refused(defense, message, lambda: defense.fit_generator(generator))


def test_data_of_another_order_of_classes(make_model: Make, images: Tensor) -> None:
    defense = trainer("tecoa", make_model(classes=3))
    turned = Named(images, ["thing 0", "thing 2", "thing 1"])
    message = r"class 'thing 2' has label 1 in the dataset, 2 in the model's head; .*with_classes\(dataset\.classes\)"
    refused(defense, message, lambda: defense.fit(turned))
    refused(defense, message, lambda: defense.fit_loader(DataLoader(turned, batch_size=4)))


def test_names_that_all_differ_are_a_warning(
    make_model: Make, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    trainer("tecoa", make_model(classes=2)).fit(Named(images, ["Thing_0", "n01440764"]))
    assert not [str(w.message) for w in recwarn if "class names" in str(w.message)]
    with pytest.warns(
        UserWarning, match=r"none of the dataset's 2 class names \('tench', \.\.\.\) is one of the model's"
    ):
        trainer("tecoa", make_model(classes=2)).fit(Named(images, ["tench", "goldfish"]))


# Labels missing


def methods() -> dict[str, type[TrainerDefense]]:
    """Every registered trainer defence."""
    names = [c.name for plugin in list_plugins() for c in plugin.contributions if c.kind == "defenses"]
    found = {name: get_defense(name) for name in names}
    return {name: cls for name, cls in found.items() if issubclass(cls, TrainerDefense)}


def test_labels_missing_names_who_needs_none(make_model: Make, images: Tensor) -> None:
    needing = {name for name, cls in methods().items() if cls.needs_labels}
    assert {"tecoa", "pmg-aft", "tga-zsr", "comp-tga", "laat", "ancra"} <= needing and "fare" not in needing
    message = "y is None, but this method learns from labels; pass integer .*, or use a method that needs none: .*fare"
    for name in sorted(needing):
        options = {"negative_embeddings": torch.randn(10, 32)} if name == "comp-tga" else {}
        defense = trainer(name, make_model(), **options)
        refused(defense, message, lambda defense=defense: defense.fit(images))  # type: ignore[misc]
    defense = trainer("tecoa", make_model())
    refused(defense, message, lambda: defense.fit(list(images)))
    refused(defense, message, lambda: defense.fit_loader([images]))
    with pytest.raises(UsageError) as caught:
        defense.fit(images)
    advised = str(caught.value).rstrip(".").partition("needs none: ")[2].split(", ")
    for name in advised:  # the advice works
        trainer(name, make_model()).fit(images)


def test_validation_without_labels_is_found_before_the_first_epoch(make_model: Make, images: Tensor) -> None:
    defense = trainer("fare", make_model(), validation=0.25)
    message = "validation images have no labels, which their accuracies need; pass validation_data with labels"
    refused(defense, message, lambda: defense.fit(images))
    refused(defense, message, lambda: defense.fit(list(images)))
    refused(defense, message, lambda: defense.fit_loader([images], validation=0.0, validation_data=images))
    defense.fit(images, validation=0.0, validation_data=(images, torch.arange(8)))
    assert "validation_robust_accuracy" in defense.history.epochs[0]  # type: ignore[union-attr]


# A tower without tokens


@pytest.mark.parametrize("name", ["tga-zsr", "comp-tga"])
def test_a_tower_without_tokens(make_model: Make, images: Tensor, name: str) -> None:
    options = {"negative_embeddings": torch.randn(10, 32)} if name == "comp-tga" else {}
    defense = trainer(name, make_model(), **options)
    message = (
        "the tower VisionTransformer has no patch tokens; open_clip ViT and ResNet towers and timm towers loaded by "
        r"name have them, or give your tower a method embed_tokens\(images\)"
    )
    refused(defense, message, lambda: defense.fit(images, torch.arange(8)))
    assert defense.history is not None and not defense.history.steps


# A resume with other hyper-parameters


def test_a_resume_lists_every_setting_that_differs(make_model: Make, images: Tensor, tmp_path: Path) -> None:
    x, y = images, torch.arange(8)
    trainer("pmg-aft", make_model(), lr=1e-3, alpha=0.5, checkpoint=str(tmp_path)).fit(x, y)
    same = {"checkpoint": str(tmp_path), "resume": True}
    other = trainer("pmg-aft", make_model(), lr=2e-3, alpha=0.7, weight_decay=0.1, **same)
    message = (
        r"resume: .* differs in 3 of its settings: hyper_parameters\.alpha is 0\.7, was 0\.5; "
        r"lr is 0\.002, was 0\.001; weight_decay is 0\.1, was 0\.0\. Use the same, or another checkpoint folder"
    )
    refused(other, message, lambda: other.fit(x, y))
    method = trainer("tecoa", make_model(), lr=1e-3, **same)
    message = r"method is 'tecoa', was 'pmg-aft'; hyper_parameters\.alpha is not there, was 0\.5; "
    refused(method, message, lambda: method.fit(x, y))
    fewer = trainer("pmg-aft", make_model(), lr=1e-3, alpha=0.5, batch_size=2, **same)
    refused(fewer, "batch_size is 2, was 4; batches an epoch is 4, was 2", lambda: fewer.fit(x, y))
    trainer("pmg-aft", make_model(), lr=1e-3, alpha=0.5, **same).fit(x, y)


def test_a_second_fit_in_place_is_told_that_it_does_not_begin_with_the_same_model(
    tiny_model: ZeroShotClassifier, images: Tensor, tmp_path: Path
) -> None:
    defense = trainer("tecoa", tiny_model, lr=1e-3, checkpoint=str(tmp_path), resume=True)
    defense.fit(images, torch.arange(8))
    message = r"Use the same on the model it began with, loaded afresh \(a fit trains in place\), or another"
    refused(defense, message, lambda: defense.fit(images, torch.arange(8)))


def test_long_class_lists_are_shown_where_they_differ(make_model: Make, images: Tensor, tmp_path: Path) -> None:
    model, other = make_model(classes=300), make_model(classes=300)
    trainer("tecoa", model, checkpoint=str(tmp_path)).fit(images, torch.arange(8))
    other.head.names = (*other.head.names[:-1], "the last thing")
    resumed = trainer("tecoa", other, checkpoint=str(tmp_path), resume=True)
    with pytest.raises(UsageError) as caught:
        resumed.fit(images, torch.arange(8))
    wanted = "class names has 300 entries, had 300: number 299 is 'the last thing', was 'thing 299'"
    assert wanted in str(caught.value) and len(str(caught.value)) < 600


# Out of memory


class Hungry(nn.Module):
    """A tower that has room for three images: for more it asks the allocator for what no machine has."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            torch.empty(2**50)
        return self.tower(x)


def test_the_advice_on_memory_leads_to_the_update_of_the_whole_batch(make_model: Make, images: Tensor) -> None:
    y, options = torch.arange(8), {"batch_size": 8, "lr": 1e-3}
    whole, hungry = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    x = images.double()
    trainer("tecoa", whole, **options).fit(x, y)
    hungry.tower = Hungry(hungry.tower)
    defense = trainer("tecoa", hungry, **options)
    tried = (
        r"out of memory on cpu with {} images at once \(batch_size 8, accumulate {}\); accumulate={} makes the same "
    )
    tried += "update from pieces of {} images"
    refused(defense, tried.format(8, 1, 2, 4), lambda: defense.fit(x, y))
    refused(defense, tried.format(4, 2, 4, 2), lambda: defense.fit(x, y, accumulate=2))
    defense.fit(x, y, accumulate=4)
    for weight, expected in zip(hungry.tower.tower.parameters(), whole.tower.parameters()):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)


class Failing(nn.Module):
    """A tower whose first pass raises."""

    def __init__(self, tower: nn.Module, error: Exception) -> None:
        super().__init__()
        self.tower, self.error = tower, error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_of_running_out(tiny_model: ZeroShotClassifier, images: Tensor, error: Exception) -> None:
    tiny_model.tower = Failing(tiny_model.tower, error)
    defense = trainer("tecoa", tiny_model, batch_size=8, accumulate=8)
    message = r"with 1 images at once \(batch_size 8, accumulate 8\); not even one image fits: train less of the tower"
    refused(defense, message, lambda: defense.fit(images, torch.arange(8)))


def test_other_errors_are_not_taken_for_it(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    tiny_model.tower = Failing(tiny_model.tower, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer("tecoa", tiny_model).fit(images, torch.arange(8))


class Forgetful(torch.optim.SGD):
    """Has no memory left after the first of the weights."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise MemoryError


def test_no_half_of_an_update_stays(
    tiny_model: ZeroShotClassifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may end where the optimiser makes its state: AdamW's is twice the weights."""
    monkeypatch.setattr(torch.optim, "SGD", Forgetful)
    defense = trainer("tecoa", tiny_model, batch_size=8)
    refused(defense, "out of memory on cpu with 8 images at once", lambda: defense.fit(images, torch.arange(8)))


# Places and devices that are not there


def test_a_checkpoint_folder_is_made_before_the_first_step(
    tiny_model: ZeroShotClassifier, images: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        defense = trainer("tecoa", tiny_model, checkpoint=str(place))
        refused(defense, "checkpoint is .*, where no folder can be made", lambda: defense.fit(images, torch.arange(8)))  # noqa: B023
        assert defense.history is None


def test_a_device_that_is_not_there(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    defense = trainer("tecoa", tiny_model, device="cuda:99")
    refused(defense, "device is 'cuda:99', which cannot be used here", lambda: defense.fit(images, torch.arange(8)))


def test_settings_of_another_kind(tiny_model: ZeroShotClassifier) -> None:
    for option, message in (
        ({"threat": "linf"}, "threat is 'linf'; a ThreatModel is expected"),
        ({"config": {"epochs": 2}}, "config is a dict; a TrainingConfig is expected, or its fields by name"),
        ({"eps": 4 / 255}, r"eps is part of the inner attack's budget; pass it as threat=ThreatModel\("),
    ):
        with pytest.raises(UsageError, match=message):
            get_defense("tecoa")(tiny_model, **option)


# A dataset shorter than a batch


def test_fewer_images_than_a_batch(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    y = torch.arange(8)
    defense = trainer("tecoa", tiny_model, batch_size=16)
    message = "there are 8 training images, fewer than one batch of 16; pass batch_size=8 or less, or more images"
    refused(defense, message, lambda: defense.fit(images, y))
    refused(defense, message, lambda: defense.fit(TensorDataset(images, y)))
    held = r"there are 6 training images \(2 more are held out\), fewer than one batch of 8; pass batch_size=6"
    refused(defense, held, lambda: defense.fit(images, y, batch_size=8, validation=0.25))
    short = "the loader has no batches; at least one is expected"
    loader = DataLoader(TensorDataset(images, y), batch_size=16, drop_last=True)
    refused(defense, short, lambda: defense.fit_loader(loader))


def test_the_usual_batch_is_larger_than_a_small_set(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    """Whoever passes no batch size at all is told which one would do, and that one does."""
    defense = get_defense("tecoa")(tiny_model, **QUIET)
    assert defense.config.batch_size == TrainingConfig().batch_size == 256
    refused(defense, "fewer than one batch of 256; pass batch_size=8", lambda: defense.fit(images, np.arange(8)))
    defense.fit(images, np.arange(8), batch_size=8)
    assert len(defense.history.steps) == 1
