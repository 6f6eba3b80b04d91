"""The native attacks, registered as a plugin registers its own (and outside `attacks`, which imports torch)."""

from __future__ import annotations

from clipdefense.hookspecs import Register, hookimpl


@hookimpl
def register_attacks(register: Register) -> None:
    register("pgd", "clipdefense.attacks.pgd:pgd", summary="projected gradient descent, Linf and L2 (1706.06083)")
    register("apgd-ce", "clipdefense.attacks.apgd:apgd_ce", summary="Auto-PGD on cross-entropy (2003.01690)")
