"""Evaluation: attacks and defences in, robust accuracies with their intervals out."""

from clipdefense.evaluation.runner import AttackSpec, Evaluation, Row, evaluate
from clipdefense.evaluation.statistics import Interval, wilson

__all__ = ["AttackSpec", "Evaluation", "Interval", "Row", "evaluate", "wilson"]
