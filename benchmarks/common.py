"""What the benchmarks share: models, images, clocks, counters, and the head of every result."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clipdefense import ZeroShotClassifier
from clipdefense.evaluation.fingerprint import machine


def commit() -> str:
    """The commit of this working tree, marked where there are uncommitted changes."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def heading(benchmark: str, command: str) -> dict[str, Any]:
    """What every result says of itself."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": command,
        "machine": machine(),
    }


def make_model(size: str, device: str) -> ZeroShotClassifier:
    """Random weights serve for speed: ViT-B/32 at 224 px, a small ViT that fills a core, or a tiny one at 32 px."""
    if size == "tiny":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clip = open_clip.model.CLIP(
                embed_dim=32,
                vision_cfg={"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
                text_cfg={"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
                quick_gelu=True,
            )
            return ZeroShotClassifier(clip.visual, torch.randn(10, 32), image_size=32).to(device).eval()
    if size == "full":
        clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
        return ZeroShotClassifier(clip.visual, torch.randn(100, 512), image_size=224).to(device).eval()
    clip = open_clip.model.CLIP(
        embed_dim=128,
        vision_cfg={"layers": 6, "width": 256, "patch_size": 8, "image_size": 64},
        text_cfg={"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
        quick_gelu=True,
    )
    return ZeroShotClassifier(clip.visual, torch.randn(100, 128), image_size=64).to(device).eval()


def make_images(model: ZeroShotClassifier, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 16, 16, generator=generator)
    side = (model.image_size, model.image_size)
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear").to(model.device)


def seconds_of(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """(result, seconds): wall time on a GPU; on a CPU with one thread its CPU time, which neighbours do not stretch."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, clock() - start


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors held at once while the function ran, over what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each function, measured in turns so that a slow spell of the machine hits all alike."""
    return {name: statistics.median(values) for name, values in rounds(functions, repeats, device).items()}


def rounds(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function, round by round, after one that does not count."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds_of(function, device)[1])
    return times


def bare_step(tower: nn.Module, images: Tensor) -> None:
    """The floor of an attack step: one forward and one backward to the input of the bare tower, weights frozen."""
    leaf = images.detach().requires_grad_(True)
    torch.autograd.grad(tower(leaf).sum(), leaf)


class Passes:
    """Images through a tower, forward and backward, counted by hooks."""

    def __init__(self, tower: nn.Module) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self._hook = tower.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        self.forward.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda gradient: self.backward.append(len(gradient)))

    def stop(self) -> None:
        self._hook.remove()
