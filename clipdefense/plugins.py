"""Discovery: entry points of the group ``clipdefense`` -> names -> objects.

Built-in plugins come in by the same route as anyone else's. Nothing is imported until it is used, a broken plugin
is reported by name and skipped, and a name that two plugins claim is an error for whoever uses that name only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from clipdefense import hookspecs
from clipdefense.errors import MissingPackageError, UsageError, check_options, unknown_name

KINDS = ("models", "defenses", "attacks", "datasets", "commands")


@dataclass(frozen=True)
class Contribution:
    """One registered name: what it is, where it lives, who brought it."""

    kind: str
    name: str
    target: str
    plugin: str
    distribution: str
    summary: str = ""
    requires: tuple[str, ...] = ()
    install: str = ""
    known_unsound: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Required packages that are not installed."""
        return tuple(name for name in self.requires if not _installed(name))

    def load(self) -> Any:
        """Import the target.

        Raises:
            MissingPackageError: an optional package is not installed; it says what to install.
            UsageError: the plugin's own code cannot be imported; it names the plugin, and the cause is chained.
        """
        if self.missing:
            raise self._not_installed(", ".join(self.missing))
        module_name, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package and package != module_name.partition(".")[0]:
                raise self._not_installed(package) from error
            raise self._broken(error) from error
        except Exception as error:
            raise self._broken(error) from error

    def _not_installed(self, packages: str) -> MissingPackageError:
        return MissingPackageError(
            f"{self.name!r} (plugin {self.plugin!r}) needs {packages}, which is not installed: "
            f"pip install '{self.install or packages}'"
        )

    def _broken(self, error: Exception) -> UsageError:
        return UsageError(
            f"plugin {self.plugin!r} of {self.distribution} registers {self.name!r} as {self.target!r}, which cannot "
            f"be imported ({type(error).__name__}: {error}); report it to the plugin's author."
        )


def _installed(package: str) -> bool:
    """Whether a package, such as ``"a"`` or ``"a.b"``, can be found without importing it (or its parent, if any)."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(package) is not None
    return False


@dataclass(frozen=True)
class PluginInfo:
    """A discovered plugin. ``error`` is empty when it loaded."""

    name: str
    distribution: str
    version: str
    contributions: tuple[Contribution, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Registry:
    """Everything that was discovered in this process."""

    plugins: tuple[PluginInfo, ...]
    by_name: dict[tuple[str, str], list[Contribution]] = field(default_factory=dict)

    def names(self, kind: str) -> list[str]:
        return sorted(name for of_kind, name in self.by_name if of_kind == kind)

    def find(self, kind: str, name: str) -> Contribution:
        """The one contribution of that kind and name.

        Raises:
            UsageError: nobody or more than one plugin claims the name.
        """
        claims = self.by_name.get((kind, name), [])
        if not claims:
            raise unknown_name(_singular(kind), name, self.names(kind), "`clipdefense plugins` lists them all.")
        if len(claims) > 1:
            raise UsageError(_conflict(claims))
        return claims[0]


def _singular(kind: str) -> str:
    """``"defenses"`` -> ``"defence"``, as messages spell it."""
    return kind[:-1].replace("defense", "defence")


def _conflict(claims: list[Contribution]) -> str:
    owners = " and ".join(f"{c.distribution} (plugin {c.plugin!r})" for c in claims)
    return (
        f"the {_singular(claims[0].kind)} name {claims[0].name!r} is claimed by {owners}; uninstall one of them, or "
        "list the plugins to keep in CLIPDEFENSE_PLUGINS."
    )


def _contributions(
    manager: pluggy.PluginManager, plugin: ModuleType, name: str, owner: str
) -> tuple[Contribution, ...]:
    """Call the plugin's own hook implementations, with a callback that records what it registers."""
    found: list[Contribution] = []
    for kind in KINDS:

        def register(
            entry: str,
            target: str,
            *,
            summary: str = "",
            requires: tuple[str, ...] = (),
            install: str = "",
            known_unsound: str = "",
            _kind: str = kind,
        ) -> None:
            if not all(target.partition(":")):
                raise UsageError(f"target {target!r} of {entry!r} is not of the form 'package.module:attribute'.")
            if isinstance(requires, str):
                raise UsageError(
                    f"requires of {entry!r} is the string {requires!r}; a tuple of import names is expected."
                )
            found.append(
                Contribution(_kind, entry, target, name, owner, summary, tuple(requires), install, known_unsound)
            )

        others = [other for other in manager.get_plugins() if other is not plugin]
        manager.subset_hook_caller(f"register_{kind}", remove_plugins=others)(register=register)
    return tuple(found)


def _admit(manager: pluggy.PluginManager, plugin: ModuleType, name: str, owner: str) -> tuple[Contribution, ...]:
    """Register a hook module; raises (and leaves the manager as it was) for a misspelt hook or a bad argument."""
    # two distributions may give their entry points the same name
    manager.register(plugin, f"{name} of {owner}")
    try:
        manager.check_pending()
        return _contributions(manager, plugin, name, owner)
    except Exception:
        manager.unregister(plugin)
        raise


def _load_entry_point(manager: pluggy.PluginManager, point: EntryPoint, strict: bool) -> PluginInfo:
    owner = point.dist.name if point.dist else "unknown distribution"
    version = point.dist.version if point.dist else ""
    try:
        return PluginInfo(point.name, owner, version, _admit(manager, point.load(), point.name, owner))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if strict:
            raise UsageError(f"plugin {point.name!r} of {owner} cannot be loaded: {reason}") from error
        warnings.warn(f"plugin {point.name!r} of {owner} is skipped: {reason}", stacklevel=2)
        return PluginInfo(point.name, owner, version, error=reason)


def discover() -> Registry:
    """Read the entry points afresh. ``registry()`` is the cached form that everything else uses."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    strict = os.environ.get("CLIPDEFENSE_STRICT") == "1"
    allowed = os.environ.get("CLIPDEFENSE_PLUGINS")
    wanted = None if allowed is None else {name.strip() for name in allowed.split(",") if name.strip()}

    native = importlib.import_module("clipdefense.native")
    plugins = [PluginInfo("core", "clipdefense", "", _admit(manager, native, "core", "clipdefense"))]
    points = sorted(entry_points(group=hookspecs.PROJECT), key=lambda point: (point.name, point.value))
    if wanted is not None and (missing := wanted - {point.name for point in points}):
        raise unknown_name("CLIPDEFENSE_PLUGINS entry", sorted(missing)[0], {point.name for point in points})
    plugins += [_load_entry_point(manager, point, strict) for point in points if wanted is None or point.name in wanted]

    by_name: dict[tuple[str, str], list[Contribution]] = {}
    for plugin in plugins:
        for contribution in plugin.contributions:
            by_name.setdefault((contribution.kind, contribution.name), []).append(contribution)
    if strict and (clashes := [claims for claims in by_name.values() if len(claims) > 1]):
        raise UsageError(_conflict(clashes[0]))
    return Registry(tuple(plugins), by_name)


@cache
def registry() -> Registry:
    """What is installed, read once per process (``registry.cache_clear()`` reads it again)."""
    return discover()


def list_plugins() -> tuple[PluginInfo, ...]:
    """Every plugin found, with its distribution, version, contributions and, where it failed, the reason."""
    return registry().plugins


def split_spec(kind: str, spec: str) -> tuple[Contribution, str]:
    """``"plugin:rest"`` -> (contribution, rest), for models and datasets.

    Raises:
        UsageError: no colon, nothing behind it, or an unknown plugin.
    """
    prefix, colon, rest = spec.partition(":")
    if not colon or not rest:
        known = ", ".join(f"{name}:..." for name in registry().names(kind)) or "none"
        raise UsageError(f"{_singular(kind)} {spec!r} is not of the form 'plugin:name'; installed: {known}.")
    return registry().find(kind, prefix), rest


def get_defense(name: str) -> Any:
    """The defence class registered as ``name``, e.g. ``"ttc"`` or ``"tecoa"``."""
    return registry().find("defenses", name).load()


def get_attack(name: str) -> Any:
    """The attack function registered as ``name``: ``"pgd"``, or ``"family:Name"`` such as ``"art:DeepFool"``."""
    known = registry()
    family, colon, rest = name.partition(":")
    if colon and ("attacks", family + ":") in known.by_name:
        return known.find("attacks", family + ":").load()(rest)
    return known.find("attacks", name).load()


def load_model(spec: str, classes: Any = None, *, device: Any = None, **options: Any) -> Any:
    """Load a zero-shot classifier.

    Args:
        spec: ``plugin:name[@weights]``; weights are a tag, a path or ``hf-hub:org/name``, as the plugin understands.
        classes: class names, in the order of the labels; None where the weights bring their own.
        device: where it goes, such as ``"cuda:1"``; None leaves that to the plugin.
        options: passed on to the plugin (``templates``, ``dtype``, ...).

    Returns:
        A :class:`clipdefense.ZeroShotClassifier` in eval mode.

    Raises:
        UsageError: an unknown plugin, or an option that it does not have, with the nearest names; and whatever the
            plugin finds wrong.
    """
    contribution, rest = split_spec("models", spec)
    name, _, weights = rest.partition("@")
    loader = contribution.load()
    check_options(loader, options, f"option of model {contribution.name!r}", given=2)
    if device is not None and "device" in inspect.signature(loader).parameters:
        return loader(name, weights or None, classes=classes, device=device, **options)
    model = loader(name, weights or None, classes=classes, **options)
    return model if device is None else model.to(device)


def load_dataset(spec: str, **options: Any) -> Any:
    """Load labelled images: ``plugin:rest``, e.g. ``"npz:path/to/images.npz"``.

    Args:
        spec: which plugin, and what it is to load.
        options: passed on to the plugin (``split``, ``n``, ``size``, ...).

    Returns:
        A :class:`clipdefense.data.ImageDataset`.

    Raises:
        UsageError: an unknown plugin, or an option that it does not have, with the nearest names; and whatever the
            plugin finds wrong.
    """
    contribution, rest = split_spec("datasets", spec)
    loader = contribution.load()
    check_options(loader, options, f"option of dataset {contribution.name!r}", given=1)
    return loader(rest, **options)
