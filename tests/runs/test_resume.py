"""What a run is compared with before it goes on, and what it is checked for before it begins."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipdefense.runs.exhibits as exhibits
from clipdefense.errors import UsageError
from clipdefense.runs.build import Builder
from clipdefense.runs.config import RunConfig
from clipdefense.runs.page import page_of
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.store import Store, stores_in
from clipdefense.runs.units import Shard
from kills import die, forked, make_files, rows

MakeConfig = Callable[..., RunConfig]


def ask(folder: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(stores_in(folder)[0])) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"threats": [{"eps": "5/255", "steps": 3}]}, r"threats\[0\].eps is 0.0196"),
        ({"attacks": ["pgd,steps=9"]}, r"attacks\[0\] is 'pgd,steps=9'"),
        ({"seed": 1}, "seed is 1"),
        ({"unit": 8}, "unit is 8"),
        ({"save_adv": True}, "save_adv is True"),
    ],
)
def test_another_run_in_the_folder_is_refused_by_field(
    make_config: MakeConfig, folder: Path, change: dict[str, Any], field: str
) -> None:
    run(make_config(), folder, device="cpu")
    before = rows(folder)
    with pytest.raises(UsageError, match=f"^{field}.*but the run in .* was made with"):
        run(make_config(**change), folder, device="cpu")
    assert rows(folder) == before
    assert run(make_config(batch_size=4), folder, device="cpu") == 0  # a matter of the machine, recorded by row


def test_work_units_that_number_their_attacks_otherwise_are_refused(make_config: MakeConfig, folder: Path) -> None:
    config = make_config(attacks=["pgd", "apgd-ce,steps=2"])
    run(config, folder, device="cpu")
    with closing(sqlite3.connect(stores_in(folder)[0])) as connection:
        connection.execute("DELETE FROM units WHERE unit = 1")
        connection.execute("DELETE FROM verdicts WHERE unit = 1")
        connection.execute("UPDATE attacks SET number = 1 - number + 2")
        connection.execute("UPDATE attacks SET number = number - 2")
        connection.commit()
    with pytest.raises(UsageError, match=r"attacks\[0\].*'pgd'.*was made with .*'apgd-ce,steps=2'"):
        run(config, folder, device="cpu")
    assert ask(folder, "SELECT count(*) FROM units") == [(2,)]


def test_other_weights_and_other_images_are_refused(
    make_config: MakeConfig, folder: Path, specs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = np.load(specs[1].removeprefix("arrays:"))["x"], np.load(specs[1].removeprefix("arrays:"))["y"]
    data = tmp_path / "images.npz"
    np.savez(data, x=x, y=y)
    config = make_config(datasets=[{"spec": f"arrays:{data}", "name": "images"}])
    run(config, folder, shard=Shard(0, 2), device="cpu")
    with closing(sqlite3.connect(stores_in(folder)[0])) as connection:
        connection.execute("DELETE FROM units WHERE unit = 0")
        connection.execute("DELETE FROM verdicts WHERE unit = 0")
        connection.commit()
    real = Builder.model

    def other(self: Builder, cell: Any) -> Any:
        model = real(self, cell)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model

    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"^weights_sha256 is"):
        patch.setattr(Builder, "model", other)
        run(config, folder, shard=Shard(0, 2), device="cpu")
    np.savez(data, x=x, y=(y + 1) % 3)
    with pytest.raises(UsageError, match=r"^contents.images.labels_sha256 is"):
        run(config, folder, shard=Shard(0, 2), device="cpu")


def test_a_finished_run_is_not_told_again_for_other_weights(tmp_path: Path, make_config: MakeConfig) -> None:
    model, data = make_files(tmp_path / "files", 20)
    config = make_config(models=[model], datasets=[data])
    run(config, tmp_path / "run", device="cpu")
    assert run(config, tmp_path / "run", device="cpu") == 0
    file = tmp_path / "files" / "spread.safetensors"
    weights = load_file(file)
    name = next(name for name, value in weights.items() if value.is_floating_point() and value.dim() > 1)
    save_file({**weights, name: weights[name] + 1e-3}, file)
    with pytest.raises(UsageError, match=r"^weights_sha256 is"):
        run(config, tmp_path / "run", device="cpu")


def test_a_finished_run_is_not_told_again_for_other_pixels(
    tmp_path: Path, make_config: MakeConfig, folder: Path
) -> None:
    for number, name in enumerate(("cat", "dog", "fish")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (number * 60, 90, 200)).save(tmp_path / "photos" / name / "0.png")
    config = make_config(datasets=[f"folder:{tmp_path / 'photos'}"])
    run(config, folder, device="cpu")
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "photos" / "dog" / "0.png")
    with pytest.raises(UsageError, match=r"has other pixels in images 0 to 2 than when the run in .* judged them"):
        run(config, folder, device="cpu")


def test_the_last_unit_that_is_done_is_looked_at_too(tmp_path: Path, make_config: MakeConfig, folder: Path) -> None:
    model, data = make_files(tmp_path / "files", 40)
    config = make_config(models=[model], datasets=[data])
    run(config, folder, device="cpu")
    file = tmp_path / "files" / "images.npz"
    arrays = dict(np.load(file))
    arrays["x"][39] = 255 - arrays["x"][39]
    np.savez(file, **arrays)
    with pytest.raises(UsageError, match=r"has other pixels in images 32 to 39"):
        run(config, folder, device="cpu")


def test_what_has_a_name_may_move(tmp_path: Path, make_config: MakeConfig, folder: Path) -> None:
    model, data = make_files(tmp_path / "files", 20)
    named = {"models": [{"spec": model, "name": "tiny"}], "datasets": [{"spec": data, "name": "images"}]}
    run(make_config(**named, batch_size=6, exhibits=False), folder, device="cpu")
    (tmp_path / "files").rename(tmp_path / "elsewhere")
    moved = {
        key: [{**row, "spec": row["spec"].replace(f"{tmp_path}/files", f"{tmp_path}/elsewhere")} for row in rows]
        for key, rows in named.items()
    }
    assert run(make_config(**moved), folder, device="cpu") == 0
    # a run is read back with the places and the batch size with which it was last worked on
    assert read(folder).config == make_config(**moved)
    builder = Builder(read(folder).config, "cpu")
    (cell,) = read(folder).cells
    assert builder.subject(cell.cell).facts["weights_sha256"] == cell.facts["weights_sha256"]


def test_an_exhibit_of_another_run_is_not_shown(make_config: MakeConfig, folder: Path) -> None:
    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "commit", broken)
        run(make_config(), folder, device="cpu")
    left = exhibits.exhibit_file(folder, 0)
    before = left.read_bytes()
    run(make_config(threats=[{"eps": "1/255"}], attacks=["pgd,steps=7"], exhibits=False), folder, device="cpu")
    (cell,) = read(folder).cells
    assert left.read_bytes() == before and exhibits.read(left, exhibits.identity(cell.cell, cell.facts)) is None
    assert "The attack's loss" not in [section.title for section in page_of(read(folder)).after]


def test_a_commit_that_was_killed_is_rolled_back_by_whoever_reads(make_config: MakeConfig, folder: Path) -> None:
    config = make_config()

    def task() -> None:
        def killed(store: Store, job: Any, unit: Any) -> None:
            run = store._connection.execute
            run("PRAGMA cache_size = 1")
            run("BEGIN IMMEDIATE")
            for number in range(4000):  # so many rows that some are in the file before the commit
                run("INSERT INTO corrupt VALUES (9, 9, ?, 'x')", (number,))
            die()

        with pytest.MonkeyPatch.context() as patch:
            commit = Store.commit
            patch.setattr(Store, "commit", lambda s, j, u: commit(s, j, u) if j.unit == 0 else killed(s, j, u))
            run(config, folder, device="cpu")

    assert forked(task).signal == 9
    assert (folder / "verdicts-0-of-1.sqlite-journal").stat().st_size > 0
    (cell,) = read(folder).cells
    assert (cell.units, cell.missing, cell.corrupt) == (1, 2, ())
    assert run(config, folder, device="cpu") == 2


def test_a_folder_without_verdicts_takes_the_corrected_run(
    make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise UsageError("too early")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="too early"):
        patch.setattr("clipdefense.runs.run._Loop.all", broken)
        run(make_config(attacks=["pgd,steps=9"], defenses=["none", "random-noise"]), folder, device="cpu")
    assert run(make_config(), folder, device="cpu") == 3
    (cell,) = read(folder).cells
    assert [attack for attack, *_ in cell.attacks] == ["pgd"]
    # from the first verdict on, what is there counts
    with pytest.raises(UsageError, match=r"attacks\[0\] is 'pgd,steps=9'"):
        run(make_config(attacks=["pgd,steps=9"]), folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["SPEC", "open_clip:nowhere.json@no.pt"]}, r"models\[1\]: .*nowhere\.json"),
        ({"defenses": ["none", {"spec": "random-noise", "options": {"eps": "many"}}]}, r"defenses\[1\]: .*many"),
        ({"defenses": ["none", {"spec": "random-noise", "views": ["smooth"]}]}, "view 'smooth' is unknown"),
        ({"attacks": ["pgd", "square,queries=many"]}, "attack 'square,queries=many' cannot be run: queries is 'many'"),
        ({"attacks": ["pgd", "pgd,objective=margn"]}, "attack 'pgd,objective=margn' cannot be run: .*'margn' is unkn"),
        ({"attacks": ["pgd", "autoattack,version=rnd"]}, "cannot be run: version 'rnd' is unknown"),
        ({"attacks": ["pgd", "art:ProjectedGradientDescent,max_iter=abc"]}, "abc' cannot be run: 'art:Proj.* refuses"),
    ],
)
def test_what_fails_late_is_tried_before_the_first_verdict(
    make_config: MakeConfig, folder: Path, specs: tuple[str, str], change: dict[str, Any], message: str
) -> None:
    if "models" in change:
        change = {"models": [specs[0], change["models"][1]]}
    with pytest.raises(UsageError, match=message):
        run(make_config(**change), folder, device="cpu")
    assert ask(folder, "SELECT * FROM units") == []
    assert run(make_config(), folder, device="cpu") == 3


def test_a_longer_list_is_named_at_its_first_difference(make_config: MakeConfig, folder: Path) -> None:
    run(make_config(attacks=["pgd"]), folder, device="cpu")
    with pytest.raises(UsageError, match=r"^attacks\[1\] is 'square', but the run in .* was made with None"):
        run(make_config(attacks=["pgd", "square"]), folder, device="cpu")
