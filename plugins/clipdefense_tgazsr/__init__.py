"""TGA-ZSR and Comp-TGA as plugins of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "tga-zsr",
        "clipdefense_tgazsr.tgazsr:TGAZSR",
        summary="text-guided attention for zero-shot robustness (NeurIPS 2024, 2410.21802)",
    )
    register(
        "comp-tga",
        "clipdefense_tgazsr.comptga:CompTGA",
        summary="complementary text-guided attention (TPAMI 2026, 2603.18598)",
    )
