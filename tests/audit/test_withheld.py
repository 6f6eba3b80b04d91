"""A robust accuracy whose audit is INVALID is in no output of an evaluation."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks import AttackWarning
from clipdefense.audit import Verdict
from clipdefense.cli import main
from clipdefense.errors import UsageError
from clipdefense.evaluation import Evaluation, report

THREAT = cd.ThreatModel("linf", 8 / 255, steps=2)


class Rounded(nn.Module):
    """A linear classifier of coarse pixels, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * 16).round().flatten(1) / 16)


@pytest.fixture(scope="module")
def judged() -> Evaluation:
    """An evaluation whose attack gets no gradient, and what the audit makes of it."""
    model, x = Rounded().eval(), torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    with pytest.warns(AttackWarning, match="exactly zero"):
        result = cd.evaluate(model, x, y, THREAT, attacks=["pgd", "square,queries=3"], name="rounded")
    found = cd.audit(model, x, y, THREAT)
    assert found.verdict is Verdict.INVALID and result.worst_case().accuracy > 0.5
    return result.audited(found)


def numbers(entry: Any) -> list[Any]:
    """Every accuracy, interval and verdict in a JSON document."""
    if isinstance(entry, dict):
        own = [value for key, value in entry.items() if key in ("accuracy", "interval_95", "correct")]
        return own + [value for part in entry.values() for value in numbers(part)]
    return [value for part in entry for value in numbers(part)] if isinstance(entry, list) else []


def test_json_has_the_clean_accuracy_alone(judged: Evaluation) -> None:
    content = json.loads(json.dumps(judged.to_dict()))
    assert content["withheld"] == judged.withheld and "input gradients (1)" in judged.withheld
    clean = content.pop("clean")
    assert clean["accuracy"] == 1.0 and clean["correct"] == ["1" * 12]
    assert len(content["attacks"]) == 2
    found = numbers(content)
    assert found and all(value is None for value in found)


def test_table_and_page_say_withheld_and_why(judged: Evaluation, tmp_path: Path) -> None:
    text = io.StringIO()
    Console(file=text, width=4000).print(report.table([judged]))
    report.write_html(tmp_path / "page.html", report.Page("title", [], [judged]))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in (text.getvalue(), page):
        assert shown.count(report.WITHHELD) == 3  # two attacks and the worst case
        assert shown.count(report.percent(judged.clean)) == 1
        assert "no robust accuracy is given: input gradients (1)" in shown


def test_joined_parts_stay_withheld(judged: Evaluation) -> None:
    """One part's reason holds for the whole."""
    other = replace(judged, withheld="", ids=tuple(range(100, 112)))
    assert Evaluation.joined([other, judged]).withheld == judged.withheld
    assert Evaluation.joined([judged, replace(judged, ids=other.ids)]).withheld == judged.withheld


def test_an_audit_of_another_eps_says_nothing(judged: Evaluation) -> None:
    model, x = Rounded().eval(), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    other = cd.audit(model, x, model(x).argmax(dim=1), cd.ThreatModel("linf", 4 / 255))
    with pytest.raises(UsageError, match=r"the audit is of .*; audit at the same eps"):
        judged.audited(other)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``call("audit", ...)``: a command on a tiny CLIP of two classes and eight images: (code, stdout, stderr)."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.model.CLIP(**config)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), tmp_path / "tiny.safetensors")
    x = np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.arange(8) % 2, classes=np.array(["cat", "dog"]))
    model = f"open_clip:{tmp_path / 'tiny.json'}@{tmp_path / 'tiny.safetensors'}"
    common = ["-m", model, "-d", f"arrays:{tmp_path / 'few.npz'}", "--device", "cpu", "--quiet"]

    def run(command: str, *extra: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipdefense", command, *common, *extra])
        monkeypatch.setenv("COLUMNS", "4000")
        with pytest.raises(SystemExit) as leave:
            main()
        return int(str(leave.value.code or 0)), *capsys.readouterr()

    return run


def test_evaluate_with_audit_on_the_command_line(call: Call, tmp_path: Path) -> None:
    out, html = tmp_path / "result.json", tmp_path / "page.html"
    over_half_the_range = ("--eps", "200/255")
    attack = ("-a", "pgd,steps=1", "--audit", "--out", str(out), "--html", str(html))
    code, shown, complaint = call("evaluate", *over_half_the_range, *attack)
    assert code == 0 and complaint == ""
    assert "threat model (19)" in json.loads(out.read_text())["withheld"]
    for text in (shown, html.read_text(encoding="utf-8")):
        assert report.WITHHELD in text and "threat model (19)" in text


def test_a_build_fails_on_a_real_audit(call: Call, tmp_path: Path) -> None:
    """Half of the two classes' labels are wrong, so that no accuracy is near 100 %."""
    out = tmp_path / "audit.json"
    code, shown, complaint = call("audit", "--eps", "4/255", "--fail-under", "adaptive=90", "--out", str(out))
    assert complaint == ""
    found = json.loads(out.read_text())
    assert code == 1 and "under 90 %" in shown and found["verdict"] != "INVALID" and found["adaptive"]["accuracy"] < 0.9
    assert call("audit", "--eps", "4/255", "--fail-under", "adaptive=0")[0] == 0
    code, shown, _ = call("audit", "--eps", "200/255")
    assert code == 1 and "adaptive: withheld" in shown
