"""Adaptive evaluation: mistakes, the fingerprint, the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.adaptive import Adaptive
from clipdefense.cli import main
from clipdefense.evaluation.results import Evaluation

from .helpers import THREAT, Shuffle


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attacks": ["pgd,steps=0"]}, r"'pgd,steps=0' has steps = 0: it would change no image"),
            ({"attacks": ["apgd-ce,steps=0"]}, r"'apgd-ce,steps=0' has steps = 0"),
            ({"attacks": ["square,queries=0"]}, r"'square,queries=0' has queries = 0"),
            ({"threat": cd.ThreatModel("linf", 2 / 255, steps=0)}, r"'pgd' has steps = 0"),
            ({"defense": Shuffle(), "verdict_seeds": 4}, r"verdict_seeds is 4; .* over at least 5"),
            ({"defense": Shuffle(), "attacks": ["square,queries=3"]}, "none of which follows a view's gradient"),
            ({"adaptive": Adaptive(black_box="sqare")}, "attack 'sqare' is unknown; did you mean 'square'"),
        ],
    )
    def test_stop_before_any_attack(self, change: dict[str, Any], message: str, run: Callable[..., Evaluation]) -> None:
        with pytest.raises(cd.UsageError, match=message):
            run(**change)

    def test_an_attack_with_steps_of_its_own_needs_none_of_the_threat_model(
        self, run: Callable[..., Evaluation]
    ) -> None:
        none = cd.ThreatModel("linf", 2 / 255, steps=0)
        assert run(attacks=["apgd-ce,steps=2", "square,queries=2"], threat=none, adaptive=False).rows[0].accuracy < 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eot_draws": ()}, r"eot_draws is \(\); rising whole numbers from 1 on"),
            ({"eot_draws": (4, 1)}, "rising whole numbers"),
            ({"eot_draws": (0, 1)}, "rising whole numbers"),
            ({"black_box_draws": 0}, "black_box_draws is 0; a whole number of at least 1"),
            ({"verdict_seeds": 2.5}, r"verdict_seeds is 2\.5"),
        ],
    )
    def test_of_the_suite(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(cd.UsageError, match=message):
            Adaptive(**options)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.arange(6).float(), r"ids has dtype torch.float32; a tensor of whole numbers, one an image"),
            (torch.tensor([0, 1, 2, 7, 4, 7]), "ids contains 7 more than once; ids name the images"),
            (torch.arange(5), r"ids has shape \(5,\); one whole number an image, \(6,\)"),
            (torch.arange(6) - 2, "ids contains -2; whole numbers of at least 0"),
            ([0, 1, 2, 3, 4, 5], "ids has type list"),
        ],
    )
    def test_of_ids(self, ids: Any, message: str, tiny_model: nn.Module, images: Tensor, labels: Tensor) -> None:
        with pytest.raises(cd.UsageError, match=message):
            cd.evaluate(tiny_model, images[:6], labels[:6], THREAT, ids=ids)
        with pytest.raises(cd.UsageError, match=message):
            cd.attacks.pgd(tiny_model, images[:6], labels[:6], THREAT, ids=ids)


def test_the_fingerprint_holds_the_whole_budget(run: Callable[..., Evaluation]) -> None:
    facts = run(defense=Shuffle()).fingerprint
    assert json.loads(json.dumps(facts))["threat"] == {
        "norm": "linf",
        "eps": 2 / 255,
        "step_size": None,
        "steps": 3,
        "restarts": 1,
        "alpha": THREAT.alpha,
    }
    assert facts["adaptive"]["eot_draws"] == (1, 3) and facts["adaptive"]["black_box"] == "square,queries=6"
    assert run(adaptive=False).fingerprint["adaptive"] is None


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    save_file(open_clip.model.CLIP(**config).state_dict(), tmp_path / "tiny.safetensors")
    x = np.random.default_rng(0).random((4, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.arange(4) % 2, classes=np.array(["cat", "dog"]))
    model = f"open_clip:{tmp_path / 'tiny.json'}@{tmp_path / 'tiny.safetensors'}"
    command = ["evaluate", "-m", model, "-d", f"arrays:{tmp_path / 'few.npz'}", "--device", "cpu", "--defense", "tte"]
    command += ["--adaptive", "-a", "pgd,steps=1", "-a", "square,queries=2", "--eot", "1", "-o", "crops=1"]

    def call(*extra: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipdefense", *command, *extra])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as leave:
            main()
        return int(str(leave.value.code)), *capsys.readouterr()

    code, out, err = call("--out", str(tmp_path / "result.json"))
    assert code == 0, err
    assert "worst case, transfer" in out and "worst case, adaptive" in out
    assert "tte: about " in err and "on defended model, its own gradient, 16 EOT draws" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert [entry["draws"] for entry in result["eot_convergence"]] == [1, 4, 16]
    assert {row["attack"] for row in result["attacks"]} == {"pgd,steps=1", "square,queries=2", "pgd,objective=drift"}
    assert call("--quiet")[2] == ""
    code, out, err = call("--verdict-seeds", "2")
    assert code == 2 and out == "" and err.startswith("error: ") and "at least 5" in err
