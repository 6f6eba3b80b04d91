"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690): an ensemble without parameters to tune, on the survivors of each.

``standard`` is APGD-CE, APGD-T, FAB-T and Square, for deterministic models; ``rand`` is APGD-CE and APGD-DLR on
gradients averaged over 20 draws, for randomised ones, judged over several draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks import engine
from clipdefense.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from clipdefense.attacks.context import check_finite, predict
from clipdefense.attacks.fab import fab_t
from clipdefense.attacks.forward import keyed
from clipdefense.attacks.options import Options, attack, checks_at_zero, labelled, parameter_free
from clipdefense.attacks.square import square
from clipdefense.checks import check_labels
from clipdefense.errors import UsageError, check_known, check_options, check_whole, unknown_name
from clipdefense.threat import ThreatModel

Stage = tuple[str, Callable[..., Tensor], dict[str, Any]]
Stages = str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None
"""See the argument of :func:`autoattack`."""

# as published for a deterministic model: one restart of each
_ATTACKS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "apgd-ce": (apgd_ce, {"steps": 100}),
    "apgd-dlr": (apgd_dlr, {"steps": 100}),
    "apgd-t": (apgd_t, {"steps": 100, "targets": 9}),
    "fab-t": (fab_t, {"steps": 100, "targets": 9}),
    "square": (square, {"queries": 5000}),
}
# what a version changes for each of its attacks
_CHANGES: dict[str, dict[str, Any]] = {"standard": {}, "rand": {"eot": 20, "early_stop": False}}


def _stage(version: str, name: str) -> Stage:
    function, own = _ATTACKS[name]
    return name, function, own | _CHANGES[version]


VERSIONS: dict[str, tuple[Stage, ...]] = {
    "standard": tuple(_stage("standard", name) for name in ("apgd-ce", "apgd-t", "fab-t", "square")),
    "rand": tuple(_stage("rand", name) for name in ("apgd-ce", "apgd-dlr")),
}


@checks_at_zero
@parameter_free
@attack
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    verdict_draws: int = 5,
    stages: Stages = None,
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
        stages: which attacks, in this order, instead of the version's own: ``"apgd-ce+apgd-dlr"``, or a sequence of
            such names (``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab-t``, ``square``), each as the version would run it.
            A mapping keeps the version's attacks and gives options of single ones, ``{"apgd-t": {"targets": 5}}``.
        options: see :class:`clipdefense.attacks.options.Options`.

    Returns:
        (N, C, H, W): a point that breaks the image, or the image as it came where none was found or it was wrong
        from the start.

    Raises:
        UsageError: bad arguments, before any attack runs; under ``standard``, a model that is declared randomised or
            answers the same question twice differently; logits that are not finite.
    """
    listed, own = stages_of(version, stages), stages if isinstance(stages, Mapping) else {}
    check_whole("verdict_draws", verdict_draws, 1)
    task = engine.Task.of(model, x, y, threat, options)
    passed = {key: value for key, value in options.items() if key in _PASSED}
    plan = [(name, function, settings | passed | dict(own.get(name, {}))) for name, function, settings in listed]
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


def stages_of(version: str = "standard", stages: Stages = None) -> tuple[Stage, ...]:
    """The attacks that a version and ``stages`` stand for: (name, function, the version's settings), in their order.

    Args:
        version, stages: as :func:`autoattack` takes them.

    Raises:
        UsageError: an unknown version, attack or option, or a name that is given twice, or none.
    """
    if version not in VERSIONS:
        raise unknown_name("version", str(version), VERSIONS)
    if stages is None:
        return VERSIONS[version]
    if isinstance(stages, Mapping):
        _check_own_options(version, stages)
        return VERSIONS[version]
    names = [name.strip() for name in stages.split("+")] if isinstance(stages, str) else stages
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"stages is {stages!r}; names of attacks joined by + are expected, such as 'apgd-ce+apgd-dlr', or a "
            "sequence of names."
        )
    check_known("stage of autoattack", names, _ATTACKS)
    if len(set(names)) < len(names):
        raise UsageError(f"stages is {stages!r}, which has a name twice; an attack repeats itself, so once is enough.")
    return tuple(_stage(version, name) for name in names)


def _check_own_options(version: str, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Require options that the version's attacks have."""
    functions = {name: function for name, function, _ in VERSIONS[version]}
    check_known(f"stage of autoattack's version {version!r}", stages, functions)
    for name, own in stages.items():
        if not isinstance(own, Mapping):
            raise UsageError(f"stages[{name!r}] is {own!r}; a mapping of options is expected, such as {{'steps': 50}}.")
        check_options(functions[name], dict(own), f"option of stage {name!r}", given=4)
        for option in {"seed", "generator", "ids", "progress"} & set(own):
            raise UsageError(f"stages[{name!r}] has {option!r}, which belongs to the whole ensemble; pass {option}=.")


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
