"""Test-time counterattack (TTC) as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register("ttc", "clipdefense_ttc.ttc:TTC", summary="test-time counterattack (CVPR 2025, 2503.03613)")
