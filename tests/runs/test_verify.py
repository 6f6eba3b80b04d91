"""Verification: claims that hold are proved again, claims that do not are found, and nothing else is proved instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clipdefense.runs.verify as module
from clipdefense.errors import UsageError
from clipdefense.evaluation import wilson
from clipdefense.evaluation.answers import Answers
from clipdefense.runs.bank import bank_file
from clipdefense.runs.build import Builder
from clipdefense.runs.config import RunConfig
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.verify import verify

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def saved(make_config: MakeConfig, folder: Path) -> Path:
    run(make_config(save_adv=True), folder, device="cpu")
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_claim_is_proved_again_on_other_threads_and_batches(saved: Path) -> None:
    (proof,) = verify(saved, device="cpu", batch_size=13)
    (cell,) = read(saved).cells
    wrong = (cell.adversarial[0, 0] != cell.labels).sum()
    assert proof.claims == wrong > 5 and proof.proved + proof.near == wrong
    assert proof.holds and proof.failures == [] and proof.images == wrong
    assert json.loads((saved / "verify.json").read_text())["proofs"][0]["proved"] == proof.proved


def test_one_forward_an_image(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, passed = Builder.model, []

    def counted(self: Builder, cell: Any) -> Any:
        model = real(self, cell)
        model.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))
        return model

    monkeypatch.setattr(Builder, "model", counted)
    (proof,) = verify(saved, device="cpu")
    assert sum(passed) == proof.images


def test_a_claim_without_a_proof_is_found(saved: Path) -> None:
    file = bank_file(saved, 0, 1)
    tensors = load_file(file)
    ids = tensors["0.ids"].tolist()
    tensors["0.delta"][0] = 0  # breaks nothing
    tensors["0.delta"][1] *= 3  # breaks the image, and the budget
    save_file(tensors, file)
    (proof,) = verify(saved, device="cpu")
    assert not proof.holds and (proof.failed, proof.over_budget) == (1, 1)
    assert proof.failures == ids[:2] and proof.proved == proof.claims - 2
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"perturbations .*cell-0-unit-1.safetensors' cannot be read"):
        verify(saved, device="cpu")


def test_a_margin_below_a_thousandth_is_counted_apart(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = read(saved).cells
    labels = dict(zip(cell.samples.tolist(), cell.labels.tolist()))
    margins = [5e-4, -5e-4, 2e-3]  # near, near and still broken, lost

    def ask(judge: Any, x: Any, y: Any, ids: torch.Tensor, seeds: range, size: int) -> Answers:
        margin = np.array([[margins[int(i) % 3] for i in ids]])
        label = np.array([[labels[int(i)] for i in ids]])
        return Answers(np.where(margin > 0, label, label + 1), margin)

    monkeypatch.setattr(module, "ask", ask)
    (proof,) = verify(saved, device="cpu")
    claimed = cell.samples[cell.adversarial[0, 0] != cell.labels]
    assert (proof.near, proof.proved, proof.failed) == tuple(int((claimed % 3 == rest).sum()) for rest in range(3))


def test_a_randomised_defence_is_asked_on_more_seeds(make_config: MakeConfig, folder: Path) -> None:
    noise = {"spec": "random-noise", "eot": 1, "options": {"eps": "4/255"}}
    config = make_config(save_adv=True, threats=[{"eps": "1/255", "steps": 3}], defenses=[noise], verdict_seeds=2)
    run(config, folder, device="cpu")
    (cell,) = read(folder).cells
    same = verify(folder, device="cpu")
    assert [proof.claims for proof in same] == [int((row != cell.labels).sum()) for row in cell.adversarial]
    assert all(proof.proved == proof.claims and proof.seeds == 2 for proof in same)
    for proof, few in zip(verify(folder, device="cpu", seeds=6), same):
        assert (proof.seeds, proof.asked, proof.claims) == (6, 6 * proof.images, few.claims) and proof.holds
        assert 0 < proof.broken_share < 1
        assert proof.interval == wilson(proof.wrong / proof.asked, proof.images)


def test_only_the_runs_own_model_and_images_prove_anything(
    saved: Path, specs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = np.load(specs[1].removeprefix("arrays:"))["x"], np.load(specs[1].removeprefix("arrays:"))["y"]
    np.savez(tmp_path / "moved.npz", x=x, y=y, classes=np.array(["cat", "dog", "fish"]))
    np.savez(tmp_path / "fewer.npz", x=x[:39], y=y[:39], classes=np.array(["cat", "dog", "fish"]))
    assert verify(saved, device="cpu", data=f"arrays:{tmp_path / 'moved.npz'}")[0].holds
    with pytest.raises(UsageError, match=r"^images is 39, but the run's dataset 'images' was made with 40"):
        verify(saved, device="cpu", data=f"arrays:{tmp_path / 'fewer.npz'}")
    with pytest.raises(UsageError, match=r"^weights_sha256 is"):
        verify(saved, device="cpu", model=specs[0].replace("spread", "tiny"))


def test_what_cannot_be_verified_says_so(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    run(make_config(), folder, device="cpu")
    with pytest.raises(UsageError, match="kept no perturbations; make it again with --save-adv"):
        verify(folder)
    with pytest.raises(UsageError, match="holds no run"):
        verify(tmp_path)
