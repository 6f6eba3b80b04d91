"""What a user can train on: arrays, datasets, loaders, ART generators, each as a source of the loop's batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipdefense.errors import UsageError
from clipdefense.training import data
from clipdefense.training.config import TrainingConfig
from clipdefense.training.items import check_same_classes
from clipdefense.training.loop import Loop

if TYPE_CHECKING:
    from clipdefense.trainers import TrainerDefense


def fit_arrays(defense: TrainerDefense, x: Any, y: Any, config: TrainingConfig, validation: Any = None) -> None:
    """Train on arrays, or (y None) on a map-style dataset of (image, label) items.

    Args:
        defense: what to train, and how.
        x: images (N, C, H, W) in [0, 1], or a dataset with ``len()`` and ``[i]``.
        y: integer or one-hot labels.
        config: training hyper-parameters.
        validation: held-out (x, y), a dataset or a loader, instead of a share of the training images.

    Raises:
        UsageError: data, labels or options that cannot be used; a run that diverged or ran out of memory.
    """
    source = _indexed(defense, x, y, config, config.batch_size, config.validation if validation is None else 0.0)
    _run(defense, source, config, validation)


def fit_generator(defense: TrainerDefense, generator: Any, config: TrainingConfig, validation: Any = None) -> None:
    """Train on an ART ``DataGenerator``; arguments as :func:`fit_arrays`."""
    fit_loader(defense, data.GeneratorEpochs(generator), config, validation)


def fit_loader(defense: TrainerDefense, loader: Any, config: TrainingConfig, validation: Any = None) -> None:
    """Train on any iterable of batches; arguments as :func:`fit_arrays`."""
    if config.validation:
        raise UsageError(
            f"validation is {config.validation}, but a loader's images cannot be held out; pass validation_data=(x, y)."
        )
    _run(defense, _batches(defense, loader, data.Batches), config, validation)


def _batches(defense: TrainerDefense, loader: Any, kind: type[data.Batches]) -> data.Batches:
    check_same_classes(loader, defense.model.class_names)
    return kind(loader, len(defense.model.class_names), defense.needs_labels)


def _indexed(
    defense: TrainerDefense, x: Any, y: Any, config: TrainingConfig, batch_size: int, held_out: float
) -> data.Indexed:
    classes = len(defense.model.class_names)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": config.seed, "validation": held_out}
    if y is None and not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        if data.gives_batches(x):
            raise UsageError(
                f"x is a {type(x).__name__}, which is iterated over: fit_loader(loader) takes what gives batches "
                "(DataLoader(x, batch_size=...) makes them of single images), fit(x, y) arrays or a dataset."
            )
        if not (hasattr(x, "__getitem__") and hasattr(x, "__len__")):
            raise UsageError(
                f"x is a {type(x).__name__}; an array or tensor (N, C, H, W) in [0, 1], or a dataset with len() and "
                "[i], is expected."
            )
        check_same_classes(x, defense.model.class_names)
        return data.MapStyle(x, classes, defense.needs_labels, workers=config.workers, **options)
    return data.Arrays(x, y, classes, defense.needs_labels, **options)


def _run(defense: TrainerDefense, source: data.Source, config: TrainingConfig, validation: Any) -> None:
    held_out = source if validation is None else _validation(defense, validation, config)
    Loop(defense, source, held_out, config).run()


def _validation(defense: TrainerDefense, validation: Any, config: TrainingConfig) -> data.Source:
    if data.gives_batches(validation):
        if isinstance(validation, Iterator):
            raise UsageError(
                f"validation_data is a {type(validation).__name__}, which can be read once; it is read after every "
                "epoch: pass a DataLoader, a dataset or (x, y)."
            )
        return _batches(defense, validation, data.HeldOutBatches)
    x, y = validation, None
    if isinstance(validation, tuple):
        if len(validation) != 2:
            raise UsageError(
                f"validation_data has {len(validation)} entries; (x, y), a dataset or a loader is expected."
            )
        x, y = validation
    elif isinstance(validation, list) and len(validation) == 2 and hasattr(validation[0], "shape"):
        x, y = validation  # and not a dataset of two (image, label) pairs
    held_out = _indexed(defense, x, y, config, 1, 0.0)
    held_out.kept_out = held_out.training
    return held_out
