"""The conformance suite: the built-in defences pass it, and each planted fault is caught by the check meant for it."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.conformance import Report, check_defense, testtime, trainer
from clipdefense.conformance.case import Case, run
from clipdefense.conformance.sample import sample
from clipdefense.errors import UsageError
from clipdefense.plugins import registry
from clipdefense.randomness import uniform
from clipdefense.training.config import TrainingConfig
from clipdefense_tecoa.tecoa import TeCoA

TEST_TIME = ("ttc", "random-noise", "anti-adversary", "tte")
SLOW = ("hedge",)  # 20 steps a pass
TRAINERS = ("tecoa", "fare", "pmg-aft", "tga-zsr", "comp-tga", "laat", "ancra")


def outcomes(report: Report) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


@pytest.mark.parametrize("name", TEST_TIME)
def test_built_in_test_time_defences_pass(name: str) -> None:
    found = outcomes(check_defense(name, audit=False))
    assert set(found.values()) <= {"passed", "skipped"} and len(found) == 10
    assert [check for check, outcome in found.items() if outcome == "skipped"] in ([], ["attacks of torchattacks"])


def test_a_defence_of_many_steps_passes() -> None:
    check_defense("hedge", audit=False, steps=2)


@pytest.mark.parametrize("name", ["random-noise", "anti-adversary"])  # the others take a quarter of a minute each
def test_built_in_test_time_defences_pass_the_audit_too(name: str) -> None:
    found = run("audit", testtime.CHECKS["audit"], Case(name, registry().find("defenses", name).load(), {}))
    assert found.outcome == "passed" and found.said in ("PASS", "WARN")


@pytest.mark.parametrize("name", TRAINERS)
def test_built_in_trainers_pass(name: str) -> None:
    # its negative prompt needs a text tower, which the suite's model has not
    given = {"negative_embeddings": torch.randn(10, 32)} if name == "comp-tga" else {}
    found = outcomes(check_defense(name, audit=False, **given))
    assert set(found.values()) <= {"passed", "skipped"} and len(found) == 9
    assert found["fit"] == found["seeds"] == "passed"


def test_every_sound_built_in_is_tried_here() -> None:
    found = registry()
    sound = [name for name in found.names("defenses") if not found.find("defenses", name).known_unsound]
    assert sorted(sound) == sorted([*TEST_TIME, *SLOW, *TRAINERS])


def test_the_sample_is_a_real_model_that_is_right() -> None:
    model, x, y = sample(12)
    assert len(y.unique()) > 3 and x.min() >= 0 and x.max() <= 1
    pooled, tokens = model.embed_tokens(x)
    torch.testing.assert_close(pooled, model.embed(x))
    assert tokens.shape == (12, 16, 32)
    again = sample(12)
    assert torch.equal(again.x, x) and torch.equal(again.y, y)


def test_keyed_noise_passes() -> None:
    assert not check_defense(Noisy, audit=False).failed


def test_one_line_for_each_check() -> None:
    report = check_defense(Blur, audit=False)
    assert report.name == "Blur" and not report.failed
    lines = str(report).splitlines()
    assert len(lines) == len(report.checks) == 10
    assert lines[0] == "passed  contract: a test-time defence, an ART preprocessor; declares no trait"
    assert lines[-1].startswith("passed  adaptive views: none, so its robust numbers are all labelled: transfer only")


def failure(cls: Any, check: str) -> str:
    """What the check says against the defence."""
    checks = testtime.CHECKS if issubclass(cls, cd.TestTimeDefense) else trainer.CHECKS
    found = run(check, checks[check], Case(cls.__name__, cls, {}))
    assert found.outcome == "failed", found
    return found.said


# Faults: each class does one thing wrong


class Blur(cd.InputDefense):
    """A defence without a fault: every image a little greyer."""

    def __init__(self, model: Any, *, seed: int = 0, batch_size: int = 128) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        self.model = model

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return 0.02 * (0.5 - x)


class Noisy(Blur):
    """Noise, keyed as it should be."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed, dtype=x.dtype) - 0.5) * 0.05

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return (x + noise).clamp(0, 1) - x


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


class Tiny(TeCoA):
    """TeCoA under another name, for faults."""

    name: ClassVar[str] = "tiny"


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


# The audit's verdict


@pytest.fixture
def asked() -> list[tuple[Any, Any]]:
    """What the audit was asked."""
    return []


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Any, Any]]) -> Callable[[str], None]:
    """``verdict("INVALID")``: what the audit will say, since what it says is tested where it lives."""

    def say(text: str) -> None:
        module = types.ModuleType("clipdefense.audit")

        def audit(*args: Any, **options: Any) -> Any:
            asked.append((args, options))
            return types.SimpleNamespace(verdict=text, withheld="of a reason")

        module.audit = audit  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "clipdefense.audit", module)
        monkeypatch.setattr(cd, "audit", module, raising=False)

    return say


def test_an_invalid_defence_fails(verdict: Callable[[str], None]) -> None:
    verdict("INVALID")
    with pytest.raises(AssertionError, match="- audit: INVALID under the declared protocol: of a reason"):
        check_defense(Blur)
    verdict("WARN")
    assert check_defense(Blur).checks[-1].said == "WARN"


def test_a_known_unsound_one_must_be_found_invalid(verdict: Callable[[str], None]) -> None:
    verdict("INVALID")
    assert check_defense(Blur, known_unsound="it hides").checks[-1].said == "INVALID, as its known_unsound says"
    verdict("WARN")
    with pytest.raises(AssertionError, match=r"registered as known_unsound \(it hides\), but the audit says WARN"):
        check_defense(Blur, known_unsound="it hides")


def test_the_audit_can_be_of_a_trained_model(
    verdict: Callable[[str], None], asked: list[tuple[Any, Any]], tiny_model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    verdict("PASS")
    for cls in (Blur, Tiny):
        check_defense(cls, on=(tiny_model, images, labels))
    for args, _ in asked:
        assert args[0] is tiny_model and args[1] is images and args[2] is labels
    assert isinstance(asked[0][1]["defense"], Blur) and "defense" not in asked[1][1]


class Rounds(cd.TestTimeDefense):
    """It rounds the input, which stops every gradient, and gives an attacker nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def wrap(self, model: nn.Module) -> nn.Module:
        return Rounded(model)


class Rounded(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 16).round() / 16)


def test_the_real_audit_finds_a_gradient_stopper() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()
    x = torch.rand(16, 3, 8, 8)
    y = model(x).argmax(dim=1)
    case = Case("rounds", Rounds, {}, on=(model, x, y))
    found = run("audit", testtime.CHECKS["audit"], case)
    assert found.outcome == "failed" and found.said.startswith("INVALID under the declared protocol: input gradients")
    known = run("audit", testtime.CHECKS["audit"], replace(case, known_unsound="it rounds"))
    assert (known.outcome, known.said) == ("passed", "INVALID, as its known_unsound says")


def test_names() -> None:
    assert cd.check_defense is check_defense
    with pytest.raises(UsageError, match="defence 'tcc' is unknown; did you mean 'ttc'"):
        check_defense("tcc")
    with pytest.raises(UsageError, match=r"'Linear' is .*; a subclass of clipdefense.TestTimeDefense"):
        check_defense(nn.Linear)
