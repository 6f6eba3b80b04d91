"""Who is attacked: the undefended model, the defence's views, the defended model itself, and embeddings through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipdefense.attacks.adaptive import Adaptive, EmbeddingTarget
from clipdefense.attacks.autoattack import declares_randomized
from clipdefense.attacks.forward import Embedder, takes_keys
from clipdefense.defenses import AttackView, InputDefense, TestTimeDefense, ViewModule
from clipdefense.errors import UsageError, unknown_name
from clipdefense.evaluation.results import Kind

if TYPE_CHECKING:
    from clipdefense.evaluation.runner import AttackSpec

UNDEFENDED = "the model itself"
TRANSFER = "transfer from the undefended model"


@dataclass(frozen=True)
class Target:
    """A module to attack.

    Attributes:
        label: what the attacker has, for the report.
        module: images -> logits (or, for the label-free attack, with an ``embed``).
        kind: for :class:`clipdefense.evaluation.results.Row`.
        specs: the attacks that run on it.
        draws: EOT draws of each.
        early_stop: whether an image may leave once the module calls it wrong; None leaves that to the attack.
    """

    label: str
    module: nn.Module
    kind: Kind
    specs: tuple[AttackSpec, ...]
    draws: int = 1
    early_stop: bool | None = False


class Surrogate(ViewModule):
    """A view for gradients, the deployed model for verdicts.

    An ensemble asks, without gradients, what it has broken. A view is a stand-in, and its answer would be about
    itself: an image that the view calls broken would leave, and one that the defence gets wrong would be handed back
    unharmed.
    """

    def __init__(self, view: AttackView, model: nn.Module, judge: nn.Module, seed: int) -> None:
        """
        Args:
            view: what gives gradients.
            model: the undefended model inside it.
            judge: what is deployed.
            seed: of the draws.
        """
        super().__init__(view, model, seed)
        self.judge, self.keyed = judge, takes_keys(judge)

    def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """The view's logits where gradients are on, the deployed model's where they are off."""
        if torch.is_grad_enabled():
            return super().forward(x, ids, seed)
        if not self.keyed:
            return self.judge(x)
        ids = self.numbers.next(x) if ids is None else ids
        return self.judge(x, ids=ids, seed=self.seed if seed is None else seed)


def views_of(model: nn.Module, defense: TestTimeDefense | None) -> tuple[AttackView, ...]:
    """The adaptive views of the defence, or those that a model has of itself."""
    if defense is not None:
        return tuple(defense.adaptive(model))
    return tuple(model.adaptive()) if has_views(model) else ()  # type: ignore[operator]


def has_views(model: Any) -> bool:
    """Whether the model itself says how it is to be attacked (reverse attention does)."""
    return callable(getattr(model, "adaptive", None))


def select(views: tuple[AttackView, ...], names: Sequence[str] | None) -> tuple[AttackView, ...]:
    """The views of these names, in their own order; all of them for None."""
    known = [view.name for view in views]
    for name in names or ():
        if name not in known:
            raise unknown_name("view", name, known)
    return tuple(view for view in views if names is None or view.name in names)


def is_randomized(model: nn.Module, defense: TestTimeDefense | None) -> bool:
    """Whether verdicts are to be taken over several seeds."""
    if defense is not None:
        return defense.traits.randomized
    return declares_randomized(model) and takes_keys(model)


@dataclass(frozen=True)
class Plan:
    """What an evaluation attacks, in the order of its rows.

    Attributes:
        model: the undefended model.
        judge: the deployed one.
        defense: None where the model is judged by itself.
        views: the adaptive views to attack.
        randomized: the deployed model draws.
        specs: the attacks asked for.
        eot: gradient draws on views, None for each view's own number.
        seed: of the draws.
        suite: what an adaptive evaluation does besides, None for a plain one.
        extra: the suite's own attacks, (black box, label-free).
        same: the deployed model says what the undefended one says.
        sample: (1, C, H, W), an image to try things on.
    """

    model: nn.Module
    judge: nn.Module
    defense: TestTimeDefense | None
    views: tuple[AttackView, ...]
    randomized: bool
    specs: tuple[AttackSpec, ...]
    eot: int | None
    seed: int
    suite: Adaptive | None
    extra: tuple[AttackSpec, ...]
    same: bool
    sample: Tensor

    def check(self) -> None:
        """
        Raises:
            UsageError: an attack that would break off once it came to the defended model.
        """
        deterministic = any(
            s.name == "autoattack" and s.option("version", "standard") == "standard" for s in self.specs
        )
        if deterministic and self.randomized and (self.views or self.defense is None):
            raise UsageError(
                "attack 'autoattack' is version 'standard', which would count one lucky draw as robustness, and the "
                "model is declared randomised; write autoattack,version=rand."
            )
        if self.suite is not None and self.views and not self._by_gradient():
            raise UsageError(
                f"attacks is {[str(spec) for spec in self.specs]}, none of which follows a view's gradient; an "
                "adaptive evaluation needs one that does, such as 'pgd'."
            )

    def targets(self) -> tuple[list[Target], list[str]]:
        """Everything to attack, and what an adaptive evaluation leaves out, each with its reason."""
        left_out: list[str] = []
        targets = [self._model(), *self._views()]
        if self.suite is None:
            return targets, left_out
        if self.defense is not None and not self.views:
            return [*targets, *self._label_free(left_out)], ["every adaptive attack: the defence has no views"]
        if self.defense is not None or self.randomized:
            targets += self._own_gradient()
        return [*targets, *self._label_free(left_out), self._black_box()], left_out

    def _model(self) -> Target:
        itself = self.defense is None or self.same
        # An image that has only just crossed the undefended boundary says little about the defence: all steps count.
        stop = None if self.defense is None and not self.randomized else False
        specs = self.specs if self.suite is None else tuple(s for s in self.specs if not _is_label_free(s))
        return Target(
            UNDEFENDED if itself else TRANSFER, self.model, "itself" if itself else "transfer", specs, 1, stop
        )

    def _views(self) -> Iterator[Target]:
        specs = self.specs if self.suite is None else self._by_gradient()
        for view in self.views:
            draws = self._draws(view)
            module = Surrogate(view, self.model, self.judge, self.seed)
            yield Target(f"adaptive view {view.name}{_over(draws)}", module, "view", specs, draws)

    def _draws(self, view: AttackView) -> int:
        return view.eot if self.eot is None else self.eot

    def _own_gradient(self) -> Iterator[Target]:
        """EOT convergence: the first attack that averages draws, on the defended model as it stands."""
        assert self.suite is not None
        how = "straight-through gradient (BPDA)" if isinstance(self.defense, InputDefense) else "its own gradient"
        spec = next((s for s in self._by_gradient() if s.takes("eot")), None)
        if spec is None:
            return
        for draws in self.suite.eot_draws if self.randomized else (1,):
            label = f"defended model, {how}{_over(draws)}"
            yield Target(label, self.judge, "own gradient", (spec,), draws, not self.randomized)

    def _black_box(self) -> Target:
        assert self.suite is not None
        black_box = self.extra[0]
        asked = tuple(spec for spec in self.specs if spec.name == black_box.name)
        draws = self.suite.black_box_draws if self.randomized else 1
        label = f"{'model' if self.defense is None else 'defended model'}, outputs alone{_over(draws)}"
        return Target(label, self.judge, "black box", asked or (black_box,), draws, not self.randomized)

    def _label_free(self, left_out: list[str]) -> Iterator[Target]:
        """Embeddings driven from where they were, on the model and, where it can be done, through each view."""
        asked = tuple(spec for spec in self.specs if _is_label_free(spec)) or self.extra[1:]
        if not callable(getattr(self.model, "embed", None)):
            left_out.append(f"the label-free attack: {type(self.model).__name__} has no embed(images)")
            return
        yield replace(self._model(), specs=asked)
        if self.defense is None or not self.views:
            return
        encoder = Embedder(self.model)
        try:
            views = self.defense.adaptive(encoder)
            for view in views:
                _probe(view, self.sample)
        except Exception as error:  # a defence may need more of a model than its outputs, and says so in any words
            left_out.append(f"the label-free attack through the defence: it takes no bare encoder ({error})")
            return
        for view in views:
            if view.name in {chosen.name for chosen in self.views}:
                draws = self._draws(view)
                module = EmbeddingTarget(ViewModule(view, encoder, self.seed))
                yield Target(f"embedding through view {view.name}{_over(draws)}", module, "embedding", asked, draws)

    def _by_gradient(self) -> tuple[AttackSpec, ...]:
        """The attacks asked for but those that have a target of their own."""
        return tuple(s for s in self.specs if s.name != self.extra[0].name and not _is_label_free(s))


def _over(draws: int) -> str:
    return f", {draws} EOT draws" if draws > 1 else ""


def _is_label_free(spec: AttackSpec) -> bool:
    return spec.option("objective") == "drift"


def _probe(view: AttackView, x: Tensor) -> None:
    """One image through a view, so that what it cannot do shows before the work starts."""
    with torch.no_grad():
        view.forward(x, torch.zeros(1, dtype=torch.int64, device=x.device), 0)
