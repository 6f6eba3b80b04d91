"""What RobustBench's fields say of an AutoAttack that is another library's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clipdefense.runs.config import RunConfig
from clipdefense.runs.results import read
from clipdefense.runs.robustbench import entry
from clipdefense.runs.run import run


@pytest.mark.parametrize(
    ("attacks", "footnote"),
    [
        (("art:AutoAttack",), "no autoattack_acc: art:AutoAttack is another library's"),
        (("+ torchattacks:AutoAttack,steps=10", "pgd"), "torchattacks:AutoAttack is another library's"),
        (("pgd", "apgd-ce"), "no AutoAttack ran"),
    ],
)
def test_another_librarys_autoattack_is_named_and_fills_nothing(
    make_config: Callable[..., RunConfig], folder: Path, attacks: tuple[str, ...], footnote: str
) -> None:
    run(make_config(exhibits=False), folder, device="cpu")
    (cell,) = read(folder).cells
    named = tuple((attack, "itself", "itself", 1) for attack in attacks)
    fields = entry(replace(cell, attacks=named, adversarial=cell.adversarial[[0] * len(named)]))
    assert fields["autoattack_acc"] is None and footnote in fields["footnote"]
