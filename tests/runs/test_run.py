"""Runs: the rows are the evaluation's, a resume does what is left, and what goes wrong is said and loses nothing."""

from __future__ import annotations

import csv
import errno
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipdefense as cd
import clipdefense.runs.decode as decode
import clipdefense.runs.run as module
from clipdefense.errors import UsageError
from clipdefense.runs.bank import bank_file, read_bank
from clipdefense.runs.build import Builder
from clipdefense.runs.config import RunConfig
from clipdefense.runs.results import read
from clipdefense.runs.run import Progress, run
from clipdefense.runs.store import Store, stores_in
from clipdefense.runs.units import Shard, cells
from kills import rows

MakeConfig = Callable[..., RunConfig]


def ask(folder: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(stores_in(folder)[0])) as connection:
        return connection.execute(query).fetchall()


def test_the_rows_are_those_of_the_evaluation(make_config: MakeConfig, folder: Path) -> None:
    noise = {"spec": "random-noise", "eot": 2, "options": {"eps": "0.2/255"}}
    config = make_config(attacks=["pgd", "apgd-ce,steps=3"], defenses=["none", noise], verdict_seeds=2)
    seen: list[Progress] = []
    assert run(config, folder, device="cpu", progress=seen.append) == 6
    assert seen[-1].done == seen[-1].total == 6
    builder = Builder(config, "cpu")
    for cell, result in zip(cells(config), read(folder).cells):
        subject = builder.subject(cell)
        parts = []
        dataset = builder.datasets["images"]
        for start in range(0, 40, 16):
            part = dataset.select(range(start, min(start + 16, 40)))
            x, y = part.tensors()
            parts.append(
                cd.evaluate(
                    subject.model,
                    x,
                    y,
                    subject.threat,
                    attacks=config.attacks,
                    defense=subject.defense,
                    verdict_seeds=2,
                    eot=cell.defense.eot,
                    ids=part.ids,
                    batch_size=8,
                )
            )
        whole = cd.evaluation.Evaluation.joined(parts)
        ours = result.evaluation
        assert ours.ids == whole.ids and ours.adaptive == whole.adaptive and ours.n == 40
        assert ours.clean.correct.tolist() == whole.clean.correct.tolist()
        assert 0.8 < ours.clean.accuracy < 1
        theirs = {(row.attack, row.attacked): row for row in whole.rows}
        assert len(theirs) == len(ours.rows) == (2 if subject.defense is None else 4)
        for row in ours.rows:
            same = theirs[row.attack, row.attacked]
            assert row.correct.tolist() == same.correct.tolist() and (row.kind, row.draws) == (same.kind, same.draws)
        assert ours.worst_case().accuracy < ours.clean.accuracy
        assert (result.margin < 0).sum() == (result.adversarial != result.labels).sum()
        assert result.unrepeatable == 0 and result.missing == 0


def test_the_model_is_asked_once_clean_and_once_attacked(
    make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, verdicts, gradients = Builder.model, [], []

    def counted(self: Builder, cell: Any) -> Any:
        model = real(self, cell)
        where = {True: gradients, False: verdicts}
        model.register_forward_hook(lambda _, inputs, output: where[torch.is_grad_enabled()].append(len(output)))
        return model

    monkeypatch.setattr(Builder, "model", counted)
    run(make_config(attacks=["pgd,early_stop=false"], exhibits=False), folder, device="cpu")
    (cell,) = read(folder).cells
    attacked = int((cell.clean[0] == cell.labels).sum())
    assert sum(gradients) == 3 * attacked
    # what comes to more is the attack's own, and the batch of 8 that is shown once more
    own = sum(verdicts) - 2 * 40 - 8
    builder = Builder(make_config(), "cpu")
    subject = builder.subject(cells(make_config())[0])
    x, y = builder.datasets["images"].tensors()
    right = torch.from_numpy(cell.clean[0] == cell.labels)
    verdicts.clear()
    cd.attacks.pgd(subject.model, x[right], y[right], subject.threat, early_stop=False, batch_size=8)
    assert own == sum(verdicts)


def test_a_model_that_does_not_repeat_itself_is_told(
    make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Builder.model

    def noisy(self: Builder, cell: Any) -> Any:
        model = real(self, cell)
        model.register_forward_hook(lambda _, inputs, output: output + 0.01 * torch.randn_like(output))
        return model

    monkeypatch.setattr(Builder, "model", noisy)
    run(make_config(attacks=["pgd", "apgd-ce,steps=2"]), folder, device="cpu")
    (cell,) = read(folder).cells
    assert 8 < cell.unrepeatable <= 2 * 8  # the first batch of each attack, all but always
    assert f"{cell.unrepeatable} verdicts CHANGED when the model was asked again" in (folder / "summary.md").read_text()


def test_summaries_in_three_forms(make_config: MakeConfig, folder: Path) -> None:
    run(make_config(), folder, device="cpu")
    result = json.loads((folder / "summary.json").read_text())["results"][0]
    row = result["rows"][1]
    assert (result["eps"], result["n"], row["attack"], row["worst_case"]) == ("4/255", 40, "pgd", False)
    assert row["interval_95"] == pytest.approx(list(cd.evaluation.wilson(row["accuracy"], 40)))
    assert result["fingerprint"]["weights_sha256"] and result["units"] == {"done": 3, "missing": 0}
    with (folder / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[1]["accuracy"]) == row["accuracy"] and lines[1]["attack"] == "pgd"
    assert f"{100 * row['accuracy']:.1f} [" in (folder / "summary.md").read_text()


def test_a_run_goes_on_where_it_stopped(
    make_config: MakeConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_adv=True)
    run(config, tmp_path / "whole", device="cpu")
    real, count = Store.commit, [0]

    def twice(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "commit", twice)
        run(config, folder, device="cpu")
    partial = read(folder).cells[0]
    assert (partial.units, partial.missing, len(partial.samples)) == (2, 1, 32)
    assert run(config, folder, device="cpu") == 1
    assert rows(folder) == rows(tmp_path / "whole")
    assert run(config, folder, device="cpu") == 0
    assert len(ask(folder, "SELECT * FROM sessions")) == 3


def test_one_process_at_a_time_and_one_division(make_config: MakeConfig, folder: Path) -> None:
    config = make_config()
    builder = Builder(config, "cpu")
    with (
        Store(folder, Shard(), builder.facts(), {}),
        pytest.raises(UsageError, match=r"another process \(number \d+ on"),
    ):
        run(config, folder, device="cpu")
    assert run(config, folder, device="cpu") == 3
    with pytest.raises(UsageError, match="a part of 1, and this process is to do 0/2; work would be done twice"):
        run(config, folder, shard=Shard(0, 2), device="cpu")


def test_a_corrupt_image_is_recorded_and_the_rest_goes_on(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    for name in ("cat", "dog", "fish"):
        (photos / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20), (number * 60, 90, 200)).save(photos / name / f"{number}.png")
    (photos / "dog" / "0.png").write_bytes(b"no image")
    (photos / "dog" / "1.png").write_bytes((photos / "dog" / "1.png").read_bytes()[:60])
    config = make_config(datasets=[{"spec": f"folder:{photos}", "size": 16}], unit=4)
    run(config, folder, device="cpu")
    (cell,) = read(folder).cells
    assert cell.samples.tolist() == [0, 1, 2, 5, 6, 7, 8] and cell.evaluation.n == 7
    assert [image for image, _ in cell.corrupt] == [3, 4] and "cannot be decoded" in cell.corrupt[0][1]
    assert len(json.loads((folder / "summary.json").read_text())["results"][0]["corrupt"]) == 2
    assert "2 images could not be decoded" in (folder / "summary.md").read_text()
    # a file that is gone is no damaged image: it may be back in a moment
    (photos / "fish" / "2.png").unlink()
    (photos / "fish" / "2.png").symlink_to(photos / "nowhere")
    with pytest.raises(UsageError, match="FileNotFoundError"):
        run(config, tmp_path / "other", device="cpu")


def test_images_of_several_shapes_need_a_size(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog", "fish")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20 + number)).save(tmp_path / "photos" / name / "0.png")
    with pytest.raises(UsageError, match=r"images of several shapes.*give it size="):
        run(make_config(datasets=[f"folder:{tmp_path / 'photos'}"]), folder, device="cpu")


def test_out_of_memory_halves_the_batch_and_goes_on(
    make_config: MakeConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, largest = Builder.model, [5]

    def small(self: Builder, cell: Any) -> Any:
        def refuse(module: Any, inputs: Any) -> None:
            if len(inputs[0]) > largest[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        model = real(self, cell)
        model.register_forward_pre_hook(refuse)
        return model

    run(make_config(batch_size=4), tmp_path / "small", device="cpu")
    monkeypatch.setattr(Builder, "model", small)
    with pytest.warns(UserWarning, match="out of memory: going on with 4 images a forward"):
        run(make_config(batch_size=16), folder, device="cpu")
    assert rows(folder) == rows(tmp_path / "small")
    assert ask(folder, "SELECT DISTINCT bucket FROM verdicts") == [(4,)]
    largest[0] = 0
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="memory does not suffice for one image at a time"):
        run(make_config(batch_size=2), tmp_path / "none", device="cpu")


def test_the_next_unit_is_decoded_during_the_attack_and_no_further(
    make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_decode, real_judge = decode._decode_one, module.judge_unit
    decoded: set[int] = set()
    arrived, in_time, ahead = threading.Condition(), [], []

    def counting(dataset: Any, index: int, row: Any) -> Any:
        result = real_decode(dataset, index, row)
        with arrived:
            decoded.add(index)
            arrived.notify_all()
        return result

    def waiting(cell: Any, subject: Any, batch: Any, *more: Any) -> Any:
        expected = min(int(batch.ids.max()) + 17, 40)
        with arrived:  # nothing but the threads can bring the following unit here
            in_time.append(arrived.wait_for(lambda: len(decoded) >= expected, timeout=30))
        ahead.append(len(decoded) - expected)
        return real_judge(cell, subject, batch, *more)

    monkeypatch.setattr(decode, "_decode_one", counting)
    monkeypatch.setattr(module, "judge_unit", waiting)
    run(make_config(), folder, device="cpu")
    assert in_time == [True] * 3 and ahead == [0] * 3


def test_a_full_disk_loses_nothing(make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(save_adv=True)
    real = Store.commit

    def small(store: Store, *arguments: Any) -> None:
        if store.done():
            pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
            store._connection.execute(f"PRAGMA max_page_count = {pages}")
        real(store, *arguments)

    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"database or disk is full.*is safe there"):
        patch.setattr(Store, "commit", small)
        patch.setattr(module, "judge_unit", _many_rows(module.judge_unit))
        run(config, folder, device="cpu")
    done = ask(folder, "SELECT count(*) FROM units")[0][0]
    assert done >= 1

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UsageError, match=r"No space left on device.*same command goes on"),
    ):
        patch.setattr("clipdefense.weights.save_file", full)
        run(config, folder, device="cpu")
    assert run(config, folder, device="cpu") == 3 - done
    assert read(folder).cells[0].missing == 0
    assert not list((folder / "adversarial").glob(".*"))


def _many_rows(judge: Callable[..., Any]) -> Callable[..., Any]:
    """So many rows that they cannot fit into the pages there are."""

    def padded(*arguments: Any) -> Any:
        unit, broken = judge(*arguments)
        if arguments[2].ids.min() > 0:
            extra = [(0, 0, 10_000 + number, 0, 0, 0, 0.0, None, 1) for number in range(3000)]
            unit.verdicts.extend(extra)
        return unit, broken

    return padded


def test_a_folder_that_cannot_be_written_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run folder .*file/run' cannot be written"):
        run(make_config(), tmp_path / "file" / "run", device="cpu")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "verdicts-0-of-1.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UsageError, match="holds a damaged file"):
        run(make_config(), tmp_path / "odd", device="cpu")


def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        Path(place).chmod(0o755)
        folder.chmod(0o555)
        read_end, write_end = os.pipe()
        child = os.fork()  # permissions do not bind root, so another user tries
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                Store(folder, Shard(), {}, {})
                message = "it could be written"
            except UsageError as error:
                message = str(error)
            os.write(write_end, message.encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
    assert "cannot be written" in message and "the same command goes on" in message


def test_the_bank_holds_what_broke_each_image(make_config: MakeConfig, folder: Path) -> None:
    config = make_config(save_adv=True)
    run(config, folder, device="cpu")
    builder = Builder(config, "cpu")
    dataset, subject = builder.datasets["images"], builder.subject(cells(config)[0])
    kept: list[int] = []
    for unit in range(3):
        for ids, delta in read_bank(bank_file(folder, 0, unit)).values():
            x, y = dataset.tensors(ids)
            assert delta.dtype == torch.float32 and 0 < delta.abs().max() <= 4 / 255 + 1e-6
            with torch.no_grad():
                assert (subject.model(x + delta).argmax(dim=1) != y).all()
            kept += ids.tolist()
    (cell,) = read(folder).cells
    fallen = (cell.adversarial[0, 0] != cell.labels) & (cell.clean[0] == cell.labels)
    assert sorted(kept) == cell.samples[fallen].tolist() and len(kept) > 3
    # an image that was wrong from the start is not attacked, one that stands has all three steps
    steps = dict(ask(folder, "SELECT sample, steps FROM verdicts"))
    for index, sample in enumerate(cell.samples.tolist()):
        right, stands = cell.clean[0, index] == cell.labels[index], sample not in kept
        assert steps[sample] in (range(1, 4) if right and not stands else (3,) if right else (0,)), sample
    assert len({steps[sample] for sample in kept}) > 1


def test_names_and_options_are_checked_before_anything_runs(make_config: MakeConfig, folder: Path) -> None:
    for change, message in (
        ({"defenses": ["tecoa"]}, "'tecoa' is not a test-time defence; train with it"),
        ({"defenses": [{"spec": "random-noise", "options": {"esp": 1}}]}, "option of 'random-noise' 'esp' is unknown"),
        ({"defenses": ["nois"]}, "defence 'nois' is unknown"),
        ({"models": ["nothing"]}, "model 'nothing' is not of the form"),
        ({"datasets": [{"spec": "arrays:nowhere.npz"}]}, "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            run(make_config(**change), folder, device="cpu")
    with pytest.raises(UsageError, match="device 'tpu' cannot be used here"):
        run(make_config(), folder, device="tpu")
    assert not folder.exists()
