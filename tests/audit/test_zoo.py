"""Planted defects are found by the checks meant for them, and clean models are left alone."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import clipdefense as cd
from audit_clean_models import EPS, RECIPES, train
from clipdefense.audit import Audit, Verdict, audit, show
from clipdefense.audit.run import ORDER, examination

from .zoo import LATER, ZOO, AwayAndBack, DeadView, Defect, Detached, LoopDefense, WrongView

Models = Callable[[], dict[str, nn.Module]]
FEW = 32


@pytest.mark.parametrize("defect", [*ZOO, *LATER], ids=lambda defect: defect.name.replace(" ", "-"))
def test_each_defect_is_invalid_by_the_checks_meant_for_it(
    defect: Defect, trained: Models, held_back: tuple[Tensor, Tensor]
) -> None:
    x, y = held_back
    with examination(defect.build(trained()), x[:FEW], y[:FEW], defect.threat) as exam:
        for number in defect.meant:
            found = ORDER[number](exam)
            assert found.verdict is Verdict.INVALID, (number, found)
            assert found.number == number and found.evidence.endswith(".") and found.advice.endswith(".")


def test_the_zoo_has_both_halves() -> None:
    assert [defect.held_out for defect in ZOO] == [False] * 8 + [True] * 8


def said(result: Audit) -> str:
    """Everything that any output says of an audit."""
    text = io.StringIO()
    show(Console(file=text, width=200), result)
    return text.getvalue() + str(result.to_dict())


def test_an_invalid_audit_gives_no_robust_accuracy_anywhere(trained: Models, held_back: tuple[Tensor, Tensor]) -> None:
    x, y = held_back
    result = audit(Detached(trained()["cnn"]).eval(), x[:FEW], y[:FEW], cd.ThreatModel("linf", EPS))
    assert result.verdict is Verdict.INVALID
    assert result.adaptive is None and result.transfer is None
    assert "input gradients (1)" in result.withheld and result.label.startswith("withheld")
    content = result.to_dict()
    assert content["adaptive"] is None and content["transfer"] is None and content["withheld"] == result.withheld
    assert "adaptive: withheld" in said(result) and "transfer: withheld" in said(result)
    assert result.clean.value > 0.8 and "clean: " in said(result)
    # the zero gradient is not a lone witness: attacks fail in the ways in which they fail on masked gradients
    assert {1, 2, 8, 9, 10, 16, 17} <= {f.number for f in result.findings if f.verdict is Verdict.INVALID}


@pytest.mark.parametrize("recipe", RECIPES)
def test_clean_models_pass(recipe: str, trained: Models, held_back: tuple[Tensor, Tensor]) -> None:
    """One of each recipe; benchmarks/audit_clean_models.py has five."""
    x, y = held_back
    model = trained()[recipe] if recipe in trained() else train(recipe, seed=0, epochs=3)
    result = audit(model, x, y, cd.ThreatModel("linf", EPS))
    assert result.verdict is not Verdict.INVALID, result.withheld
    assert [f.number for f in result.findings] == list(range(1, 21))
    assert sum(f.verdict is Verdict.WARN for f in result.findings) <= 1
    assert result.adaptive is not None and result.adaptive.value <= result.clean.value
    assert result.transfer is None and not result.label


def test_a_loop_that_ends_where_it_began_is_found_as_a_defence_too(
    trained: Models, held_back: tuple[Tensor, Tensor]
) -> None:
    x, y = held_back
    with examination(trained()["cnn"], x[:FEW], y[:FEW], cd.ThreatModel("linf", EPS), defense=LoopDefense()) as exam:
        found = ORDER[7](exam)
        assert found.verdict is Verdict.INVALID and found.value is not None and found.value < 1e-5
        assert ORDER[15](exam).verdict is Verdict.WARN  # no views: transfer only


@pytest.mark.parametrize(("defense", "meant"), [(WrongView, (8,)), (DeadView, (1, 8))])
def test_views_that_mislead_are_found(
    defense: type[cd.InputDefense], meant: tuple[int, ...], trained: Models, held_back: tuple[Tensor, Tensor]
) -> None:
    """A defence is no sounder for a view that does not show how it is to be attacked."""
    x, y = held_back
    with examination(trained()["cnn"], x, y, cd.ThreatModel("linf", EPS), defense=defense()) as exam:
        for number in meant:
            assert ORDER[number](exam).verdict is Verdict.INVALID, number


def test_a_module_that_only_hands_on_is_no_defence(trained: Models, held_back: tuple[Tensor, Tensor]) -> None:
    x, y = held_back

    class Handed(AwayAndBack):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with examination(Handed(trained()["cnn"]).eval(), x[:FEW], y[:FEW], cd.ThreatModel("linf", EPS)) as exam:
        assert exam.subject.part == "net"
        found = ORDER[7](exam)
        assert found.verdict is Verdict.SKIPPED and "claims nothing" in found.evidence


def test_undeclared_optimisation_is_found_with_any_autograd(trained: Models, held_back: tuple[Tensor, Tensor]) -> None:
    x, y = held_back

    class Reverse(AwayAndBack):
        functional = False

        def forward(self, x: Tensor) -> Tensor:
            def energy(leaf: Tensor) -> Tensor:
                return self.net(leaf).logsumexp(dim=1).sum()

            if self.functional:
                gradient = torch.func.grad(energy)(x.detach())
            else:
                with torch.enable_grad():
                    leaf = x.detach().clone().requires_grad_(True)
                    (gradient,) = torch.autograd.grad(energy(leaf), leaf)
            return self.net(x + 0.05 * gradient.sign())

    for functional in (False, True):
        module = Reverse(trained()["cnn"]).eval()
        module.functional = functional
        with examination(module, x[:8], y[:8], cd.ThreatModel("linf", EPS)) as exam:
            assert ORDER[6](exam).verdict is Verdict.INVALID
    with examination(trained()["cnn"], x[:8], y[:8], cd.ThreatModel("linf", EPS)) as exam:
        assert ORDER[6](exam).verdict is Verdict.PASS
