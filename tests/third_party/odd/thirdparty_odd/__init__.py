"""Its entry point has the name of another distribution's, and its targets cannot be imported."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_attacks(register):
    register("odd-module", "thirdparty_odd.nowhere:attack")
    register("odd-attribute", "thirdparty_odd:nothing")
    register("odd-code", "thirdparty_odd.parts:attack")
    register("odd-fine", "thirdparty_odd:__doc__", known_unsound="masks [gradients]")


@hookimpl
def register_commands(register):
    register("odd-command", "thirdparty_odd.nowhere:command")
