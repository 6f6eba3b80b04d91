"""The core's own attacks and commands, registered as a plugin registers its own (nothing here imports torch)."""

from __future__ import annotations

from clipdefense.hookspecs import Register, hookimpl


@hookimpl
def register_attacks(register: Register) -> None:
    register("pgd", "clipdefense.attacks.pgd:pgd", summary="projected gradient descent, Linf and L2 (1706.06083)")
    register("apgd-ce", "clipdefense.attacks.apgd:apgd_ce", summary="Auto-PGD on cross-entropy (2003.01690)")


@hookimpl
def register_commands(register: Register) -> None:
    register("plugins", "clipdefense.cli:plugins", summary="list what is installed")
    register("evaluate", "clipdefense.cli:evaluate", summary="clean and robust accuracy of a model or a defence")
    register("train", "clipdefense.cli:train", summary="fine-tune an image tower with a trainer defence")
