"""Evaluation: attacks and defences in, robust accuracies with their intervals out."""

from clipdefense.evaluation.results import Evaluation, Row
from clipdefense.evaluation.runner import AttackSpec, evaluate
from clipdefense.evaluation.statistics import Interval, wilson

__all__ = ["AttackSpec", "Evaluation", "Interval", "Row", "evaluate", "wilson"]
