"""ART's attacks by name, and the native attacks as an ART class, on real ART objects."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import art.attacks.evasion as evasion
import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoAttack, FastGradientMethod, ProjectedGradientDescentPyTorch
from art.defences.preprocessor import FeatureSqueezing
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError
from torch import Tensor, nn

from clipdefense import InputDefense, MissingPackageError, ThreatModel, UsageError, ZeroShotClassifier, get_attack
from clipdefense.attacks import AttackWarning, run
from clipdefense.attacks.foreign import within_budget
from clipdefense_art import NativeAttack

LINF = ThreatModel("linf", eps=4 / 255, steps=4)
L2 = ThreatModel("l2", eps=0.5, steps=4)


def art_classifier(model: nn.Module, **options: Any) -> PyTorchClassifier:
    """ART's own class, without any part of this library."""
    shape = {"input_shape": (3, 32, 32), "nb_classes": 10, "clip_values": (0, 1)}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), **{**shape, "device_type": "cpu", **options})


def direct(attack: type, model: nn.Module, x: Tensor, y: Tensor, seed: int, **options: Any) -> Tensor:
    np.random.seed(seed)  # noqa: NPY002 - ART draws from it
    torch.manual_seed(seed)
    attacked = attack(art_classifier(model), batch_size=128, **options).generate(x.numpy(), y.numpy())
    return torch.from_numpy(attacked)


class Darken(InputDefense):
    """A defence with a closed form: every pixel loses a quarter of its value."""

    def perturb(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return -0.25 * x


@pytest.mark.parametrize(("threat", "norm"), [(LINF, np.inf), (L2, 2)])
def test_pgd_by_name_is_arts_own(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor, threat: ThreatModel, norm: float
) -> None:
    options = {"norm": norm, "eps": threat.eps, "eps_step": threat.alpha, "max_iter": 4, "num_random_init": 1}
    expected = direct(ProjectedGradientDescentPyTorch, tiny_model, images, labels, 7, verbose=False, **options)
    found = run("art:ProjectedGradientDescentPyTorch", tiny_model, images, labels, threat, seed=7)
    assert torch.equal(found, expected)
    assert not torch.equal(
        found, run("art:ProjectedGradientDescentPyTorch", tiny_model, images, labels, threat, seed=8)
    )
    assert within_budget(threat, images, found).all()


def test_probabilities_are_told_of_in_both_directions(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    model = nn.Sequential(tiny_model, nn.Softmax(dim=1))
    with pytest.warns(AttackWarning, match="model returns probabilities"):
        run("art:FastGradientMethod", model, images, labels, LINF)
    with pytest.warns(AttackWarning, match="model returns probabilities") as told:
        NativeAttack(art_classifier(model), threat=LINF).generate(images.numpy(), labels.numpy())
    assert [warning.filename for warning in told] == [__file__]


def test_fgsm_by_name_is_arts_own_and_starts_at_the_image(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    expected = direct(FastGradientMethod, tiny_model, images, labels, 0, eps=LINF.eps)
    assert torch.equal(run("art:FastGradientMethod", tiny_model, images, labels, LINF, seed=5), expected)


def test_parameter_free_attacks_step_by_twice_eps(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    short = {"max_iter": 6, "nb_random_init": 1}
    attack = evasion.AutoProjectedGradientDescent
    expected = direct(
        attack, tiny_model, images, labels, 3, eps=LINF.eps, eps_step=2 * LINF.eps, verbose=False, **short
    )
    found = run("art:AutoProjectedGradientDescent", tiny_model, images, labels, LINF, seed=3, **short)
    assert torch.equal(found, expected)


def test_options_override_the_threat_model(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    options = {"max_iter": 1, "eps_step": LINF.eps, "num_random_init": 0}
    found = run("art:ProjectedGradientDescentPyTorch", tiny_model, images, labels, LINF, **options)
    torch.testing.assert_close(
        found, run("art:FastGradientMethod", tiny_model, images, labels, LINF), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("name", "options"), [("AutoAttack", {}), ("UniversalPerturbation", {"max_iter": 1})])
def test_ensembles_run_in_silence(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    capfd: pytest.CaptureFixture[str],
    name: str,
    options: dict[str, int],
) -> None:
    found = run(f"art:{name}", tiny_model, images[:6], labels[:6], LINF, **options)
    assert (found != images[:6]).any()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_attacks_that_are_targeted_in_art_are_untargeted_here(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    options = {"max_iter": 2, "num_trial": 2, "sample_size": 2, "keep_outside": True}
    found = run("art:BoundaryAttack", tiny_model, images, labels, L2, **options)
    moved = (found != images).flatten(1).any(dim=1)
    assert moved.any()
    assert (tiny_model(found[moved]).argmax(dim=1) != labels[moved]).all()


def test_unbounded_attacks_break_nothing_outside_of_the_ball(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    anywhere = run("art:DeepFool", tiny_model, images, labels, LINF, keep_outside=True)
    distance = (anywhere - images).flatten(1).norm(dim=1)
    threat = ThreatModel("l2", eps=float(distance.median()))
    inside = within_budget(threat, images, anywhere)
    assert inside.any() and not inside.all()
    found = run("art:DeepFool", tiny_model, images, labels, threat)
    assert torch.equal(found[inside], anywhere[inside])
    assert torch.equal(found[~inside], images[~inside])


@pytest.mark.parametrize(
    "name",
    ["ProjectedGradientDescentPyTorch", "SquareAttack", "CarliniL2Method", "NewtonFool", "UniversalPerturbation"],
)
def test_nothing_is_left_behind(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
    name: str,
) -> None:
    with untouched(tiny_model):
        found = run(f"art:{name}", tiny_model, images.double(), labels, LINF, max_iter=2)
    assert found.dtype == torch.float64 and not found.requires_grad


def test_zoo_goes_image_by_image(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    options = {"max_iter": 2, "use_resize": False, "use_importance": False, "nb_parallel": 2}
    assert run("art:ZooAttack", tiny_model, images[:2], labels[:2], LINF, **options).shape == (2, 3, 32, 32)


def test_a_zero_radius_gives_the_images_back(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    found = run("art:ProjectedGradientDescentPyTorch", tiny_model, images, labels, ThreatModel("linf", eps=0.0))
    assert torch.equal(found, images) and found.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ProjectedGradientDecent", "did you mean 'ProjectedGradientDescent"),
        ("PGD", "ART attack 'PGD' is unknown"),
        ("GeoDA", "np.mat"),
        ("DPatch", "ObjectDetectorMixin"),
        ("CarliniWagnerASR", "SpeechRecognizerMixin"),
        ("SimBA", "softmax"),
        ("AdversarialPatchPyTorch", "one patch"),
        ("ProjectedGradientDescentTensorFlowV2", "TensorFlow"),
    ],
)
def test_classes_that_cannot_be_used_say_why(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_attack(f"art:{name}")


@pytest.mark.skipif(importlib.util.find_spec("kornia") is not None, reason="kornia is installed")
def test_a_missing_package_is_named_with_its_install() -> None:
    with pytest.raises(MissingPackageError, match="pip install 'kornia'"):
        get_attack("art:CompositeAdversarialAttackPyTorch")


@pytest.mark.parametrize(
    ("name", "threat", "options", "message"),
    [
        ("ProjectedGradientDescent", LINF, {"max_iters": 3}, "did you mean 'max_iter'"),
        ("ProjectedGradientDescent", LINF, {"eps_step": -1.0}, "refuses its options: .*positive"),
        ("ProjectedGradientDescent", LINF, {"targeted": True}, "y are the true labels"),
        ("BasicIterativeMethod", L2, {}, "works in linf.*use 'art:ProjectedGradientDescentPyTorch'"),
    ],
)
def test_options_that_cannot_be_used_say_why(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    name: str,
    threat: ThreatModel,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        run(f"art:{name}", tiny_model, images, labels, threat, **options)


def test_two_classes_have_no_logits_ratio(make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    model, labels = make_model(2), torch.zeros(len(images), dtype=torch.long)
    with pytest.raises(UsageError, match="needs 3 classes, and the model has 2"):
        run("art:AutoAttack", model, images, labels, LINF)
    options = {"loss_type": "cross_entropy", "max_iter": 3, "nb_random_init": 1}
    assert run("art:AutoProjectedGradientDescent", model, images, labels, LINF, **options).shape == images.shape


def test_a_bare_module_gets_its_labels_checked(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(UsageError, match=r"\[0, 3\] is expected"):
        run("art:FastGradientMethod", model, images, torch.full((len(images),), 4), LINF)


@pytest.mark.parametrize("labels_as", ["integers", "column", "one-hot", "none"])
@pytest.mark.parametrize(("name", "options"), [("pgd", {}), ("apgd-ce", {"steps": 4})])
def test_native_attacks_are_the_same_in_art(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor, labels_as: str, name: str, options: dict[str, Any]
) -> None:
    integers = labels.numpy()
    y = {"integers": integers, "column": integers[:, None], "one-hot": np.eye(10)[integers], "none": None}[labels_as]
    found = NativeAttack(art_classifier(tiny_model), name, threat=LINF, seed=2, **options).generate(images.numpy(), y)
    assert found.dtype == np.float32
    assert np.array_equal(found, run(name, tiny_model, images, labels, LINF, seed=2, **options).numpy())


def test_the_native_attack_goes_through_the_estimators_defences(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    defended = art_classifier(tiny_model, preprocessing_defences=[Darken()], preprocessing=None)
    found = NativeAttack(defended, "pgd", threat=LINF, early_stop=False).generate(images.numpy(), labels.numpy())
    expected = run("pgd", Darken().wrap(tiny_model), images, labels, LINF, early_stop=False)
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found, run("pgd", tiny_model, images, labels, LINF, early_stop=False).numpy())


def test_a_numpy_defence_is_refused(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    defended = art_classifier(tiny_model, preprocessing_defences=[FeatureSqueezing((0.0, 1.0), bit_depth=3)])
    with pytest.raises(UsageError, match=r"FeatureSqueezing.*PreprocessorPyTorch"):
        NativeAttack(defended, "pgd", threat=LINF).generate(images.numpy(), labels.numpy())


def test_the_native_attack_is_left_alone_by_arts_base_class(tiny_model: ZeroShotClassifier) -> None:
    attack = NativeAttack(art_classifier(tiny_model), "pgd", threat=LINF, eot=2)
    assert not attack.targeted
    assert "attack=pgd" in repr(attack) and "options={'eot': 2}" in repr(attack)
    attack.set_params(threat=L2, seed=None)
    assert attack.threat == L2
    with pytest.raises(UsageError, match=r"threat is 8; a clipdefense\.ThreatModel"):
        attack.set_params(threat=8)


def test_without_a_seed_torchs_global_generator_decides(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    attack = NativeAttack(art_classifier(tiny_model), "pgd", threat=LINF, seed=None, early_stop=False)
    first, second = (attack.generate(images.numpy(), labels.numpy()) for _ in range(2))
    torch.manual_seed(0)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, attack.generate(images.numpy(), labels.numpy()))


def test_adversarial_training_and_auto_attack_take_it(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    classifier = art_classifier(tiny_model, optimizer=optimizer)
    attack = NativeAttack(classifier, "pgd", threat=LINF, seed=None)
    found = AutoAttack(classifier, eps=LINF.eps, attacks=[attack]).generate(images.numpy(), labels.numpy())
    assert (classifier.predict(found).argmax(axis=1) != labels.numpy()).any()

    before = [weight.detach().clone() for weight in tiny_model.parameters()]
    AdversarialTrainer(classifier, attack, ratio=1.0).fit(images.numpy(), labels.numpy(), batch_size=6, nb_epochs=1)
    assert any(not torch.equal(old, new) for old, new in zip(before, tiny_model.parameters()))


def test_bad_arguments_of_the_native_attack_say_why(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    classifier = art_classifier(tiny_model)
    with pytest.raises(UsageError, match="did you mean 'pgd'"):
        NativeAttack(classifier, "pdg", threat=LINF)
    with pytest.raises(UsageError, match="did you mean 'objective'"):
        NativeAttack(classifier, "pgd", threat=LINF, objectiv="margin")
    with pytest.raises(UsageError, match="clip_values"):
        NativeAttack(art_classifier(tiny_model, clip_values=(0, 255)), "pgd", threat=LINF)
    with pytest.raises(EstimatorError):
        NativeAttack(BlackBoxClassifier(lambda x: x, (3, 32, 32), 10), "pgd", threat=LINF)
    attack = NativeAttack(classifier, "pgd", threat=LINF)
    with pytest.raises(UsageError, match="uint8"):
        attack.generate((images.numpy() * 255).astype(np.uint8), labels.numpy())
    with pytest.raises(UsageError, match="'mask'"):
        attack.generate(images.numpy(), labels.numpy(), mask=np.ones(1))
    with pytest.raises(UsageError, match=r"\[0, 9\] is expected"):
        attack.generate(images.numpy(), labels.numpy() + 10)
    with pytest.raises(UsageError, match=r"shape \(12, 3\)"):
        attack.generate(images.numpy(), np.eye(3)[labels.numpy() % 3].astype(np.int64))
