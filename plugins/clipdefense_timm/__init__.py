"""timm trunks with a projection to a joint space, as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_models(register):  # type: ignore[no-untyped-def]
    register(
        "timm",
        "clipdefense_timm.loader:load",
        summary="a timm trunk with a linear projection and stored class embeddings: MODEL@FILE",
        requires=("timm",),
        install="timm",
    )
