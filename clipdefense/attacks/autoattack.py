"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690): an ensemble without parameters to tune, on the survivors of each.

``standard`` is APGD-CE, APGD-T, FAB-T and Square, for deterministic models; ``rand`` is APGD-CE and APGD-DLR on
gradients averaged over 20 draws, for randomised ones, judged over several draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from clipdefense.attacks.context import predict
from clipdefense.attacks.fab import fab_t
from clipdefense.attacks.objectives import cross_entropy
from clipdefense.attacks.square import square
from clipdefense.errors import UsageError, unknown_name
from clipdefense.threat import ThreatModel

Attack = Callable[..., Tensor]
Stage = tuple[str, Attack, dict[str, Any]]

VERSIONS: dict[str, tuple[Stage, ...]] = {
    "standard": (
        ("apgd-ce", apgd_ce, {"steps": 100}),
        ("apgd-t", apgd_t, {"steps": 100, "targets": 9}),
        ("fab-t", fab_t, {"steps": 100, "targets": 9}),
        ("square", square, {"queries": 5000}),
    ),
    "rand": (
        ("apgd-ce", apgd_ce, {"steps": 100}),
        ("apgd-dlr", apgd_dlr, {"steps": 100}),
    ),
}
RAND_EOT = 20


class AutoAttackWarning(UserWarning):
    """Something about the model makes AutoAttack's verdict doubtful."""


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    eot: int | None = None,
    verdict_draws: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    generator: torch.Generator | None = None,
    ids: Tensor | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: dict[str, Any],
) -> Tensor:
    """Run the ensemble, each attack on the images that the ones before it left standing.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps.
        version: ``"standard"`` or ``"rand"``.
        eot: gradient draws a step of ``rand`` (published: 20).
        verdict_draws: under ``rand``, an image counts as broken only if it is misclassified on most of so many draws.
        batch_size: images a forward.
        seed, generator, ids: key the random draws.
        progress: called before each attack with its name, images and how many still stand.
        options: keyword arguments of single attacks, ``apgd_t={"targets": 5}``.

    Returns:
        (N, C, H, W): a point that breaks the image, or the image as it came where none was found or it was wrong
        from the start.

    Raises:
        UsageError: bad arguments; under ``standard``, a model that answers the same question twice differently.
    """
    if version not in VERSIONS:
        raise unknown_name("version", version, VERSIONS)
    seed, names = engine.prepare(model, x, y, seed, generator, ids)
    stages = list(_stages(version, options))
    logits = predict(model, x, batch_size=batch_size)
    if version == "standard":
        _require_deterministic(model, x, batch_size, logits)
    _warn_of_probabilities(logits)
    y = y.long()
    result = x.detach().clone()
    left = torch.nonzero(logits.argmax(dim=1) == y)[:, 0]
    _warn_of_zero_gradients(model, x[left], y[left], batch_size)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    if version == "rand":
        common |= {"eot": RAND_EOT if eot is None else eot, "early_stop": False}
    for label, attack, own in stages:
        if not len(left):
            break
        if progress is not None:
            progress(label, len(x), len(left))
        x_adv = attack(model, x[left], y[left], threat, ids=names[left], **(common | own))
        draws = 1 if version == "standard" else verdict_draws
        broken = _broken(model, x_adv, y[left], batch_size, draws)
        result[left[broken]] = x_adv[broken]
        left = left[~broken]
    return result


def _stages(version: str, options: dict[str, dict[str, Any]]) -> Iterator[Stage]:
    """The version's attacks with the caller's options."""
    known = {name.replace("-", "_") for name, _, _ in VERSIONS[version]}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of attack 'autoattack' ({version})", option, known)
    for name, attack, own in VERSIONS[version]:
        yield name, attack, own | options.get(name.replace("-", "_"), {})


def _broken(model: nn.Module, x_adv: Tensor, y: Tensor, batch_size: int, draws: int) -> Tensor:
    """(N,) misclassified on most of the draws."""
    wrong = torch.zeros(len(y), device=y.device)
    for _ in range(draws):
        wrong += predict(model, x_adv, batch_size=batch_size).argmax(dim=1) != y
    return wrong > draws / 2


def _require_deterministic(model: nn.Module, x: Tensor, batch_size: int, logits: Tensor) -> None:
    few = x[:batch_size]
    difference = float((predict(model, few, batch_size=batch_size) - logits[: len(few)]).abs().max())
    if difference > 1e-4 * max(1.0, float(logits.abs().max())):
        raise UsageError(
            f"model gives other logits when asked again (by up to {difference:.3g}): version 'standard' would count one "
            "lucky draw as robustness or as a break; use version='rand', and judge over several draws."
        )


def _warn_of_probabilities(logits: Tensor) -> None:
    sums = logits.sum(dim=1)
    if (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        warnings.warn(
            "model returns probabilities (each row sums to 1): cross-entropy on them saturates and DLR loses its scale, "
            "so attacks look weaker than they are; return logits.",
            AutoAttackWarning,
            stacklevel=3,
        )


def _warn_of_zero_gradients(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> None:
    """A model whose gradients are zero is not robust: it is not attacked."""
    if not len(x):
        return
    few, labels = x[:batch_size], y[:batch_size]
    with engine.attack_mode(model):
        _, gradient, _ = engine.evaluate(model, few, lambda logits: cross_entropy(logits, labels), labels=labels)
    dead = int((gradient.flatten(1) == 0).all(dim=1).sum())
    if dead:
        warnings.warn(
            f"{dead} of {len(few)} images have an input gradient of exactly zero: gradient attacks cannot move there, "
            "and what they leave standing must not be called robust; Square alone is a test of such a model.",
            AutoAttackWarning,
            stacklevel=3,
        )
