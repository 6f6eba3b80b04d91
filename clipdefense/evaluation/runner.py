"""One model, or one defence around it, under a list of attacks: who is attacked, what is judged, what is reported.

A test-time defence is always judged twice: on images made against the undefended model (transfer, the protocol under
which such defences are usually published) and on images made by an attacker who knows it (its adaptive views).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipdefense.attacks.context import check_finite, predict
from clipdefense.attacks.engine import prepare
from clipdefense.defenses import AttackView, TestTimeDefense, ViewModule
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.fingerprint import constructed, fingerprint
from clipdefense.evaluation.roles import check_counts, check_roles
from clipdefense.evaluation.statistics import Interval, wilson
from clipdefense.plugins import get_attack
from clipdefense.threat import ThreatModel, parse_eps

UNDEFENDED = "the model itself"
TRANSFER = "transfer from the undefended model"

Progress = Callable[[str], None]
"""Told what begins now, such as ``"ttc: pgd on bpda-eot"``."""


@dataclass(frozen=True)
class AttackSpec:
    """An attack by name with its options, written ``name,key=value,...``: ``pgd,steps=100,objective=margin``.

    Options are keyword arguments of the attack, or fields of the threat model (``steps``, ``restarts``,
    ``step_size``) that hold for this attack alone.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AttackSpec:
        """
        Raises:
            UsageError: a part that is not ``key=value``.
        """
        name, *parts = (part.strip() for part in text.split(","))
        options = []
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key or not value:
                raise UsageError(f"attack {text!r} has the part {part!r}; name,key=value,key=value is expected.")
            options.append((key.strip(), literal(value.strip())))
        return cls(name, tuple(options))

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options)])

    def bind(self, threat: ThreatModel) -> tuple[Callable[..., Tensor], ThreatModel, dict[str, Any]]:
        """The attack function, the threat model and the keyword arguments that this spec stands for.

        Raises:
            UsageError: an unknown attack, or an option that neither the attack nor the threat model has.
        """
        attack = get_attack(self.name)
        parameters = inspect.signature(attack).parameters.values()
        own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        of_threat = {f.name for f in fields(ThreatModel)} - {"norm", "eps"}
        passed: dict[str, Any] = {}
        changed: dict[str, Any] = {}
        for key, value in self.options:
            if key in own:
                passed[key] = value
            elif key in of_threat:
                changed[key] = value
            elif anything:
                passed[key] = value
            else:
                raise unknown_name(f"option of attack {self.name!r}", key, own | of_threat)
        return attack, replace(threat, **changed), passed


def parse_attacks(attacks: Sequence[str | AttackSpec], threat: ThreatModel) -> list[AttackSpec]:
    """The attacks as specs, each known to exist and to have its options.

    Raises:
        UsageError: none, or one that does not.
    """
    if isinstance(attacks, str):
        raise UsageError(f"attacks is the string {attacks!r}; a list is expected, such as [{attacks!r}].")
    specs = [spec if isinstance(spec, AttackSpec) else AttackSpec.parse(spec) for spec in attacks]
    if not specs:
        raise UsageError("attacks is empty; at least one attack is expected, such as 'pgd'.")
    for spec in specs:
        spec.bind(threat)
    return specs


def literal(text: str) -> Any:
    """A typed value: a whole number, a number, a fraction such as 4/255, true, false, none, else the text itself."""
    kinds: tuple[Callable[[str], Any], ...] = (int, float, parse_eps)
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


@dataclass(frozen=True)
class Row:
    """What one attack did.

    Attributes:
        attack: as written, e.g. ``"pgd,steps=100"``.
        attacked: what the attacker had gradients of.
        correct: (verdict seeds, n) whether the defended model was still right.
        adversarial: (n, C, H, W), only where asked for.
    """

    attack: str
    attacked: str
    correct: NDArray[np.bool_]
    adversarial: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy(self) -> float:
        """Mean over images and verdict seeds."""
        return float(self.correct.mean())

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval on n images."""
        return wilson(self.accuracy, self.correct.shape[1])


@dataclass(frozen=True)
class Evaluation:
    """One model or defence under every attack.

    Attributes:
        name: what was judged.
        threat: the attacker's budget.
        clean: a :class:`Row` without an attack.
        rows: one for each attack and thing attacked.
        adaptive: whether an attacker who knows the defence is among them; where not, every robust number is
            "transfer only".
        fingerprint: what the numbers depend on.
        ids: the images, in the order of the verdicts.
    """

    name: str
    threat: ThreatModel
    clean: Row
    rows: tuple[Row, ...]
    adaptive: bool
    fingerprint: dict[str, Any]
    ids: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        return self.clean.correct.shape[1]

    def worst_case(self) -> Row:
        """Right under every attack and every verdict seed, and on the clean image."""
        every = np.concatenate([self.clean.correct, *(row.correct for row in self.rows)])
        survived = np.asarray(every.all(axis=0))[None]
        label = "worst case per image" if self.adaptive else "worst case per image (transfer only)"
        return Row(label, f"{len(self.rows)} attacks", survived)

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Evaluations of the same things on disjoint images, as one.

        Raises:
            UsageError: they differ in what was judged or attacked, or share images.
        """
        first = parts[0]
        ids = tuple(name for part in parts for name in part.ids)
        same = {(part.name, part.threat, tuple((r.attack, r.attacked) for r in part.rows)) for part in parts}
        if len(same) > 1 or len(set(ids)) < len(ids):
            raise UsageError(
                "the evaluations differ in what was judged or attacked, or share images; they cannot be joined."
            )

        def join(rows: Sequence[Row]) -> Row:
            kept = [row.adversarial for row in rows if row.adversarial is not None]
            pictures = torch.cat(kept) if len(kept) == len(rows) else None
            return replace(rows[0], correct=np.concatenate([row.correct for row in rows], axis=1), adversarial=pictures)

        rows = tuple(join(same_attack) for same_attack in zip(*(part.rows for part in parts)))
        return replace(first, clean=join([part.clean for part in parts]), rows=rows, ids=ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every number with its attack, n and interval, and the verdict of each image."""

        def entry(row: Row) -> dict[str, Any]:
            return {
                "attack": row.attack,
                "attacked": row.attacked,
                "n": self.n,
                "verdict_seeds": len(row.correct),
                "accuracy": row.accuracy,
                "interval_95": list(row.interval),
                "correct": ["".join("01"[int(bit)] for bit in seed) for seed in row.correct],
            }

        return {
            "name": self.name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "adaptive": self.adaptive,
            "clean": entry(self.clean),
            "attacks": [entry(row) for row in self.rows],
            "worst_case": entry(self.worst_case()),
            "ids": list(self.ids),
            "fingerprint": self.fingerprint,
        }


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    attacks: Sequence[str | AttackSpec] = ("pgd,steps=10", "apgd-ce"),
    defense: TestTimeDefense | None = None,
    views: Sequence[str] | None = None,
    cumulative: bool = False,
    name: str = "",
    eot: int | None = None,
    verdict_seeds: int = 5,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int = 128,
    keep_adversarial: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Clean and robust accuracy of a model, or of a test-time defence around it.

    Args:
        model: images in [0, 1] -> logits.
        x: (N, C, H, W) in [0, 1]; y: (N,) integer labels.
        threat: the attacker's budget.
        attacks: names with options, see :class:`AttackSpec`. Each runs on the model, and for a defence on each of
            its adaptive views too.
        defense: a test-time defence; None judges the model itself.
        views: names of the defence's adaptive views to attack; None takes all.
        cumulative: on each thing attacked, an attack gets only the images that those before it left standing, and
            its row says what is left after all of them, as AutoAttack counts. Much shorter. An image that is wrong
            on most draws counts as fallen, on all of them.
        name: for the report; the class name when empty.
        eot: gradient draws a step on adaptive views; None takes each view's own number.
        verdict_seeds: draws over which a randomised defence is judged.
        seed: of attacks and defence draws.
        ids: (N,) image ids that key every draw; 0 .. N-1 when not given.
        batch_size: images a forward.
        keep_adversarial: keep each attack's images in the rows.
        progress: told what begins.

    Returns:
        An :class:`Evaluation`; images that are wrong before any attack count as not robust.

    Raises:
        UsageError: bad images, labels, attacks or options, before anything runs.
    """
    check_roles(model, threat, defense, views, eot)
    check_counts(verdict_seeds=verdict_seeds, batch_size=batch_size, eot=1 if eot is None else eot)
    _, ids = prepare(model, x, y, seed, None, ids)
    specs = parse_attacks(attacks, threat)
    title = name or type(model if defense is None else defense).__name__
    job = _Job(model, defense, views, x, y, ids, seed, verdict_seeds, eot, batch_size, keep_adversarial)

    clean = Row("none", "nothing", job.verdicts(x))
    say = (lambda text: None) if progress is None else lambda text: progress(f"{title}: {text}")
    rows = job.rows(specs, threat, clean, cumulative, say)
    adaptive = defense is None or len(job.views) > 0
    facts = fingerprint(model, **job.settings(), cumulative=cumulative, attacks=[str(spec) for spec in specs])
    return Evaluation(title, threat, clean, tuple(rows), adaptive, facts, tuple(ids.tolist()))


def _left(correct: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(draws, n) verdicts with those of an image that is wrong on most draws struck out."""
    kept: NDArray[np.bool_] = correct & (correct.mean(axis=0) > 0.5)
    return kept


def _select(views: tuple[AttackView, ...], names: Sequence[str] | None) -> tuple[AttackView, ...]:
    """The views of these names, in their own order; all of them for None."""
    known = [view.name for view in views]
    for name in names or ():
        if name not in known:
            raise unknown_name("view", name, known)
    return tuple(view for view in views if names is None or view.name in names)


class _Job:
    """What stays the same over the attacks of one evaluation."""

    def __init__(
        self,
        model: nn.Module,
        defense: TestTimeDefense | None,
        views: Sequence[str] | None,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        seed: int,
        verdict_seeds: int,
        eot: int | None,
        batch_size: int,
        keep: bool,
    ) -> None:
        self.model, self.defense, self.x, self.y, self.ids = model, defense, x, y, ids
        self.seed, self.eot, self.batch_size, self.keep = seed, eot, batch_size, keep
        self.randomized = defense is not None and defense.traits.randomized
        self.seeds = range(seed, seed + verdict_seeds) if self.randomized else range(seed, seed + 1)
        self.judge = model if defense is None else defense.wrap(model)
        self.views = () if defense is None else _select(defense.adaptive(model), views)

    def settings(self) -> dict[str, Any]:
        """What the verdicts depend on besides the model and the attacks."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "attacked_at": list(self.x.shape[2:]),
            "verdict_seeds": list(self.seeds),
            "defense": None if self.defense is None else constructed(self.defense),
            "views": {view.name: view.eot if self.eot is None else self.eot for view in self.views},
        }

    def targets(self) -> list[tuple[str, nn.Module, int]]:
        """(label, module to attack, EOT draws)."""
        own = UNDEFENDED if self.defense is None else TRANSFER
        targets: list[tuple[str, nn.Module, int]] = [(own, self.model, 1)]
        for view in self.views:
            draws = view.eot if self.eot is None else self.eot
            label = f"adaptive view {view.name}" + (f", {draws} EOT draws" if draws > 1 else "")
            targets.append((label, ViewModule(view, self.model, self.seed), draws))
        return targets

    def verdicts(self, x: Tensor) -> NDArray[np.bool_]:
        """(verdict seeds, N) whether the judged model is right."""
        correct = []
        for seed in self.seeds:
            keys = {"ids": self.ids, "seed": seed} if self.randomized else {}
            logits = predict(self.judge, x, batch_size=self.batch_size, **keys)
            check_finite(logits, self.ids)
            correct.append((logits.argmax(dim=1) == self.y).cpu().numpy())
        return np.stack(correct)

    def rows(
        self, specs: Sequence[AttackSpec], threat: ThreatModel, clean: Row, cumulative: bool, say: Progress
    ) -> list[Row]:
        """Every attack on everything there is to attack."""
        rows = []
        for label, target, draws in self.targets():
            standing = clean
            for spec in specs:
                say(f"{spec} on {label}")
                row = self.attack(spec, threat, label, target, draws, standing)
                if cumulative:
                    after = f"{'+ ' if standing is not clean else ''}{row.attack}"
                    row = standing = replace(row, attack=after, correct=_left(row.correct & standing.correct))
                rows.append(row)
        return rows

    def attack(
        self, spec: AttackSpec, threat: ThreatModel, label: str, target: nn.Module, draws: int, standing: Row
    ) -> Row:
        """Attack every image that is still right on some draw, and judge the result."""
        function, budget, options = spec.bind(threat)
        parameters = inspect.signature(function).parameters
        common: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size}
        if self.defense is not None:
            # An image that only just crossed the undefended boundary, or a view that is wrong on some draws, says
            # little about the defence: every image goes through all steps.
            common |= {"eot": draws, "early_stop": False}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        common = {k: v for k, v in common.items() if k in parameters or (open_ended and k == "batch_size")}
        if isinstance(target, ViewModule):  # a row does not depend on which attacks came before it
            target.numbers.seen = 0
        x_adv = self.x.clone()
        rows = torch.from_numpy(standing.correct.any(axis=0)).to(self.x.device)
        if rows.any():
            x_adv[rows] = function(target, self.x[rows], self.y[rows], budget, ids=self.ids[rows], **(common | options))
        return Row(str(spec), label, self.verdicts(x_adv), x_adv.cpu() if self.keep else None)
