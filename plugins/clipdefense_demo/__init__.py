"""The demo's own data and model as a plugin of clipdefense: handwritten digits and a small CLIP trained on them."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_datasets(register):  # type: ignore[no-untyped-def]
    register(
        "digits",
        "clipdefense_demo.digits:load",
        summary="scikit-learn's 1,797 handwritten digits at 32 px, no download: train, val, test",
        requires=("sklearn",),
        install="scikit-learn",
    )


@hookimpl
def register_commands(register):  # type: ignore[no-untyped-def]
    register("demo", "clipdefense_demo.command:demo", summary="attack a small CLIP, defend it, read the verdict")


@hookimpl
def register_models(register):  # type: ignore[no-untyped-def]
    register(
        "demo",
        "clipdefense_demo.model:load",
        summary="a small CLIP for the digits, trained on first use (half a minute) and cached: demo:digits",
        requires=("open_clip", "sklearn"),
        install="open_clip_torch scikit-learn",
    )
