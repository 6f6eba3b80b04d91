"""Protocols: everything that a published number depends on besides model and defence, as one immutable object.

The presets are JSON in ``presets/``. :func:`get_protocol` loads one; :meth:`Protocol.from_dict` makes one of yours.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from clipdefense.data.dataset import ImageDataset
from clipdefense.data.files import find_file
from clipdefense.data.resizing import Resize
from clipdefense.errors import UsageError, check_known, unknown_name
from clipdefense.plugins import load_dataset
from clipdefense.threat import ThreatModel, parse_eps

PRESETS = Path(__file__).parent / "presets"
_UNHASHED = ("title", "source", "notes")


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_of(content: Any) -> str:
    """SHA-256 of anything JSON-ready, by its :func:`canonical` form."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


@dataclass(frozen=True)
class Subset:
    """Which images are attacked.

    Attributes:
        n: how many; all of them where a data set has fewer.
        rule: ``"balanced"``: evenly over the classes; ``"uniform"``: every image with the same chance.
        seed: of the draw.
    """

    n: int
    rule: Literal["balanced", "uniform"] = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("balanced", "uniform"):
            raise unknown_name("subset rule", str(self.rule), ("balanced", "uniform"))
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise UsageError(f"n of a subset is {self.n!r}; a positive whole number is expected.")

    def of(self, images: ImageDataset) -> ImageDataset:
        """The subset, in the data set's order."""
        if self.n >= len(images):
            return images
        if self.rule == "balanced":
            return images.sample(self.n, seed=self.seed)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        return images.select(order[: self.n].sort().values)


@dataclass(frozen=True)
class DatasetRule:
    """How a protocol uses one data set.

    Attributes:
        name: as the protocol's reader knows it.
        split: as the reader knows it; None is the reader's choice.
        names: which cleaning of the class names, with its version (``"tecoa/1"``); None takes them as they are.
        templates: prompts with ``{}`` for the class name; empty where the data set's own files bring them.
        resize: the rule that fixes the resolution at which the perturbation lives.
        attacks: instead of the protocol's, for this data set; empty for those.
    """

    name: str
    split: str | None = None
    names: str | None = None
    templates: tuple[str, ...] = ()
    resize: Resize = field(default_factory=Resize)
    attacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in self.templates:
            if not isinstance(template, str) or "{}" not in template:
                raise UsageError(f"data set {self.name!r} has the template {template!r}; text with {{}} is expected.")


@dataclass(frozen=True)
class Protocol:
    """Data sets, prompts, resolution, threat models and attacks: immutable, hashable, JSON-ready.

    Attributes:
        name: e.g. ``"ttc-224"``.
        title: one line for people.
        reader: the dataset plugin that reads the data sets.
        folders: patterns with ``{}`` for the data set's name, for a reader of folders; empty for one with a root.
        page: where the data can be got.
        rules: one a data set.
        headline: the data sets over which the published mean runs.
        means: other means that were published under it, each a name and its data sets.
        threats: norm and eps of each row; steps are part of the attacks.
        attacks: as ``clipdefense evaluate --attack`` takes them.
        randomized_attacks: instead of ``attacks`` for a randomised model or defence; empty where the publication makes
            no difference.
        cumulative: a number counts images that all attacks left standing, instead of one number an attack.
        subset: which images are attacked; None is all.
        verdict_seeds: draws over which a randomised defence is judged.
        adaptive: a test-time defence is attacked through its adaptive views too.
        source: where the protocol is published.
        notes: what differs from the publication, and what it leaves open.
    """

    name: str
    title: str
    reader: str
    rules: tuple[DatasetRule, ...]
    threats: tuple[ThreatModel, ...]
    attacks: tuple[str, ...]
    headline: tuple[str, ...] = ()
    means: tuple[tuple[str, tuple[str, ...]], ...] = ()
    folders: tuple[str, ...] = ()
    page: str = ""
    randomized_attacks: tuple[str, ...] = ()
    cumulative: bool = False
    subset: Subset | None = None
    verdict_seeds: int = 5
    adaptive: bool = False
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = self.datasets
        if not known or not self.threats or not self.attacks:
            raise UsageError(f"protocol {self.name!r} lacks data sets, threats or attacks; at least one of each.")
        if len(set(known)) < len(known):
            raise UsageError(f"protocol {self.name!r} names a data set twice: {', '.join(known)}.")
        check_known(f"protocol {self.name!r}: headline data set", self.headline, known)
        for mean, datasets in self.means:
            check_known(f"protocol {self.name!r}: data set of the mean {mean!r}", datasets, known)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(rule.name for rule in self.rules)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that a number depends on; title, source and notes are not part of it."""
        return sha256_of({key: value for key, value in self.to_dict().items() if key not in _UNHASHED})

    def rule(self, dataset: str) -> DatasetRule:
        """The rule of one data set.

        Raises:
            UsageError: the protocol does not have it.
        """
        for rule in self.rules:
            if rule.name == dataset:
                return rule
        raise unknown_name(f"protocol {self.name!r}: data set", dataset, self.datasets)

    def attacks_on(self, dataset: str, *, randomized: bool = False) -> tuple[str, ...]:
        """The attacks for one data set, on a randomised model or defence or on another."""
        own = self.rule(dataset).attacks
        return own or (randomized and self.randomized_attacks) or self.attacks

    def templates(self, dataset: str | ImageDataset) -> tuple[str, ...]:
        """The prompts for one data set, by name or as loaded by :meth:`dataset`.

        Raises:
            UsageError: the protocol does not have it, or its prompts lie with its images and only its name is given.
        """
        if isinstance(dataset, ImageDataset):
            own = dataset.meta.get("templates")
            if dataset.meta.get("protocol") == self.name and own:
                return tuple(own)
        name = dataset if isinstance(dataset, str) else str(dataset.meta.get("dataset", dataset.name))
        templates = self.rule(name).templates
        if not templates:
            raise UsageError(
                f"the prompts of {name!r} lie with its images in protocol {self.name!r}; pass what dataset() gave."
            )
        return templates

    def dataset(
        self, name: str, root: str | Path | None = None, *, subset: bool = True, download: bool = False
    ) -> ImageDataset:
        """One data set as the protocol wants it: split, class names, resolution, images to attack.

        Args:
            name: one of :attr:`datasets`.
            root: the folder that holds the data sets; None is the reader's own choice.
            subset: only the images to attack; False gives them all (clean accuracy).
            download: fetch it where the reader can; nothing is downloaded otherwise.

        Returns:
            A dataset whose ``meta`` says ``protocol``, ``protocol_sha256``, ``dataset``, ``templates``, ``resize``
            and ``class_names_sha256``.

        Raises:
            UsageError: an unknown name, or a data set that is not there, with where it was looked for.
        """
        rule = self.rule(name)
        options: dict[str, Any] = {} if rule.split is None else {"split": rule.split}
        if self.folders:
            images = load_dataset(f"{self.reader}:{self._folder(name, root)}", **options)
        else:
            given = {"names": rule.names, "root": root, "download": download or None}
            options |= {key: value for key, value in given.items() if value is not None}
            images = load_dataset(f"{self.reader}:{name}", **options)
        templates = rule.templates or tuple(images.meta.get("templates", ()))
        if not templates:
            raise UsageError(f"data set {images.name!r} brings no prompts, which protocol {self.name!r} takes from it.")
        images = images.resized(
            rule.resize,
            protocol=self.name,
            protocol_sha256=self.hash,
            dataset=name,
            templates=list(templates),
            resize=str(rule.resize),
            class_names_sha256=sha256_of(list(images.classes)),
        )
        return self.subset.of(images) if subset and self.subset is not None else images

    def _folder(self, name: str, root: str | Path | None) -> Path:
        tried = []
        for pattern in self.folders:
            relative = Path(root or ".") / pattern.format(name)
            try:
                return find_file(relative, f"data set {name!r}")
            except UsageError:
                tried.append(str(relative))
        raise UsageError(
            f"data set {name!r} is not there: looked for {', '.join(tried)}, from the working folder and from "
            f"CLIPDEFENSE_DATA. Get it from {self.page}, and name the folder that holds it with root= (on the command "
            "line --root)."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` gives the same protocol back."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Protocol:
        """
        Args:
            content: what :meth:`to_dict` gives, or a preset: ``default`` holds what the data sets of ``datasets``
                share, eps may be ``"1/255"``, and a template list may be ``{"from": "module:attribute", "sha256":
                ...}``, of which the hash must fit.

        Raises:
            UsageError: a missing or unknown key, or a value out of its range.
        """
        given = dict(content)
        name = str(given.get("name", ""))
        if "rules" not in given:
            shared = given.pop("default", {})
            given["rules"] = [{**shared, **own, "name": key} for key, own in given.pop("datasets", {}).items()]
        given["rules"] = tuple(_rule(entry, name) for entry in given["rules"])
        given["threats"] = tuple(_threat(entry, name) for entry in given.get("threats", ()))
        if given.get("subset") is not None:
            given["subset"] = _made(Subset, given["subset"], f"subset of protocol {name!r}")
        for key in ("attacks", "randomized_attacks", "headline", "folders", "notes"):
            given[key] = tuple(given.get(key, ()))
        given["means"] = tuple((mean, tuple(sets)) for mean, sets in dict(given.get("means", ())).items())
        protocol: Protocol = _made(cls, given, f"protocol {name!r}")
        return protocol


def _made(cls: type[Any], given: Mapping[str, Any], what: str) -> Any:
    known = [each.name for each in fields(cls)]
    for key in given:
        if key not in known:
            raise unknown_name(f"{what}: key", key, known)
    try:
        return cls(**given)
    except TypeError as error:
        raise UsageError(f"{what} is not complete: {error}.") from error


def _rule(entry: Mapping[str, Any], protocol: str) -> DatasetRule:
    what = f"data set {entry.get('name')!r} of protocol {protocol!r}"
    given = {**entry, "templates": _templates(entry.get("templates", ()), what)}
    given["attacks"] = tuple(entry.get("attacks", ()))
    given["resize"] = _made(Resize, entry.get("resize") or {}, f"resize of {what}")
    rule: DatasetRule = _made(DatasetRule, given, what)
    return rule


def _threat(entry: Mapping[str, Any], protocol: str) -> ThreatModel:
    eps = entry.get("eps")
    given = {**entry, "eps": parse_eps(eps) if isinstance(eps, str) else eps}
    threat: ThreatModel = _made(ThreatModel, given, f"threat of protocol {protocol!r}")
    return threat


def _templates(given: Sequence[str] | Mapping[str, str], what: str) -> tuple[str, ...]:
    """A list of prompts, or the one that ``from`` names, which must be the one that was meant."""
    if not isinstance(given, Mapping):
        return tuple(given)
    module, _, attribute = given["from"].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    templates = tuple(each if isinstance(each, str) else each("{}") for each in found)
    if sha256_of(list(templates)) != given["sha256"]:
        raise UsageError(
            f"{given['from']}, the prompts of {what}, is not the list that the protocol was written with (its hash "
            f"differs, {len(templates)} prompts); install the version that goes with this clipdefense."
        )
    return templates


def list_protocols() -> tuple[str, ...]:
    """The names that :func:`get_protocol` takes."""
    return tuple(sorted(file.stem for file in PRESETS.glob("*.json")))


@cache
def get_protocol(name: str) -> Protocol:
    """A preset: ``"tecoa-native"``, ``"tga-224"``, ``"ttc-224"``, ``"robustvlm-1k"`` or ``"clipdefense-1"``.

    Raises:
        UsageError: an unknown name, with the nearest ones.
    """
    if name not in list_protocols():
        raise unknown_name("protocol", name, list_protocols())
    return Protocol.from_dict(json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8")))
