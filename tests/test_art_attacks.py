"""Every evasion attack of ART that works on a classifier of images with logits works on CLIPClassifier.

Few images and few iterations: what is checked is that an attack runs through our estimator, keeps its promises and
leaves nothing behind, not how strong it is. Left out, because of what they are made for or how long they take:

* FeatureAdversariesNumpy takes finite differences through scipy, 3,000 forwards an iteration;
* AdversarialPatchNumpy is what AdversarialPatch uses for other frameworks;
* attacks on videos, sound, tables, object detectors, decision trees and TensorFlow models.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import art.attacks.evasion as evasion
import numpy as np
import pytest
import torch
from torch import Tensor

from clipdefense import CLIPClassifier, ZeroShotClassifier

EPS = 8 / 255
LINF: dict[str, Any] = {"norm": np.inf, "eps": EPS, "eps_step": EPS / 2, "max_iter": 2, "verbose": False}
FREE: dict[str, Any] = {"eps": EPS, "eps_step": 2 * EPS, "max_iter": 4, "nb_random_init": 1, "verbose": False}
CE: dict[str, Any] = {**FREE, "loss_type": "cross_entropy"}
CW: dict[str, Any] = {"max_iter": 2, "initial_const": 1.0, "learning_rate": 0.05, "verbose": False}
PATCH: dict[str, Any] = {
    "rotation_max": 10.0, "scale_min": 0.3, "scale_max": 0.5, "max_iter": 2, "batch_size": 4, "verbose": False,
}  # fmt: skip
QUERIES: dict[str, Any] = {"max_iter": 1, "init_size": 20, "verbose": False}
EVERYWHERE = np.full((3, 32, 32), EPS, dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """An attack at its smallest.

    Attributes:
        attack: class name in ``art.attacks.evasion``.
        options: of its constructor.
        images: how many; 1 or 2 where an image is slow.
        ball: (norm, radius) that it promises to stay in, in [0, 1] pixels; None for attacks that minimise.
        y: what it is given: the true labels, or others where it reads them as targets.
        touches: what it changes on the module behind our back: AutoAttack, APGD and ACG put a plain PyTorchClassifier
            of their own around it; the others call ``model.eval()`` or ``model.zero_grad()`` themselves.
    """

    attack: str
    options: dict[str, Any] = field(default_factory=dict)
    images: int = 4
    ball: tuple[float, float] | None = None
    y: Literal["true", "others", "one-hot others", "guides"] = "true"
    touches: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = [str(self.options[key]) for key in ("loss_type", "norm") if key in self.options]
        return "-".join([self.attack, *kind])


CASES = [
    Case("FastGradientMethod", {"eps": EPS}, ball=(np.inf, EPS)),
    Case("FastGradientMethod", {"eps": 0.5, "norm": 2}, ball=(2, 0.5)),
    Case("BasicIterativeMethod", {k: v for k, v in LINF.items() if k != "norm"}, ball=(np.inf, EPS)),
    Case("MomentumIterativeMethod", LINF, ball=(np.inf, EPS)),
    Case("ProjectedGradientDescent", LINF, ball=(np.inf, EPS)),
    Case("ProjectedGradientDescentNumpy", LINF, ball=(np.inf, EPS)),
    Case("ProjectedGradientDescentPyTorch", LINF, ball=(np.inf, EPS)),
    Case("ProjectedGradientDescentPyTorch", {**LINF, "norm": 2, "eps": 0.5, "eps_step": 0.2}, ball=(2, 0.5)),
    Case("ProjectedGradientDescentPyTorch", {**LINF, "norm": 1, "eps": 5.0, "eps_step": 2.0}, ball=(1, 5.0)),
    Case(
        "ProjectedGradientDescentPyTorch", {**LINF, "eps": EVERYWHERE, "eps_step": EVERYWHERE / 2}, ball=(np.inf, EPS)
    ),
    Case("ProjectedGradientDescentPyTorch", {**LINF, "targeted": True}, ball=(np.inf, EPS), y="others"),
    Case("AutoProjectedGradientDescent", {**FREE, "loss_type": None}, ball=(np.inf, EPS)),
    Case("AutoProjectedGradientDescent", CE, ball=(np.inf, EPS), touches=("modes", "gradients")),
    Case(
        "AutoProjectedGradientDescent",
        {**CE, "norm": 2, "eps": 0.5, "eps_step": 1.0},
        ball=(2, 0.5),
        touches=("modes", "gradients"),
    ),
    Case(
        "AutoProjectedGradientDescent",
        {**FREE, "loss_type": "difference_logits_ratio"},
        ball=(np.inf, EPS),
        touches=("modes", "gradients"),
    ),
    Case("AutoConjugateGradient", CE, ball=(np.inf, EPS), touches=("modes", "gradients")),
    Case("RescalingAutoConjugateGradient", CE, ball=(np.inf, EPS), touches=("modes", "gradients")),
    Case(  # so small that some image survives each of its four parts
        "AutoAttack",
        {"eps": EPS / 16, "eps_step": EPS / 8},
        ball=(np.inf, EPS / 16),
        touches=("modes", "gradients"),
    ),
    Case("CarliniL2Method", {**CW, "binary_search_steps": 2}),
    Case("CarliniLInfMethod", {**CW, "largest_const": 10.0}, images=2),
    Case("CarliniL0Method", {**CW, "binary_search_steps": 1}, images=2),
    Case("ElasticNet", {**CW, "max_iter": 3, "binary_search_steps": 2}),
    Case("DeepFool", {"max_iter": 5, "nb_grads": 3, "verbose": False}),
    Case("NewtonFool", {"max_iter": 3, "verbose": False}),
    Case("SquareAttack", {"eps": EPS, "max_iter": 5, "verbose": False}, ball=(np.inf, EPS)),
    Case("SquareAttack", {"norm": 2, "eps": 1.0, "max_iter": 5, "verbose": False}, ball=(2, 1.0)),
    Case(
        "SignOPTAttack",
        {"targeted": False, "max_iter": 1, "num_trial": 3, "k": 3, "query_limit": 100, "verbose": False},
        images=1,
    ),
    Case(
        "ZooAttack",
        {
            **CW,
            "learning_rate": 0.5,
            "initial_const": 10.0,
            "nb_parallel": 64,
            "use_resize": False,
            "use_importance": False,
        },
        images=2,
    ),
    Case("SaliencyMapMethod", {"theta": 0.5, "gamma": 0.005, "verbose": False}, images=2, y="others"),
    Case(
        "SpatialTransformation",
        {"max_translation": 10.0, "num_translations": 2, "max_rotation": 10.0, "num_rotations": 2, "verbose": False},
    ),
    Case(
        "UniversalPerturbation",
        {"attacker": "fgsm", "attacker_params": {"eps": EPS}, "eps": EPS, "max_iter": 1, "verbose": False},
        ball=(np.inf, EPS),
    ),
    Case(
        "TargetedUniversalPerturbation",
        {"attacker": "fgsm", "attacker_params": {"eps": EPS, "targeted": True}, "eps": EPS, "max_iter": 1},
        ball=(np.inf, EPS),
        y="one-hot others",
    ),
    Case(
        "Wasserstein",
        {"max_iter": 2, "conjugate_sinkhorn_max_iter": 5, "projected_sinkhorn_max_iter": 5, "verbose": False},
        images=2,
    ),
    Case("HopSkipJump", {**QUERIES, "max_eval": 20, "init_eval": 5}, images=2),
    Case("BoundaryAttack", {**QUERIES, "targeted": False, "num_trial": 2, "sample_size": 3}, images=2),
    Case("PixelAttack", {"th": 1, "es": 1, "max_iter": 1, "verbose": False}, images=1),
    Case("ShadowAttack", {"nb_steps": 3, "batch_size": 1, "verbose": False}, images=1, y="others"),
    Case("FrameSaliencyAttack", {"method": "iterative_saliency", "verbose": False}, ball=(np.inf, EPS)),
    Case(
        "FeatureAdversariesPyTorch",
        {"delta": EPS, "layer": "tower", "step_size": 1 / 255, "max_iter": 3, "verbose": False},
        ball=(np.inf, EPS),
        y="guides",
        touches=("modes",),
    ),
    Case("AdversarialPatch", {**PATCH, "patch_shape": (3, 32, 32)}, touches=("gradients",)),
    Case("AdversarialPatchPyTorch", {**PATCH, "patch_shape": (3, 16, 16)}, touches=("gradients",)),
]


def make(case: Case, classifier: CLIPClassifier) -> Any:
    attack = getattr(evasion, case.attack)
    if case.attack == "FrameSaliencyAttack":
        return attack(classifier, evasion.FastGradientMethod(classifier, eps=EPS), **case.options)
    made = attack(classifier, **case.options)
    if case.attack == "AutoAttack":
        for part in made.attacks:  # it has no options for them
            part.verbose, part.max_iter = False, 3
            part.nb_random_init = part.nb_restarts = 1
    return made


def craft(case: Case, classifier: CLIPClassifier, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    others = (y + 1) % classifier.nb_classes
    one_hot = np.eye(classifier.nb_classes, dtype=np.float32)[others]
    given = {"true": y, "others": others, "one-hot others": one_hot, "guides": x[::-1].copy()}
    attack = make(case, classifier)
    result = attack.generate(x, given[case.y])
    return attack.apply_patch(x, scale=0.4) if "Patch" in case.attack else result


def distance(x_adv: np.ndarray, x: np.ndarray, norm: float) -> float:
    return float(np.linalg.norm((x_adv - x).reshape(len(x), -1).astype(float), ord=norm, axis=1).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attack_works_and_leaves_nothing_behind(
    case: Case, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - ART draws from it
    tiny_model.train()
    tiny_model.tower.ln_pre.eval()
    tiny_model.tower.conv1.weight.requires_grad_(False)
    own = tiny_model.tower.proj.grad = torch.ones_like(tiny_model.tower.proj)
    modes = {name: part.training for name, part in tiny_model.named_modules()}
    x, y = images[: case.images].numpy(), labels[: case.images].numpy()
    before = x.copy()

    x_adv = craft(case, CLIPClassifier(tiny_model), x, y)

    assert x_adv.shape == x.shape
    assert x_adv.dtype == np.float32
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (x_adv != x).any()
    assert np.array_equal(x, before)
    if case.ball is not None:
        norm, radius = case.ball
        assert 0 < distance(x_adv, x, norm) <= radius * (1 + 1e-5) + 1e-6
    assert [name for name, weight in tiny_model.named_parameters() if not weight.requires_grad] == [
        "tower.conv1.weight"
    ]
    if "modes" not in case.touches:
        assert {name: part.training for name, part in tiny_model.named_modules()} == modes
    if "gradients" not in case.touches:
        left = {name: weight.grad for name, weight in tiny_model.named_parameters() if weight.grad is not None}
        assert list(left) == ["tower.proj"]
        assert left["tower.proj"] is own and (own == 1).all()


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


IMPOSSIBLE = [
    # numpy 2 has no np.mat any more
    pytest.param("GeoDA", {"max_iter": 500, "verbose": False}, AttributeError, id="GeoDA"),
    # images with the channels last
    pytest.param("LaserAttack", {"iterations": 1, "laser_generator": None}, ValueError, id="LaserAttack"),
    # they want probabilities; a softmax behind the model gives them
    pytest.param("SimBA", {"max_iter": 2, "verbose": False}, ValueError, id="SimBA"),
    pytest.param("VirtualAdversarialMethod", {"max_iter": 1, "verbose": False}, TypeError, id="VirtualAdversarial"),
    # it reads one-hot labels only
    pytest.param(
        "TargetedUniversalPerturbation",
        {"attacker": "fgsm", "attacker_params": {"targeted": True}, "max_iter": 1},
        np.exceptions.AxisError,
        id="TargetedUniversalPerturbation-integers",
    ),
    # one image at a time
    pytest.param("ShadowAttack", {"nb_steps": 1, "batch_size": 1, "verbose": False}, ValueError, id="ShadowAttack"),
    # optional packages of ART
    pytest.param("ThresholdAttack", {"th": 1, "es": 0, "verbose": False}, ModuleNotFoundError, id="ThresholdAttack",
                 marks=pytest.mark.skipif(not missing("cma"), reason="cma is installed")),
    pytest.param("CompositeAdversarialAttackPyTorch", {}, ModuleNotFoundError, id="CompositeAdversarialAttack",
                 marks=pytest.mark.skipif(not missing("kornia"), reason="kornia is installed")),
    pytest.param("BrendelBethgeAttack", {}, AttributeError, id="BrendelBethge",
                 marks=pytest.mark.skipif(not missing("numba"), reason="numba is installed")),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "options", "error"), IMPOSSIBLE)
def test_what_cannot_work_and_why(
    attack: str,
    options: dict[str, Any],
    error: type[Exception],
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
) -> None:
    with pytest.raises(error) as caught:
        getattr(evasion, attack)(CLIPClassifier(tiny_model), **options).generate(images[:2].numpy(), labels[:2].numpy())
    assert caught.type is error


def test_the_logits_ratio_needs_three_classes(make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    classifier = CLIPClassifier(make_model(classes=2))
    attack = evasion.AutoProjectedGradientDescent(classifier, **FREE, loss_type="difference_logits_ratio")
    with pytest.raises(IndexError):
        attack.generate(images[:2].numpy())
