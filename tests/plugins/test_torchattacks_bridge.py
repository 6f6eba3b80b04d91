"""torchattacks' attacks by name, and the native attacks as a torchattacks class, on real torchattacks objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from clipdefense import ThreatModel, UsageError, ZeroShotClassifier, get_attack
from clipdefense.attacks import AttackWarning, run
from clipdefense.attacks.foreign import within_budget
from clipdefense_torchattacks import NativeAttack
from clipdefense_torchattacks.bridge import make

LINF = ThreatModel("linf", eps=4 / 255, steps=4)
L2 = ThreatModel("l2", eps=0.5, steps=4)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


class Fixed(nn.Module):
    """A linear classifier without parameters."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(classes, 3 * 32 * 32))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class OnNormalised(nn.Module):
    """A model that takes normalised images, made of one that takes pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z * channels(STD) + channels(MEAN))


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


@contextmanager
def count_forwards(model: nn.Module) -> Iterator[list[int]]:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def test_pgd_by_name_is_torchattacks_own(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(7)
    expected = torchattacks.PGD(tiny_model, eps=LINF.eps, alpha=LINF.alpha, steps=4)(images, labels)
    found = run("torchattacks:PGD", tiny_model, images, labels, LINF, seed=7)
    assert torch.equal(found, expected)
    assert not torch.equal(found, run("torchattacks:PGD", tiny_model, images, labels, LINF, seed=8))


@pytest.mark.parametrize(("threat", "norm"), [(LINF, "Linf"), (L2, "L2")])
def test_apgd_by_name_is_torchattacks_own(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor, threat: ThreatModel, norm: str
) -> None:
    attack = torchattacks.APGD(tiny_model, norm=norm, eps=threat.eps, steps=12, n_restarts=1, seed=7)
    found = run("torchattacks:APGD", tiny_model, images, labels, threat, seed=7, steps=12)
    assert torch.equal(found, attack(images, labels).detach())
    assert not found.requires_grad
    assert within_budget(threat, images, found).all()


def test_pgd_and_the_native_one_agree_from_the_same_start(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    threat = ThreatModel("linf", eps=1 / 255, steps=6)
    torch.manual_seed(7)
    start = torch.empty_like(images).uniform_(-threat.eps, threat.eps)
    theirs = run("torchattacks:PGD", tiny_model, images, labels, threat, seed=7)
    ours = run("pgd", tiny_model, images, labels, threat, init=start, early_stop=False)
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
    broken = tiny_model(ours).argmax(dim=1) != labels
    assert torch.equal(tiny_model(theirs).argmax(dim=1) != labels, broken)


def test_probabilities_and_half_precision_are_told_of(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    with pytest.warns(AttackWarning, match="model returns probabilities"):
        run("torchattacks:PGD", nn.Sequential(tiny_model, nn.Softmax(dim=1)), images, labels, LINF)
    with pytest.warns(AttackWarning, match="model has torch.float16 weights"):
        run("torchattacks:PGD", tiny_model.half(), images, labels, LINF)


def test_images_go_in_batches(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    with count_forwards(tiny_model) as sizes:
        found = run("torchattacks:FGSM", tiny_model, images, labels, LINF, batch_size=5)
    assert sizes == [5, 5, 2]
    torch.testing.assert_close(found, run("torchattacks:FGSM", tiny_model, images, labels, LINF), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "further"), [("APGD", 0), ("AutoAttack", 1)])
@pytest.mark.parametrize(("options", "steps"), [({}, 100), ({"steps": 20}, 20)])
def test_parameter_free_attacks_run_the_published_steps(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    name: str,
    further: int,
    options: dict[str, int],
    steps: int,
) -> None:
    threat = ThreatModel("linf", eps=16 / 255)
    with count_forwards(tiny_model) as sizes:
        found = run(f"torchattacks:{name}", tiny_model, images, labels, threat, **options)
    # a clean pass, the start, the steps; AutoAttack's first part is APGD, which breaks all, and it looks once more
    assert len(sizes) == 1 + 1 + steps + further
    assert (tiny_model(found).argmax(dim=1) != labels).all() and not found.requires_grad


def test_auto_attacks_parts_get_steps_and_classes(tiny_model: ZeroShotClassifier) -> None:
    settings = {"eps": LINF.eps, "norm": "Linf", "n_classes": 7, "unknown": 1}
    made = make(torchattacks.AutoAttack, tiny_model, torch.device("cpu"), settings, steps=100)
    apgd, apgdt, fab, square = made._autoattack.attacks
    assert (apgd.steps, apgdt.steps, fab.steps) == (100, 100, 100)
    assert (apgdt.n_target_classes, fab.n_target_classes) == (6, 6)
    assert square.n_queries == 5000 and square.eps == LINF.eps


def test_all_of_the_models_classes_are_targets(images: Tensor) -> None:
    model = Fixed(5)
    threat = ThreatModel("linf", eps=1e-6)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    with count_forwards(model) as sizes:
        run("torchattacks:APGDT", model, images, labels, threat, steps=3)
    # one to count the classes, one clean; the start and 3 steps against each of 4 targets, the target being read
    # from one more pass on the images each time
    assert len(sizes) == 2 + 4 * (1 + 4)


def test_an_unnamed_eps_is_the_threat_models(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    found = run("torchattacks:PIFGSM", tiny_model, images, labels, LINF, keep_outside=True)
    assert (found - images).abs().amax() == pytest.approx(LINF.eps, rel=1e-4)


def test_unbounded_attacks_break_nothing_outside_of_the_ball(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    anywhere = run("torchattacks:DeepFool", tiny_model, images, labels, LINF, keep_outside=True)
    threat = ThreatModel("l2", eps=float((anywhere - images).flatten(1).norm(dim=1).median()))
    inside = within_budget(threat, images, anywhere)
    assert inside.any() and not inside.all()
    found = run("torchattacks:DeepFool", tiny_model, images, labels, threat)
    assert torch.equal(found[inside], anywhere[inside])
    assert torch.equal(found[~inside], images[~inside])


@pytest.mark.parametrize(
    ("name", "options"), [("PGD", {}), ("FAB", {"steps": 3}), ("CW", {"steps": 3}), ("AutoAttack", {"steps": 3})]
)
def test_nothing_is_left_behind(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
    name: str,
    options: dict[str, Any],
) -> None:
    threat = ThreatModel("linf", eps=16 / 255)
    with untouched(tiny_model), torch.no_grad():
        found = run(f"torchattacks:{name}", tiny_model, images, labels.int(), threat, **options)
    assert not found.requires_grad


def test_a_model_without_parameters_works_in_silence(images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = Fixed()
    labels = model(images).argmax(dim=1)
    found = run("torchattacks:PGD", model, images, labels, LINF)
    ours = NativeAttack(model, "pgd", eps=LINF.eps, steps=4)(images, labels)
    assert torch.equal(ours, run("pgd", model, images, labels, LINF))
    assert found.shape == images.shape
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [("PGDD", "did you mean 'PGD'"), ("Attack", "is unknown"), ("MultiAttack", "wraps other attacks")],
)
def test_classes_that_cannot_be_used_say_why(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_attack(f"torchattacks:{name}")


@pytest.mark.parametrize(
    ("name", "threat", "options", "message"),
    [
        ("PGD", LINF, {"stepps": 3}, "did you mean 'steps'"),
        ("PGD", L2, {}, "works in linf.*use 'torchattacks:PGDL2'"),
        ("PGDL2", LINF, {}, "works in l2.*use 'torchattacks:PGD'"),
        ("AutoAttack", LINF, {"version": "best"}, "refuses its options: Not valid version"),
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
        run(f"torchattacks:{name}", tiny_model, images, labels, threat, **options)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("APGD", {"loss": "dlr"}, 3),
        ("APGDT", {}, 4),
        ("AutoAttack", {}, 4),
        ("AutoAttack", {"version": "rand"}, 3),
    ],
)
def test_too_few_classes_say_what_works(images: Tensor, name: str, options: dict[str, Any], least: int) -> None:
    labels = torch.zeros(len(images), dtype=torch.long)
    with pytest.raises(UsageError, match=f"needs {least} classes.*the model has {least - 1}.*torchattacks:APGD"):
        run(f"torchattacks:{name}", Fixed(least - 1), images, labels, LINF, **options)


@pytest.mark.parametrize("name", ["APGD", "FAB"])
def test_what_is_advised_for_two_classes_works(images: Tensor, name: str) -> None:
    model = Fixed(2)
    labels = model(images).argmax(dim=1)
    found = run(f"torchattacks:{name}", model, images, labels, LINF, steps=5)
    assert (model(found).argmax(dim=1) != labels).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("norm", "threat"), [("Linf", LINF), ("L2", L2)])
def test_native_attacks_are_the_same_in_torchattacks(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor, dtype: torch.dtype, norm: str, threat: ThreatModel
) -> None:
    attack = NativeAttack(tiny_model, "pgd", norm=norm, eps=threat.eps, steps=4, seed=3, objective="margin")
    found = attack(images, labels.to(dtype))
    assert torch.equal(found, run("pgd", tiny_model, images, labels, threat, seed=3, objective="margin"))
    assert not found.requires_grad


def test_steps_are_those_of_the_attack(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    for attack, steps in (
        (NativeAttack(tiny_model, "apgd-ce", steps=6, early_stop=False), 7),
        (NativeAttack(tiny_model, "apgd-ce", early_stop=False), 101),
        (NativeAttack(tiny_model, early_stop=False), 10),
    ):
        with count_forwards(tiny_model) as sizes:
            attack(images, labels)
        assert len(sizes) == steps


def test_attributes_may_be_changed_and_are_shown(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    attack = NativeAttack(tiny_model, "pgd", eps=8 / 255, init=torch.zeros(12, 3, 32, 32), eot=2)
    assert repr(attack).startswith("pgd(model_name=ZeroShotClassifier")
    assert "norm=Linf" in repr(attack) and "attack_mode=default" in repr(attack)
    attack.eps = 0.0
    assert torch.equal(attack(images, labels), images)
    attack.eps = 8
    with pytest.raises(UsageError, match="did you mean 8/255"):
        attack(images, labels)


def test_without_a_seed_torchs_global_generator_decides(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    attack = NativeAttack(tiny_model, "pgd", seed=None, early_stop=False)
    first, second = attack(images, labels), attack(images, labels)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, attack(images, labels))


def test_normalised_images_are_attacked_on_pixels(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    attack = NativeAttack(OnNormalised(tiny_model), "pgd", eps=LINF.eps, steps=4, early_stop=False)
    attack.set_normalization_used(mean=MEAN, std=STD)
    found = attack((images - channels(MEAN)) / channels(STD), labels) * channels(STD) + channels(MEAN)
    assert (found - images).abs().amax() == pytest.approx(LINF.eps, rel=1e-3)
    expected = run("pgd", tiny_model, images, labels, LINF, early_stop=False)
    # a gradient's sign may flip where it is rounding: most pixels agree
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.99

    with pytest.raises(UsageError):
        attack(images + 9, labels)
    assert attack._normalization_applied is True


def test_modes_that_native_attacks_do_not_have_are_refused(tiny_model: ZeroShotClassifier) -> None:
    attack = NativeAttack(tiny_model, "pgd")
    with pytest.raises(UsageError, match="no targeted mode"):
        attack.set_mode_targeted_random()
    with pytest.raises(UsageError, match="no targeted mode"):
        attack.set_mode_targeted_by_function(lambda inputs, labels: labels)
    with pytest.raises(UsageError, match="eval mode"):
        attack.set_model_training_mode(dropout_training=True)
    assert not attack.targeted and attack.get_mode() == "default"


def test_it_saves_what_torchattacks_loads(
    tiny_model: ZeroShotClassifier,
    images: Tensor,
    labels: Tensor,
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    attack = NativeAttack(tiny_model, "pgd", eps=LINF.eps, steps=4)
    with untouched(tiny_model):
        attack(images, labels)
    with untouched(tiny_model):
        accuracy, _, _ = attack.save([(images, labels)], str(tmp_path / "adv.pt"), verbose=False, return_verbose=True)
    [(found, _)] = list(torchattacks.PGD.load(str(tmp_path / "adv.pt")))
    assert torch.equal(found, run("pgd", tiny_model, images, labels, LINF))
    broken = tiny_model(found).argmax(dim=1) != labels
    assert accuracy == pytest.approx(100 * (1 - broken.float().mean().item()))


def test_multi_attack_takes_it(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    weak = torchattacks.VANILA(tiny_model)
    native = NativeAttack(tiny_model, "apgd-ce", eps=16 / 255, steps=20)
    found = torchattacks.MultiAttack([weak, native])(images, labels)
    assert (tiny_model(found).argmax(dim=1) != labels).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attack": "apgd"}, "did you mean .*'apgd-ce'"),
        ({"objectiv": "margin"}, "did you mean 'objective'"),
        ({"norm": "L1"}, "norm 'l1' is unknown"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"attack": "apgd-ce", "alpha": 1 / 255}, "chooses its step sizes itself"),
    ],
)
def test_bad_arguments_of_the_native_attack_say_why(
    tiny_model: ZeroShotClassifier, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        NativeAttack(tiny_model, **arguments)


def test_labels_are_checked(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(UsageError, match="y is a NoneType"):
        NativeAttack(tiny_model)(images)
    with pytest.raises(UsageError, match="float"):
        NativeAttack(tiny_model)(images, labels.float())
