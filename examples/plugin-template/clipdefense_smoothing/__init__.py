"""What this package adds to clipdefense. Imports pluggy only: everything else is loaded when it is used."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "smoothing",
        "clipdefense_smoothing.smoothing:Smoothing",
        summary="a 3 x 3 blur of random strength (an example)",
    )
