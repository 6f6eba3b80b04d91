"""open_clip's models as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_models(register):  # type: ignore[no-untyped-def]
    register(
        "open_clip",
        "clipdefense_openclip.loader:load",
        summary="any open_clip model: ARCHITECTURE@TAG, ARCHITECTURE@FILE, hf-hub:ORG/NAME, CONFIG.json@FILE; "
        "published robust ones: ViT-L-14-quickgelu@fare2, @fare4, @tecoa2, @tecoa4; "
        "ViT-B-32@fare4-laion2b-b32, @tecoa4-laion2b-b32; ViT-B-16@fare4-laion2b-b16, @tecoa4-laion2b-b16",
        requires=("open_clip",),
        install="open_clip_torch",
    )


@hookimpl
def register_commands(register):  # type: ignore[no-untyped-def]
    register(
        "export-open-clip",
        "clipdefense_openclip.command:export_open_clip",
        summary="write a hardened model as a checkpoint for plain open_clip",
    )
