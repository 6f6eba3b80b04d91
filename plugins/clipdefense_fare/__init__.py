"""FARE as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "fare",
        "clipdefense_fare.fare:FARE",
        summary="unsupervised adversarial fine-tuning of the image embedding (ICML 2024, 2402.12336)",
    )
