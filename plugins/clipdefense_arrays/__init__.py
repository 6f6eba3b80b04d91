"""Data sets from files of one's own, as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_datasets(register):  # type: ignore[no-untyped-def]
    register("npz", "clipdefense_arrays.datasets:load_packed", summary="encoded images packed in one .npz file")
    register(
        "folder",
        "clipdefense_arrays.datasets:load_folder",
        summary="a folder of images, one sub-folder a class",
    )
    register(
        "arrays",
        "clipdefense_arrays.datasets:load_arrays",
        summary="pixels and labels in an .npz or .npy file",
    )
    register(
        "webdataset",
        "clipdefense_arrays.shards:load_shards",
        summary="a folder of WebDataset tar shards, read by index: images beside .cls labels",
    )
