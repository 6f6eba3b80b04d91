"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690): an ensemble without parameters to tune, on the survivors of each.

``standard`` is APGD-CE, APGD-T, FAB-T and Square, for deterministic models; ``rand`` is APGD-CE and APGD-DLR on
gradients averaged over 20 draws, for randomised ones, judged over several draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from clipdefense.attacks.context import check_finite, predict
from clipdefense.attacks.fab import fab_t
from clipdefense.attacks.forward import keyed
from clipdefense.attacks.options import Options, attack, labelled
from clipdefense.attacks.square import square
from clipdefense.checks import check_labels
from clipdefense.errors import UsageError, check_known, check_options, check_whole, unknown_name
from clipdefense.threat import ThreatModel

Stage = tuple[str, Callable[..., Tensor], dict[str, Any]]

VERSIONS: dict[str, tuple[Stage, ...]] = {
    "standard": (
        ("apgd-ce", apgd_ce, {"steps": 100}),
        ("apgd-t", apgd_t, {"steps": 100, "targets": 9}),
        ("fab-t", fab_t, {"steps": 100, "targets": 9}),
        ("square", square, {"queries": 5000}),
    ),
    "rand": (
        ("apgd-ce", apgd_ce, {"steps": 100, "eot": 20, "early_stop": False}),
        ("apgd-dlr", apgd_dlr, {"steps": 100, "eot": 20, "early_stop": False}),
    ),
}


@attack
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    verdict_draws: int = 5,
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Tensor:
    """Run the ensemble, each attack on the images that the ones before it left standing.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1].
        y: (N,) integer labels.
        threat: norm and eps.
        version: ``"standard"`` or ``"rand"``, which averages gradients over 20 draws (``eot`` overrides).
        verdict_draws: under ``rand``, an image is broken once it is misclassified on most of so many draws.
        stages: options of single attacks, ``{"apgd-t": {"targets": 5}}``.
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): a point that breaks the image, or the image as it came where none was found or it was wrong
        from the start.

    Raises:
        UsageError: bad arguments; under ``standard``, a model that is declared randomised or answers the same
            question twice differently; logits that are not finite.
    """
    if version not in VERSIONS:
        raise unknown_name("version", version, VERSIONS)
    check_whole("verdict_draws", verdict_draws, 1)
    task = engine.Task.of(model, x, y, threat, options)
    plan = list(_plan(version, stages or {}, {key: value for key, value in options.items() if key in _PASSED}))
    judge = _Judge(1 if version == "standard" else verdict_draws)
    if version == "standard":
        _refuse_randomized(task)
    right = ~judge.wrong(task, first=True)
    result, left = task.x.clone(), right.nonzero()[:, 0]
    for label, function, settings in plan:
        if not len(left) or threat.eps == 0:
            break
        standing = task.rows(left, labelled(task.options.progress, label))
        common = {"seed": task.seed, "ids": standing.ids}
        common |= {"progress": standing.options.progress, "doubts": standing.options.doubts}
        x_adv = function(model, standing.x, standing.y, threat, **(settings | common))
        broken = judge.wrong(replace(standing, x=x_adv))
        result[left[broken]] = x_adv[broken]
        task.options.doubts.fell(standing.ids[broken])
        left = left[~broken]
    return result


# what the parts take as the ensemble got it; the rest of the options is set for each part
_PASSED = {field.name for field in fields(Options)} - {"seed", "generator", "ids", "progress", "doubts"}


def _plan(version: str, stages: Mapping[str, Mapping[str, Any]], options: dict[str, Any]) -> Iterator[Stage]:
    """The version's attacks with the caller's options."""
    check_known(f"stage of autoattack's version {version!r}", stages, [stage for stage, _, _ in VERSIONS[version]])
    for name, function, _ in VERSIONS[version]:
        if not isinstance(own := stages.get(name, {}), Mapping):
            raise UsageError(f"stages[{name!r}] is {own!r}; a mapping of options is expected, such as {{'steps': 50}}.")
        check_options(function, dict(own), f"option of stage {name!r}", given=4)
        for option in {"seed", "generator", "ids", "progress"} & set(own):
            raise UsageError(f"stages[{name!r}] has {option!r}, which belongs to the whole ensemble; pass {option}=.")
    for name, function, own in VERSIONS[version]:
        yield name, function, own | options | dict(stages.get(name, {}))


class _Judge:
    """Verdicts of a deterministic model, or of a randomised one by the majority of several draws."""

    def __init__(self, draws: int) -> None:
        self.draws = draws

    def wrong(self, task: engine.Task, first: bool = False) -> Tensor:
        """(N,) misclassified on most of the draws."""
        count = torch.zeros(len(task.y), device=task.y.device)
        for draw in range(self.draws):
            keys = keyed(task.model, task.ids, task.seed + draw)
            logits = predict(task.model, task.x, batch_size=task.options.batch_size, **keys)
            check_finite(logits, task.ids)
            if first and draw == 0:
                check_labels(task.y, len(task.y), classes=logits.shape[1])
                task.options.doubts.of_outputs(logits)
            count += logits.argmax(dim=1) != task.y
        return count > self.draws / 2


def declares_randomized(model: nn.Module) -> bool:
    """Whether a part of the model, or the defence wrapped in it, has ``traits`` that say randomised."""
    owners = [owner for part in model.modules() for owner in (part, getattr(part, "defense", None))]
    return any(getattr(getattr(owner, "traits", None), "randomized", False) for owner in owners)


def _refuse_randomized(task: engine.Task) -> None:
    """One batch is asked twice, which a defence that forgot to declare itself does not survive."""
    why = "is declared randomised" if declares_randomized(task.model) else ""
    if not why:
        few, size = task.x[: task.options.batch_size], task.options.batch_size
        first, again = (predict(task.model, few, batch_size=size) for _ in range(2))
        difference = float((first - again).abs().max())
        if difference > 1e-4 * max(1.0, float(first.abs().max())):
            why = f"gives other logits when asked again (by up to {difference:.3g})"
    if why:
        raise UsageError(
            f"model {why}: version 'standard' would count one lucky draw as robustness or as a break; use "
            "version='rand', which averages gradients and judges over several draws."
        )
