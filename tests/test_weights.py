"""Reading checkpoints: what is accepted, what each kind of bad file gets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipdefense.errors import UsageError
from clipdefense.weights import (
    load_strictly,
    parse_device,
    parse_dtype,
    read_checkpoint,
    read_sidecar,
    read_state_dict,
    restored_transform,
    stored_classes,
)

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, -1.0])}


def saved(folder: Path, content: object, name: str = "file.pt") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def test_safetensors_and_torch_files_hold_the_same(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    (tmp_path / "no_suffix").write_bytes((tmp_path / "a.safetensors").read_bytes())
    old = tmp_path / "old.pt"
    torch.save(STATE, old, _use_new_zipfile_serialization=False)
    for path in (tmp_path / "a.safetensors", tmp_path / "no_suffix", saved(tmp_path, STATE), old):
        read = read_state_dict(path)
        assert read.keys() == STATE.keys()
        assert all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", "vision_encoder_state_dict", "model"])
def test_weights_are_found_below_what_training_scripts_call_them(tmp_path: Path, container: str) -> None:
    content = {"epoch": 3, container: {f"module.{name}": value for name, value in STATE.items()}, "optimizer": {"a": 1}}
    checkpoint = read_checkpoint(saved(tmp_path, content))
    assert checkpoint.container == container
    assert torch.equal(checkpoint.state["weight"], STATE["weight"])


def test_a_prefix_goes_only_where_all_names_have_it(tmp_path: Path) -> None:
    read = read_state_dict(saved(tmp_path, {"module.a": torch.ones(1), "b": torch.ones(1)}))
    assert set(read) == {"module.a", "b"}
    read = read_state_dict(saved(tmp_path, {"module._orig_mod.a": torch.ones(1)}))
    assert set(read) == {"a"}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_truncated_file_is_said_to_be_one(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / f"file.{kind}"
    content = {"a": torch.randn(5000)}
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UsageError, match="truncated or not a"):
        read_state_dict(path)


def test_a_pickle_of_objects_is_not_opened_and_names_the_culprit(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    with pytest.raises(UsageError, match=r"argparse\.Namespace.*weights_only=False"):
        read_state_dict(saved(tmp_path, {"args": argparse.Namespace(lr=1), "state_dict": STATE}))
    with pytest.raises(UsageError, match="may run code"):
        read_state_dict(saved(tmp_path, {"state_dict": STATE, "trap": Trap()}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_opened_only_where_it_is_trusted(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    layer.load_state_dict(STATE)
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(layer), path)
    with pytest.raises(UsageError, match=r"TorchScript.*torch\.jit\.load"):
        read_state_dict(path)
    assert torch.equal(read_checkpoint(path, trusted_script=True).state["weight"], STATE["weight"])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UsageError, match="truncated or not a checkpoint"):
        read_state_dict(tmp_path / "text.pt")
    with pytest.raises(UsageError, match=r"does not exist.*absent\.pt"):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(UsageError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(UsageError, match=r"holds no state dict: epoch, loss"):
        read_state_dict(saved(tmp_path, {"epoch": 3, "loss": 0.5}))
    with pytest.raises(UsageError, match="holds no state dict: Tensor"):
        read_state_dict(saved(tmp_path, torch.ones(3)))


def test_load_strictly_lists_eight_and_counts_all() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    state = {f"{i}.weight": torch.ones(3, 3) for i in range(6)} | {"0.bias": torch.ones(4), "other": torch.ones(1)}
    with pytest.raises(UsageError) as caught:
        load_strictly(model, state, "checkpoint x")
    message = str(caught.value)
    assert "checkpoint x does not fit Sequential: 7 of 13 entries" in message
    assert "1 of another shape, 5 missing, 1 unknown" in message
    assert "0.bias is (4,) instead of (3,)" in message
    assert "other is not in the model" in message
    assert " more" not in message
    with pytest.raises(UsageError, match=r"12 of 14 entries.*; and 4 more"):
        load_strictly(model, {"a": torch.ones(1), "b": torch.ones(1)} | dict(list(state.items())[:2]), "checkpoint x")
    assert not torch.equal(model[0].weight, torch.ones(3, 3))  # nothing was loaded


def test_load_strictly_casts_and_forgives_an_absent_step_counter() -> None:
    model = nn.BatchNorm1d(2)
    state = {"weight": torch.tensor([2.0, 3.0]), "bias": torch.ones(2), "running_mean": torch.ones(2)}
    load_strictly(model, {n: v.half() for n, v in (state | {"running_var": torch.ones(2)}).items()}, "checkpoint x")
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [2.0, 3.0]


def test_sidecars(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "m.safetensors", tmp_path / "m.safetensors.json"
    assert read_sidecar(path) == {}
    sidecar.write_text(json.dumps({"format": "clipdefense-model", "version": 1, "source": "a"}))
    assert read_sidecar(path)["source"] == "a"
    sidecar.write_text(json.dumps({"something": "else"}))
    assert read_sidecar(path) == {}
    sidecar.write_text(json.dumps({"format": "clipdefense-model", "version": 2}))
    with pytest.raises(UsageError, match="version 2"):
        read_sidecar(path)
    sidecar.write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        read_sidecar(path)


def test_parts_of_a_saved_head() -> None:
    head = {
        "embeddings": torch.ones(2, 3),
        "transform.weight": torch.full((2, 3), 4.0),
        "transform.bias": STATE["bias"],
    }
    assert stored_classes({}, {"class_names": ["a"]}, "it") is None
    assert stored_classes(head, {}, "it") is None
    found = stored_classes(head, {"class_names": ["a", "b"]}, "it")
    assert found is not None and found[0] == ["a", "b"]
    with pytest.raises(UsageError, match="2 class embeddings, but its description has 1 names"):
        stored_classes(head, {"class_names": ["a"]}, "it")
    with pytest.raises(UsageError, match=r"weight, bias.*pass transform="):
        restored_transform(None, head, "it")
    layer = nn.Linear(3, 2)
    assert restored_transform(layer, head, "it") is layer
    assert torch.equal(layer.weight, head["transform.weight"])
    assert restored_transform(None, {"embeddings": torch.ones(2, 3)}, "it") is None


def test_devices() -> None:
    assert parse_device(None) == parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")
    for wrong in ("gpu", "cuda:99", torch.device("cuda:99")):
        with pytest.raises(UsageError, match=r"device is '.*99'|device is 'gpu'"):
            parse_device(wrong)


def test_dtypes() -> None:
    assert parse_dtype(None) == torch.float32
    assert parse_dtype("bfloat16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    for wrong in ("int8", torch.int64, "bf17"):
        with pytest.raises(UsageError, match="dtype"):
            parse_dtype(wrong)
