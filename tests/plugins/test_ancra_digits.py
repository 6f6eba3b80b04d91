"""Reverse attention before the audit: on a network that has learned something it is found out, for the right reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.conformance import testtime
from clipdefense.conformance.case import THREAT, Case
from clipdefense.conformance.sample import sample
from clipdefense_ancra.digits import trained_on_digits
from clipdefense_ancra.reverse_attention import ReverseAttention

Trained = tuple[cd.ZeroShotClassifier, Tensor, Tensor, cd.ThreatModel]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return trained_on_digits()


def test_the_network_has_learned_something(trained: Trained) -> None:
    model, x, y, threat = trained
    assert x.shape == (64, 3, 8, 8) and threat.eps == 0.1
    assert float((predict(model, x).argmax(dim=1) == y).float().mean()) > 0.7
    before = torch.get_rng_state()
    again, same, _, _ = trained_on_digits()
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(same, x)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_audit_finds_that_the_last_logits_hide_the_gradient(trained: Trained) -> None:
    model, x, y, threat = trained
    found = cd.audit(model, x, y, threat, defense=ReverseAttention(model))
    invalid = [finding for finding in found.findings if finding.verdict.name == "INVALID"]
    assert [finding.number for finding in invalid] == [15]  # the adaptive views; no other check has to lend a hand
    assert found.withheld.startswith("adaptive views") and found.adaptive is None
    control = cd.audit(model, x, y, threat, defense=ReverseAttention(model, head="plain"))
    views = control.findings[14]
    assert views.verdict.name == "PASS" and views.measured["views_ahead"] > 0.05


def test_the_conformance_suite_calls_it_invalid() -> None:
    report = cd.check_defense("reverse-attention")
    assert not report.failed
    assert report.checks[-1].name == "audit" and report.checks[-1].said == "INVALID, as its known_unsound says"


def test_a_sound_defence_does_not_choose_what_it_is_judged_on(trained: Trained) -> None:
    def judged(**given: Any) -> Any:
        return testtime._audited(Case("reverse-attention", ReverseAttention, {}, **given))

    suite, known = judged(), judged(known_unsound="it hides")
    assert suite[0].class_names == sample(1).model.class_names and suite[3] == THREAT
    assert known[0].class_names == trained[0].class_names and torch.equal(known[1], trained[1])
    assert judged(known_unsound="it hides", on=trained[:3]) == (*trained[:3], THREAT)  # what is given goes first
