"""Comparison: which images changed, how likely by chance, and whether one run's perturbations break the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest

from clipdefense.errors import UsageError
from clipdefense.runs.compare import _pairs, compare, mcnemar, standing, transfer
from clipdefense.runs.config import RunConfig
from clipdefense.runs.likeness import WORST
from clipdefense.runs.results import RunResult, read
from clipdefense.runs.run import run
from clipdefense.runs.units import Cell

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
    # no name is in both, and the undefended cells are the only ones of their defence, data set and threat model
    assert {(change.a, change.b) for change in compare(tmp_path / "a", tmp_path / "b")} == {
        ("tiny | none | images | linf 4/255", "other | none | images | linf 4/255")
    }
    small = make_config(datasets=[{"spec": specs[1], "name": "images", "size": 12}])
    run(small, tmp_path / "c", device="cpu")
    with pytest.raises(UsageError, match=r"^dataset.attacked_at\[0\] is 12"):
        compare(tmp_path / "b", tmp_path / "c")


def cells(result: RunResult, *names: tuple[str, str, str, str]) -> RunResult:
    """The run as if it had cells of these labels: model, defence, data set, threat model."""
    (own,) = result.cells[:1]
    made = []
    for number, labels in enumerate(names):
        tables = (own.cell.model, own.cell.defense, own.cell.dataset, own.cell.threat)
        named = [table.model_copy(update={"name": label}) for table, label in zip(tables, labels)]
        made.append(replace(own, cell=Cell(number, *named)))  # type: ignore[arg-type]
    contents = {label: result.facts["contents"]["images"] for _, _, label, _ in names}
    return replace(result, cells=tuple(made), facts={**result.facts, "contents": contents})


@pytest.mark.parametrize(
    ("ours", "theirs", "paired"),
    [
        # one name in both is enough, whatever else there is
        ([("m", "d", "x", "t"), ("m", "e", "x", "t")], [("m", "d", "x", "t"), ("n", "e", "x", "t")], [(0, 0)]),
        # the same model with another defence, on either data set
        ([("m", "d", "x", "t"), ("m", "d", "y", "t")], [("m", "e", "y", "t"), ("m", "e", "x", "t")], [(0, 1), (1, 0)]),
        # the same defence on another model, and another threat model that goes with none
        ([("m", "d", "x", "t"), ("m", "d", "x", "s")], [("n", "d", "x", "t"), ("n", "e", "x", "t")], [(0, 0)]),
        # another model and another defence
        ([("m", "d", "x", "t"), ("m", "d", "y", "t")], [("n", "e", "x", "t"), ("n", "e", "y", "t")], [(0, 0), (1, 1)]),
        # two could be meant, on one side or the other
        ([("m", "d", "x", "t")], [("n", "e", "x", "t"), ("o", "f", "x", "t")], []),
        ([("m", "d", "x", "t"), ("m", "e", "x", "t")], [("n", "f", "x", "t")], []),
        ([("m", "d", "x", "t"), ("m", "d", "y", "t")], [("m", "d", "x", "s"), ("m", "d", "y", "s")], []),
    ],
)
def test_cells_without_a_common_name_are_paired_by_what_they_share(
    pair: tuple[Path, Path],
    ours: list[tuple[str, str, str, str]],
    theirs: list[tuple[str, str, str, str]],
    paired: list[tuple[int, int]],
) -> None:
    a, b = cells(read(pair[0]), *ours), cells(read(pair[1]), *theirs)
    if not paired:
        with pytest.raises(UsageError, match=r"by its data set and threat model .* say which .* with --cell-a \("):
            _pairs(a, b, None, None)
        return
    assert [(one.cell.number, two.cell.number) for one, two in _pairs(a, b, None, None)] == paired


def test_of_many_cells_a_few_are_named(pair: tuple[Path, Path]) -> None:
    a = cells(read(pair[0]), *(("m", "d", f"x{number}", "t") for number in range(9)))
    b = cells(read(pair[1]), *(("m", "d", f"y{number}", "t") for number in range(6)))
    with pytest.raises(UsageError) as refused:
        _pairs(a, b, None, None)
    said = str(refused.value)
    assert "'m | d | x5 | t' and 3 more) and --cell-b ('m | d | y0 | t'" in said and said.endswith("'m | d | y5 | t').")
    assert "x6" not in said
