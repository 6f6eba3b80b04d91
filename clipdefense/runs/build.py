"""From a run's tables to objects, and what is written down about them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipdefense.data import ImageDataset
from clipdefense.data.protocols import get_protocol
from clipdefense.defenses import TestTimeDefense
from clipdefense.errors import UsageError, check_options
from clipdefense.evaluation.fingerprint import constructed, fingerprint, hashed_once, machine
from clipdefense.evaluation.roles import check_roles
from clipdefense.evaluation.runner import AttackSpec
from clipdefense.evaluation.targets import has_views, is_randomized, select, views_of
from clipdefense.plugins import get_defense, load_dataset, load_model, split_spec
from clipdefense.runs.config import NO_DEFENSE, DatasetTable, DefenseTable, ModelTable, RunConfig
from clipdefense.runs.units import Cell
from clipdefense.threat import ThreatModel

Facts = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What a cell judges, ready to run; ``hashes`` are those of its weights, see :func:`hashed_once`."""

    model: nn.Module
    defense: TestTimeDefense | None
    threat: ThreatModel
    attacks: list[AttackSpec]
    seeds: range
    facts: Facts
    hashes: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def judge(self) -> nn.Module:
        """The model that gives verdicts."""
        return self.model if self.defense is None else self.defense.wrap(self.model)

    @property
    def randomized(self) -> bool:
        return is_randomized(self.model, self.defense)


@contextmanager
def _key(table: str, index: int, of: int) -> Iterator[None]:
    """What is wrong inside is said with its key, where there are several."""
    try:
        yield
    except UsageError as error:
        if of == 1:
            raise
        raise UsageError(f"{table}[{index}]: {error}") from error


def choose_device(name: str | None, local_rank: int = 0, argument: str = "device") -> str:
    """The device as named; where not named, the process's own GPU, or the CPU where there is none.

    Raises:
        UsageError: it cannot be used here.
    """
    if name is None:
        return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{argument} {name!r} cannot be used here ({reason}); cpu always can.") from error
    return name


class Builder:
    """Loads what cells name: each dataset once, and the model and defence of the latest cell.

    Attributes:
        config, device: as given.
        datasets: by label.
        samples: of each the first image that can be decoded, with its label.
        shapes: (C, H, W) of its images.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        """
        Args:
            config: the run.
            device: where models go.

        Raises:
            UsageError: an unknown plugin, a trainer in the place of a test-time defence, or an option that one does
                not have.
        """
        self.config, self.device = config, device
        for index, model in enumerate(config.models):
            with _key("models", index, len(config.models)):
                split_spec("models", model.spec)
        for index, defense in enumerate(config.defenses):
            with _key("defenses", index, len(config.defenses)):
                _defense_class(defense)
        self.protocol = None if config.protocol is None else get_protocol(config.protocol)
        self.datasets = self._datasets()
        self.samples = {label: _first(dataset) for label, dataset in self.datasets.items()}
        self.shapes = {label: tuple(image.shape) for label, (image, _) in self.samples.items()}
        self._model: tuple[tuple[str, str], nn.Module] | None = None
        self._subject: tuple[int, Subject] | None = None
        self._hashes: dict[int, str] = {}

    def _datasets(self) -> dict[str, ImageDataset]:
        found: dict[str, ImageDataset] = {}
        missing: dict[str, UsageError] = {}
        for table in self.config.datasets:
            try:
                found[table.label] = self._dataset(table)
            except UsageError as error:
                missing[table.label] = error
        if len(missing) > 1:
            raise UsageError(
                f"{len(missing)} data sets cannot be loaded: {', '.join(missing)}; name those that you have (datasets "
                f"in a TOML file, or --data). The first: {next(iter(missing.values()))}"
            )
        for problem in missing.values():
            raise problem
        return found

    def _dataset(self, table: DatasetTable) -> ImageDataset:
        if self.protocol is not None:
            images = self.protocol.dataset(table.spec, self.config.root)
            return images if table.n is None else images.sample(table.n, seed=self.config.seed)
        given = {"split": table.split, "size": table.size}
        dataset = load_dataset(table.spec, **{k: v for k, v in given.items() if v is not None}, **table.options)
        return dataset if table.n is None else dataset.sample(table.n, seed=self.config.seed)

    def model(self, cell: Cell) -> nn.Module:
        """The cell's model with its dataset's classes."""
        key = (cell.model.label, cell.dataset.label)
        if self._model is None or self._model[0] != key:
            self._model = self._subject = None  # the old one's memory goes before the new one's is taken
            images = self.datasets[cell.dataset.label]
            options = {**self._prompts(cell.model, images), **cell.model.options}
            with _key("models", self.config.models.index(cell.model), len(self.config.models)):
                model = load_model(cell.model.spec, classes=images.classes, device=self.device, **options)
            self._model, self._hashes = (key, model), {}
        return self._model[1]

    def _prompts(self, table: ModelTable, images: ImageDataset) -> Facts:
        """The protocol's prompts, for a model that has a text tower to read them with."""
        plugin = split_spec("models", table.spec)[0].load()
        takes = "templates" in inspect.signature(plugin).parameters
        return {"templates": list(self.protocol.templates(images))} if self.protocol is not None and takes else {}

    def subject(self, cell: Cell) -> Subject:
        """What the cell judges."""
        if self._subject is None or self._subject[0] != cell.number:
            model = self.model(cell)
            with _key("defenses", self.config.defenses.index(cell.defense), len(self.config.defenses)):
                defense = _construct(cell.defense, model)
            threat = cell.threat.threat
            check_roles(model, threat, defense, cell.defense.views, cell.defense.eot)
            randomized = is_randomized(model, defense)
            attacks = self.config.attacks_of(cell.threat, cell.dataset, randomized=randomized)
            draws = self.config.verdict_seeds if randomized else 1
            seeds = range(self.config.seed, self.config.seed + draws)
            # the model's hash serves all its cells; a defence's own modules go with the cell, and so do their hashes
            hashes = dict(self._hashes)
            with hashed_once(hashes):
                facts = self._facts(cell, model, defense, attacks)
            self._hashes = {id(model): hashes[id(model)]}
            self._subject = cell.number, Subject(model, defense, threat, attacks, seeds, facts, hashes)
        return self._subject[1]

    def _facts(self, cell: Cell, model: nn.Module, defense: TestTimeDefense | None, attacks: list[AttackSpec]) -> Facts:
        views = select(views_of(model, defense), cell.defense.views)
        prompts = {**self._prompts(cell.model, self.datasets[cell.dataset.label]), **cell.model.options}
        templates = prompts.get("templates")  # None: what the weights bring, or the loader's own
        facts = fingerprint(
            model,
            templates=templates,
            templates_sha256=None if templates is None else hashlib.sha256("\n".join(templates).encode()).hexdigest(),
            defense=None if defense is None else constructed(defense),
            views={view.name: cell.defense.eot or view.eot for view in views},
            attacker_knows=bool(views) or (defense is None and not has_views(model)),
            attacks=[str(spec) for spec in attacks],
            cumulative=self.config.cumulative,
        )
        # of the machine only the versions: where a unit was computed is in the store, unit by unit
        return {key: value for key, value in facts.items() if key not in ("machine", "device")}

    def facts(self) -> Facts:
        """What every part of the run has in common: the configuration, the datasets' contents, the versions."""
        datasets = {label: _contents(self.datasets[label], self.shapes[label]) for label in self.datasets}
        return {**self.config.facts(), "contents": datasets, "versions": machine()["versions"]}


def _defense_class(table: DefenseTable) -> type[TestTimeDefense] | None:
    if table.spec == NO_DEFENSE:
        return None
    cls = get_defense(table.spec)
    if not (isinstance(cls, type) and issubclass(cls, TestTimeDefense)):
        raise UsageError(
            f"{table.spec!r} is not a test-time defence; train with it (`clipdefense train --method {table.spec}`) "
            "and name the weights it writes under models."
        )
    check_options(cls.__init__, table.options, f"option of {table.spec!r}", given=1)
    return cls


def _construct(table: DefenseTable, model: nn.Module) -> TestTimeDefense | None:
    cls = _defense_class(table)
    if cls is None:
        return None
    make: Any = cls
    try:
        return cast(TestTimeDefense, make(model, **table.options))
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in table.options.items()) or "no options"
        raise UsageError(f"defence {table.spec!r} cannot be built with {given}: {error}.") from error


def _first(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """The first image that can be decoded, (C, H, W) in [0, 1], and its label, ()."""
    for index in range(len(dataset)):
        try:
            return dataset[index][0], dataset.labels[index]
        except UsageError as error:
            problem = error
    raise UsageError(f"no image of data set {dataset.name!r} can be decoded; the last: {problem}") from problem


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _contents(dataset: ImageDataset, shape: tuple[int, ...]) -> Facts:
    return {
        "name": dataset.name,
        "images": len(dataset),
        "ids_sha256": _sha256(dataset.ids),
        "labels_sha256": _sha256(dataset.labels),
        "classes": list(dataset.classes),
        "attacked_at": list(shape[1:]),
        "said": {key: value for key, value in dataset.meta.items() if isinstance(value, (bool, int, float, str))},
    }


def difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two fingerprints differ: (its dotted path, our value, theirs); None for equal ones."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            found = difference(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip_longest(ours, theirs)))
        return next((found for found in pairs if found is not None), None)
    return None if ours == theirs else (path, ours, theirs)
