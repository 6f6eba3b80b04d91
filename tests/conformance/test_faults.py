"""Each planted fault is caught by the check that is meant for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.conformance import check_defense, testtime, trainer
from clipdefense.conformance.case import Case, run
from clipdefense.training.config import TrainingConfig

from .helpers import Blur, Noisy, Tiny


def failure(cls: Any, check: str) -> str:
    """What the check says against the defence."""
    checks = testtime.CHECKS if issubclass(cls, cd.TestTimeDefense) else trainer.CHECKS
    found = run(check, checks[check], Case(cls.__name__, cls, {}))
    assert found.outcome == "failed", found
    return found.said


# Faults: each class does one thing wrong


class OutOfRange(Blur):
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return torch.full_like(x, 0.5)


class TakesAnything(Blur):
    def __new__(cls, *args: Any, **options: Any) -> TakesAnything:
        return object.__new__(cls)

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model)


class BatchMean(Blur):
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return 0.1 * (x.mean(dim=0, keepdim=True) - x)


class Leaks(Blur):
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        with torch.enable_grad():
            self.model(x).sum().backward()
        return 0.02 * (0.5 - x)


class InPlace(Blur):
    def _perturbation(self, x: Tensor, noise: Tensor | None, ids: Tensor | None, seed: int | None) -> Tensor:
        delta = super()._perturbation(x, noise, ids, seed)
        with torch.no_grad():
            x.mul_(0.99)
        return delta


class Evaluates(Blur):
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.model.eval()
        return 0.02 * (0.5 - x)


class Unfreezes(Blur):
    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.model.requires_grad_(True)
        return 0.02 * (0.5 - x)


class GlobalNoise(Noisy):
    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (torch.rand_like(x) - 0.5) * 0.05


class Undeclared(Blur):
    """Its draws come from a counter of its own, and it says nothing of it."""

    calls = 0

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        Undeclared.calls += 1
        return 0.01 * (1 + Undeclared.calls % 5) * (0.5 - x)


class Remembers(Blur):
    """What an instance has seen changes what it does."""

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return 0.01 * self.seen * (0.5 - x)


class Constant(Noisy):
    """Declared randomised, and is not."""

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return torch.zeros_like(x)


class ByContent(Noisy):
    """Keyed by what the image shows: a deterministic defence that calls itself random."""

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return super().draw(x, (x.flatten(1).sum(dim=1) * 1000).long(), seed)


class NoPickle(Blur):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.helper = lambda x: x


class Detached(Blur):
    def defend(self, x: Tensor, *, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        return super().defend(x, ids=ids, seed=seed).detach()


class NeedsGrad(Blur):
    """It works on its own gradient, and forgets that it may be called where there are none."""

    def _perturbation(self, x: Tensor, noise: Tensor | None, ids: Tensor | None, seed: int | None) -> Tensor:
        leaf = x.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.model(leaf).square().sum(), leaf)
        return 0.001 * gradient.sign() * (x > 0.01) * (x < 0.99)


class Views(Blur):
    """Views, chosen by a test."""

    offered: ClassVar[Callable[[nn.Module], Any]] = staticmethod(lambda model: ())

    def adaptive(self, model: nn.Module) -> Any:
        return self.offered(model)


class NoModule(cd.TestTimeDefense):
    def __init__(self, model: Any) -> None:
        self.model = model

    def wrap(self, model: nn.Module) -> Any:
        return lambda x: model(x)


class Unkeyed(NoModule):
    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def wrap(self, model: nn.Module) -> Any:
        return nn.Sequential(model)


class Probabilities(NoModule):
    def wrap(self, model: nn.Module) -> Any:
        return nn.Sequential(model, nn.Unflatten(1, (5, 2)))


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (OutOfRange, "contract", r"x \+ perturbation\(x\) has pixels in \[0.5, 1.5\]; \[0, 1\] is expected"),
        (TakesAnything, "contract", "an unknown option is taken without a word"),
        (NoModule, "contract", r"wrap\(model\) returns a function; a torch module"),
        (Unkeyed, "contract", r"takes no ids and seed to key its draws"),
        (Probabilities, "contract", r"of shape \(8, 5, 2\) for 8 images and 10 classes"),
        (BatchMean, "batch independence", "an image's logits change by .* % of their spread alone"),
        (Leaks, "no gradient leak", "gradients in .grad of the model's weights"),
        (Unfreezes, "no gradient leak", "requires_grad of the model's weights is not what it was"),
        (InPlace, "no gradient leak", "changes the images it was given, in place"),
        (Evaluates, "modes restored", "train and eval modes of the model's parts are not what they were"),
        (GlobalNoise, "seeds", "a pass draws from a global generator"),
        (Undeclared, "seeds", "not declared randomized, give other logits the second time"),
        (Remembers, "seeds", "a second pass of the same instance gives other logits"),
        (Constant, "seeds", "traits say randomized, but another seed gives the same logits"),
        (ByContent, "seeds", "copies of an image under other ids get the same draw"),
        (NoPickle, "pickles", "it raises (PicklingError|AttributeError)"),
        (Detached, "ART", "it raises RuntimeError: .* does not require grad"),
        (NeedsGrad, "no_grad and inference_mode", "it raises RuntimeError"),
    ],
)
def test_a_fault_is_caught_by_the_check_meant_for_it(cls: type, check: str, words: str) -> None:
    assert re.search(words, failure(cls, check))


def test_everything_that_failed_is_listed() -> None:
    with pytest.raises(AssertionError) as raised:
        check_defense(Evaluates, audit=False)
    head, *lines = str(raised.value).splitlines()
    assert head == "Evaluates fails 1 of 10 checks:" and len(lines) == 1
    assert lines[0].startswith("- modes restored: train and eval modes")
    with pytest.raises(AssertionError) as raised:
        check_defense(Undeclared, audit=False)
    head, *lines = str(raised.value).splitlines()
    assert head == f"Undeclared fails {len(lines)} of 10 checks:" and len(lines) > 1
    assert all(line.startswith("- ") for line in lines)


def view(forward: Callable[..., Tensor], name: str = "a", **options: Any) -> cd.AttackView:
    return cd.AttackView(name, forward, **options)


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        (lambda model: [view(lambda x, ids, seed: model(x))], "a tuple of clipdefense.AttackView is expected"),
        (lambda model: (view(lambda x, ids, seed: model(x)),) * 2, "are not distinct"),
        (lambda model: (view(lambda x, ids, seed: model(x).detach()),), "has no gradient in the images"),
        (lambda model: (view(lambda x, ids, seed: model(x)[:, :3]),), r"gives shape \(4, 3\), or NaN"),
        (lambda model: (view(lambda x, ids, seed: model(x) * float("nan")),), "or NaN; finite logits"),
        (lambda model: (view(lambda x, ids, seed: model((x * 255).round() / 255)),), "a gradient of zero everywhere"),
        (
            lambda model: (view(lambda x, ids, seed: model(x) + torch.rand(1)),),
            "gives other logits for the same ids and seed",
        ),
        (
            lambda model: (view(lambda x, ids, seed: model(x), extra_loss=lambda x, y: x.sum()),),
            "has an extra loss of shape",
        ),
    ],
)
def test_a_faulty_view_is_named(
    offered: Callable[[nn.Module], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Views, "offered", staticmethod(offered))
    assert re.search(words, failure(Views, "adaptive views"))


class AttackInTheWeights(Tiny):
    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        self.model(batch["x"]).sum().backward()
        return super().inner_attack(batch, seed=seed)


class Forgets(Tiny):
    """Its draws come from a generator that nobody seeds."""

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noise = torch.rand(1, generator=self.own)
        return {"ce": super().losses(batch)["ce"] * noise[0]}

    own: ClassVar[torch.Generator] = torch.Generator()


class Idle(Tiny):
    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"none": 0 * super().losses(batch)["ce"]}

    def default_config(self) -> TrainingConfig:
        return super().default_config().override(weight_decay=0.0)


class ChangesAtOnce(Tiny):
    def __init__(self, classifier: Any, **options: Any) -> None:
        super().__init__(classifier, **options)
        with torch.no_grad():
            next(self.model.parameters()).mul_(1.01)


class LeavesTrainMode(Tiny):
    def fit(self, *args: Any, **options: Any) -> None:
        super().fit(*args, **options)
        self.model.train()


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (AttackInTheWeights, "no gradient leak", "the inner attack leaves gradients in .grad of the weights"),
        (Forgets, "seeds", "a fit with the same seed ends with other weights"),
        (Idle, "fit", "a fit changes no weight"),
        (LeavesTrainMode, "modes restored", "train and eval modes of the model's parts are not what they were"),
        (ChangesAtOnce, "contract", "making the trainer changes the model; only a fit may"),
    ],
)
def test_a_faulty_trainer_is_caught(cls: type, check: str, words: str) -> None:
    assert re.search(words, failure(cls, check))
