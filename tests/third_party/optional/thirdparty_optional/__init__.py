"""Needs packages that are not installed: one declared, one found out at import."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_attacks(register):
    register(
        "optional-declared",
        "thirdparty_optional.parts:attack",
        requires=("thirdparty_absent", "thirdparty_absent.part"),
        install="thirdparty-optional[fast]",
    )
    register("optional-undeclared", "thirdparty_optional.parts:attack")
