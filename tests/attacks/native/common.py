"""The native attacks at small budgets, and threat models, as several tests take them."""

from __future__ import annotations

from typing import Any

from clipdefense import ThreatModel

THREATS = [ThreatModel("linf", 8 / 255, steps=6), ThreatModel("l2", 1.0, steps=6)]
STEPS: dict[str, dict[str, Any]] = {
    "apgd-ce": {"steps": 6},
    "apgd-dlr": {"steps": 6},
    "apgd-t": {"steps": 4, "targets": 2},
    "fab-t": {"steps": 4, "targets": 2},
    "square": {"queries": 25},
}
FEW: dict[str, dict[str, Any]] = {
    "pgd": {},
    **STEPS,
    "autoattack": {"stages": {k: STEPS[k] for k in STEPS if k != "apgd-dlr"}},
}
NATIVE = list(FEW)
