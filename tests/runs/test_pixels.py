"""Whether what is proved is proved on the run's own pixels: other images are told apart from attacks that fail."""

from __future__ import annotations

import ctypes
import os
import resource
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipdefense import load_model
from clipdefense.cli import application
from clipdefense.errors import UsageError
from clipdefense.runs.compare import compare, transfer
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.pixels import unit_hashes
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.verify import closing as closing_lines
from clipdefense.runs.verify import verify
from kills import forked

MakeConfig = Callable[..., RunConfig]
SIDE = 96
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@pytest.fixture
def saved(make_config: MakeConfig, folder: Path) -> Path:
    run(make_config(save_adv=True, exhibits=False), folder, device="cpu")
    return folder


@pytest.fixture
def changed(specs: tuple[str, str], tmp_path: Path) -> Callable[..., str]:
    """``changed(rows)``: the spec of the same labels where the images of these rows are noise."""
    held = np.load(specs[1].removeprefix("arrays:"))

    def make(rows: slice, seed: int = 0) -> str:
        x = held["x"].copy()
        x[rows] = np.random.default_rng(seed).integers(0, 256, x[rows].shape, dtype=np.uint8)
        np.savez(tmp_path / "images.npz", x=x, y=held["y"], classes=held["classes"])
        return f"arrays:{tmp_path / 'images.npz'}"

    return make


def test_the_runs_own_pixels_are_known(saved: Path) -> None:
    (proof,) = verify(saved, device="cpu")
    assert (proof.units, proof.other_pixels, proof.failed_on_other_pixels) == (3, 0, 0)
    assert not any("other pixels" in line for line in closing_lines([proof]))


def test_every_image_replaced(saved: Path, changed: Callable[..., str]) -> None:
    (proof,) = verify(saved, device="cpu", data=changed(slice(None)))
    assert not proof.holds and (proof.units, proof.other_pixels) == (3, 3)
    fail = proof.failed + proof.over_budget
    assert fail == proof.failed_on_other_pixels > 0
    assert closing_lines([proof])[-1] == (
        "3 of 3 work units hold other pixels here than in the run: what fails in them may be the images, not the "
        f"attack ({fail} of the {fail} claims that fail are in them)"
    )
    result = CliRunner().invoke(application(), ["verify", str(saved), "--device", "cpu", "--data", changed(slice(40))])
    assert result.exit_code == 1 and "3 of 3 work units hold other pixels" in result.stdout
    assert '"other_pixels": 3' in (saved / "verify.json").read_text()


def test_one_grey_level_is_no_refusal(saved: Path, specs: tuple[str, str], tmp_path: Path) -> None:
    held = np.load(specs[1].removeprefix("arrays:"))
    x = held["x"].copy()
    x[20, 0, 0, 0] ^= 1
    np.savez(tmp_path / "decoder.npz", x=x, y=held["y"], classes=held["classes"])
    (proof,) = verify(saved, device="cpu", data=f"arrays:{tmp_path / 'decoder.npz'}")
    assert proof.holds and (proof.units, proof.other_pixels, proof.failed_on_other_pixels) == (3, 1, 0)


def test_only_what_fails_in_those_units_is_laid_to_the_images(saved: Path, changed: Callable[..., str]) -> None:
    (proof,) = verify(saved, device="cpu", data=changed(slice(16, 32)))
    assert (proof.units, proof.other_pixels) == (3, 1)
    assert proof.failed_on_other_pixels == proof.failed + proof.over_budget > 0
    assert all(16 <= image < 32 for image in proof.failures)


def test_images_that_the_run_could_not_decode_are_left_out(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    for name in ("cat", "dog", "fish"):
        (photos / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (number * 60, 90, 200)).save(photos / name / f"{number}.png")
    whole = (photos / "dog" / "0.png").read_bytes()
    (photos / "dog" / "0.png").write_bytes(b"no image")
    little = [{"eps": "0.01/255", "steps": 1}]  # what is right stays right
    config = make_config(
        datasets=[{"spec": f"folder:{photos}", "name": "images"}], threats=little, unit=6, save_adv=True
    )
    run(config, folder, device="cpu")
    (cell,) = read(folder).cells
    claimed = set(cell.samples[(cell.adversarial[0, 0] != cell.labels)].tolist())
    assert [image for image, _ in cell.corrupt] == [4] and claimed
    assert verify(folder, device="cpu")[0].other_pixels == 0
    (photos / "dog" / "0.png").write_bytes(whole)  # mended since: the run's pixels are those of the others
    assert verify(folder, device="cpu")[0].other_pixels == 0
    names = {image: photos / ("cat", "dog", "fish")[image // 4] / f"{image % 4}.png" for image in range(12)}
    spared = next(image for image in cell.samples.tolist() if image not in claimed)
    pixels = names[spared].read_bytes()
    names[spared].write_bytes(b"no image")  # nothing is claimed of it
    assert verify(folder, device="cpu")[0].other_pixels == 1
    names[spared].write_bytes(pixels)
    names[min(claimed)].write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"an image that the run has verdicts on cannot be decoded here: .* cannot be"):
        verify(folder, device="cpu")


def test_a_transfer_on_other_pixels(
    saved: Path, make_config: MakeConfig, specs: tuple[str, str], changed: Callable[..., str], tmp_path: Path
) -> None:
    held = changed(slice(16))
    weak = [{"eps": "4/255", "steps": 1, "step_size": 1e-6}]
    config = make_config(datasets=[{"spec": held, "name": "images"}], threats=weak, exhibits=False)
    run(config, tmp_path / "other", device="cpu")
    (found,) = transfer(saved, tmp_path / "other", device="cpu")
    # B was made on what is here, A was not
    assert (found.other_pixels, found.other_pixels_a) == (0, 1) and 0 < found.units_a <= found.units == 3
    assert found.notes[-1:] == [
        f"1 of {found.units_a} work units hold other pixels here than in A's run: what breaks or does not in them may "
        "be the images"
    ]
    # what was compared differs, too, and the stores know it
    assert compare(saved, tmp_path / "other")[-1].notes[-1] == (
        "1 of 3 work units hold other pixels in A than in B: what changed in them may be the images"
    )
    changed(slice(None), seed=1)  # since both
    (found,) = transfer(saved, tmp_path / "other", device="cpu")
    assert found.other_pixels == found.units and found.other_pixels_a == found.units_a
    assert [note[:11] for note in found.notes[-2:]] == [f"{n} of {n} work" for n in (found.units_a, found.units)]


def test_a_transfer_between_runs_that_are_cut_otherwise(saved: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    weaker = {"threats": [{"eps": "4/255", "steps": 1}], "exhibits": False}
    for unit in (7, 40):
        run(make_config(unit=unit, **weaker), tmp_path / f"cut-{unit}", device="cpu")
    run(make_config(**weaker), tmp_path / "alike", device="cpu")
    (alike,) = transfer(saved, tmp_path / "alike", device="cpu")
    for unit in (7, 40):
        (found,) = transfer(saved, tmp_path / f"cut-{unit}", device="cpu")
        assert (found.tried, found.broken) == (alike.tried, alike.broken) and found.tried > 0
        assert (found.other_pixels, found.other_pixels_a, found.units_a) == (0, 0, alike.units_a)
        assert compare(saved, tmp_path / f"cut-{unit}")[-1].notes[-1].startswith("attacks that do not say otherwise")


def test_the_hashes_are_the_stores(saved: Path) -> None:
    hashes = unit_hashes(saved, 0)
    assert sorted(hashes) == [0, 1, 2] and all(len(value) == 64 for value in hashes.values())
    with closing(sqlite3.connect(saved / "verdicts-0-of-1.sqlite")) as connection:
        assert hashes == dict(connection.execute("SELECT unit, pixels_sha256 FROM units"))


def wrong_photos(model: str, folder: Path, count: int) -> None:
    """So many links to one picture, all but one in the folder of a class that the model does not see in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        right = int(load_model(model, ("cat", "dog"))(x).argmax())
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        first = folder / name / "0.png"
        Image.fromarray(pixels).save(first)
        for index in range(1, 1 if label == right else count - 1):
            os.link(first, first.with_name(f"{index}.png"))


def proved_in_mib(model: str, photos: Path, folder: Path, count: int) -> float:
    """The most memory that a process of its own holds while it proves a run of so many claims."""
    tables = {"models": [model], "datasets": [f"folder:{photos}"], "attacks": ["pgd,steps=1"], "save_adv": True}
    config = read_config({**tables, "unit": 32, "batch_size": 32, "exhibits": False})
    forked(lambda: wrong_photos(model, photos, count))
    forked(lambda: run(config, folder, device="cpu"))

    def task() -> float:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            # what is freed goes back at once: else the heap's gaps, more on some days than on others, count as well
            mallopt(M_MMAP_THRESHOLD, 1 << 16)
        (proof,) = verify(folder, device="cpu")
        assert proof.claims >= count - 1 and proof.holds and proof.units == count // 32
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    ended = forked(task)
    assert isinstance(ended.value, float), ended
    return ended.value


def test_memory_is_flat_from_1x_to_16x(specs: tuple[str, str], tmp_path: Path) -> None:
    peaks = {n: proved_in_mib(specs[0], tmp_path / f"{n}", tmp_path / f"run-{n}", n) for n in (64, 1024)}
    decoded = (1024 - 64) * 3 * SIDE * SIDE * 4 / 2**20  # 101 MiB, if the larger one were held at once
    assert peaks[1024] - peaks[64] < 0.15 * decoded, peaks
