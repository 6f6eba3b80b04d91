"""Claims the names of an attack of the core, a defence of another plugin, and a command."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_attacks(register):
    register("pgd", "thirdparty_taken.parts:pgd")
    register("taken-own", "thirdparty_taken:__name__")


@hookimpl
def register_defenses(register):
    register("ttc", "thirdparty_taken.parts:TTC")


@hookimpl
def register_commands(register):
    register("train", "thirdparty_taken.parts:train")
