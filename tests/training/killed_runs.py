"""Run as a script: one run left alone, one killed three times and resumed; prints what became of their weights.

Each run is a forked process that has not computed anything before, so that torch is imported once for all.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from clipdefense.training.state import STATE_FILE
from clipdefense.weights import sha256_of_weights
from clipdefense_tecoa.tecoa import TeCoA

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tiny_model

IMAGES, BATCH, EPOCHS = 32, 4, 3


class Flaky(torch.utils.data.Dataset[Any]):
    """Images with random augmentation, which has to repeat too."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        base = torch.linspace(0, 0.8, 3 * 32 * 32).view(3, 32, 32).roll(index, dims=2)
        return base + 0.2 * torch.rand(3, 32, 32), index % 10


def fit(folder: Path, kill_after: int | None) -> dict[str, Any]:
    model = make_tiny_model()
    options: dict[str, Any] = {"batch_size": BATCH, "epochs": EPOCHS, "lr": 1e-3, "warmup_steps": 3}
    where: dict[str, Any] = {"checkpoint": str(folder), "checkpoint_every": 2, "resume": True, "show_progress": False}
    defense = TeCoA(model, **options, **where)
    if kill_after is not None:
        threading.Thread(target=kill_at_some_moment, args=(defense, kill_after), daemon=True).start()
    defense.fit(Flaky())
    assert defense.history is not None
    return {"weights": sha256_of_weights(model), "steps": len(defense.history.steps)}


def kill_at_some_moment(defense: TeCoA, after: int) -> None:
    """Not before update ``after``, and a random moment later: in an attack, an update or a write."""
    while defense.history is None or len(defense.history.steps) < after:
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.03))
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(folder: Path, kill_after: int | None = None) -> tuple[int, dict[str, Any]]:
    """(signal that ended it, what it printed)"""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        result = json.dumps(fit(folder, kill_after))
        os.write(write, result.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(text or "{}")


def main(folder: Path) -> None:
    _, unbroken = in_a_process(folder / "unbroken")
    starts = sorted(random.sample(range(1, 18), 3))
    signals = [in_a_process(folder / "killed", after)[0] for after in starts]
    assert (folder / "killed" / STATE_FILE).exists() or starts[-1] < 2
    _, resumed = in_a_process(folder / "killed")
    print(json.dumps({"unbroken": unbroken, "resumed": resumed, "signals": signals, "after": starts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
