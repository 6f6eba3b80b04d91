"""The attack engine's figures: verdicts and time beside torchattacks and ART, passes, memory, growth, precision.

On one thread of a CPU, seconds are that thread's CPU seconds, which a busy machine does not stretch; on a GPU they are
wall time. ``--size smoke`` shows that everything runs; the CPU's table is ``--size cpu``, the GPU's ``--size full``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdefense import ThreatModel, attacks
from clipdefense.attacks.context import frozen
from clipdefense.classifier import ClassHead
from common import Passes, bare_step, interleaved, make_images, make_model, peak_bytes, seconds_of
from peers import ATTACKS, PEERS, PUBLISHED, SHORT, art_autoattack, correct, subjects

warnings.filterwarnings("ignore", message=".*input gradient is exactly zero.*")
Record = Callable[..., None]


def test_verdicts_and_time_beside_torchattacks(size: str, device: str, record: Record) -> None:
    """Attack by attack and as a suite, the same model, images, budgets and hyper-parameters."""
    options, seeds = (SHORT, (0,)) if size == "smoke" else (PUBLISHED, (0, 1, 2))
    figures: dict[str, Any] = {"hyper-parameters": options, "seeds": len(seeds)}
    for subject in subjects(size, device):
        rows: dict[str, Any] = {}
        for name in (*ATTACKS, "suite"):
            ours, theirs = [], []
            for seed in seeds:
                own, own_seconds = seconds_of(lambda: subject.ours(name, seed, options), device)  # noqa: B023
                their, their_seconds = seconds_of(lambda: PEERS[name](subject, seed, options), device)  # noqa: B023
                ours.append((correct(subject, own), own_seconds))
                theirs.append((correct(subject, their), their_seconds))
            rows[name] = {
                "robust images, clipdefense": [count for count, _ in ours],
                "robust images, torchattacks": [count for count, _ in theirs],
                "seconds, clipdefense": [seconds for _, seconds in ours],
                "seconds, torchattacks": [seconds for _, seconds in theirs],
                "times faster": sum(s for _, s in theirs) / sum(s for _, s in ours),
            }
        figures[subject.name] = {"eps": subject.eps, "images": len(subject.x), "clean": subject.clean, **rows}
    record("attacks_verdicts", figures)


def test_time_and_verdict_beside_the_suite_of_art(size: str, device: str, record: Record) -> None:
    """ART's AutoAttack at its defaults is another suite; ours is ``autoattack`` at its own."""
    if size == "smoke":
        pytest.skip("ART's AutoAttack takes more than a minute an image on this model; --size cpu runs it")
    figures: dict[str, Any] = {}
    for subject in (every.first(3) for every in subjects(size, device)):
        own, own_seconds = seconds_of(lambda: subject.ours("suite", 0, PUBLISHED), device)  # noqa: B023
        their, their_seconds = seconds_of(lambda: art_autoattack(subject), device)  # noqa: B023
        figures[subject.name] = {
            "images": len(own),
            "robust images, clipdefense": correct(subject, own),
            "robust images, ART": correct(subject, their),
            "seconds, clipdefense": own_seconds,
            "seconds, ART": their_seconds,
            "times faster": their_seconds / own_seconds,
        }
    record("attacks_art", figures)


@pytest.mark.parametrize("name", ATTACKS)
def test_passes_beside_what_the_algorithm_needs(name: str, size: str, device: str, record: Record) -> None:
    """Needed: an image alone, until it is broken; an image that never is, the published count."""
    subject = subjects("smoke", device)[0]
    options = PUBLISHED if size != "smoke" else SHORT
    if name == "square":
        options = options | {"queries": 100}

    def passes(rows: slice, batch_size: int) -> tuple[int, int]:
        counter = Passes(subject.model.tower)
        subject.first(rows).ours(name, 0, options, batch_size=batch_size)
        counter.stop()
        return sum(counter.forward), sum(counter.backward)

    together = passes(slice(None), 8)
    alone = [passes(slice(i, i + 1), 1) for i in range(len(subject.x))]
    needed = tuple(sum(counts) for counts in zip(*alone))
    standing = max(alone)
    targets = options["targets"] if name in ("apgd-t", "fab-t") else 1
    steps = options["steps"]
    published = {  # forward and backward passes of an image that is never broken; 1 ranks the targets
        "apgd-ce": (steps + 1, steps + 1),
        "apgd-t": (targets * (steps + 1) + 1, targets * (steps + 1)),
        "fab-t": (targets * 2 * steps + 1, targets * steps),
        "square": (options["queries"], 0),
    }[name]
    compared = (
        targets if name in ("apgd-t", "fab-t") else 0
    )  # forwards at each target's end, to return the best of them
    figures = {
        "forward and backward, images together": together,
        "forward and backward, image by image": needed,
        "an image that stands": standing,
        "published for one that stands": published,
        "passes over needed": sum(together) / sum(needed),
        "passes over published, for one that stands": sum(standing) / sum(published),
    }
    assert standing == (published[0] + compared, published[1])
    assert sum(together) <= 1.02 * sum(needed)
    record(f"attacks_passes_{name}", figures)


def test_time_over_the_bare_tower_and_memory_over_pgd(size: str, device: str, record: Record) -> None:
    """Seconds over those that the counted passes take on the tower alone; peak bytes over PGD's at that batch."""
    model = make_model("full" if size == "full" else "smoke", device)
    batch, repeats = {"smoke": (8, 1), "cpu": (32, 5), "full": (256, 10)}[size]
    x = make_images(model, batch)
    y = attacks.predict(model, x).argmax(dim=1)
    normalised, threat = model.preprocess(x), ThreatModel("linf", 8 / 255, steps=4)
    settings: dict[str, dict[str, Any]] = {
        "pgd": {},
        "apgd-ce": {"steps": 4},
        "apgd-t": {"steps": 4, "targets": 1},
        "fab-t": {"steps": 4, "targets": 1},
        "square": {"queries": 8},
    }

    def attack(name: str) -> Callable[[], Tensor]:
        every = {"early_stop": False, "batch_size": batch}
        return lambda: attacks.run(name, model, x, y, threat, **every, **settings[name])

    def forward() -> None:
        with frozen(model), torch.no_grad():
            model.tower(normalised)

    def step() -> None:
        with frozen(model):
            bare_step(model.tower, normalised)

    functions: dict[str, Callable[[], Any]] = {"forward": forward, "forward and backward": step}
    seconds = interleaved(functions | {name: attack(name) for name in settings}, repeats, device)
    memory = {name: peak_bytes(attack(name), device) for name in settings}
    figures: dict[str, Any] = {"batch": batch}
    for name in settings:
        counter = Passes(model.tower)
        attack(name)()
        counter.stop()
        forwards, backwards = sum(counter.forward) / batch, sum(counter.backward) / batch
        floor = backwards * seconds["forward and backward"] + (forwards - backwards) * seconds["forward"]
        figures[name] = {
            "forward passes an image": forwards,
            "backward passes an image": backwards,
            "time over the bare tower": seconds[name] / floor,
            "peak memory over PGD's": memory[name] / memory["pgd"],
        }
    record("attacks_overhead", figures)


def test_growth_with_images_and_classes(size: str, device: str, record: Record) -> None:
    """Seconds an image at 1, 4 and 16 times the images, and at 10, 100 and 1,000 classes beside the logits' product."""
    model = make_model("full" if size == "full" else "tiny", device)
    base = {"smoke": 16, "cpu": 64, "full": 256}[size]
    x = make_images(model, 16 * base)
    threat, steps = ThreatModel("linf", 8 / 255), 4

    def head_of(classes: int) -> ClassHead:
        anchors = torch.randn(classes, model.head.embeddings.shape[1], generator=torch.Generator().manual_seed(0))
        return ClassHead([str(i) for i in range(classes)], anchors).to(device)

    def product(classes: int) -> Callable[[], None]:
        """What the steps of an attack on ``4 * base`` images spend on the logits alone, forward and backward."""
        head, embeddings = head_of(classes), torch.randn(base, model.head.embeddings.shape[1], device=device)

        def run() -> None:
            for _ in range(4 * (steps + 1)):
                leaf = embeddings.detach().requires_grad_(True)
                torch.autograd.grad(head(leaf).sum(), leaf)

        return run

    def apgd(classes: int, images: int) -> Callable[[], Tensor]:
        head = head_of(classes)
        other = make_model("full" if size == "full" else "tiny", device)
        other.head = head
        y = torch.zeros(images, dtype=torch.long, device=device)
        return lambda: attacks.run(
            "apgd-ce", other, x[:images], y, threat, steps=steps, early_stop=False, batch_size=base, seed=0
        )

    counts, lists = (base, 4 * base, 16 * base), (10, 100, 1000)
    by_images = interleaved({str(n): apgd(10, n) for n in counts}, 3, device)
    by_classes = interleaved({str(k): apgd(k, 4 * base) for k in lists}, 3, device)
    products = interleaved({str(k): product(k) for k in lists}, 3, device)
    figures = {
        "ms an image, by images": {n: 1000 * s / int(n) for n, s in by_images.items()},
        "ms an image, by classes": {k: 1000 * s / (4 * base) for k, s in by_classes.items()},
        "ms an image, by classes, of the logits' product": {k: 1000 * s / (4 * base) for k, s in products.items()},
    }
    record("attacks_growth", figures)


def test_precision_of_the_gradients(size: str, device: str, record: Record) -> None:
    """Images times steps a second in each gradient precision, and the images that still stand."""
    model = make_model("full" if size == "full" else "tiny", device)
    n, steps = (2048, 20) if size == "full" else (32, 4)
    x = make_images(model, n)
    y = attacks.predict(model, x).argmax(dim=1)
    threat = ThreatModel("linf", 0.25 / 255, step_size=0.05 / 255, steps=steps)
    figures: dict[str, Any] = {}
    for dtype in ("fp32", "tf32", "bf16") if device == "cuda" else ("fp32", "bf16"):
        common: dict[str, Any] = {"gradient_dtype": dtype, "batch_size": min(512, n)}
        run = lambda **more: attacks.run("pgd", model, x, y, threat, **common, **more)  # noqa: B023, E731
        run(early_stop=False)
        _, seconds = seconds_of(lambda: run(early_stop=False), device)  # noqa: B023
        standing = int((attacks.predict(model, run()).argmax(dim=1) == y).sum())
        figures[dtype] = {"images x steps a second": n * steps / seconds, "robust images": standing, "images": n}
    record("attacks_precision", figures)
