"""``clipdefense audit``: what it prints, writes and returns to a build."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdefense import cli
from clipdefense.audit import Accuracy, Audit
from clipdefense.audit.report import found
from clipdefense.cli import main
from clipdefense.threat import ThreatModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The entry point with a model and data set that are not looked at: (code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "_load", lambda *_: ("the model", Images()))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipdefense", "audit", "-m", "a:b", "-d", "c:d", *arguments])
        with pytest.raises(SystemExit) as leave:
            main()
        text = capsys.readouterr()
        return int(str(leave.value.code)), text.out, text.err

    return call


class Images:
    """Data that nobody reads."""

    def __len__(self) -> int:
        return 8

    def sample(self, n: int, seed: int) -> Images:
        assert n == 8  # there are no more
        return self

    def tensors(self) -> tuple[Any, ...]:
        return torch.zeros(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)


def outcome(invalid: bool, adaptive: float | None = 0.5) -> Callable[..., Audit]:
    """A stand-in for the audit itself, which has tests of its own."""

    def audit(*_: Any, **options: Any) -> Audit:
        options["progress"]("check 1 of 20: determinism")
        findings = (found(1, {"unusable_gradients": 1.0 if invalid else 0.0}, "Seen."),)
        given = None if adaptive is None or invalid else Accuracy(adaptive, 64, "all")
        withheld = "input gradients (1): Seen." if invalid else ""
        return Audit("it", ThreatModel("linf", 1 / 255), findings, Accuracy(0.9, 64, "no"), None, given, withheld, {})

    return audit


@pytest.mark.parametrize(
    ("invalid", "adaptive", "floors", "code"),
    [
        (False, 0.5, [], 0),
        (False, 0.5, ["adaptive=30"], 0),
        (False, 0.2, ["adaptive=30"], 1),
        (False, None, ["adaptive=30"], 1),
        (False, 0.5, ["adaptive=30", "transfer=10"], 1),
        (True, 0.5, [], 1),
        (True, 0.5, ["adaptive=0"], 1),
    ],
)
def test_exit_codes(
    invalid: bool,
    adaptive: float | None,
    floors: list[str],
    code: int,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys.modules["clipdefense.audit"], "audit", outcome(invalid, adaptive))
    out = tmp_path / "audit.json"
    arguments = [part for floor in floors for part in ("--fail-under", floor)]
    got, shown, _ = run(*arguments, "--quiet", "--out", str(out))
    assert got == code
    content = json.loads(out.read_text())
    assert bool(content["missed"]) == (code == 1 and not (invalid and not floors))
    assert ("adaptive: withheld" in shown) == invalid and (content["adaptive"] is None) == (invalid or adaptive is None)
    if not invalid:
        assert ("transfer only" in shown) == (adaptive is None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-under", "adaptive"], "--fail-under is 'adaptive'"),
        (["--fail-under", "robust=3"], "--fail-under 'robust' is unknown"),
        (["--option", "steps=2"], "--option is for a defence"),
        (["--eps", "x"], "eps 'x' is not a number"),
        (["--n", "65"], "--n"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, run: Run) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err
