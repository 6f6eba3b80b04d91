"""One model, or one defence around it, under a list of attacks: who is attacked, what is judged, what is reported.

A test-time defence is always judged twice: on images made against the undefended model (transfer, the protocol under
which such defences are usually published) and on images made by an attacker who knows it (its adaptive views). An
adaptive evaluation does more of the second, see :class:`clipdefense.attacks.adaptive.Adaptive`.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipdefense.attacks.adaptive import Adaptive, passes
from clipdefense.attacks.context import predict
from clipdefense.attacks.doubts import Doubts
from clipdefense.attacks.engine import prepare
from clipdefense.attacks.options import Progress, can_be_tried, labelled, takes_doubts, takes_effort
from clipdefense.defenses import TestTimeDefense, ViewModule
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.answers import ask
from clipdefense.evaluation.cost import SINGLE, estimate, watched
from clipdefense.evaluation.fingerprint import constructed, fingerprint
from clipdefense.evaluation.results import Evaluation, Kind, Row, still_standing
from clipdefense.evaluation.roles import check_counts, check_roles
from clipdefense.evaluation.targets import TRANSFER, Plan, Target, has_views, is_randomized, select, views_of
from clipdefense.generators import global_seed
from clipdefense.plugins import get_attack
from clipdefense.threat import ThreatModel, parse_eps


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

    def option(self, key: str, default: Any = None) -> Any:
        """The option's value as written."""
        return dict(self.options).get(key, default)

    def takes(self, parameter: str) -> bool:
        """Whether the attack has that keyword argument."""
        return parameter in inspect.signature(get_attack(self.name)).parameters

    def bind(self, threat: ThreatModel) -> tuple[Callable[..., Tensor], ThreatModel, dict[str, Any]]:
        """The attack function, the threat model and the keyword arguments that this spec stands for.

        Raises:
            UsageError: an unknown attack, or an option that neither the attack nor the threat model has.
        """
        attack = get_attack(self.name)
        parameters = inspect.signature(attack).parameters.values()
        own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        of_threat = {f.name for f in fields(ThreatModel)} - {"norm", "eps"} if takes_effort(attack) else set()
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

    def check(self, threat: ThreatModel) -> None:
        """Require that the attack exists, has its options, and does something.

        Raises:
            UsageError: it would return every image as it came, and its row would pass the clean accuracy off as robust.
        """
        _, budget, options = self.bind(threat)
        effort = {key: options[key] for key in ("steps", "queries", "targets") if key in options}
        if not (self.takes("steps") or self.takes("queries") or self.takes("stages")):
            effort["steps"] = budget.steps
        for key, value in effort.items():
            if value == 0:
                raise UsageError(
                    f"attack {str(self)!r} has {key} = 0: it would change no image, and the clean accuracy would look "
                    "robust; at least 1 is expected."
                )


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
        spec.check(threat)
    return specs


def rehearse(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, specs: Sequence[AttackSpec]) -> None:
    """Start each attack that can be tried on one image that may not be changed: options of the wrong kind show at once.

    Args:
        model: what is going to be attacked.
        x: (1, C, H, W) in [0, 1]; y: (1,) its label.
        threat: the budget.
        specs: the attacks.

    Raises:
        UsageError: an attack that does not start; names it.
    """
    for spec in specs:
        function, budget, options = spec.bind(threat)
        if not options or not can_be_tried(function):
            continue  # what the threat model has was checked when it was made
        try:
            with warnings.catch_warnings(), global_seed(0):
                warnings.simplefilter("ignore")  # what is doubtful is told when it is attacked in earnest
                function(model, x, y, replace(budget, eps=0.0, step_size=None), **options)
        except (UsageError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise UsageError(f"attack {str(spec)!r} cannot be run: {error}") from error


def literal(text: str) -> Any:
    """A typed value: a whole number, a number, a fraction such as 4/255, true, false, none, else the text itself."""
    kinds: tuple[Callable[[str], Any], ...] = (int, float, parse_eps)
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    attacks: Sequence[str | AttackSpec] = ("pgd,steps=10", "apgd-ce"),
    defense: TestTimeDefense | None = None,
    adaptive: bool | Adaptive = False,
    views: Sequence[str] | None = None,
    cumulative: bool = False,
    name: str = "",
    eot: int | None = None,
    verdict_seeds: int = 5,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int = 128,
    keep_adversarial: bool = False,
    on_row: Callable[[Row, Tensor], None] | None = None,
    progress: Callable[[str], None] | None = None,
    watch: Progress | None = None,
) -> Evaluation:
    """Clean and robust accuracy of a model, or of a test-time defence around it.

    Args:
        model: images in [0, 1] -> logits. The views of a model's own ``adaptive()`` are attacked as a defence's are.
        x: (N, C, H, W) in [0, 1]; y: (N,) integer labels.
        threat: the attacker's budget.
        attacks: names with options, see :class:`AttackSpec`; run on the model and on each adaptive view.
        defense: a test-time defence; None judges the model itself.
        adaptive: attack all that :class:`clipdefense.attacks.adaptive.Adaptive` (which sets the budgets) lists. A
            `square` or a `pgd,objective=drift` among the attacks takes the place of the suite's own.
        views: names of the adaptive views to attack; None takes all.
        cumulative: on each thing attacked, an attack gets only the images that those before it left standing, and
            its row says what is left, as AutoAttack counts. An image wrong on most draws counts as fallen on all.
        name: for the report; the class name when empty.
        eot: gradient draws a step on adaptive views; None takes each view's own number.
        verdict_seeds: draws over which a randomised defence is judged.
        seed: of attacks and defence draws.
        ids: (N,) distinct image ids that key every draw; 0 .. N-1 when not given.
        batch_size: images a forward.
        keep_adversarial: keep each attack's images in the rows.
        on_row: given each row and its images (N, C, H, W), on x's device: x plus what can be stored, to the last bit.
        progress: told what begins, such as ``"ttc: pgd on adaptive view bpda-eot"``.
        watch: told how far each attack is, see :func:`clipdefense.attacks.progress_bar`. With it, ``progress`` is told
            at the start how long the attacks on a defence will take.

    Returns:
        An :class:`Evaluation`; images that are wrong before any attack count as not robust.

    Raises:
        UsageError: bad images, labels, attacks or options, before any attack runs.
    """
    check_roles(model, threat, defense, views, eot)
    check_counts(verdict_seeds=verdict_seeds, batch_size=batch_size, eot=1 if eot is None else eot)
    _, ids = prepare(model, x, y, seed, None, ids)
    specs = parse_attacks(attacks, threat)
    job = _Job(model, defense, x, y, ids, threat, seed, verdict_seeds, batch_size, keep_adversarial, on_row, watch)
    plan = job.plan(specs, adaptive, views, eot)
    return job.run(plan, cumulative, name or type(model if defense is None else defense).__name__, progress)


class _Job:
    """What stays the same over the attacks of one evaluation."""

    def __init__(
        self,
        model: nn.Module,
        defense: TestTimeDefense | None,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        threat: ThreatModel,
        seed: int,
        verdict_seeds: int,
        batch_size: int,
        keep: bool,
        on_row: Callable[[Row, Tensor], None] | None,
        watch: Progress | None,
    ) -> None:
        self.model, self.defense, self.x, self.y, self.ids, self.threat = model, defense, x, y, ids, threat
        self.seed, self.batch_size, self.keep, self.on_row, self.watch = seed, batch_size, keep, on_row, watch
        self.randomized = is_randomized(model, defense)
        self.seeds = range(seed, seed + verdict_seeds) if self.randomized else range(seed, seed + 1)
        self.judge = model if defense is None else defense.wrap(model)

    def plan(
        self, specs: Sequence[AttackSpec], adaptive: bool | Adaptive, views: Sequence[str] | None, eot: int | None
    ) -> Plan:
        """What is going to be attacked.

        Raises:
            UsageError: an unknown view, or what an attack would break off over.
        """
        suite = (adaptive if isinstance(adaptive, Adaptive) else Adaptive()) if adaptive else None
        if suite is not None and self.randomized and len(self.seeds) < suite.verdict_seeds:
            raise UsageError(
                f"verdict_seeds is {len(self.seeds)}; an adaptive evaluation judges a randomised defence over at least "
                f"{suite.verdict_seeds}."
            )
        extra = parse_attacks([suite.black_box, suite.label_free], self.threat) if suite is not None else []
        plan = Plan(
            model=self.model,
            judge=self.judge,
            defense=self.defense,
            views=select(views_of(self.model, self.defense), views),
            randomized=self.randomized,
            specs=tuple(specs),
            eot=eot,
            seed=self.seed,
            suite=suite,
            extra=tuple(extra),
            same=self.same(self.x),
            sample=self.x[:1],
        )
        plan.check()
        own = [spec for spec in plan.specs if suite is None or spec.option("objective") != "drift"]
        rehearse(self.model, self.x[:1], self.y[:1], self.threat, own)
        return plan

    def run(self, plan: Plan, cumulative: bool, title: str, progress: Callable[[str], None] | None) -> Evaluation:
        """Every attack of the plan, judged."""
        targets, left_out = plan.targets()
        clean = self.judged(self.x, "none", "nothing", "clean")
        say = (lambda text: None) if progress is None else lambda text: progress(f"{title}: {text}")
        if self.watch is not None and (self.defense is not None or plan.views):
            say(estimate(targets, self.judge, len(self.seeds), self.x, self.threat, self.batch_size))
        rows = tuple(row for target in targets for row in self.rows(target, clean, cumulative, say))
        undefended = self.defense is None and not has_views(self.model)
        names = [str(spec) for spec in plan.specs]
        facts = fingerprint(self.model, **self.settings(plan), cumulative=cumulative, attacks=names)
        knows, ids = undefended or bool(plan.views), tuple(self.ids.tolist())
        return Evaluation(title, self.threat, clean, rows, knows, facts, ids, tuple(left_out))

    def same(self, x: Tensor) -> bool:
        """Whether the deployed model is the undefended one, to the last bit on these images."""
        if self.judge is self.model:
            return True
        if self.randomized:
            return False
        deployed, undefended = (predict(module, x, batch_size=self.batch_size) for module in (self.judge, self.model))
        return deployed.shape == undefended.shape and torch.equal(deployed, undefended)

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What the verdicts depend on besides the model and the attacks."""
        return {
            "threat": {**asdict(self.threat), "alpha": self.threat.alpha},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "attacked_at": list(self.x.shape[2:]),
            "verdict_seeds": list(self.seeds),
            "defense": None if self.defense is None else constructed(self.defense),
            "views": {view.name: view.eot if plan.eot is None else plan.eot for view in plan.views},
            "adaptive": None if plan.suite is None else asdict(plan.suite),
        }

    def judged(self, x: Tensor, attack: str, attacked: str, kind: Kind, draws: int = 1) -> Row:
        """What the judged model says of these images."""
        answers = ask(self.judge, x, self.y, self.ids, self.seeds, self.batch_size)
        return Row(attack, attacked, answers.predicted == self.y.cpu().numpy(), None, kind, draws, answers)

    def rows(self, target: Target, clean: Row, cumulative: bool, say: Callable[[str], None]) -> list[Row]:
        """Every attack of one target."""
        rows = []
        standing = clean
        for spec in target.specs:
            stage = f"{spec} on {target.label}"
            say(stage)
            row, x_adv = self.attack(spec, target, standing, stage)
            if cumulative:
                after = f"{'+ ' if standing is not clean else ''}{row.attack}"
                row = standing = replace(row, attack=after, correct=still_standing(row.correct, standing.correct))
            rows.append(row)
            if self.on_row is not None:
                self.on_row(row, x_adv)
            del x_adv  # the next attack may need the memory
        return rows

    def attack(self, spec: AttackSpec, target: Target, standing: Row, stage: str) -> tuple[Row, Tensor]:
        """Attack every image that is still right on some draw, and judge the result: the row, and its images."""
        function, budget, options = spec.bind(self.threat)
        parameters = inspect.signature(function).parameters
        common: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size}
        if target.early_stop is not None:
            common |= {"eot": target.draws, "early_stop": target.early_stop}
        common |= {} if self.watch is None else {"progress": labelled(self.watch, stage)}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        common = {k: v for k, v in common.items() if k in parameters or (open_ended and k == "batch_size")}
        for part in target.module.modules():  # a row does not depend on which attacks came before it
            if isinstance(part, ViewModule):
                part.numbers.seen = 0
        x_adv, spent = self.x.clone(), Doubts()
        common |= {"doubts": spent} if takes_doubts(function) else {}
        rows = torch.from_numpy(standing.correct.any(axis=0)).to(self.x.device)
        if rows.any():
            count = None
            if spec.name in SINGLE and not target.early_stop and not options.get("compile"):
                count = passes(spec.name, budget, options, classes=0)
            each = None if count is None else count.total * options.get("eot", target.draws)
            with watched(target.module, stage, int(rows.sum()), each, self.watch):
                arguments = common | options
                x_adv[rows] = function(
                    target.module, self.x[rows], self.y[rows], budget, ids=self.ids[rows], **arguments
                )
            spent.tell()
        x_adv = self.x + (x_adv - self.x)  # what a stored perturbation gives, which may be a rounding away
        attacked, kind = target.label, target.kind
        if kind == "itself" and not self.same(x_adv):  # the defence acts on attacked images only
            attacked, kind = TRANSFER, "transfer"
        row = self.judged(x_adv, str(spec), attacked, kind, target.draws)
        steps = spent.steps(self.ids).cpu().numpy() if takes_doubts(function) else None
        return replace(row, adversarial=x_adv.cpu() if self.keep else None, steps=steps), x_adv
