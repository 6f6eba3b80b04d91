"""Two processes make the update that one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("distributed_run.py")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
OPTIONS = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def run(launcher: list[str], folder: Path, accumulate: int) -> dict[str, Tensor]:
    folder.mkdir()
    # the environment variable turns the launcher's several GPUs into several CPU processes (gloo)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(accumulate)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "seen.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return run([], tmp_path_factory.mktemp("runs") / "one", 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_equal_one_in_float64(tmp_path: Path, one_process: dict[str, Tensor], accumulate: int) -> None:
    two = run(LAUNCH + OPTIONS, tmp_path / "two", accumulate)
    assert (int(one_process.pop("processes", torch.tensor(1))), int(two.pop("processes"))) == (1, 2)
    assert two.keys() == one_process.keys()
    gradients = [name for name in two if name.startswith("gradient.")]
    assert len(gradients) == sum(name.startswith("weight.tower.") for name in two)
    for name, value in one_process.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12 * float(value.abs().max()), msg=name)
