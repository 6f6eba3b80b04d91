"""What an evaluation leaves: a row for each attack, the worst case over them, and never a number without its caveat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipdefense.errors import UsageError
from clipdefense.evaluation.answers import Answers
from clipdefense.evaluation.counts import counted
from clipdefense.evaluation.statistics import Interval, wilson
from clipdefense.threat import ThreatModel

if TYPE_CHECKING:
    from clipdefense.audit import Audit

Kind = Literal["", "clean", "itself", "transfer", "view", "own gradient", "embedding", "black box"]
"""What was attacked: the model itself, the undefended model, a view, the defended model (its own gradient, or outputs
alone), embeddings through the defence."""

NAIVE: tuple[Kind, ...] = ("itself", "transfer")
ADAPTIVE: tuple[Kind, ...] = ("view", "own gradient", "embedding", "black box")


@dataclass(frozen=True)
class Row:
    """What one attack did.

    Attributes:
        attack: as written, e.g. ``"pgd,steps=100"``.
        attacked: what the attacker had gradients of.
        correct: (verdict seeds, n) whether the defended model was still right.
        adversarial: (n, C, H, W), only where asked for.
        kind: see :data:`Kind`.
        draws: EOT draws of each gradient (or query).
        answers: what was said of this attack's own images, also where ``correct`` counts those before it; None where
            no model was asked, as in a worst case.
        steps: (n,) evaluations of what it attacked that the attack spent on each image, the draws of one counted as
            one; None where it does not tell.
    """

    attack: str
    attacked: str
    correct: NDArray[np.bool_]
    adversarial: Tensor | None = field(default=None, repr=False, compare=False)
    kind: Kind = ""
    draws: int = 1
    answers: Answers | None = field(default=None, repr=False, compare=False)
    steps: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy(self) -> float:
        """Mean over images and verdict seeds."""
        return float(self.correct.mean())

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval on n images."""
        return wilson(self.accuracy, self.correct.shape[1])


@dataclass(frozen=True)
class Evaluation:
    """One model or defence under every attack.

    Attributes:
        name: what was judged.
        threat: the attacker's budget.
        clean: a :class:`Row` without an attack.
        rows: one for each attack and thing attacked.
        adaptive: whether an attacker who knows the defence is among them; where not, every robust number carries
            :attr:`caveat`.
        fingerprint: what the numbers depend on.
        ids: the images, in the order of the verdicts.
        left_out: attacks of an adaptive evaluation that did not run, each with its reason.
        withheld: why an audit withholds every robust accuracy; empty where none does. The rows keep their verdicts,
            and no output shows them.
    """

    name: str
    threat: ThreatModel
    clean: Row
    rows: tuple[Row, ...]
    adaptive: bool
    fingerprint: dict[str, Any]
    ids: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    withheld: str = ""

    @property
    def n(self) -> int:
        return self.clean.correct.shape[1]

    @property
    def caveat(self) -> str:
        """What stands beside every robust number: ``"transfer only"`` where no attacker knew the defence."""
        if self.adaptive:
            return ""
        return "no adaptive views" if any(row.kind == "itself" for row in self.rows) else "transfer only"

    def worst_case(self, kinds: Sequence[Kind] | None = None, label: str = "worst case per image") -> Row:
        """Right under every attack and every verdict seed, and on the clean image.

        Args:
            kinds: only attacks of these kinds; None takes all.
            label: what the row is called; :attr:`caveat` is added.
        """
        rows = [row for row in self.rows if kinds is None or row.kind in kinds]
        every = np.concatenate([self.clean.correct, *(row.correct for row in rows)])
        survived = np.asarray(every.all(axis=0))[None]
        return Row(label + (f" ({self.caveat})" if self.caveat else ""), counted(len(rows), "attack"), survived)

    def compared(self) -> tuple[Row, ...]:
        """Two worst cases side by side: of an attacker who does not know the defence, and of one who does.

        Empty where one of them is missing: there is nothing to compare, and the caveat says so.
        """
        kinds = {row.kind for row in self.rows}
        if not (kinds & set(NAIVE) and kinds & set(ADAPTIVE)):
            return ()
        naive = "worst case, transfer" if "transfer" in kinds else "worst case, the model itself"
        return self.worst_case(NAIVE, naive), self.worst_case(ADAPTIVE, "worst case, adaptive")

    def convergence(self) -> tuple[tuple[int, Row], ...]:
        """(EOT draws, row) of the defended model's own gradient; the last draws should change nothing."""
        return tuple((row.draws, row) for row in self.rows if row.kind == "own gradient")

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Evaluations of the same things on disjoint images, as one.

        Raises:
            UsageError: they differ in what was judged or attacked, or share images.
        """
        first = parts[0]
        ids = tuple(name for part in parts for name in part.ids)
        same = {(part.name, part.threat, tuple((r.attack, r.attacked) for r in part.rows)) for part in parts}
        if len(same) > 1 or len(set(ids)) < len(ids):
            raise UsageError(
                "the evaluations differ in what was judged or attacked, or share images; they cannot be joined."
            )

        def join(rows: Sequence[Row]) -> Row:
            kept = [row.adversarial for row in rows if row.adversarial is not None]
            steps = [row.steps for row in rows if row.steps is not None]
            answers = [row.answers for row in rows if row.answers is not None]
            return replace(
                rows[0],
                correct=np.concatenate([row.correct for row in rows], axis=1),
                adversarial=torch.cat(kept) if len(kept) == len(rows) else None,
                steps=np.concatenate(steps) if len(steps) == len(rows) else None,
                answers=Answers.joined(answers) if len(answers) == len(rows) else None,
            )

        rows = tuple(join(same_attack) for same_attack in zip(*(part.rows for part in parts)))
        why = " ".join(dict.fromkeys(part.withheld for part in parts if part.withheld))
        return replace(first, clean=join([part.clean for part in parts]), rows=rows, ids=ids, withheld=why)

    def audited(self, audit: Audit) -> Evaluation:
        """The same, its robust accuracies withheld where the audit is INVALID.

        Args:
            audit: what :func:`clipdefense.audit` found of the same model, defence and threat model.

        Raises:
            UsageError: it is of another norm or eps.
        """
        if (audit.threat.norm, audit.threat.eps) != (self.threat.norm, self.threat.eps):
            raise UsageError(f"the audit is of {audit.threat}, the evaluation of {self.threat}; audit at the same eps.")
        return replace(self, withheld=audit.withheld)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every number with its attack, n and interval, and the verdict of each image.

        What is withheld is null: accuracies, intervals and verdicts of every row but the clean one.
        """
        compared = [self._entry(row, robust=True) for row in self.compared()]
        transfer = self._entry(self.worst_case(), robust=True) if self.caveat == "transfer only" else None
        return {
            "name": self.name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "adaptive": self.adaptive,
            "caveat": self.caveat,
            "withheld": self.withheld or None,
            "clean": self._entry(self.clean),
            "attacks": [self._entry(row, robust=True) for row in self.rows],
            "transfer_worst_case": compared[0] if compared else transfer,
            "adaptive_worst_case": compared[1] if compared else None,
            "worst_case": self._entry(self.worst_case(), robust=True),
            "eot_convergence": [
                {"draws": draws, **self._numbers(row, robust=True)} for draws, row in self.convergence()
            ],
            "left_out": list(self.left_out),
            "ids": list(self.ids),
            "fingerprint": self.fingerprint,
        }

    def _entry(self, row: Row, robust: bool = False) -> dict[str, Any]:
        return {
            "attack": row.attack,
            "attacked": row.attacked,
            "kind": row.kind,
            "eot_draws": row.draws,
            "n": self.n,
            "verdict_seeds": len(row.correct),
            "caveat": self.caveat if robust else "",
            **self._numbers(row, robust),
        }

    def _numbers(self, row: Row, robust: bool) -> dict[str, Any]:
        if robust and self.withheld:
            return {"accuracy": None, "interval_95": None, "correct": None}
        verdicts = ["".join("01"[int(bit)] for bit in seed) for seed in row.correct]
        return {"accuracy": row.accuracy, "interval_95": list(row.interval), "correct": verdicts}


def still_standing(correct: NDArray[np.bool_], before: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(draws, n) verdicts of what also stood before; an image wrong on most draws has fallen on all."""
    left = correct & before
    kept: NDArray[np.bool_] = left & (left.mean(axis=0) > 0.5)
    return kept
