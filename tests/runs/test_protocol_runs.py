"""A protocol as a key of a run: it says everything but models and defences, and nothing can be said against it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clipdefense as cd
from clipdefense import UsageError
from clipdefense.data.protocols import get_protocol
from clipdefense.evaluation.runner import parse_attacks
from clipdefense.runs.build import Builder
from clipdefense.runs.config import RunConfig, read_config
from clipdefense.runs.page import page_of
from clipdefense.runs.results import read
from clipdefense.runs.run import run
from clipdefense.runs.units import cells
from clipdefense.runs.verify import verify

EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EuroSAT as it is unpacked, two images a class."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    for name in EUROSAT:
        (root / "eurosat" / "2750" / name).mkdir(parents=True)
        for number in (1, 2):
            pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", quality=95)
    return root


def test_a_protocol_says_everything(specs: tuple[str, str], root: Path, tmp_path: Path) -> None:
    config = read_config(
        {
            "models": [{"spec": specs[0], "name": "tiny"}],
            "protocol": "ttc-224",
            "datasets": [{"spec": "eurosat", "n": 6}],
            "threats": [{"eps": "4/255"}],
            "root": str(root),
        }
    )
    protocol = get_protocol("ttc-224")
    assert config.attacks == list(protocol.attacks) and config.verdict_seeds == protocol.verdict_seeds
    assert read_config({**config.facts(), **config.settings()}) == config  # a stored one is read back as it was
    assert "root" not in config.facts()
    builder = Builder(config, "cpu")
    (cell,) = cells(config)
    images, subject = builder.datasets["eurosat"], builder.subject(cell)
    assert subject.facts["templates"] == list(protocol.templates(images))
    assert len(subject.facts["templates_sha256"]) == 64
    assert builder.shapes["eurosat"] == (3, 224, 224) and len(images) == 6
    assert images.meta["protocol_sha256"] == protocol.hash
    # the prompts are the protocol's: the same text tower with these, and not with its own default
    (mine, other) = (
        cd.load_model(specs[0], classes=images.classes, templates=templates)
        for templates in (["A centered satellite photo of {}."], None)
    )
    ours = subject.model.head.embeddings  # type: ignore[union-attr]
    assert ours.allclose(mine.head.embeddings) and not ours.allclose(other.head.embeddings)
    assert subject.attacks == parse_attacks(protocol.attacks, subject.threat)


def test_a_run_under_a_protocol(specs: tuple[str, str], root: Path, tmp_path: Path) -> None:
    config = read_config(
        {
            "models": [{"spec": specs[0], "name": "tiny"}],
            "protocol": "tga-224",
            "datasets": [{"spec": "eurosat", "n": 4}],
            "threats": [{"eps": "1/255"}],
            "root": str(root),
        }
    )
    assert run(config, tmp_path / "run", device="cpu") == 1
    result = read(tmp_path / "run")
    page = page_of(result)
    assert page.facts["protocol"].startswith("tga-224: TGA-ZSR")
    assert "fp16 autocast" in page.facts["what to know of the protocol"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["fingerprint"]["protocol"] == "tga-224"
    assert summary["fingerprint"]["contents"]["eurosat"]["said"]["protocol_sha256"] == get_protocol("tga-224").hash
    attacks = parse_attacks(get_protocol("tga-224").attacks, config.threats[0].threat)
    assert [row["attack"] for row in summary["results"][0]["rows"][1:-1]] == [str(spec) for spec in attacks]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "ttc"}, "protocol 'ttc' is unknown; did you mean 'ttc-224'"),
        ({"attacks": ["pgd"]}, r"key 'attacks' is \['pgd'\], but protocol 'ttc-224' says"),
        ({"adaptive": True}, "key 'adaptive' is True, but protocol 'ttc-224' says False"),
        ({"datasets": ["mnist"]}, "protocol 'ttc-224': data set 'mnist' is unknown"),
        ({"datasets": [{"spec": "cifar10", "size": 32}]}, "datasets has the key 'size', which protocol 'ttc-224' says"),
        (
            {"threats": [{"eps": "8/255"}]},
            "threat model linf 8/255 is not one of protocol 'ttc-224'; it has linf, eps 1/",
        ),
        ({"threats": [{"eps": "1/255", "steps": 3}]}, "threat model linf 1/255 is not one of protocol"),
    ],
)
def test_what_contradicts_a_protocol_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config({"models": ["a:b"], "protocol": "ttc-224", **change})


def test_data_sets_that_are_missing_are_all_named_at_once(specs: tuple[str, str], root: Path, tmp_path: Path) -> None:
    config = read_config({"models": [specs[0]], "protocol": "ttc-224", "root": str(root)})
    assert len(config.datasets) == len(get_protocol("ttc-224").datasets) and len(config.threats) == 2
    with pytest.raises(UsageError, match=r"^16 data sets cannot be loaded: cifar10, cifar100, .*--data\). The first: "):
        run(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_strictest_protocol_attacks_what_draws_as_such() -> None:
    config = read_config({"models": ["a:b"], "protocol": "clipdefense-1", "datasets": ["eurosat"]})
    (dataset,), threat = config.datasets, config.threats[0]
    plain, random = (config.attacks_of(threat, dataset, randomized=draws) for draws in (False, True))
    assert str(plain[-1]) == "autoattack" and str(random[-1]) == "autoattack,version=rand"
    assert config.cumulative and config.adaptive and config.verdict_seeds == 10


def test_cumulative_rows_are_the_evaluations(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    noise = {"spec": "random-noise", "eot": 2, "options": {"eps": "6/255"}}
    attacks = ["pgd,steps=1", "apgd-ce,steps=3"]
    config = make_config(attacks=attacks, defenses=["none", noise], verdict_seeds=3, cumulative=True, save_adv=True)
    run(config, tmp_path / "run", device="cpu")
    builder = Builder(config, "cpu")
    for cell, result in zip(cells(config), read(tmp_path / "run").cells):
        subject, parts = builder.subject(cell), []
        for start in range(0, 40, 16):
            part = builder.datasets["images"].select(range(start, min(start + 16, 40)))
            x, y = part.tensors()
            options = {"defense": subject.defense, "verdict_seeds": 3, "eot": cell.defense.eot, "ids": part.ids}
            if subject.defense is not None:
                subject.defense.reset()  # type: ignore[attr-defined]
            parts.append(
                cd.evaluate(
                    subject.model, x, y, subject.threat, attacks=attacks, cumulative=True, batch_size=8, **options
                )
            )
        whole = cd.evaluation.Evaluation.joined(parts)
        ours = result.evaluation
        names = [(row.attack, row.attacked) for row in whole.rows]
        assert [(row.attack, row.attacked) for row in ours.rows] == names and names[1][0] == "+ apgd-ce,steps=3"
        for row, same in zip(ours.rows, whole.rows):
            assert row.correct.tolist() == same.correct.tolist()
        assert ours.rows[1].accuracy < ours.rows[0].accuracy <= ours.clean.accuracy
        assert result.unrepeatable == 0
    assert all(proof.holds for proof in verify(tmp_path / "run", device="cpu"))
