"""The core's own attacks and commands, registered as a plugin registers its own (nothing here imports torch)."""

from __future__ import annotations

from clipdefense.hookspecs import Register, hookimpl


@hookimpl
def register_attacks(register: Register) -> None:
    register("pgd", "clipdefense.attacks.pgd:pgd", summary="projected gradient descent, Linf and L2 (1706.06083)")
    register("apgd-ce", "clipdefense.attacks.apgd:apgd_ce", summary="Auto-PGD on cross-entropy (2003.01690)")
    register("apgd-dlr", "clipdefense.attacks.apgd:apgd_dlr", summary="Auto-PGD on the DLR loss (2003.01690)")
    register("apgd-t", "clipdefense.attacks.apgd:apgd_t", summary="Auto-PGD towards 9 target classes (2003.01690)")
    register("fab-t", "clipdefense.attacks.fab:fab_t", summary="minimum-norm FAB towards 9 classes (1907.02044)")
    register("square", "clipdefense.attacks.square:square", summary="random search, no gradients (1912.00049)")
    register(
        "autoattack",
        "clipdefense.attacks.autoattack:autoattack",
        summary="the standard ensemble, or version=rand for randomised models (2003.01690)",
    )


@hookimpl
def register_commands(register: Register) -> None:
    register("plugins", "clipdefense.cli:plugins", summary="list what is installed")
    register("evaluate", "clipdefense.commands.evaluate:evaluate", summary="clean and robust accuracy, kept or shown")
    register("train", "clipdefense.cli:train", summary="fine-tune an image tower with a trainer defence")
    register("report", "clipdefense.commands.report:report", summary="a run's summaries and page, made again")
    register("merge", "clipdefense.commands.merge:merge", summary="join the shards of a run")
    register("verify", "clipdefense.commands.verify:verify", summary="prove every broken image of a run again")
    register("compare", "clipdefense.commands.compare:compare", summary="which images changed verdict between runs")
    register("doctor", "clipdefense.commands.doctor:doctor", summary="what is installed here, and what may go wrong")
    register("audit", "clipdefense.commands.audit:audit", summary="twenty checks before a robust number is believed")
