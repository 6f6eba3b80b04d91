"""torchvision's data sets as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_datasets(register):  # type: ignore[no-untyped-def]
    register(
        "torchvision",
        "clipdefense_torchvision.datasets:load",
        summary="the usual data sets by name: cifar10, imagenet, tiny-imagenet, caltech101, oxford-pets, eurosat, ...",
        requires=("torchvision",),
        install="torchvision",
    )
