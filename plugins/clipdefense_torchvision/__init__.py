"""torchvision's data sets as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_datasets(register):  # type: ignore[no-untyped-def]
    register(
        "torchvision",
        "clipdefense_torchvision.datasets:load",
        summary="torchvision's data sets by name: cifar10, cifar100",
        requires=("torchvision",),
        install="torchvision",
    )
