"""Model files, and runs that go on where they were killed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.files import write_atomically
from clipdefense.training.checkpoint import load_weights, save_model
from clipdefense.training.state import STATE_FILE
from clipdefense.weights import read_sidecar, sha256_of_weights, write_tensors
from clipdefense_tecoa.tecoa import TeCoA

Make = Callable[..., ZeroShotClassifier]
QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0, "lr": 1e-3, "batch_size": 4}


def data(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, 32, 32, generator=generator), torch.arange(n) % 10


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"w": torch.ones(10)}, {})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(path, {"w": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_model_file_comes_back_bit_for_bit(make_model: Make, tmp_path: Path, images: Tensor) -> None:
    model, fresh = make_model(), make_model()
    before = sha256_of_weights(model)
    TeCoA(model, **QUIET, epochs=1, checkpoint=str(tmp_path)).fit(*data())
    path = tmp_path / "model.safetensors"
    facts = read_sidecar(path)
    assert (facts["method"], facts["variant"], facts["class_names"]) == ("tecoa", "default", list(model.class_names))
    assert facts["base_weights_sha256"] == before != facts["weights_sha256"] == sha256_of_weights(model)
    assert facts["threat"]["eps"] == 1 / 255 and facts["training"]["lr"] == 1e-3
    assert (facts["image_size"], facts["logit_scale"]) == (32, 100.0)
    load_weights(fresh, path)
    assert same(model, fresh)
    with torch.no_grad():
        assert torch.equal(model(images), fresh(images))


def test_other_dtypes_and_shared_storage_are_saved_whole(make_model: Make, tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    save_model(model, tmp_path / "half.safetensors", note="a remark")
    stored = load_file(tmp_path / "half.safetensors")
    assert stored["tower.proj"].dtype == torch.bfloat16 and stored.keys() == model.state_dict().keys()
    assert read_sidecar(tmp_path / "half.safetensors")["note"] == "a remark"
    with pytest.raises(UsageError, match=r"a model file ends in \.safetensors"):
        save_model(model, tmp_path / "model.pt")


def test_files_follow_the_umask(tiny_model: ZeroShotClassifier, tmp_path: Path) -> None:
    path = save_model(tiny_model, tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_another_class_list(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(), make_model(classes=4)
    with torch.no_grad():
        model.tower.proj.add_(1.0)
    path = save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"has the 10 classes thing 0, .* the model has 4: .* keep_classes=True"):
        load_weights(other, path)
    embeddings = other.head.embeddings.clone()
    load_weights(other, path, keep_classes=True)
    assert torch.equal(other.tower.proj, model.tower.proj) and torch.equal(other.head.embeddings, embeddings)


def test_other_preprocessing_and_other_architectures(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    path = save_model(model, tmp_path / "model.safetensors")
    other.image_size = 64
    with pytest.raises(UsageError, match=r"other preprocessing: image_size 32 \(here 64\)"):
        load_weights(other, path)
    other.image_size = 32
    other.tower.proj = nn.Parameter(torch.zeros(64, 16))
    with pytest.raises(UsageError, match=r"tower\.proj is \(64, 32\) instead of \(64, 16\)"):
        load_weights(other, path)
    (tmp_path / "model.safetensors.json").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors\.json is missing"):
        load_weights(make_model(), path)


class Stopped(Exception):
    pass


class Until(TeCoA):
    """TeCoA that stops before update ``last + 1``, as if pulled out of the socket."""

    last = 5

    def losses(self, batch: Any) -> dict[str, Tensor]:
        if len(self.history.steps) == self.last:  # type: ignore[union-attr]
            raise Stopped
        return super().losses(batch)


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_equals_an_unbroken_one(
    make_model: Make, tmp_path: Path, every: int | None, optimizer: str
) -> None:
    options = {**QUIET, "epochs": 2, "optimizer": optimizer, "checkpoint_every": every, "validation": 0.1, "mix": 0.5}
    unbroken = make_model()
    whole = TeCoA(unbroken, **options)
    whole.fit(*data(18))
    with pytest.raises(Stopped):
        Until(make_model(), **options, checkpoint=str(tmp_path)).fit(*data(18))
    resumed = make_model()
    rest = TeCoA(resumed, **options, checkpoint=str(tmp_path), resume=True)
    rest.fit(TensorDataset(*data(18)))
    assert same(unbroken, resumed)
    assert rest.history == whole.history
    again = make_model()
    TeCoA(again, **options, checkpoint=str(tmp_path), resume=True).fit(*data(18))
    assert same(unbroken, again)


def test_resume_without_a_state_starts(make_model: Make, tmp_path: Path) -> None:
    defense = TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path / "new"), resume=True)
    defense.fit(*data())
    assert len(defense.history.steps) == 4


def test_a_state_is_never_overwritten_by_another_run(make_model: Make, tmp_path: Path) -> None:
    TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path)).fit(*data())
    with pytest.raises(UsageError, match="holds the state of a run; pass resume=True to continue it"):
        TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path)).fit(*data())


def test_a_resume_with_other_settings_lists_them(make_model: Make, tmp_path: Path) -> None:
    TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path)).fit(*data())
    options = {**QUIET, "lr": 1e-2, "epochs": 3, "checkpoint": str(tmp_path), "resume": True}
    with pytest.raises(UsageError, match=r"differs in 2 of its settings: epochs is 3, was 1; lr is 0\.01, was 0\.001"):
        TeCoA(make_model(), **options).fit(*data())
    with pytest.raises(UsageError, match=r"training images is 20, was 16; batches an epoch is 5, was 4"):
        TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path), resume=True).fit(*data(20))
    other = make_model()
    with torch.no_grad():
        other.tower.proj.add_(1.0)
    with pytest.raises(UsageError, match=r"1 of its settings: base weights \(SHA-256\) .*loaded afresh"):
        TeCoA(other, **QUIET, epochs=1, checkpoint=str(tmp_path), resume=True).fit(*data())
    threat = TeCoA(other).threat.__class__("l2", eps=0.5)
    with pytest.raises(UsageError, match=r"threat\.norm is 'l2', was 'linf'; threat\.eps is 0\.5, was 0\.0039"):
        TeCoA(make_model(), threat=threat, **QUIET, epochs=1, checkpoint=str(tmp_path), resume=True).fit(*data())


def test_a_damaged_state_is_an_error_not_a_new_start(make_model: Make, tmp_path: Path) -> None:
    TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path)).fit(*data())
    file = tmp_path / STATE_FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        TeCoA(make_model(), **QUIET, epochs=1, checkpoint=str(tmp_path), resume=True).fit(*data())


def test_a_loader_resumes_at_the_last_checkpoint_and_says_so(make_model: Make, tmp_path: Path) -> None:
    options = {**QUIET, "epochs": 2, "checkpoint_every": 1, "checkpoint": str(tmp_path)}
    loader = DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True)
    with pytest.raises(Stopped):
        Until(make_model(), **options).fit_loader(loader)
    defense = TeCoA(make_model(), **options, resume=True)
    with pytest.warns(UserWarning, match="resuming at update 5: this loader's order is its own"):
        defense.fit_loader(loader)
    assert [record["step"] for record in defense.history.steps] == list(range(1, 9))
    with warnings.catch_warnings():  # nothing is left to do
        warnings.simplefilter("error")
        TeCoA(make_model(), **options, resume=True).fit_loader(loader)


def test_a_loader_says_so_between_epochs_too(make_model: Make, tmp_path: Path) -> None:
    """A generator of batches goes on where it stood, which a new process cannot know."""
    options = {**QUIET, "max_steps": 4, "schedule": "constant", "checkpoint": str(tmp_path)}
    loader = DataLoader(TensorDataset(*data()), batch_size=4)

    class Interrupted(TeCoA):
        def inner_attack(self, batch: Any, *, seed: int) -> Any:
            if len(self.history.epochs) == 1:
                raise Stopped
            return super().inner_attack(batch, seed=seed)

    with pytest.raises(Stopped):
        Interrupted(make_model(), **options, epochs=2).fit_loader(list(loader)[:2])
    with pytest.warns(UserWarning, match="resuming at update 2: this loader's order is its own"):
        TeCoA(make_model(), **options, epochs=2, resume=True).fit_loader(list(loader)[:2])


def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    """Three SIGKILLs at random moments, then an undisturbed rest, against a run nobody killed."""
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["signals"] == [9, 9, 9]
    assert report["resumed"] == report["unbroken"]
    assert report["resumed"]["steps"] == 24
