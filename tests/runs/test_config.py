"""A run's configuration: what it may say, and how a mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipdefense import UsageError
from clipdefense.runs.config import read_config
from clipdefense.runs.units import Shard, cells, jobs

TOML = """
models = ["open_clip:ViT-B-32-quickgelu@openai", {spec = "timm:x", name = "mine"}]
attacks = ["pgd,steps=20", "apgd-ce"]
seed = 3

[[datasets]]
spec = "folder:photos"
size = 224

[[defenses]]
spec = "none"

[[defenses]]
spec = "random-noise"
options = {eps = "8/255"}

[[threats]]
eps = "1/255"

[[threats]]
norm = "l2"
eps = 0.5
attacks = ["pgd,steps=5"]
"""


def test_a_file_says_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    config = read_config(file, seed=4, attacks=None)
    assert config.seed == 4 and config.unit == 512 and not config.save_adv
    assert config.defenses[1].options == {"eps": 8 / 255}
    assert [row.label for row in config.threats] == ["linf 1/255", "l2 0.5"]
    assert [str(spec) for spec in config.attacks_of(config.threats[0], config.datasets[0])] == [
        "pgd,steps=20",
        "apgd-ce",
    ]
    assert [str(spec) for spec in config.attacks_of(config.threats[1], config.datasets[0])] == ["pgd,steps=5"]
    listed = cells(config)
    assert [cell.number for cell in listed] == list(range(8))
    assert listed[5].name == "mine | none | folder:photos | l2 0.5"
    # a stored configuration is read back as it was
    again = read_config({**config.facts(), **config.settings()})
    assert again == config and again.facts() == config.facts()
    # where what has a name lies, and how it is computed, is no part of what a run is
    models = [config.models[0].spec, {"spec": "other:place", "name": "mine"}]
    moved = read_config(file, seed=4, batch_size=3, models=models)
    assert moved.facts() == config.facts() and moved != config
    assert read_config(file, seed=4, models=["other:place", models[1]]).facts() != config.facts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": []}, "the run: key 'modles' is unknown; did you mean 'models'"),
        ({"models": []}, "key 'models' is .*; list should have at least 1 item"),
        ({"models": [{"name": "x"}]}, r"key 'models\[0\].spec' is missing"),
        ({"datasets": [{"spec": "a", "spilt": "x"}]}, r"key 'datasets\[0\].spilt' is unknown; did you mean .*split'"),
        ({"datasets": [{"spec": "a", "n": 0}]}, r"n' is 0; a number greater than or equal to 1 is expected"),
        ({"datasets": [{"spec": "a", "n": "7"}]}, r"key 'datasets\[0\].n' is '7'; a valid integer is expected"),
        ({"threats": [{"eps": 4}]}, r"threats\[0\]: eps is 4.*did you mean 4/255"),
        ({"threats": [{"eps": "4/x"}]}, r"threats\[0\].eps: eps '4/x' is not a number"),
        ({"threats": [{"eps": 0.1, "norm": "l1"}]}, r"threats\[0\]: norm 'l1' is unknown; did you mean 'l2'"),
        ({"threats": [{"eps": 0.1}, {"eps": 0.1, "steps": 3}]}, "threats has 'linf 0.1' 2 times; give each a name="),
        ({"attacks": ["pgdd"]}, "attack 'pgdd' is unknown; did you mean 'pgd'"),
        ({"attacks": ["pgd", "pgd"]}, "attacks has 'pgd' 2 times"),
        ({"attacks": ["pgd", "pgd,step=3"]}, r"the run: attacks\[1\]: option of attack 'pgd' 'step' is unknown"),
        ({"threats": [{"eps": 0.1, "attacks": ["pg"]}]}, r"threats\[0\]: attacks\[0\]: attack 'pg' is unknown"),
        ({"threats": {"eps": 0.1}}, r"key 'threats' is .*write \[\[threats\]\] in the place of \[threats\]"),
        ({"defenses": [{"spec": "none", "options": {"a": 2}}]}, "defence 'none' has options; they are for"),
        ({"unit": 513}, "key 'unit' is 513; a number less than or equal to 512 is expected"),
        ({"save_adv": "yes"}, "key 'save_adv' is 'yes'; a valid boolean is expected"),
    ],
)
def test_a_mistake_is_named_with_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config({"models": ["a:b"], "datasets": ["c:d"], **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "run file .* does not exist"), ("models = [", "is not TOML"), ("", "'models' is missing")],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(file)


def test_shards_own_whole_units_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config({"models": ["a:b"], "datasets": ["c:d"], "defenses": ["none", "random-noise"]})
    every = jobs(cells(config), {"c:d": 1300}, 512)
    assert [(job.cell.number, job.unit, job.start, job.stop) for job in every[:4]] == [
        (0, 0, 0, 512),
        (0, 1, 512, 1024),
        (0, 2, 1024, 1300),
        (1, 0, 0, 512),
    ]
    parts = [Shard(index, 4).owned(every) for index in range(4)]
    assert sorted((j.cell.number, j.unit) for part in parts for j in part) == [(j.cell.number, j.unit) for j in every]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # two processes of each of two machines
    assert Shard().launched() == Shard(1, 2) and Shard.parse("1/2").launched() == Shard(3, 4)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_a_bad_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shard is"):
        Shard.parse(text)
