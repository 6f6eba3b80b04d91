"""Comparison: which images changed, how likely by chance, and whether one run's perturbations break the other."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from pathlib import Path

import pytest

from clipdefense.errors import UsageError
from clipdefense.runs.compare import WORST, compare, mcnemar, standing, transfer
from clipdefense.runs.config import RunConfig
from clipdefense.runs.results import read
from clipdefense.runs.run import run

MakeConfig = Callable[..., RunConfig]


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(4, 4) == 1
    # two tails of Binomial(10, 1/2) at 2 or fewer
    assert mcnemar(2, 8) == pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10)
    assert mcnemar(8, 2) == mcnemar(2, 8)


@pytest.fixture
def pair(make_config: MakeConfig, tmp_path: Path) -> tuple[Path, Path]:
    """The same model under 4/255, perturbations kept, and under a weaker attack of the same radius."""
    for name, changes in (("a", {"save_adv": True}), ("b", {"attacks": ["pgd", "pgd,step_size=1e-5"]})):
        steps = 3 if name == "a" else 1
        run(make_config(threats=[{"eps": "4/255", "steps": steps}], **changes), tmp_path / name, device="cpu")
    return tmp_path / "a", tmp_path / "b"


def test_the_images_that_changed(pair: tuple[Path, Path]) -> None:
    a, b = (read(folder).cells[0] for folder in pair)
    by_attack = {change.attack: change for change in compare(*pair)}
    assert set(by_attack) == {"pgd", f"{WORST}, over the 1 attack both have"}
    change = by_attack["pgd"]
    right_a, right_b = (cell.adversarial[0, 0] == cell.labels for cell in (a, b))
    assert change.n == 40 and change.both + change.neither + len(change.only_a) + len(change.only_b) == 40
    assert change.only_b == tuple(a.samples[right_b & ~right_a]) and change.only_a == tuple(
        a.samples[right_a & ~right_b]
    )
    assert len(change.only_b) >= 1 and change.p_value == mcnemar(len(change.only_a), len(change.only_b))
    assert change.to_dict()["images_only_b"] == change.only_b


def test_one_runs_perturbations_on_the_other(pair: tuple[Path, Path]) -> None:
    (found,) = transfer(*pair, device="cpu")
    a, b = (read(folder).cells[0] for folder in pair)
    # the model is the same, so that what A's bank breaks is what A has broken and B, under all its attacks, has not
    only_b = tuple(a.samples[standing(b, None) & ~standing(a, None)].tolist())
    assert found.broken == only_b and found.tried == len(found.broken) > 0
    assert found.units == found.units_a > 0 and found.notes == []
    with pytest.raises(UsageError, match="kept no perturbations"):
        transfer(pair[1], pair[0], device="cpu")


def test_a_perturbation_outside_the_others_budget_does_not_count(
    pair: tuple[Path, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    run(make_config(threats=[{"eps": "0.5/255", "steps": 1}]), tmp_path / "tight", device="cpu")
    (found,) = transfer(pair[0], tmp_path / "tight", device="cpu")
    assert found.tried == 0 and found.broken == () and found.over_budget > 0
    assert found.notes == [
        f"A's perturbations of {found.over_budget} more are outside B's threat model and were not tried"
    ]


def test_cells_are_matched_by_name_or_named(make_config: MakeConfig, tmp_path: Path, specs: tuple[str, str]) -> None:
    grid = make_config(defenses=["none", {"spec": "random-noise", "name": "noise", "views": []}], verdict_seeds=1)
    run(grid, tmp_path / "a", device="cpu")
    names = [cell.cell.name for cell in read(tmp_path / "a").cells]
    assert {change.a for change in compare(tmp_path / "a", tmp_path / "a")} == set(names)
    assert compare(tmp_path / "a", tmp_path / "a", cell_a=names[0], cell_b=names[1])[-1].b == names[1]
    with pytest.raises(UsageError, match="is unknown; did you mean"):
        compare(tmp_path / "a", tmp_path / "a", cell_a=names[0] + "x")
    renamed = make_config(models=[{"spec": specs[0], "name": "other"}], defenses=["none"])
    run(renamed, tmp_path / "b", device="cpu")
    with pytest.raises(UsageError, match="say which to compare with --cell-a"):
        compare(tmp_path / "a", tmp_path / "b")
    small = make_config(datasets=[{"spec": specs[1], "name": "images", "size": 12}])
    run(small, tmp_path / "c", device="cpu")
    with pytest.raises(UsageError, match=r"^dataset.attacked_at\[0\] is 12"):
        compare(tmp_path / "b", tmp_path / "c")
