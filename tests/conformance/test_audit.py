"""The audit's verdict in the conformance suite."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.conformance import check_defense, testtime
from clipdefense.conformance.case import Case, run
from clipdefense.errors import UsageError

from .helpers import Blur, Tiny

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
