"""Two processes make the update that one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_run.py")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
OPTIONS = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def start(launcher: list[str], folder: Path, accumulate: int) -> subprocess.Popen[str]:
    folder.mkdir()
    # the environment variable turns the launcher's several GPUs into several CPU processes (gloo)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(accumulate)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_equal_one_in_float64(tmp_path: Path) -> None:
    """Gradients of the first update, weights and history after four; two processes in three pieces, one in one."""
    runs = [start([], tmp_path / "one", 1), start(LAUNCH + OPTIONS, tmp_path / "two", 3)]
    for running in runs:
        _, errors = running.communicate(timeout=300)
        assert running.returncode == 0, errors[-3000:]
    one, two = (load_file(tmp_path / name / "seen.safetensors") for name in ("one", "two"))
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert two.keys() == one.keys()
    gradients = [name for name in two if name.startswith("gradient.")]
    used = [name for name in two if name.startswith("weight.tower.tower.")]
    assert len(gradients) == len(used) > 30 and "weight.tower.pooler.weight" in two
    for name, value in one.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            two[name], value, rtol=1e-9, atol=1e-12 * scale, msg=lambda text, at=name: f"{at}: {text}"
        )
