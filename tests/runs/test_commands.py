"""The subcommands as a user meets them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipdefense.cli import main
from clipdefense.runs.bank import bank_file
from clipdefense.runs.store import Store

Outcome = tuple[int, str, str]


@pytest.fixture
def clipdefense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The entry point: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "250")
    show = warnings.showwarning

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["clipdefense", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            main()
        text = capsys.readouterr()
        return int(str(leave.value.code)), text.out, text.err

    yield call
    warnings.showwarning = show


def test_run_verify_compare_and_merge(
    clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'models = ["{specs[0]}"]\ndatasets = ["{specs[1]}"]\nattacks = ["pgd"]\nunit = 16\n'
        '[[threats]]\neps = "4/255"\nsteps = 3\n'
    )
    common = ("evaluate", toml, "--device", "cpu", "--quiet", "--save-adv")
    code, out, _ = clipdefense(*common, "--run", tmp_path / "a")
    assert code == 0 and "pgd" in out and "3 work units now" in out
    assert {"summary.json", "summary.md", "summary.csv", "report.html"} <= {
        file.name for file in (tmp_path / "a").iterdir()
    }
    code, out, _ = clipdefense("verify", tmp_path / "a", "--device", "cpu", "--quiet")
    assert code == 0 and "Not robust, proved again" in out
    for index in range(2):
        code, out, _ = clipdefense(*common, "--shard", f"{index}/2", "--run", tmp_path / "parts")
        assert code == 0 and "clipdefense merge" in out
    code, out, _ = clipdefense("merge", tmp_path / "parts", "--out", tmp_path / "merged")
    assert code == 0 and "pgd" in out
    result = tmp_path / "compare.json"
    code, out, _ = clipdefense(
        "compare", tmp_path / "a", tmp_path / "merged", "--transfer", "--device", "cpu", "--out", result
    )
    assert code == 0 and "McNemar p" in out and "A's perturbations break 0 of 0 images" in out
    changes = json.loads(result.read_text())["changes"]
    assert all(change["only_a"] == change["only_b"] == 0 and change["p_value"] == 1 for change in changes)
    code, out, _ = clipdefense("report", tmp_path / "a", "--html", tmp_path / "again.html")
    assert code == 0 and "wrote" in out
    assert (tmp_path / "again.html").read_text() == (tmp_path / "a" / "report.html").read_text()
    bank_file(tmp_path / "merged", 0, 0).write_bytes(bank_file(tmp_path / "a", 0, 1).read_bytes())
    code, _, err = clipdefense("verify", tmp_path / "merged", "--device", "cpu", "--quiet")
    assert code == 1 and err == ""


def test_flags_alone(clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path) -> None:
    flags = ("--model", specs[0], "--data", specs[1], "--n", 9, "--attack", "pgd,steps=1", "--eps", "1/255")
    noise = ("--defense", "random-noise", "--option", "eps=2/255", "--view", "eot", "--eot", 1, "--verdict-seeds", 2)
    code, _, err = clipdefense("evaluate", *flags, *noise, "--device", "cpu", "--quiet", "--run", tmp_path / "run")
    assert (code, err) == (0, "")
    (result,) = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert result["n"] == 9 and result["fingerprint"]["defense"]["eps"] == pytest.approx(2 / 255)
    assert {row["attacked"] for row in result["rows"]} >= {"transfer from the undefended model", "adaptive view eot"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--run", "x"], "error: Missing option '--model' / '-m', or a TOML file"),
        (["evaluate", "nowhere.toml", "--run", "x"], "error: run file 'nowhere.toml' does not exist"),
        (["evaluate", "-m", "a:b"], "error: the run: key 'datasets' is missing; it has no default: give it in a TOML"),
        (["evaluate", "-m", "a:b", "--n", "5"], "error: --n is for the data set of --data"),
        (
            ["evaluate", "-m", "a:b", "-d", "c:d", "--defense", "none", "--defense", "ttc", "--eot", "5"],
            "error: --option, --view and --eot are for the one defence of --defense, and there are 2",
        ),
        (["evaluate", "-m", "a:b", "-d", "c:d", "--run", "x", "--shard", "4/4"], "error: shard is 4/4"),
        (["evaluate", "-m", "a:b", "-d", "c:d", "--shard", "0/4"], "error: --shard is for a run that is kept"),
        (["evaluate", "-m", "a:b", "-d", "c:d", "--save-adv"], "error: --save-adv is for a run that is kept"),
        (
            ["evaluate", "-m", "a:b", "-d", "c:d", "--run", "x", "--out", "y.json"],
            "error: --out is for one combination",
        ),
        (
            ["evaluate", "-m", "a:b", "-d", "c:d", "--eps", "1/255", "--eps", "2/255", "--out", "y.json"],
            "error: --out is for one combination without --run (2 here); --run DIR keeps them all",
        ),
        (["evaluate", "-m", "a:b", "-d", "c:d"], "error: model 'a' is unknown"),
        (["evaluate", "-m", "demo:digits", "--protocol", "ttc"], "error: the run: protocol 'ttc' is unknown; did you"),
        (["report", "x"], "error: 'x' holds no run"),
        (["verify", "x"], "error: 'x' holds no run"),
        (["compare", "x", "y"], "error: 'x' holds no run"),
        (["merge", "x", "--out", "y"], "error: 'x' holds no shard"),
    ],
)
def test_a_mistake_is_one_line(
    clipdefense: Callable[..., Outcome],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = clipdefense(*arguments)
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_begun_run_goes_on_by_its_folder_alone(
    clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'models = [{{spec = "{specs[0]}", name = "tiny"}}]\ndatasets = ["{specs[1]}"]\nattacks = ["pgd"]\nunit = 16\n'
        'save_adv = true\n[[threats]]\neps = "4/255"\nsteps = 3\n'
    )
    real, units = Store.commit, [0]

    def once(*arguments: object) -> None:
        units[0] += 1
        if units[0] == 2:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", once)
        code, _, err = clipdefense("evaluate", toml, "--device", "cpu", "--run", folder)
    assert code == 130 and f"every finished work unit is safe; clipdefense evaluate --run {folder} goes on" in err
    assert "[0/3] " in err and "[1/3] " in err
    code, out, err = clipdefense("evaluate", "--device", "cpu", "--run", folder)
    assert code == 0 and "2 work units now" in out and "[3/3] " in err
    assert clipdefense("verify", folder, "--device", "cpu", "--quiet")[0] == 0
    code, out, err = clipdefense("evaluate", "--device", "cpu", "--run", folder, "--quiet", "--seed", 3)
    assert code == 2 and err.startswith("error: seed is 3, but the run in")


def test_a_build_can_fail_on_the_worst_case(
    clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path
) -> None:
    flags = ("evaluate", "-m", specs[0], "-d", specs[1], "-a", "pgd,steps=1", "--eps", "0.1/255", "--device", "cpu")
    floor = ("--quiet", "--run", tmp_path / "run", "--fail-under")
    code, out, err = clipdefense(*flags, *floor, 0)
    assert (code, err) == (0, "") and "pgd" in out
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["results"][0]["rows"][-1]["accuracy"]
    assert 0.5 < accuracy < 1
    assert clipdefense(*flags, *floor, 100 * accuracy - 1)[0] == 0
    code, _, err = clipdefense(*flags, *floor, 95)
    assert code == 1 and f"{100 * accuracy:.1f} % stay right in the worst case, under 95 %" in err
    code, _, err = clipdefense(*flags, *floor, 95, "--shard", "0/2")
    assert code == 2 and "--fail-under is for a run in one piece" in err


PART = r"the part 1/2 of (a run|one)"


@pytest.mark.parametrize(
    ("launched", "arguments", "message", "then"),
    [
        (True, [], "RANK and WORLD_SIZE, which torchrun and accelerate launch set", "name one folder for all"),
        (True, ["--out", "x.json"], "RANK and WORLD_SIZE, which", "a part has to be kept"),
        (True, ["--run", "r", "--out", "x.json"], "--out is for a run in one piece", "then read MERGED/summary.json."),
        (True, ["--run", "r", "--html", "x.html"], "--html is", "then clipdefense report MERGED --html PAGE."),
        (True, ["--run", "r", "--audit"], "--audit is", "then clipdefense evaluate --run MERGED --audit."),
        (True, ["--run", "r", "--fail-under", 0], "--fail-under is for", "evaluate --run MERGED --fail-under."),
        (
            False,
            ["--run", "r", "--shard", "1/2", "--html", "x.html"],
            "--html is for a run in one piece",
            "merge first",
        ),
        (False, ["--run", "r", "--shard", "1/2", "--out", "x.json"], "--out is for a run in one piece", "merge first"),
        (False, ["--run", "r", "--shard", "1/2", "--audit"], "--audit is for a run in one piece", "merge first"),
    ],
)
def test_what_needs_the_whole_run_is_refused_of_a_part_before_any_work(
    clipdefense: Callable[..., Outcome],
    launched: bool,
    arguments: list[str],
    message: str,
    then: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or it would be computed and lost: the model's name is unknown, so any work would say so instead."""
    monkeypatch.chdir(tmp_path)
    if launched:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = clipdefense("evaluate", "-m", "a:b", "-d", "c:d", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and then in err and err.count("\n") == 1
    assert re.search(PART, err) and not list(tmp_path.iterdir())


def test_a_launched_process_keeps_its_part(
    clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("-m", specs[0], "-d", specs[1], "--n", 9, "-a", "pgd,steps=1", "--device", "cpu", "--quiet")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = clipdefense("evaluate", *flags, "--run", tmp_path / "run")
    assert (code, err) == (0, "") and out.startswith("1 work unit of this shard now; when all are done: clipdefense me")
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, out, err = clipdefense("evaluate", *flags, "--out", tmp_path / "one.json", "--fail-under", 0)
    assert (code, err) == (0, "") and (tmp_path / "one.json").is_file()  # one process is the whole run


def test_a_floor_is_not_held_by_transfer_alone(
    clipdefense: Callable[..., Outcome], specs: tuple[str, str], tmp_path: Path
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'models = [{{spec = "{specs[0]}", name = "tiny"}}]\ndatasets = ["{specs[1]}"]\n'
        'attacks = ["pgd"]\nverdict_seeds = 1\n[[threats]]\neps = "0.1/255"\nsteps = 1\n[[defenses]]\n'
        'spec = "random-noise"\nviews = []\noptions = {eps = "0.1/255"}\n'
    )
    run = ("evaluate", toml, "--device", "cpu", "--quiet", "--run", tmp_path / "run")
    code, _, err = clipdefense(*run, "--fail-under", 0)
    stays = "stay right in the worst case (transfer only)"
    assert code == 1 and f"{stays}; no attacker who knows the defence was tried, so no floor is held\n" in err
    code, _, err = clipdefense(*run, "--fail-under", 100)
    assert code == 1 and err.endswith(f"{stays}, under 100 %\n")
    assert clipdefense(*run)[0] == 0
