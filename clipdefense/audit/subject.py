"""What is audited: who judges, who is attacked, what was declared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipdefense.attacks.context import attack_mode, full_fp32, predict
from clipdefense.attacks.forward import keyed
from clipdefense.attacks.objectives import margin
from clipdefense.defenses import AttackView, InputDefense, TestTimeDefense, Traits

SEEDS = 5  # defence seeds over which a randomised defence is judged
DEPTH = 3  # how deep in an undeclared module its classifier is looked for

Loss = Callable[[Tensor, Tensor], Tensor]


class Target(nn.Module):
    """Something an attacker differentiates, made safe to attack.

    Where there is no gradient, or one with NaN, the attack sees zeros: it goes on, and fails, as it should be seen to.
    """

    def __init__(
        self,
        label: str,
        logits: Callable[[Tensor, Tensor, int], Tensor],
        parts: list[nn.Module],
        *,
        extra: Callable[[Tensor, Tensor], Tensor] | None = None,
        eot: int = 1,
    ) -> None:
        """
        Args:
            label: what it is, for reports.
            logits: ``(x, ids, seed) -> (N, C)``.
            parts: the modules in it, frozen with it.
            extra: a view's own term of the objective.
            eot: gradient draws a step.
        """
        super().__init__()
        self.label, self.raw, self.extra, self.eot = label, logits, extra, eot
        self.parts = nn.ModuleList(parts)
        self.blind = False  # whether backward fails outright

    def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C) finite logits with a finite gradient in x."""
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0))
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        logits = finite(self.raw(x, ids, 0 if seed is None else seed))
        if self.blind or not logits.requires_grad:
            logits = logits.detach() + 0 * x.flatten(1).sum(dim=1, keepdim=True)
        return logits

    def extra_loss(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The view's own term, (N,), or None."""
        return None if self.extra is None else self.extra(x, y)

    def gradient(self, x: Tensor, y: Tensor, loss: Loss, *, seed: int = 0, scale: float = 1.0) -> Tensor | None:
        """d loss / dx as it is, (N, C, H, W), zeros and NaN included; None where there is none to be had."""
        with attack_mode(self):
            leaf = x.detach().clone().requires_grad_(True)
            ids = torch.arange(len(x), device=x.device)
            try:
                value = loss(self.raw(leaf, ids, seed), y).sum() * scale
                (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return None
        return gradient

    def look(self, x: Tensor, y: Tensor, loss: Loss) -> None:
        """See on two images whether backward fails outright: see :attr:`blind`."""
        self.blind = self.gradient(x[:2], y[:2], loss) is None


class _Count(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> int:
    """Tensor operations that a call takes, those of a backward pass included: its cost, the same on every run."""
    with _Count() as count:
        function()
    return count.operations


def finite(logits: Tensor) -> Tensor:
    """NaN as 0 and infinities as 1e30, which breaks comparisons with them but not the arithmetic."""
    return torch.nan_to_num(logits, nan=0.0, posinf=1e30, neginf=-1e30)


def call(module: nn.Module, x: Tensor, ids: Tensor, seed: int) -> Any:
    """``module(x)``, its draws keyed where it takes keys."""
    return module(x, **keyed(module, ids, seed))


class Judged(NamedTuple):
    """What the judge says of images."""

    margin: Tensor  # (N,), max_{j != y} z_j - z_y, mean over seeds
    right: Tensor  # (seeds, N) bool

    @property
    def broken(self) -> Tensor:
        """(N,) wrong on some seed."""
        return ~self.right.all(dim=0)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited.

    Attributes:
        judge: the module whose predictions count.
        undefended: what an attacker has who does not know the defence; None for a plain model.
        part: where in an undeclared judge the undefended model was found; empty when it was given.
        defense: the test-time defence, where one was declared.
        traits: what was declared.
        pristine: a copy of the judge that was never asked anything, the judge itself where it cannot be copied.
        targets: what the white-box attacker differentiates: the views, or the judge itself.
        views: how many of the targets are adaptive views.
    """

    judge: nn.Module
    undefended: nn.Module | None
    part: str
    defense: TestTimeDefense | None
    traits: Traits
    pristine: nn.Module
    targets: tuple[Target, ...]
    views: int

    @property
    def exact(self) -> Target | None:
        """What should have the gradients of its own logits: the judge, unless it is declared to have surrogate ones."""
        surrogate = self.traits.optimizes_in_forward or isinstance(self.defense, InputDefense)
        if not surrogate:
            return self.own
        return None if self.undefended is None else target_of("the undefended model", self.undefended)

    @property
    def own(self) -> Target:
        """The judge as a target, by its own gradients."""
        return target_of("its own gradients", self.judge)

    @property
    def seeds(self) -> range:
        """Of the draws that judge."""
        return range(SEEDS if self.traits.randomized else 1)

    def logits(self, x: Tensor, seed: int = 0) -> Tensor:
        """(N, C) finite verdict logits of the judge: eval mode, fp32."""
        keys = keyed(self.judge, torch.arange(len(x), device=x.device), seed)
        return finite(predict(self.judge, x, batch_size=len(x), **keys))

    def judged(self, x: Tensor, y: Tensor) -> Judged:
        """Margins and verdicts over the seeds."""
        logits = torch.stack([self.logits(x, seed) for seed in self.seeds])
        return Judged(torch.stack([margin(z, y) for z in logits]).mean(dim=0), logits.argmax(dim=2) == y)


def target_of(label: str, module: nn.Module) -> Target:
    """A module with logits as a target."""
    return Target(label, lambda x, ids, seed: call(module, x, ids, seed), [module])


def subject_of(model: nn.Module, defense: TestTimeDefense | None, x: Tensor, y: Tensor, eot: int) -> Subject:
    """Who is who, from what was given.

    Args:
        model: a plain model, a wrapped defence, or a module that declares nothing.
        defense: a test-time defence around it, or None.
        x, y: images and labels to try things on.
        eot: at most so many draws a step on views; less where a tenth of the view's own number is less.
    """
    judge, undefended, part = model, None, ""
    inside, around = getattr(model, "model", None), getattr(model, "defense", None)
    if defense is not None:
        judge, undefended = defense.wrap(model), model
    elif isinstance(around, TestTimeDefense) and isinstance(inside, nn.Module):
        defense, undefended = around, inside
    else:
        part = classifier_inside(model, x, y)
        undefended = model.get_submodule(part) if part else None
    pristine = copied(judge) or judge  # before anything is asked: a question may leave something behind
    owner = model if defense is None else defense
    declared = getattr(owner, "traits", None)
    views: tuple[AttackView, ...] = ()
    if defense is not None and undefended is not None:
        views = defense.adaptive(undefended)
    elif defense is None and callable(getattr(model, "adaptive", None)):
        views = tuple(model.adaptive())  # type: ignore[operator]
    parts = [module for module in (judge, undefended) if module is not None]
    targets = [
        Target(f"view {view.name}", view.forward, parts, extra=view.extra_loss, eot=max(1, min(view.eot // 10, eot)))
        for view in views
    ]
    if defense is None or not views:
        targets.append(target_of("its own gradients", judge))
    for target in targets:
        target.look(x, y, margin)
    traits = declared if isinstance(declared, Traits) else Traits()
    return Subject(judge, undefended, part, defense, traits, pristine, tuple(targets), len(views))


def classifier_inside(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """The name of a part that is itself a classifier of the same images into as many classes; empty for none.

    The part nearest to the root is taken that is right at least half as often as the whole: a defence that declares
    nothing usually holds what it defends, but what follows a normalisation is no classifier of these images.
    """
    spare = copied(model)
    if spare is None:
        return ""
    with attack_mode(spare), torch.no_grad():
        whole = spare(x)
        right = int((whole.argmax(dim=1) == y).sum())
        names = [name for name, _ in spare.named_modules() if name and name.count(".") < DEPTH]
        for name in sorted(names, key=lambda name: name.count(".")):
            part = spare.get_submodule(name)
            with contextlib.suppress(Exception):  # most parts do not take images, and say so in their own ways
                logits = part(x)
                fits = isinstance(logits, Tensor) and logits.shape == whole.shape and logits.is_floating_point()
                if fits and 2 * int((logits.argmax(dim=1) == y).sum()) >= right:
                    return name
    return ""


def copied(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """A deep copy, cast where asked for; None where the module cannot be copied."""
    try:
        spare = copy.deepcopy(module)
    except Exception:  # whatever a part's own __deepcopy__ or __reduce__ raises
        return None
    return spare if dtype is None else spare.to(dtype)


@contextlib.contextmanager
def as_given(module: nn.Module) -> Iterator[nn.Module]:
    """The module in the modes in which it was handed over, on a copy where it can be copied; full fp32."""
    spare = copied(module)
    kept = {} if spare is not None else {name: value.clone() for name, value in module.state_dict().items()}
    try:
        with torch.inference_mode(False), full_fp32():
            yield module if spare is None else spare
    finally:
        if spare is None:
            module.load_state_dict(kept)
