"""The parts of the audit: thresholds and their page, tests on counts, what is declared, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.audit import CHECKS, STATISTICS, Audit, Verdict
from clipdefense.audit.report import Accuracy, Finding, Floor, found, skipped, worst
from clipdefense.audit.run import ORDER, examination
from clipdefense.audit.statistics import ahead, guessing, least, mcnemar
from clipdefense.audit.thresholds import BY_KEY
from clipdefense.randomness import uniform

PAGE = Path(__file__).parent.parent.parent / "docs" / "audit.md"
THREAT = cd.ThreatModel("linf", 4 / 255)


class Blur(cd.InputDefense):
    """Noise alone, declared, with its view."""

    traits: ClassVar[cd.Traits] = cd.Traits(randomized=True)

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return ((x + noise).clamp(0, 1) - x).detach()

    def draw(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return (uniform(tuple(x.shape[1:]), ids, seed=seed) - 0.5) * 0.05

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("eot", lambda x, ids, seed: self.bpda(model, x, ids, seed), eot=3),)


class Blind(Blur):
    """The same without views."""

    def adaptive(self, model: nn.Module) -> tuple[cd.AttackView, ...]:
        return ()


def test_the_page_shows_the_table() -> None:
    rows = [
        f"| {s.check} | {CHECKS[s.check]} | `{s.key}`: {s.what} | {s.limits()[0]} | {s.limits()[1]} | {s.advice} |"
        for s in sorted(STATISTICS, key=lambda s: s.check)
    ]
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
    assert [line for line in shown if line[2].isdigit()] == rows


def test_the_table_is_whole() -> None:
    assert sorted(CHECKS) == list(range(1, 21)) == sorted(ORDER)
    assert {s.check for s in STATISTICS} == set(CHECKS) and len(BY_KEY) == len(STATISTICS)
    for statistic in STATISTICS:
        assert statistic.advice.endswith(".") and statistic.warn is not None
        if statistic.invalid is not None:
            low, high = sorted((statistic.warn, statistic.invalid))
            assert (statistic.invalid == low) if statistic.low_is_bad else (statistic.invalid == high)
        if "McNemar" in statistic.what:
            assert (statistic.warn, statistic.invalid, statistic.low_is_bad) == (0.05, 0.01, True)


def test_verdicts_at_the_thresholds() -> None:
    share, p = BY_KEY["unusable_gradients"], BY_KEY["black_box_ahead"]
    assert [share.verdict(v).name for v in (0, 0.02, 0.03, 0.1, 0.11)] == ["PASS", "PASS", "WARN", "WARN", "INVALID"]
    assert [p.verdict(v).name for v in (1, 0.05, 0.04, 0.01, 0.009)] == ["PASS", "PASS", "WARN", "WARN", "INVALID"]
    assert share.verdict(float("nan")) is Verdict.INVALID and p.verdict(float("nan")) is Verdict.INVALID
    assert BY_KEY["views"].verdict(0) is Verdict.WARN
    assert p.limits() == ("< 0.05", "< 0.01") and BY_KEY["views"].limits() == ("< 1", "never")


def test_mcnemar_on_known_counts() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 0) == pytest.approx(2**-7)  # the least number of images that can be INVALID
    assert mcnemar(6, 0) > 0.01 > mcnemar(7, 0)
    assert mcnemar(5, 5) == pytest.approx(638 / 1024) and mcnemar(0, 9) == 1.0
    one, two = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert ahead(one, two) == (1, 1)
    assert least({"a": (7, 0), "b": (1, 1)}) == ("a", pytest.approx(2**-6)) and least({}) == ("", 1.0)
    assert guessing(5, 50, 10) > 0.4 and guessing(50, 50, 10) < 1e-40


def test_the_worst_statistic_decides() -> None:
    one = found(10, {"standing_at_full_eps": 0.05, "not_monotone": 0.001}, "Seen.", info={"more": 3})
    assert (one.statistic, one.value, one.verdict) == ("not_monotone", 0.001, Verdict.INVALID)
    assert one.advice == BY_KEY["not_monotone"].advice
    assert dict(one.measured) == {"standing_at_full_eps": 0.05, "not_monotone": 0.001, "more": 3}
    fine, none = found(20, {"half_width": 0.1}, "Seen."), skipped(8, "Nothing to attack.")
    assert fine.advice == "" and (none.value, none.verdict) == (None, Verdict.SKIPPED)
    assert worst((fine, none)) is Verdict.PASS and worst((fine, none, one)) is Verdict.INVALID
    assert json.loads(json.dumps(one.to_dict()))["verdict"] == "INVALID"


def result(adaptive: Accuracy | None, withheld: str = "") -> Audit:
    findings: tuple[Finding, ...] = (found(20, {"half_width": 0.1}, "Seen."),)
    return Audit("it", THREAT, findings, Accuracy(0.9, 64, "none"), None, adaptive, withheld, {})


def test_floors() -> None:
    floor = Floor.parse("adaptive=30")
    assert floor == Floor("adaptive", 30.0)
    assert floor.missed(result(Accuracy(0.3, 64, "all"))) == ""
    assert "29.7 %, under 30 %" in floor.missed(result(Accuracy(0.296875, 64, "all")))
    assert "transfer only" in floor.missed(result(None))
    assert "withheld: because" in floor.missed(result(None, "because"))
    assert "nothing undefended" in Floor.parse("transfer = 1.5").missed(result(Accuracy(1.0, 64, "all")))
    for text, message in (
        ("adaptive", "adaptive=PERCENT or transfer=PERCENT"),
        ("adaptive=x", "adaptive=PERCENT"),
        ("adaptive=101", "in 0 to 100"),
        ("adaptve=30", "did you mean 'adaptive'"),
    ):
        with pytest.raises(cd.UsageError, match=message):
            Floor.parse(text)


def test_what_is_declared_chooses_the_protocol(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with examination(tiny_model, images, labels, THREAT, defense=Blur()) as exam:
        assert exam.subject.views == 1 and len(exam.subject.seeds) == 5
        for number in (4, 5, 6, 7, 15):
            assert ORDER[number](exam).verdict <= Verdict.WARN, number
        assert ORDER[4](exam).measured["repeat_difference"] == 0.0
        assert ORDER[16](exam).verdict is Verdict.SKIPPED
    wrapped = Blur().wrap(tiny_model)
    with examination(wrapped, images, labels, THREAT) as exam:  # taken apart
        assert exam.subject.views == 1 and exam.subject.judge is wrapped and exam.subject.undefended is tiny_model
    undeclared = type("Undeclared", (Blur,), {"traits": cd.Traits()})()
    with examination(tiny_model, images, labels, THREAT, defense=undeclared) as exam:
        # its draws are keyed, and so do not change; the audit keys them as any caller may
        assert len(exam.subject.seeds) == 1
    with examination(tiny_model, images, labels, THREAT, defense=Blind()) as exam:
        found_views = ORDER[15](exam)
        assert found_views.verdict is Verdict.WARN and "transfer only" in found_views.advice


class Two(nn.Module):
    """Own gradients that hide what an auxiliary head shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([model])

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner[0](x)
        return logits.detach() + 1e-3 * (x - x.detach()).sum(dim=(1, 2, 3))[:, None] * logits.detach().sign()

    def adaptive(self) -> tuple[cd.AttackView, ...]:
        return (cd.AttackView("auxiliary", lambda x, ids, seed: self.inner[0](x)),)


def test_a_view_that_beats_the_own_gradients_is_named(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with examination(Two(tiny_model), images, labels, THREAT) as exam:
        finding = ORDER[15](exam)
    assert finding.verdict is Verdict.INVALID and finding.statistic == "views_ahead"
    assert "the strongest: margin on view auxiliary" in finding.evidence


def test_nothing_is_changed_and_the_same_comes_again(
    trained: Callable[[], dict[str, nn.Module]],
    held_back: tuple[Tensor, Tensor],
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    told: list[str] = []
    model, (x, y) = trained()["cnn"], held_back
    with untouched(model):
        first = cd.audit(model, x[:16], y[:16], THREAT, progress=told.append)
        again = cd.audit(model, x[:16], y[:16], THREAT)
    assert told[0] == "check 1 of 20: determinism" and len(told) == 20
    assert [f.to_dict() for f in first.findings] == [f.to_dict() for f in again.findings]
    content = json.loads(json.dumps(first.to_dict()))
    assert content["verdict"] == first.verdict.name and len(content["findings"]) == 20
    assert len(content["fingerprint"]["weights_sha256"]) == 64
    low, high = content["clean"]["interval_95"]
    assert low < content["clean"]["accuracy"] <= high


def test_the_public_name_is_a_function_whatever_was_imported_before() -> None:
    import clipdefense.audit as package

    assert isinstance(package, ModuleType) and callable(package) and callable(cd.audit)
    assert package.audit.__name__ == "audit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threat": cd.ThreatModel("linf", 0.0)}, "eps above 0 is expected"),
        ({"threat": "linf"}, "threat is 'linf'"),
        ({"defense": Blur}, "defense is Blur; an object is expected"),
        ({"few": 4}, "x has 4 images; .* at least 8"),
        ({"shift": 10}, r"\[0, 9\] is expected"),
        ({"model": nn.Identity()}, "logits of shape"),
    ],
)
def test_bad_requests_are_refused(
    changes: dict[str, Any], message: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    n = changes.get("few", len(images))
    model, threat = changes.get("model", tiny_model), changes.get("threat", THREAT)
    with pytest.raises(cd.UsageError, match=message):
        cd.audit(model, images[:n], labels[:n] + changes.get("shift", 0), threat, defense=changes.get("defense"))


def test_findings_are_named_by_the_number_of_their_check() -> None:
    clean, none = Accuracy(1.0, 8, "no attack"), skipped(7, "There is nothing to compare with.")
    audit = Audit("a model", cd.ThreatModel("linf", 8 / 255), (none,), clean, None, None, "", {})
    assert audit.finding(7) is none
    with pytest.raises(cd.UsageError, match="number is 21; a check's, in 1 to 20, is expected"):
        audit.finding(21)
