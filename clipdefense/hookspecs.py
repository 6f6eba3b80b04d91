"""What a plugin may contribute.

A plugin is a module named by an entry point of the group ``clipdefense``. It imports nothing but pluggy (so that
``clipdefense --help`` is instant and a missing optional package is a message, not a crash) and registers names
with dotted ``"package.module:attribute"`` targets, which are imported when first used::

    import pluggy

    hookimpl = pluggy.HookimplMarker("clipdefense")


    @hookimpl
    def register_defenses(register):
        register("my-defense", "my_package.defense:MyDefense", summary="what it does, in one line")

Every ``register`` takes ``(name, target, *, summary="", requires=(), install="", known_unsound="")``:

* ``summary``: the line that ``clipdefense plugins`` prints;
* ``requires``: import names of optional packages, and ``install``, what to ``pip install`` to get them;
* ``known_unsound``: why a registered variant gives false robustness (it must then be found INVALID by the audit).
"""

from __future__ import annotations

from typing import Protocol

import pluggy

PROJECT = "clipdefense"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """The callback every hook receives."""

    def __call__(
        self,
        name: str,
        target: str,
        *,
        summary: str = "",
        requires: tuple[str, ...] = (),
        install: str = "",
        known_unsound: str = "",
    ) -> None: ...


@hookspec
def register_models(register: Register) -> None:
    """Model loaders: ``target(name, weights, *, classes, **options) -> ZeroShotClassifier``.

    Used as ``plugin:name[@weights]``: ``register("open_clip", ...)`` receives everything after ``open_clip:``.
    """


@hookspec
def register_defenses(register: Register) -> None:
    """Defence classes: a :class:`clipdefense.TrainerDefense` or a :class:`clipdefense.TestTimeDefense`."""


@hookspec
def register_attacks(register: Register) -> None:
    """Attacks: ``target(model, x, y, threat, *, seed=0, ids=None, **options) -> x_adv``.

    A name that ends in ``":"`` is a family: ``register("art:", ...)`` and then ``target("FastGradientMethod")``
    returns the attack function that ``art:FastGradientMethod`` stands for.
    """


@hookspec
def register_datasets(register: Register) -> None:
    """Dataset loaders: ``target(rest, *, split, n, **options) -> ImageDataset``, used as ``plugin:rest``."""


@hookspec
def register_commands(register: Register) -> None:
    """Subcommands of ``clipdefense``: a function that typer can turn into a command, in a module quick to import."""
