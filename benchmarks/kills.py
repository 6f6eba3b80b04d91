"""SIGKILLs at random moments of an evaluation, at the worst ones, and of a fine-tune; shards, a full disk.

What becomes of the rows, and of the weights.

    python benchmarks/kills.py --size smoke|full [--kills 20] [--points POINT ...] [--results FILE.json]

Every run is a forked process that has not computed anything before, so that torch is imported once for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate, normalize

import clipdefense.runs.run as run_module
import clipdefense.weights as weights_module
from clipdefense import UsageError, get_defense, load_dataset, load_model
from clipdefense.runs.bank import FOLDER
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.merge import merge
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.store import Finished, Store, stores_in
from clipdefense.runs.units import Shard
from clipdefense.training.checkpoint import save_model
from clipdefense.training.state import STATE_FILE
from clipdefense.weights import sha256_of_weights
from common import heading

CLASSES = ("cat", "dog", "fish")
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
IMAGES = {"smoke": 24, "full": 160}
UNIT = {"smoke": 8, "full": 16}


def make_files(folder: Path, images: int) -> tuple[str, str]:
    """A tiny model and images that it mostly gets right, on disk; returns (model spec, dataset spec)."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        (folder / "tiny.json").write_text(json.dumps(TOWER))
        save_file(open_clip.model.CLIP(**TOWER).state_dict(), folder / "tiny.safetensors")
        model = load_model(f"open_clip:{folder / 'tiny.json'}@{folder / 'tiny.safetensors'}", CLASSES)
        x = interpolate(torch.rand(images, 3, 4, 4), size=16, mode="bilinear").mul(255).round().to(torch.uint8)
        # without the direction that all its embeddings share, an untrained tower's predictions spread over the classes
        with torch.no_grad():
            common = normalize(model.embed(torch.rand(64, 3, 16, 16)).mean(dim=0), dim=0)
            anchors = torch.randn(len(CLASSES), 16)
            model.head.embeddings.copy_(anchors - anchors @ common[:, None] * common)
        save_model(model, folder / "spread.safetensors")
    spread = f"open_clip:{folder / 'tiny.json'}@{folder / 'spread.safetensors'}"
    with torch.no_grad():
        y = load_model(spread, CLASSES)(x.float() / 255).argmax(dim=1)
    y[::10] = (y[::10] + 1) % len(CLASSES)  # some are wrong from the start
    np.savez(folder / "images.npz", x=x.numpy(), y=y.numpy(), classes=np.array(CLASSES))
    return spread, f"arrays:{folder / 'images.npz'}"


def configuration(model: str, data: str, unit: int) -> RunConfig:
    """The model by itself and a randomised defence around it."""
    return read_config(
        {
            "models": [{"spec": model, "name": "tiny"}],
            "datasets": [{"spec": data, "name": "images"}],
            "defenses": ["none", {"spec": "random-noise", "eot": 1}],
            "threats": [{"eps": "4/255", "steps": 2}],
            "attacks": ["pgd", "apgd-ce,steps=3"],
            "verdict_seeds": 2,
            "unit": unit,
            "batch_size": 6,
            "save_adv": True,
        }
    )


def rows(folder: Path) -> str:
    """A hash over everything in a run that does not depend on when and where it was computed."""
    digest = hashlib.sha256()
    queries = (
        "SELECT * FROM verdicts ORDER BY cell, number, seed, sample",
        "SELECT * FROM attacks ORDER BY cell, number",
        "SELECT * FROM corrupt ORDER BY cell, sample",
        "SELECT cell, unit, images, pixels_sha256, unrepeatable, bank, bucket FROM units ORDER BY cell, unit",
        "SELECT * FROM cells ORDER BY cell",
    )
    (store,) = stores_in(folder)
    with closing(sqlite3.connect(store)) as connection:
        for query in queries:
            for row in connection.execute(query):
                digest.update(repr(row).encode())
    for file in sorted((folder / "adversarial").glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: the signal, if one did it, and what it returned."""

    signal: int
    value: Any


def forked(task: Callable[[], Any], kill_after: float | None = None) -> Ended:
    """The task in a process of its own, killed after so many seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # threads do not survive a fork: what waits for the parent's would wait for ever
        try:
            value = task()
        except UsageError as error:
            value = f"error: {error}"
        os.write(write, json.dumps(value).encode())
        os._exit(0)
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return Ended(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(text) if text else None)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Points:
    """The moments at which a kill could do most harm, each brought about at the third work unit."""

    def __init__(self) -> None:
        self.units = 0

    def third(self) -> bool:
        self.units += 1
        return self.units == 3

    def before_the_perturbations(self) -> None:
        real = run_module.write_bank
        run_module.write_bank = lambda *a: die() if self.third() else real(*a)

    def inside_the_perturbations(self) -> None:
        real = weights_module.save_file

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            real(tensors, path, metadata)
            if path.parent.name == FOLDER and self.third():
                os.truncate(path, path.stat().st_size // 2)
                die()

        weights_module.save_file = half

    def before_the_commit(self) -> None:
        real = Store.commit
        Store.commit = lambda *a: die() if self.third() else real(*a)  # type: ignore[method-assign,assignment,return-value]

    def inside_the_transaction(self) -> None:
        real = Store.commit

        def commit(store: Store, job: Any, unit: Finished) -> None:
            if self.third():
                # with a cache of a page, half of the rows are in the file and the journal is hot
                store._connection.execute("PRAGMA cache_size = 1")
                unit = replace(unit, verdicts=_half(unit.verdicts))  # type: ignore[arg-type]
            real(store, job, unit)

        Store.commit = commit  # type: ignore[method-assign]

    def after_the_commit(self) -> None:
        real = Store.commit

        def commit(store: Store, job: Any, unit: Finished) -> None:
            real(store, job, unit)
            if self.third():
                die()

        Store.commit = commit  # type: ignore[method-assign]

    NAMES = (
        "before_the_perturbations",
        "inside_the_perturbations",
        "before_the_commit",
        "inside_the_transaction",
        "after_the_commit",
    )


def _half(verdicts: list[Any]) -> Iterator[Any]:
    for number, verdict in enumerate(verdicts):
        if number == len(verdicts) // 2:
            die()
        yield verdict


@dataclass(frozen=True)
class Bench:
    """A run to kill, and the folder for its copies."""

    config: RunConfig
    folder: Path

    def complete(self, name: str, prepare: Callable[[], None] = lambda: None, shard: Shard | None = None) -> Any:
        prepare()
        return run(self.config, self.folder / name, shard=shard, device="cpu")

    def unbroken(self) -> dict[str, Any]:
        began = time.monotonic()
        ended = forked(lambda: self.complete("unbroken"))
        assert ended.signal == 0 and isinstance(ended.value, int), ended
        return {"units": ended.value, "seconds": time.monotonic() - began, "rows": rows(self.folder / "unbroken")}

    def resumed(self, name: str, whole: dict[str, Any]) -> dict[str, Any]:
        """What became of a killed run once it went on by what its folder alone says, as far as that says anything."""
        try:
            again = replace(self, config=read(self.folder / name).config)
        except UsageError:
            again = self
            assert not _units(self.folder / name), "only a run that had not begun cannot be read"
        done = _units(self.folder / name)
        ended = forked(lambda: again.complete(name))
        identical = ended.signal == 0 and rows(self.folder / name) == whole["rows"]
        result = {
            "units_before": done,
            "units_after": ended.value,
            "nothing_twice": isinstance(ended.value, int) and done + ended.value == whole["units"],
            "identical": identical,
        }
        shutil.rmtree(self.folder / name)
        return result

    def random_kills(self, kills: int, whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        number = 0
        while number < kills:
            after = random.uniform(0, whole["seconds"])
            name = f"killed-{number}"
            if forked(partial(self.complete, name), after).signal != signal.SIGKILL:  # it was done before
                shutil.rmtree(self.folder / name)
                continue
            yield {"after_seconds": after, **self.resumed(name, whole)}
            number += 1

    def worst_kills(self, points: Sequence[str], whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for point in points:
            ended = forked(partial(self.complete, point, getattr(Points(), point)))
            assert ended.signal == signal.SIGKILL, (point, ended)
            yield {"point": point, **self.resumed(point, whole)}

    def shards(self, count: int, whole: dict[str, Any]) -> dict[str, Any]:
        for index in range(count):
            ended = forked(partial(self.complete, "shards", shard=Shard(index, count)))
            assert ended.signal == 0 and isinstance(ended.value, int), ended
        forked(lambda: len(merge([self.folder / "shards"], self.folder / "merged").cells))
        return {"shards": count, "identical": rows(self.folder / "merged") == whole["rows"]}

    def full_disk(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Files may grow to a few pages only, which is how a quota or a full disk looks to a process."""
        limit = stores_in(self.folder / "unbroken")[0].stat().st_size // 2

        def full() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        message = forked(lambda: self.complete("full", full)).value
        return {"said": str(message).replace(str(self.folder), ""), **self.resumed("full", whole)}


class Tuning:
    """Fine-tunes of the tiny model, each in a folder and a process of its own."""

    def __init__(self, model: str, data: str, folder: Path) -> None:
        self.model, self.data, self.folder = model, data, folder

    def fit(self, name: str) -> dict[str, Any]:
        """From its last checkpoint to its end: where it began, and the hash of its weights."""
        images = load_dataset(self.data)
        model = load_model(self.model, images.classes)
        options: dict[str, Any] = {"batch_size": 6, "epochs": 2, "lr": 1e-3, "warmup_steps": 2}
        kept = {"checkpoint": str(self.folder / name), "checkpoint_every": 1, "resume": True, "show_progress": False}
        state = self.folder / name / STATE_FILE
        resumed = state.exists()
        get_defense("tecoa")(model, **options, **kept).fit(images)
        return {"resumed": resumed, "weights": sha256_of_weights(model)}

    def kills(self, kills: int) -> Iterator[dict[str, Any]]:
        began = time.monotonic()
        whole = forked(lambda: self.fit("tuned"))
        seconds = time.monotonic() - began
        assert whole.signal == 0 and whole.value["weights"], whole
        number = 0
        while number < kills:
            after, name = random.uniform(0, seconds), f"tuned-{number}"
            if forked(partial(self.fit, name), after).signal == signal.SIGKILL:  # else it was done before
                ended = forked(partial(self.fit, name))
                same = ended.signal == 0 and ended.value["weights"] == whole.value["weights"]
                yield {"after_seconds": after, "resumed": ended.value["resumed"], "identical": same}
                number += 1
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _units(folder: Path) -> int:
    """Finished work units; reading the store also rolls back what was half written."""
    for store in stores_in(folder):
        with closing(sqlite3.connect(store)) as connection:
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'units'").fetchone():
                return int(connection.execute("SELECT count(*) FROM units").fetchone()[0])
    return 0


def measure(size: str, kills: int, points: Sequence[str], folder: Path) -> dict[str, Any]:
    """All of it, in a new folder."""
    torch.set_num_threads(1)  # what is compared was computed alike
    specs = make_files_forked(folder, IMAGES[size])
    bench = Bench(configuration(*specs, unit=UNIT[size]), folder)
    whole = bench.unbroken()
    killed = list(bench.random_kills(kills, whole))
    worst = list(bench.worst_kills(points, whole))
    tuned = list(Tuning(*specs, folder).kills(kills))
    return {
        **heading("kills", f"python benchmarks/kills.py --size {size} --kills {kills}"),
        "unbroken": whole,
        "random_kills": killed,
        "worst_kills": worst,
        "fine_tune_kills": tuned,
        "shards": bench.shards(4, whole),
        "full_disk": bench.full_disk(whole),
        "identical": f"{sum(map(good, killed))} of {len(killed)}",
        "fine_tunes_identical": f"{sum(kill['identical'] for kill in tuned)} of {len(tuned)}",
        "identical_at_the_worst_moments": f"{sum(map(good, worst))} of {len(worst)}",
    }


def good(kill: dict[str, Any]) -> bool:
    return bool(kill["identical"] and kill["nothing_twice"])


def make_files_forked(folder: Path, images: int) -> tuple[str, str]:
    """:func:`make_files` in a process of its own: this one forks, and so computes nothing."""
    return tuple(forked(lambda: make_files(folder, images)).value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sorted(IMAGES), default="smoke")
    parser.add_argument("--kills", type=int, default=None, help="3 for smoke, 20 for full")
    parser.add_argument("--points", nargs="*", choices=Points.NAMES, default=Points.NAMES, help="worst moments")
    parser.add_argument("--results", type=Path, default=None)
    options = parser.parse_args()
    kills = options.kills if options.kills is not None else {"smoke": 3, "full": 20}[options.size]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.size, kills, options.points, Path(folder))
    text = json.dumps(result, indent=1)
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(text + "\n")
    print(text)
    fine = all(map(good, (*result["random_kills"], *result["worst_kills"])))
    fine = fine and all(kill["identical"] for kill in result["fine_tune_kills"])
    sys.exit(0 if fine and result["shards"]["identical"] and result["full_disk"]["identical"] else 1)


if __name__ == "__main__":
    main()
