"""What a run is asked for: the tables of its TOML file, each key checked before anything is loaded.

models = ["open_clip:ViT-B-32-quickgelu@openai"]
defenses = ["none", {spec = "some-defence", options = {steps = 2}}]
attacks = ["pgd,steps=10", "autoattack"]
save_adv = true

[[datasets]]
spec = "folder:photos"
size = 224

[[threats]]
eps = "1/255"

Or, where a protocol says all of that but models and defences:

models = ["open_clip:ViT-B-32-quickgelu@openai"]
protocol = "ttc-224"
datasets = ["cifar10", "eurosat"]
root = "/data"
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from clipdefense.attacks.engine import UNIT
from clipdefense.data.protocols import Protocol, get_protocol
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.runner import AttackSpec, literal, parse_attacks
from clipdefense.threat import Norm, ThreatModel, format_eps, parse_eps

NO_DEFENSE = "none"
"""The defence that stands for the model itself."""


def _number(value: Any) -> Any:
    return parse_eps(value) if isinstance(value, str) else value


def _options(value: Any) -> Any:
    """TOML has neither fractions nor null: text such as "4/255" or "none" means what it means on the command line."""
    if not isinstance(value, Mapping):
        return value
    return {key: literal(item) if isinstance(item, str) else item for key, item in value.items()}


def _table(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str) else value


Radius = Annotated[float, BeforeValidator(_number)]
Options = Annotated[dict[str, Any], BeforeValidator(_options)]


class _Table(BaseModel):
    """Keys as given, no others; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Named(_Table):
    """Something loaded by its spec.

    Attributes:
        spec: ``plugin:name``, as the command line takes it; a plain string in the place of the table is its spec.
        name: what results call it; the spec where not given.
        options: keyword arguments of the plugin.
    """

    spec: str = Field(min_length=1)
    name: str = ""
    options: Options = {}

    @property
    def label(self) -> str:
        return self.name or self.spec


class ModelTable(_Named):
    """``[[models]]``."""


class DatasetTable(_Named):
    """``[[datasets]]``; under a protocol ``spec`` is the protocol's own name of it, and only ``n`` can be chosen.

    Attributes:
        split, size: as the dataset plugin takes them.
        n: images drawn evenly over the classes with the run's seed; all where not given.
    """

    split: str | None = None
    size: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)


class DefenseTable(_Named):
    """``[[defenses]]``: a test-time defence by name, or ``"none"`` for the model itself.

    Attributes:
        views: adaptive views to attack, of the defence or of a model that has some; all where not given.
        eot: gradient draws a step on them; each view's own number where not given.
    """

    views: list[str] | None = None
    eot: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _none_has_nothing(self) -> DefenseTable:
        if self.spec == NO_DEFENSE and self.options:
            raise UsageError("defence 'none' has options; they are for a test-time defence only.")
        return self


def _check_attacks(attacks: list[str], threat: ThreatModel, key: str) -> None:
    names = []
    for index, attack in enumerate(attacks):
        try:
            names += [str(spec) for spec in parse_attacks([attack], threat)]
        except UsageError as error:
            raise UsageError(f"{key}[{index}]: {error}") from error
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"{key} has {name!r} {count} times; once is enough, a seed makes it repeat itself.")


class ThreatTable(_Table):
    """``[[threats]]``: the fields of :class:`clipdefense.ThreatModel`, eps as a number or as text such as "4/255".

    Attributes:
        name: what results call it; norm and radius where not given.
        attacks: under this threat model; the run's where not given.
    """

    norm: str = "linf"
    eps: Radius
    step_size: Annotated[float | None, BeforeValidator(_number)] = None
    steps: int = 10
    restarts: int = 1
    name: str = ""
    attacks: list[str] | None = None

    @cached_property
    def threat(self) -> ThreatModel:
        return ThreatModel(cast(Norm, self.norm), self.eps, self.step_size, self.steps, self.restarts)

    @property
    def label(self) -> str:
        return self.name or f"{self.norm} {format_eps(self.eps)}"

    @model_validator(mode="after")
    def _is_a_threat(self) -> ThreatTable:
        _check_attacks(self.attacks or [], self.threat, "attacks")
        return self


class RunConfig(_Table):
    """Everything a run's numbers depend on that can be chosen, and the batch size.

    Attributes:
        models, defenses, datasets, threats: the four tables; every combination is a cell of the run.
        protocol: a preset that says data sets, threat models, attacks, and how they are counted (``tecoa-native``,
            ``tga-224``, ``ttc-224``, ``robustvlm-1k``, ``clipdefense-1``); of its data sets and threat models some may
            be chosen, the rest is not to be given.
        root: the folder that holds the protocol's data sets.
        also: attacks besides the protocol's.
        attacks: names with options, such as ``"pgd,steps=100"``.
        seed: of images drawn, attacks and defence noise.
        cumulative: each attack only on images that those before it left standing, as AutoAttack counts.
        adaptive: attack a defence with all that an adaptive evaluation does, see :func:`clipdefense.evaluate`.
        verdict_seeds: draws over which a randomised defence is judged.
        unit: consecutive images that are decoded, attacked and committed together; 512 at most.
        save_adv: keep the perturbation that broke each image.
        exhibits: keep an attack's losses on a few images and pictures of them, for the page.
        batch_size: images a forward, halved when memory runs out; every row records what it was. It, the exhibits,
            the device, the root and the specs of what has a name may change on a resume.

    Raises:
        UsageError: from :func:`read_config`, with the key.
    """

    models: list[Annotated[ModelTable, BeforeValidator(_table)]] = Field(min_length=1)
    datasets: list[Annotated[DatasetTable, BeforeValidator(_table)]] = Field(min_length=1)
    defenses: list[Annotated[DefenseTable, BeforeValidator(_table)]] = Field(
        [DefenseTable(spec=NO_DEFENSE, eot=None)], min_length=1
    )
    threats: list[ThreatTable] = Field([ThreatTable(eps=1 / 255)], min_length=1)
    attacks: list[str] = Field(["pgd,steps=10", "apgd-ce"], min_length=1)
    protocol: str | None = None
    root: str | None = None
    also: list[str] = []
    cumulative: bool = False
    adaptive: bool = False
    seed: int = Field(0, ge=0, le=2**62)
    verdict_seeds: int = Field(5, ge=1)
    unit: int = Field(UNIT, ge=1, le=UNIT)
    save_adv: bool = False
    exhibits: bool = True
    batch_size: int = Field(128, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_protocol(cls, content: Any) -> Any:
        named = content.get("protocol") if isinstance(content, Mapping) else None
        return content if not isinstance(named, str) else {**content, **_fixed(get_protocol(named), content)}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for table in ("models", "defenses", "datasets", "threats"):
            labels = Counter(row.label for row in getattr(self, table))
            for label, count in labels.items():
                if count > 1:
                    raise UsageError(f"{table} has {label!r} {count} times; give each a name= of its own.")
        for row in self.threats:
            _check_attacks(self.attacks, row.threat, "attacks")
            _check_attacks(self.also, row.threat, "also")
        if self.protocol is None and (self.also or self.root is not None):
            raise UsageError(
                "also and root are for a protocol; without one, attacks and each data set's spec say it all."
            )
        return self

    def attacks_of(self, row: ThreatTable, dataset: DatasetTable, *, randomized: bool = False) -> list[AttackSpec]:
        """The attacks under one of the threat models, on a data set, on what draws or does not."""
        attacks: Sequence[str] = self.attacks if row.attacks is None else row.attacks
        if self.protocol is not None:
            attacks = get_protocol(self.protocol).attacks_on(dataset.spec, randomized=randomized)
        return list(dict.fromkeys(parse_attacks([*attacks, *self.also], row.threat)))

    def facts(self) -> dict[str, Any]:
        """What two parts of one run must have in common: every key that a verdict may depend on.

        Where something lies is not among them, as far as it has a name: its weights and images are compared themselves.
        """
        facts = self.model_dump(mode="json", exclude={"batch_size", "exhibits", "root"})
        for row in [*facts["models"], *(facts["datasets"] if self.protocol is None else [])]:
            if row["name"]:
                del row["spec"]
        return facts

    def settings(self) -> dict[str, Any]:
        """The rest, which may change on a resume: places, and matters of the machine."""
        return self.model_dump(mode="json", include={"models", "datasets", "root", "batch_size", "exhibits"})


def _fixed(protocol: Protocol, content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a protocol says.

    Raises:
        UsageError: one of them is given and says otherwise.
    """
    said: dict[str, Any] = {
        "attacks": list(protocol.attacks),
        "cumulative": protocol.cumulative,
        "adaptive": protocol.adaptive,
        "verdict_seeds": protocol.verdict_seeds,
    }
    for key, value in said.items():
        if key in content and content[key] != value:
            raise UsageError(
                f"key {key!r} is {content[key]!r}, but protocol {protocol.name!r} says {value!r}; leave it out"
                f"{' (also = [...] adds attacks)' if key == 'attacks' else ''}, or leave the protocol out and say "
                "everything."
            )
    said["datasets"] = content.get("datasets") or list(protocol.datasets)
    for row in said["datasets"]:
        table = _table(row)
        if isinstance(table, Mapping) and "spec" in table:
            protocol.rule(str(table["spec"]))
            for key in ("split", "size", "options"):
                if table.get(key):
                    raise UsageError(
                        f"datasets has the key {key!r}, which protocol {protocol.name!r} says; leave it out."
                    )
    known = {(threat.norm, threat.eps): threat for threat in protocol.threats}
    everything = [{"norm": norm, "eps": eps} for norm, eps in known]
    said["threats"] = content.get("threats") or everything
    for row in said["threats"]:
        table = ThreatTable.model_validate(row)
        if known.get((table.threat.norm, table.eps)) != table.threat or table.attacks is not None:
            radii = ", ".join(str(threat) for threat in protocol.threats)
            raise UsageError(f"threat model {table.label} is not one of protocol {protocol.name!r}; it has {radii}.")
    return said


def read_config(source: str | Path | Mapping[str, Any], **changes: Any) -> RunConfig:
    """A run's configuration, checked.

    Args:
        source: a TOML file, or what one would hold.
        changes: top-level keys that replace the file's; None leaves a key as it is.

    Raises:
        UsageError: no such file, not TOML, or a key that is unknown, missing or has a value that cannot be used; the
            key is named as ``datasets[0].split``.
    """
    where, content = ("the run", source) if isinstance(source, Mapping) else (f"{source}", _read(Path(source)))
    try:
        return RunConfig.model_validate({**content, **{k: v for k, v in changes.items() if v is not None}})
    except ValidationError as error:
        raise _in_words(where, error) from None


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"run file {str(file)!r} {what}; a TOML file is expected (looked for {file.absolute()}).")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"run file {str(file)!r} is not TOML ({error}).") from error


_TABLES: dict[str, type[_Table]] = {
    "models": ModelTable,
    "datasets": DatasetTable,
    "defenses": DefenseTable,
    "threats": ThreatTable,
}


def _in_words(where: str, error: ValidationError) -> UsageError:
    """The first thing wrong, as one sentence with its key."""
    first = error.errors()[0]
    parts = first["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    if first["type"] == "extra_forbidden":
        table: type[BaseModel] = RunConfig if len(parts) == 1 else _TABLES[str(parts[0])]
        return unknown_name(
            f"{where}: key", key, [f"{key.rpartition('.')[0]}.{n}".lstrip(".") for n in table.model_fields]
        )
    if first["type"] == "missing":
        if len(parts) == 1:
            flag = {"models": "--model", "datasets": "--data (or --protocol)"}[key]
            return UsageError(f"{where}: key {key!r} is missing; it has no default: give it in a TOML file, or {flag}.")
        return UsageError(f"{where}: key {key!r} is missing; it has no default.")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return UsageError(f"{where}: {key + ': ' if key else ''}{cause}")
    got, wanted = repr(first["input"]), first["msg"].removeprefix("Input should be ")
    wanted = f"a number {wanted}" if first["type"].startswith(("greater_than", "less_than")) else wanted
    wanted = f"{wanted[0].lower()}{wanted[1:]}" + (" is expected" if wanted != first["msg"] else "")
    if first["type"] == "list_type" and isinstance(first["input"], Mapping):
        wanted = f"a list of tables is expected: write [[{key}]] in the place of [{key}]"
    return UsageError(f"{where}: key {key!r} is {got if len(got) <= 120 else got[:117] + '...'}; {wanted}.")
