"""TTC's passes against theory, and its wall time over those passes on the bare tower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipdefense.attacks.context import frozen
from clipdefense.classifier import ZeroShotClassifier
from clipdefense_ttc.ttc import TTC
from common import Passes, bare_step, interleaved, make_images, make_model


def theory(n: int, stable: int, steps: int) -> tuple[list[int], list[int]]:
    """(forward, backward) batch sizes that the method needs for one chunk, as its module docstring says."""
    if stable == 0:
        return [n, n], []
    if stable == n:
        return [n] * (1 + steps), [n] * steps
    return [n, n] + [stable] * steps, [stable] * steps


def bare(model: ZeroShotClassifier, normalised: Tensor, n: int, stable: int, steps: int) -> Callable[[], None]:
    """The same passes on the bare tower, with nothing around them."""

    def run() -> None:
        forward, backward = theory(n, stable, steps)
        with frozen(model):
            with torch.no_grad():
                for count in forward[: len(forward) - len(backward)]:
                    model.tower(normalised[:count])
            for count in backward:
                bare_step(model.tower, normalised[:count])

    return run


def test_ttc_passes_and_time(size: str, device: str, record: Callable[..., None]) -> None:
    model = make_model(size, device)
    n, repeats, steps = (256, 20, 2) if size == "full" else (32, 9, 2)
    x = make_images(model, n)
    ids = torch.arange(n, device=x.device)
    drift = TTC(model, batch_size=n).drift(x, ids=ids).sort().values
    # the gate's threshold decides who is benign: none, all, or half of the images count as attacked
    thresholds = {"benign": 0.0, "attacked": float("1e9"), "mixed": float(drift[n // 2 - 1 : n // 2 + 1].mean())}
    normalised = model.preprocess(x)
    figures: dict[str, object] = {"images": n, "steps": steps}
    for kind, threshold in thresholds.items():
        stable = {"benign": 0, "attacked": n, "mixed": n // 2}[kind]
        ttc = TTC(model, steps=steps, threshold=threshold, batch_size=n)
        passes = Passes(model.tower)
        ttc.perturbation(x, ids=ids)
        passes.stop()
        assert (passes.forward, passes.backward) == theory(n, stable, steps)

        def defend(ttc: TTC = ttc) -> None:
            ttc.perturbation(x, ids=ids)

        seconds = interleaved({"ttc": defend, "bare": bare(model, normalised, n, stable, steps)}, repeats, device)
        figures[kind] = {
            "forwards per image": sum(passes.forward) / n,
            "backwards per image": sum(passes.backward) / n,
            "theory": [sum(part) / n for part in theory(n, stable, steps)],
            "ms": 1000 * seconds["ttc"],
            "over the same passes on the bare tower": seconds["ttc"] / seconds["bare"],
        }
    record("ttc", figures)
