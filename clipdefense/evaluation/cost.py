"""How long an evaluation takes: an estimate before it starts, and how far an attack is while it runs.

A defended model is slow for two reasons that multiply: a pass through it is many passes through the model, and each
gradient is averaged over draws. An attack on it ends no image early, so that nothing would be told for a long time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks.adaptive import EmbeddingTarget, passes
from clipdefense.attacks.context import attack_mode, predict
from clipdefense.attacks.forward import takes_keys
from clipdefense.attacks.options import Progress, Status
from clipdefense.evaluation.targets import Target
from clipdefense.threat import ThreatModel

# what these spend is all in one part, so that counting passes says how far they are
SINGLE = ("pgd", "apgd-ce", "apgd-dlr", "square")


def estimate(
    targets: Sequence[Target], judge: nn.Module, draws: int, x: Tensor, threat: ThreatModel, batch_size: int
) -> str:
    """How long the attacks and their verdicts will take, in words, from timed passes of each target.

    Args:
        targets: what is attacked.
        judge: what gives the verdicts.
        draws: verdicts an attack.
        x: (N, C, H, W), the images.
        threat: the budget of attacks that have none of their own.
        batch_size: images a forward.

    Returns:
        ``"about 12 min for 9 attacks on 500 images; slowest: adaptive view smoothed, 20 EOT draws, 8 min"``; attacks
        of other libraries are named as not counted.
    """
    spent: dict[str, float] = {}
    unknown: list[str] = []
    few = x[:batch_size]
    classes = predict(judge, few[:1]).shape[1]
    attacks = sum(len(target.specs) for target in targets)
    verdicts = _seconds(judge, few, gradient=False) * attacks * draws
    for target in targets:
        for spec in target.specs:
            _, budget, options = spec.bind(threat)
            count = passes(spec.name, budget, options, classes)
            if count is None:
                unknown.append(str(spec))
                continue
            each = sum(
                times * _seconds(target.module, few, gradient)
                for times, gradient in ((count.steep, True), (count.plain, False))
                if times
            )
            eot = options.get("eot", count.draws if target.early_stop is None else target.draws)
            spent[target.label] = spent.get(target.label, 0.0) + eot * each
    scale = len(x) / len(few)
    slowest = max(spent, key=lambda label: spent[label], default="")
    text = f"about {spell(scale * (verdicts + sum(spent.values())))} for {attacks} attacks on {len(x)} images"
    if len(spent) > 1:
        text += f"; slowest: {slowest}, {spell(scale * spent[slowest])}"
    return text + (f"; not counted: {', '.join(dict.fromkeys(unknown))}" if unknown else "")


def spell(seconds: float) -> str:
    """``"40 s"``, ``"12 min"``, ``"3.5 h"``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seconds(module: nn.Module, x: Tensor, gradient: bool) -> float:
    """One forward, and backward where a gradient is wanted, of these images; a first one, uncounted, warms up."""
    keys: dict[str, Any] = {}
    if takes_keys(module):
        keys = {"ids": torch.arange(len(x), device=x.device), "seed": 0}
    taken = math.inf
    with attack_mode(module), torch.set_grad_enabled(gradient):
        for _ in range(2):
            began = time.monotonic()
            leaf = x.detach().clone().requires_grad_(gradient)
            result = module(leaf, **keys).sum()
            if gradient:
                (result,) = torch.autograd.grad(result, leaf)
            result.sum().item()  # waits for the device
            taken = min(taken, time.monotonic() - began)
    return taken


class _Ticker:
    """Counts the images that pass a module, and tells of it in images done."""

    def __init__(self, stage: str, total: int, each: int, progress: Progress) -> None:
        self.stage, self.total, self.each, self.progress = stage, total, each, progress
        self.passed, self.began = 0, time.monotonic()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.passed += len(output)
        share = min(self.passed / (self.total * self.each), 1.0)
        left = (time.monotonic() - self.began) * (1 - share) / share
        self.progress(Status(self.stage, int(share * self.total), self.total, self.total, left))


@contextmanager
def watched(target: nn.Module, stage: str, total: int, each: int | None, progress: Progress | None) -> Iterator[None]:
    """Progress from every pass of an attack, not only when images leave.

    Args:
        target: what is attacked.
        stage: as the attack's own statuses call it.
        total: images attacked.
        each: passes an image; None where that is not known.
        progress: told; None keeps quiet.
    """
    if progress is None:
        yield
        return
    progress(Status(stage, 0, total, total, math.inf))
    if not each or isinstance(target, EmbeddingTarget):
        yield
        return
    hook = target.register_forward_hook(_Ticker(stage, total, each, progress))
    try:
        yield
    finally:
        hook.remove()
