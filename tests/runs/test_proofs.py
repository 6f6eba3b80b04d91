"""Proofs as people meet them: read-only archives, unfinished runs, and what the terminal says."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Callable
from contextlib import closing as closing_connection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from clipdefense.cli import application
from clipdefense.errors import UsageError
from clipdefense.runs.bank import bank_file
from clipdefense.runs.build import Builder
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.merge import merge
from clipdefense.runs.run import run
from clipdefense.runs.show import SHOWN, proofs
from clipdefense.runs.units import Shard
from clipdefense.runs.verify import Proof, closing, verify
from kills import forked, make_files

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def saved(make_config: MakeConfig, folder: Path) -> Path:
    run(make_config(save_adv=True, exhibits=False), folder, device="cpu")
    return folder


def shown(found: list[Proof], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    proofs(console, found)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_an_archive_that_cannot_be_written_is_proved(tables: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        model, data = make_files(Path(place), 40)
        datasets = [{"spec": data, "name": "images"}]
        config = read_config({**tables, "models": [model], "datasets": datasets, "save_adv": True, "exhibits": False})
        folder = Path(place) / "run"
        run(config, folder, device="cpu")
        for path in (*Path(place).rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def task() -> dict[str, Any]:
            if os.geteuid() == 0:  # permissions do not bind root, so another user tries
                os.setuid(65534)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (proof,) = verify(folder, device="cpu")
            return {"holds": proof.holds, "claims": proof.claims, "said": [str(warning.message) for warning in caught]}

        ended = forked(task).value
        folder.chmod(0o755)
        assert not (folder / "verify.json").exists()
    assert ended["holds"] and ended["claims"] > 5
    (said,) = ended["said"]
    assert said == f"'{folder}/verify.json' was not written (Permission denied); --out FILE writes it elsewhere."


def test_the_command_shows_what_it_cannot_write(saved: Path, tmp_path: Path) -> None:
    (saved / "verify.json").mkdir()  # a file cannot take its place, whoever writes
    arguments = ["verify", str(saved), "--device", "cpu", "--quiet"]
    with pytest.warns(UserWarning, match=r"verify.json' was not written \(Is a directory\); --out FILE writes it"):
        result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0 and "Not robust, proved again" in result.stdout
    assert " claims: " in result.stdout
    out = tmp_path / "new" / "proofs.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert CliRunner().invoke(application(), [*arguments, "--out", str(out)]).exit_code == 0
    content = json.loads(out.read_text())
    assert content["missing_units"] == 0 and content["proofs"][0]["proved"] > 0
    bank_file(saved, 0, 0).write_bytes(bank_file(saved, 0, 1).read_bytes())
    with pytest.warns(UserWarning, match="was not written"):
        assert CliRunner().invoke(application(), arguments).exit_code == 1  # by the proofs


def test_out_is_checked_before_the_work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    loaded: list[object] = []
    monkeypatch.setattr(Builder, "model", lambda *arguments: loaded.append(arguments))
    result = CliRunner().invoke(application(), ["verify", str(saved), "--out", str(tmp_path / "file" / "x.json")])
    assert isinstance(result.exception, UsageError) and "cannot be written" in str(result.exception) and not loaded


def test_an_unfinished_run_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(save_adv=True, exhibits=False, threats=[{"eps": "2/255"}, {"eps": "4/255"}])
    run(config, tmp_path / "parts", shard=Shard(0, 6), device="cpu")
    merge([tmp_path / "parts"], tmp_path / "run")
    # five work units are missing, three of them of a cell without a verdict
    with pytest.warns(UserWarning, match="is NOT FINISHED: 5 work units are missing; what is there is proved"):
        (proof,) = verify(tmp_path / "run", device="cpu")
    assert proof.holds and proof.claims > 0
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["missing_units"] == 5


def test_a_run_without_verdicts_proves_nothing(make_config: MakeConfig, folder: Path) -> None:
    run(make_config(save_adv=True, exhibits=False), folder, device="cpu")
    with closing_connection(sqlite3.connect(folder / "verdicts-0-of-1.sqlite")) as connection, connection:
        for table in ("units", "verdicts", "attacks"):  # as a run leaves it that was ended in its first work unit
            connection.execute(f"DELETE FROM {table}")
    with pytest.raises(UsageError, match="has no verdicts yet; let it finish a work unit first"):
        verify(folder, device="cpu")


def test_a_missing_file_is_named_before_the_work(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank_file(saved, 0, 2).unlink()
    loaded: list[object] = []
    monkeypatch.setattr(Builder, "model", lambda *arguments: loaded.append(arguments))
    with pytest.raises(UsageError, match=r"cell-0-unit-2.safetensors' cannot be read \(there is no such file\); what"):
        verify(saved, device="cpu")
    assert not loaded


@pytest.mark.parametrize("seeds", [0, 1.5, True])
def test_seeds_and_batches_are_whole_numbers(saved: Path, seeds: Any) -> None:
    with pytest.raises(UsageError, match=f"^seeds is {seeds}; a whole number of at least 1 is expected"):
        verify(saved, seeds=seeds)
    with pytest.raises(UsageError, match=f"^batch_size is {seeds}; a whole number of at least 1 is expected"):
        verify(saved, batch_size=seeds)


def test_datasets_are_hashed_once(
    make_config: MakeConfig, folder: Path, specs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [{"spec": specs[1], "name": "one"}, {"spec": specs[1], "name": "two", "n": 12}]
    run(make_config(save_adv=True, exhibits=False, datasets=datasets), folder, device="cpu")
    real, calls = Builder.facts, []

    def counted(self: Builder) -> Any:
        calls.append(self)
        return real(self)

    monkeypatch.setattr(Builder, "facts", counted)
    verify(folder, device="cpu")
    assert len(calls) == 1


def test_the_last_line_adds_up(saved: Path) -> None:
    (proof,) = verify(saved, device="cpu")
    n = proof.claims
    (line,) = closing([proof])
    assert line == f"{n} claims: {proof.proved} proved again, {proof.near} within 1e-3, 0 failed, 0 over budget"
    assert shown([proof]).rstrip().endswith(line)
    two = [Proof("a", "pgd", "it", 10, 5, 2, 1, 2), Proof("b", "pgd", "it", 3, 3)]
    assert closing(two) == ["13 claims: 8 proved again, 2 within 1e-3, 1 failed, 2 over budget"]
    assert closing([]) == ["0 claims: 0 proved again, 0 within 1e-3, 0 failed, 0 over budget"]


def test_claims_of_a_randomised_defence_add_up(make_config: MakeConfig, folder: Path) -> None:
    noise = {"spec": "random-noise", "eot": 1, "options": {"eps": "4/255"}}
    run(make_config(save_adv=True, defenses=[noise], verdict_seeds=3, exhibits=False), folder, device="cpu")
    file = bank_file(folder, 0, 0)
    tensors = load_file(file)
    tensors["0.delta"] *= 3  # every draw that an image was broken on is a claim, and none holds
    save_file(tensors, file)
    for seeds in (None, 2):
        found = verify(folder, device="cpu", seeds=seeds)
        assert found[0].over_budget > 0 and not found[0].holds
        for proof in found:
            assert proof.claims == sum(proof.counts[1:])


def test_the_share_and_its_interval_are_whole_at_80_columns() -> None:
    name = "a-model-with-a-name | random-noise | a-data-set:test | linf 4/255"
    proof = Proof(name, "apgd-t,steps=100,targets=9", "adaptive view eot", 355228, 355200, 20, 8, 0, 100, 6, 600, 555)
    text = shown([proof])
    low, high = (100 * value for value in proof.interval or (0, 0))
    assert f"92.5 % [{low:.1f}, {high:.1f}] of 6 draws of its 100 images" in text
    lines = [line for line in text.splitlines() if "│" in line]
    assert all(any(number in line for line in lines) for number in ("355228", "355200", " 20 ", " 8 "))
    assert max(map(len, lines)) <= 80


def test_of_many_only_what_does_not_hold_in_full(saved: Path) -> None:
    (one,) = verify(saved, device="cpu")
    attacks = ("pgd", "apgd-ce", "square")
    many = [Proof(f"cell {cell}", attack, "it", 5, 5) for cell in range(SHOWN // 2) for attack in attacks]
    many[4] = Proof("cell 1", "apgd-ce", "it", 5, 4, 1)
    many[8] = Proof("cell 2", "square", "it", 5, 4, 0, 1)
    text = shown(many)
    rows = [line for line in text.splitlines() if any(attack in line for attack in attacks)]
    assert len(rows) == 2 and "apgd-ce" in rows[0] and "square" in rows[1]
    summary = [line for line in text.splitlines() if line.startswith("│ cell")]
    assert len(summary) == SHOWN // 2 and " ".join(summary[1].split()) == "│ cell 1 │ 15 │ 14 │ 1 │ 0 │ 0 │"
    assert f"{5 * len(many)} claims: {5 * len(many) - 2} proved again, 1 within 1e-3, 1 failed" in text
    assert "pgd" in shown([one])  # of few, everything
