"""A run's memory does not grow with its data set: work units pass through, one at a time."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipdefense import load_model
from clipdefense.runs.config import read_config
from clipdefense.runs.run import run
from kills import forked

SIDE = 96


def photos(model: str, folder: Path, counts: tuple[int, ...]) -> None:
    """So many files, in a folder each, all links to one picture of what the model calls a cat.

    Work units are then alike. Where they are not, every new number of images a forward costs the matrix library a few
    MiB, once, which would hide what is looked for.
    """
    classifier = load_model(model, ("cat", "dog", "fish"))
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        with torch.no_grad():
            if int(classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).argmax()) == 0:
                break
    for count in counts:
        for name, images in (("cat", count - 2), ("dog", 1), ("fish", 1)):
            (folder / str(count) / name).mkdir(parents=True)
            first = folder / str(count) / name / "0.png"
            Image.fromarray(pixels).save(first)
            for index in range(1, images):
                os.link(first, first.with_name(f"{index}.png"))


def peak_mib(model: str, data: Path, folder: Path) -> float:
    """The most memory that a process of its own held during the run."""
    tables = {"models": [model], "datasets": [f"folder:{data}"], "attacks": ["pgd,steps=1,early_stop=false"]}
    config = read_config({**tables, "unit": 32, "batch_size": 32, "exhibits": False})

    def task() -> float:
        run(config, folder, device="cpu")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    ended = forked(task)
    assert isinstance(ended.value, float), ended
    return ended.value


def test_memory_is_flat_from_1x_to_16x(specs: tuple[str, str], tmp_path: Path) -> None:
    forked(lambda: photos(specs[0], tmp_path / "photos", (128, 2048)))
    peaks = {n: peak_mib(specs[0], tmp_path / "photos" / str(n), tmp_path / f"run-{n}") for n in (128, 2048)}
    decoded = (2048 - 128) * 3 * SIDE * SIDE * 4 / 2**20  # 203 MiB, if the larger one were held at once
    assert peaks[2048] - peaks[128] < 0.15 * decoded, peaks
