"""Labelled images: one dataset class, and what the dataset plugins share."""

from clipdefense.data.dataset import ImageDataset, from_arrays
from clipdefense.data.files import CACHE_VARIABLE, cache_folder, find_file, read_arrays
from clipdefense.data.sources import ArrayImages, EncodedImages, FileImages, ImageSource

__all__ = [
    "CACHE_VARIABLE",
    "ArrayImages",
    "EncodedImages",
    "FileImages",
    "ImageDataset",
    "ImageSource",
    "cache_folder",
    "find_file",
    "from_arrays",
    "read_arrays",
]
