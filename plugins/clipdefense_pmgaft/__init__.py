"""PMG-AFT as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "pmg-aft",
        "clipdefense_pmgaft.pmgaft:PMGAFT",
        summary="pre-trained model guided adversarial fine-tuning (CVPR 2024, 2401.04350)",
    )
