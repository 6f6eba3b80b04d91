"""What every native attack can be told, and what it tells while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from clipdefense.attacks.context import check_target
from clipdefense.attacks.doubts import Doubts
from clipdefense.errors import UsageError, check_known, check_options, check_whole, unknown_name
from clipdefense.threat import ThreatModel

GradientDtype = Literal["fp32", "tf32", "bf16"]
GRADIENT_DTYPES: tuple[GradientDtype, ...] = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Status:
    """How far an attack is.

    Attributes:
        stage: which part of it runs, such as ``"apgd-t, target 2 of 9"``; empty where there is one part only.
        done: images that left this part, broken or after all their steps.
        total: images that this part was given: those that the parts before it left standing.
        robust: images of it not yet broken.
        seconds_left: for this part, at the pace so far.
    """

    stage: str
    done: int
    total: int
    robust: int
    seconds_left: float


Progress = Callable[[Status], None]
"""Told whenever images leave; None keeps quiet."""


@dataclass(frozen=True, eq=False)
class Options:
    """Keyword arguments that all native attacks share.

    Attributes:
        seed: of the random draws; each is a function of (seed, image id, step) alone.
        generator: where to draw the seed from instead.
        ids: (N,) integers that name the images in the draws; 0 .. N-1 when not given.
        batch_size: images a forward.
        eot: gradient draws a step, averaged, for randomised models.
        early_stop: an image leaves as soon as it is misclassified in fp32, with the iterate that broke it. Off,
            every image goes through all steps (training's inner attack; randomised models, where one draw proves
            little).
        gradient_dtype: ``"fp32"``, ``"tf32"`` (CUDA) or ``"bf16"`` (autocast) for the forward and backward that give
            gradients. Verdicts stay fp32: what looks broken otherwise is confirmed in fp32 before it leaves.
        compile: run those forwards through ``torch.compile``, padded to four batch sizes so that few shapes compile;
            not those of a model whose draws are keyed (see :func:`clipdefense.attacks.forward.takes_keys`), nor of one
            whose first compiled logits are not its own, of which a warning tells.
        progress: told how far the attack is; None keeps quiet.
        doubts: where the parts of an attack leave what makes its verdict doubtful; no option of the attack's own.

    Raises:
        UsageError: a value outside its range.
    """

    seed: int = 0
    generator: torch.Generator | None = None
    ids: Tensor | None = None
    batch_size: int = 128
    eot: int = 1
    early_stop: bool = True
    gradient_dtype: GradientDtype = "fp32"
    compile: bool = False
    progress: Progress | None = None
    doubts: Doubts = field(default_factory=Doubts)

    def __post_init__(self) -> None:
        for name in ("batch_size", "eot"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed)
        for name in ("early_stop", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; True or False is expected.")
        if not (self.progress is None or callable(self.progress)):
            raise UsageError(f"progress is {self.progress!r}; None or a function of a Status is expected.")
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise UsageError(f"generator is {self.generator!r}; a torch.Generator is expected, or seed=.")
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise unknown_name("gradient_dtype", str(self.gradient_dtype), GRADIENT_DTYPES)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """
        Raises:
            UsageError: an option that no attack has, or a value outside its range.
        """
        check_known("option", options, [option.name for option in fields(cls)])
        return cls(**options)


AttackFunction = TypeVar("AttackFunction", bound=Callable[..., Tensor])


def attack(function: AttackFunction) -> AttackFunction:
    """An attack that takes the :class:`Options` as ``**options``, as users call it.

    They show in its signature, the model, the threat model and the names of options are checked, and what its parts
    doubt is told once, at the end.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(Options)
        if option.name != "doubts"
    ]

    @wraps(function)
    def called(
        model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, doubts: Doubts | None = None, **options: Any
    ) -> Tensor:
        check_target(model, threat)
        check_options(called, options, f"option of attack {function.__name__!r}", given=4)
        gathered = Doubts() if doubts is None else doubts
        x_adv = function(model, x, y, threat, doubts=gathered, **options)
        if doubts is None:
            gathered.tell()
        return x_adv

    called.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    called.takes_doubts = True  # type: ignore[attr-defined]
    return cast(AttackFunction, called)


def parameter_free(function: AttackFunction) -> AttackFunction:
    """Marks an attack that takes norm and eps of the threat model alone, not its steps, step size or restarts."""
    function.parameter_free = True  # type: ignore[attr-defined]
    return function


def checks_at_zero(function: AttackFunction) -> AttackFunction:
    """Marks an attack that with eps 0 checks all its options and attacks nothing, so that it can be tried for free."""
    function.checks_at_zero = True  # type: ignore[attr-defined]
    return function


def can_be_tried(function: Callable[..., Tensor]) -> bool:
    """Whether the attack was marked with :func:`checks_at_zero`."""
    return bool(getattr(_bare(function), "checks_at_zero", False))


def takes_doubts(function: Callable[..., Tensor]) -> bool:
    """Whether what the attack sees can be asked of it: it was made with :func:`attack`, and takes ``doubts=``."""
    return bool(getattr(_bare(function), "takes_doubts", False))


def takes_effort(function: Callable[..., Tensor]) -> bool:
    """Whether the threat model's steps, step size and restarts mean anything to the attack."""
    return not getattr(_bare(function), "parameter_free", False)


def _bare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function.func if isinstance(function, partial) else function


def labelled(progress: Progress | None, label: str) -> Progress | None:
    """The same progress with a label before each stage."""
    if progress is None:
        return None
    return lambda status: progress(replace(status, stage=", ".join(filter(None, (label, status.stage)))))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr: ``with progress_bar() as progress: attacks.run(..., progress=progress)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[robust]} robust so far")
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, robust="")

        def show(status: Status) -> None:
            if bar.tasks[0].description != status.stage:
                bar.reset(task, total=status.total, description=status.stage, robust=status.total)
            bar.update(task, completed=status.done, total=status.total, robust=status.robust)

        yield show
