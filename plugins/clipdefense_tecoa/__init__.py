"""TeCoA as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "tecoa",
        "clipdefense_tecoa.tecoa:TeCoA",
        summary="text-guided contrastive adversarial fine-tuning (ICLR 2023, 2212.07016)",
    )
