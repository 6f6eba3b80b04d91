"""LAAT as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "laat",
        "clipdefense_laat.laat:LAAT",
        summary="language-driven anchor-based adversarial training (CVPR 2024, 2301.13096)",
    )


@hookimpl
def register_models(register):  # type: ignore[no-untyped-def]
    register(
        "laat",
        "clipdefense_laat.towers:load",
        summary="an image network to train towards stored text anchors: conv4-512, resnet12 or a timm model",
        requires=("timm",),
        install="timm",
    )
