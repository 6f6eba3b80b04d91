"""What ART's and torchattacks' ensembles are made of, as those libraries make them."""

from __future__ import annotations

import pytest
import torch

from clipdefense.evaluation.ensemble import parts, ran

# their classes, by the names that the same attacks have in this library
NAMES = {
    "AutoProjectedGradientDescent cross_entropy": "apgd-ce",
    "AutoProjectedGradientDescent difference_logits_ratio": "apgd-dlr",
    "DeepFool": "deepfool",
    "SquareAttack": "square",
    "APGD ce": "apgd-ce",
    "APGD dlr": "apgd-dlr",
    "APGDT": "apgd-t",
    "FAB": "fab",
    "FAB targeted": "fab-t",
    "Square": "square",
}


def tiny() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))


def test_arts_autoattack_is_what_art_makes_it_of() -> None:
    evasion = pytest.importorskip("art.attacks.evasion")
    classifier = pytest.importorskip("art.estimators.classification").PyTorchClassifier
    estimator = classifier(tiny(), torch.nn.CrossEntropyLoss(), (3, 2, 2), 4, clip_values=(0, 1))
    made = evasion.AutoAttack(estimator).attacks
    names = {NAMES[f"{type(part).__name__} {getattr(part, 'loss_type', '')}".strip()] for part in made}
    effort = ran("+ art:AutoAttack,targeted=True")
    assert effort.keys() == parts("art:AutoAttack") == names and len(names) == len(made)
    assert [effort["apgd-ce"]["steps"], effort["square"]["queries"]] == [made[0].max_iter, made[-1].max_iter]
    assert not parts("art:AutoAttack,attacks=[]")
    assert ran("art:SquareAttack") == {"square": {"queries": evasion.SquareAttack(estimator).max_iter}}
    assert ran("art:SquareAttack,max_iter=7") == {"square": {"queries": 7}}


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_the_autoattack_of_torchattacks_is_what_it_makes_it_of(version: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    made = torchattacks.AutoAttack(tiny(), version=version, n_classes=4)._autoattack.attacks
    names = set()
    for part in made:
        kind = type(part).__name__
        more = {"APGD": getattr(part, "loss", ""), "FAB": "targeted" if getattr(part, "multi_targeted", 0) else ""}
        names.add(NAMES[f"{kind} {more.get(kind, '')}".strip()])
    assert parts(f"torchattacks:AutoAttack,version={version}") == names
    assert ran(f"torchattacks:AutoAttack,version={version},steps=7")["apgd-ce"] == {"steps": 7}
    assert ran("torchattacks:Square")["square"] == {"queries": torchattacks.Square(tiny()).n_queries}
