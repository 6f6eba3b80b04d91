"""Labelled images: one dataset class, what the dataset plugins share, and the protocols of published numbers."""

from clipdefense.data.dataset import ImageDataset, from_arrays
from clipdefense.data.files import CACHE_VARIABLE, cache_folder, find_file, read_arrays
from clipdefense.data.protocols import DatasetRule, Protocol, Subset, get_protocol, list_protocols
from clipdefense.data.resizing import Resize
from clipdefense.data.sources import ArrayImages, EncodedImages, FileImages, ImageSource

__all__ = [
    "CACHE_VARIABLE",
    "ArrayImages",
    "DatasetRule",
    "EncodedImages",
    "FileImages",
    "ImageDataset",
    "ImageSource",
    "Protocol",
    "Resize",
    "Subset",
    "cache_folder",
    "find_file",
    "from_arrays",
    "get_protocol",
    "list_protocols",
    "read_arrays",
]
