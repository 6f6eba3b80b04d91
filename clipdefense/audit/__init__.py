"""The audit: twenty checks on few images, and a robust accuracy that is withheld where one of them fails.

``clipdefense.audit`` is the public function as well as this package, so the package can be called.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from clipdefense.audit.report import Accuracy, Audit, Finding, Floor
from clipdefense.audit.run import audit
from clipdefense.audit.show import show, table
from clipdefense.audit.thresholds import CHECKS, STATISTICS, Statistic, Verdict

__all__ = [
    "CHECKS",
    "STATISTICS",
    "Accuracy",
    "Audit",
    "Finding",
    "Floor",
    "Statistic",
    "Verdict",
    "audit",
    "show",
    "table",
]


class _Callable(ModuleType):
    """Importing a subpackage binds it in its parent, over a function of the same name: either can be called."""

    def __call__(self, *args: Any, **options: Any) -> Audit:
        return audit(*args, **options)


sys.modules[__name__].__class__ = _Callable
__signature__ = inspect.signature(audit)
