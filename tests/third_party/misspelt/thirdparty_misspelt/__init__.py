"""Spells a hook the way its language does."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defences(register):
    register("misspelt", "thirdparty_misspelt.parts:Misspelt")
