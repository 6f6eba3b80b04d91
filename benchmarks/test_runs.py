"""What a run costs over the bare attack: its verdicts, and then decoding, storing and summing up."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import clipdefense.runs.run as module
from clipdefense.evaluation import evaluate
from clipdefense.evaluation.answers import ask
from clipdefense.runs.build import Builder
from clipdefense.runs.config import read_config
from clipdefense.runs.run import run
from clipdefense.runs.units import cells
from common import rounds

IMAGES = {"smoke": 256, "cpu": 1024, "full": 4096}
ROUNDS = {"smoke": 5, "cpu": 31, "full": 9}


@pytest.mark.parametrize("attack", ["pgd,steps=10,early_stop=false", "pgd,steps=100,early_stop=false"])
def test_overhead(
    attack: str, size: str, device: str, tmp_path: Path, record: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo's digits, whose model is small, so that everything around the attack weighs most."""
    if size == "smoke" and "steps=100" in attack:
        pytest.skip("--size cpu or full")
    if device == "cpu":
        torch.set_num_threads(1)
    data = {"spec": "digits:train", "n": min(IMAGES[size], 1400), "name": "digits"}
    tables = {"models": ["demo:digits"], "datasets": [data], "attacks": [attack], "threats": [{"eps": "6/255"}]}
    config = read_config({**tables, "exhibits": False})
    builder = Builder(config, device)
    subject = builder.subject(cells(config)[0])
    x, y = (tensor.to(device) for tensor in builder.datasets["digits"].tensors())
    ids = builder.datasets["digits"].ids.to(device)
    function, threat, options = subject.attacks[0].bind(subject.threat)
    monkeypatch.setattr(module, "Builder", lambda *_: builder)  # what loading costs is no matter of the run
    number = iter(range(1000))

    def two_forwards() -> None:  # no accuracy without these: one for the clean image, one for the attacked
        for _ in range(2):
            ask(subject.judge, x, y, ids, subject.seeds, config.batch_size)

    times = rounds(
        {
            "attack": lambda: function(subject.model, x, y, threat, ids=ids, batch_size=128, **options),
            "two forwards an image": two_forwards,
            "attack and verdicts": lambda: evaluate(subject.model, x, y, threat, attacks=[attack], ids=ids),
            "run": lambda: run(config, tmp_path / str(next(number)), device=device),
        },
        5 if "steps=100" in attack else ROUNDS[size],
        device,
    )

    def over(more: str, less: str | None = None) -> float:
        """Median over the rounds, each against its own bare attack: a slow spell lasts longer than a round."""
        bare = times["attack"]
        taken = times[less] if less is not None else [0.0] * len(bare)
        return statistics.median((a - b) / c for a, b, c in zip(times[more], taken, bare))

    figures = {
        "images": len(x),
        "attack": attack,
        "rounds": len(times["attack"]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "two forwards an image over the bare attack": over("two forwards an image"),
        "verdicts over the bare attack": over("attack and verdicts", "attack"),
        "decode, store, progress and summaries over the bare attack": over("run", "attack and verdicts"),
        "run over the bare attack": over("run", "attack"),
    }
    record(f"runs_overhead_{'pgd10' if 'steps=10,' in attack else 'pgd100'}", figures)
