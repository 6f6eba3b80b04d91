"""What an attack must not pass off as robustness, and what it must refuse before it starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense import attacks
from clipdefense.attacks.doubts import AttackWarning
from clipdefense.attacks.options import Status
from clipdefense.errors import UsageError

THREAT = cd.ThreatModel("linf", eps=4 / 255, steps=3)
SHORT: dict[str, dict[str, Any]] = {
    "pgd": {},
    "apgd-ce": {"steps": 3},
    "apgd-t": {"steps": 3, "targets": 2},
    "fab-t": {"steps": 3, "targets": 2},
}


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x), x)


def steady(model: nn.Module, x: Tensor) -> Tensor:
    return attacks.predict(model, x).argmax(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", SHORT)
def test_a_gradient_that_is_not_finite_stops_the_attack(
    name: str, norm: Any, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    model = Wrapped(tiny_model, lambda z, x: z + torch.sqrt(x.flatten(1)[:, :1] * 0))
    y, ids = steady(tiny_model, images), torch.arange(100, 112)
    with pytest.raises(UsageError, match=r"NaN or infinite input gradients for \d+ images \(ids 10\d"):
        attacks.run(name, model, images, y, cd.ThreatModel(norm, eps=4 / 255, steps=3), ids=ids, **SHORT[name])


@pytest.mark.parametrize("name", SHORT)
def test_a_gradient_that_vanishes_after_the_start_is_reported(
    name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    calls: list[int] = []

    def vanish(z: Tensor, x: Tensor) -> Tensor:
        if z.requires_grad:
            calls.append(1)
        return z if len(calls) < 2 else z.detach() + 0 * z.sum(dim=1, keepdim=True)

    threat = cd.ThreatModel("linf", eps=1e-4, steps=5)
    options = {**SHORT[name], "steps": 5} if "steps" in SHORT[name] else {}
    with pytest.warns(AttackWarning, match="gradient is exactly zero on"):
        attacks.run(name, Wrapped(tiny_model, vanish), images, steady(tiny_model, images), threat, **options)


def test_a_saturated_loss_on_a_broken_image_is_no_dead_gradient(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    """DLR is constant once the label is third: of an image that fell, which says nothing against the attack."""
    y = steady(tiny_model, images)
    attacks.run("apgd-dlr", tiny_model, images, y, cd.ThreatModel("linf", 16 / 255), steps=12, early_stop=False)
    assert not [w for w in recwarn if issubclass(w.category, AttackWarning)]


@pytest.mark.parametrize("name", [*SHORT, "square", "autoattack"])
def test_labels_that_the_model_has_no_logit_for(name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    model, y = Wrapped(tiny_model, lambda z, x: z), torch.full((12,), 50)
    with pytest.raises(UsageError, match=r"50.*\[0, 9\]"):
        attacks.run(name, model, images, y, THREAT)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
def test_a_keyed_random_model_gives_the_same_result_again(
    name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    defended = cd.get_defense("random-noise")(tiny_model, eps=8 / 255).wrap(tiny_model)
    y = steady(tiny_model, images)
    options: dict[str, Any] = SHORT.get(name, {"queries": 20} if name == "square" else {"steps": 3})
    results = [attacks.run(name, defended, images, y, THREAT, eot=2, seed=3, **options) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_init_keeps_ids_and_no_graph(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    y, ids = steady(tiny_model, images), torch.tensor([7, 3, 11, 2, 40, 5, 8, 1, 0, 9, 30, 22])
    init = (torch.rand_like(images) - 0.5).mul(4 / 255).requires_grad_(True)
    options: dict[str, Any] = {"early_stop": False}
    whole = attacks.pgd(tiny_model, images, y, THREAT, init=init, ids=ids, **options)
    assert not whole.requires_grad
    order = torch.tensor([4, 0, 9])
    some = attacks.pgd(tiny_model, images[order], y[order], THREAT, init=init[order], ids=ids[order], **options)
    torch.testing.assert_close(some, whole[order], rtol=0, atol=1e-6)
    broken = Wrapped(tiny_model, lambda z, x: z / 0)
    with pytest.raises(UsageError, match=r"ids 40\b"):
        attacks.pgd(broken, images[4:5], y[4:5], THREAT, init=init[4:5], ids=ids[4:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_refused(
    dtype: torch.dtype, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    with pytest.raises(UsageError, match=r"in which a small eps is rounded away; pass x.float\(\)"):
        attacks.run("pgd", tiny_model, images.to(dtype), torch.zeros(12, dtype=torch.long), THREAT)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("apgd-ce", {"steps": -1}, "steps is -1; a whole number of at least 0"),
        ("apgd-ce", {"steps": 2.5}, "steps is 2.5; a whole number"),
        ("apgd-ce", {"steps": True}, "steps is True; a whole number"),
        ("apgd-ce", {"alpha": 7}, "alpha is 7; a number above 0 and at most 1"),
        ("apgd-t", {"targets": "9"}, "targets is '9'; a whole number of at least 1"),
        ("fab-t", {"steps": -3}, "steps is -3"),
        ("fab-t", {"eta": -1}, "eta is -1; a number above 0"),
        ("square", {"queries": 10.5}, "queries is 10.5; a whole number"),
        ("square", {"p": 5}, "p is 5; a number above 0 and at most 1"),
        ("pgd", {"seed": 1.5}, "seed is 1.5; a whole number"),
        ("pgd", {"early_stop": "no"}, "early_stop is 'no'; True or False"),
        ("pgd", {"progress": True}, "progress is True; None or a function"),
        ("pgd", {"generator": 3}, "generator is 3; a torch.Generator"),
        ("pgd", {"objective": lambda z, y: z.sum()}, "objective returned shape"),
        ("autoattack", {"stages": {"square": {"querys": 3}}}, "did you mean 'queries'"),
        ("autoattack", {"stages": {"apgd-ce": {"seed": 5}}}, "belongs to the whole ensemble; pass seed="),
        ("autoattack", {"stages": {"apgd-ce": 5}}, "a mapping of options is expected"),
    ],
)
def test_options_are_checked_before_anything_runs(
    name: str, options: dict[str, Any], message: str, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    with pytest.raises(UsageError, match=message):
        attacks.run(name, tiny_model, images, torch.zeros(12, dtype=torch.long), THREAT, **options)


def test_progress_is_told_while_nothing_leaves(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    told: list[Status] = []
    y = steady(tiny_model, images)
    attacks.run("square", tiny_model, images, y, cd.ThreatModel("linf", 1e-5), queries=200, progress=told.append)
    assert len(told) >= 7 and told[0].done == 0 and told[0].robust == 12
    assert told[-1].done == 12 and told[-1].seconds_left == 0


def test_the_l2_ball_holds_to_1e_7_at_full_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 4))
    x, eps = torch.rand(2, 3, 224, 224), 0.5
    y = steady(model, x)
    for name, options in (*SHORT.items(), ("square", {"queries": 5})):
        x_adv = attacks.run(name, model, x, y, cd.ThreatModel("l2", eps, steps=3), early_stop=False, **options)
        assert float((x_adv.double() - x.double()).flatten(1).norm(dim=1).max()) <= eps + 1e-7


def doubts(caught: pytest.WarningsRecorder) -> list[str]:
    """The attack warnings, each told at the line of this file that called."""
    found = [w for w in caught if issubclass(w.category, AttackWarning)]
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


EVERY: dict[str, dict[str, Any]] = {
    **SHORT,
    "square": {"queries": 3},
    "autoattack": {"stages": {**{k: SHORT[k] for k in SHORT if k != "pgd"}, "square": {"queries": 3}}},
}


@pytest.mark.parametrize("name", EVERY)
def test_probabilities_are_told_of_once(
    name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model, y = Wrapped(tiny_model, lambda z, x: z.softmax(1)), steady(tiny_model, images)
    attacks.run(name, model, images, y, cd.ThreatModel("linf", 1e-5, steps=3), **EVERY[name])
    assert [text[:27] for text in doubts(recwarn)] == ["model returns probabilities"]


def test_log_probabilities_are_logits(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model, y = Wrapped(tiny_model, lambda z, x: z.log_softmax(1)), steady(tiny_model, images)
    attacks.run("pgd", model, images, y, THREAT)
    assert not doubts(recwarn)


@pytest.mark.parametrize("name", ["apgd-t", "fab-t", "autoattack"])
def test_dead_gradients_are_told_of_once_whatever_the_parts(
    name: str, tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model = Wrapped(tiny_model, lambda z, x: z.detach() + 0 * z)
    attacks.run(name, model, images, steady(tiny_model, images), cd.ThreatModel("linf", 1e-5), **EVERY[name])
    (text,) = doubts(recwarn)
    assert text.startswith("the input gradient is exactly zero on 12 of 12 images")


def test_a_loss_that_saturates_is_no_dead_gradient_where_another_loss_moves(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    """Logits times 1e5: the softmax is exactly one-hot in float32, while DLR and the margin see no scale."""
    model, y, threat = (
        Wrapped(tiny_model, lambda z, x: z * 1e5),
        steady(tiny_model, images),
        cd.ThreatModel("linf", 1e-5),
    )
    attacks.run("apgd-ce", model, images, y, threat, steps=3)
    (text,) = doubts(recwarn)
    assert "exactly zero on" in text
    recwarn.clear()
    attacks.run("autoattack", model, images, y, threat, **EVERY["autoattack"])
    assert not doubts(recwarn)


@pytest.mark.parametrize("change", [lambda z, x: z.detach(), lambda z, x: z.detach().requires_grad_()])
@pytest.mark.parametrize("name", EVERY)
def test_logits_cut_off_from_the_images_are_named(
    name: str, change: Callable[..., Tensor], tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    model, y = Wrapped(tiny_model, change), steady(tiny_model, images)
    if name == "square":
        assert attacks.run(name, model, images, y, THREAT, **EVERY[name]).shape == images.shape
        return
    with pytest.raises(UsageError, match=r"model's output has no gradient to x.*or use square"):
        attacks.run(name, model, images, y, THREAT, **EVERY[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_told_of(
    dtype: torch.dtype, tiny_model: cd.ZeroShotClassifier, images: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    y = steady(tiny_model, images)
    attacks.run("apgd-t", tiny_model.to(dtype), images, y, THREAT, **SHORT["apgd-t"])
    assert [text[:31] for text in doubts(recwarn)] == [f"model has {dtype} weights"[:31]]


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1), (1,)])
def test_a_foreign_model_may_call_what_it_likes_mean(shape: tuple[int, ...], images: Tensor) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full(shape, 0.5))
            self.linear = nn.Linear(3 * 32 * 32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(1))

    model = Own()
    assert attacks.run("pgd", model, images, steady(model, images), THREAT).shape == images.shape


def test_a_function_checks_what_run_checks(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    y, threat = steady(tiny_model, images), THREAT
    with pytest.raises(UsageError, match=r"model is a CLIPClassifier.*pass its \.model"):
        attacks.pgd(cd.CLIPClassifier(tiny_model), images, y, threat)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"threat is 0\.1; a ThreatModel is expected"):
        attacks.apgd_ce(tiny_model, images, y, 0.1)
    with pytest.raises(UsageError, match="option of attack 'pgd' 'objectiv' is unknown; did you mean 'objective'"):
        attacks.pgd(tiny_model, images, y, threat, objectiv="ce")
    assert "doubts" not in inspect.signature(attacks.apgd_dlr).parameters


def test_a_compiled_model_that_is_another_is_not_used(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 32 * 32, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.linear(x.flatten(1))
            return logits.flip(1) if torch.compiler.is_compiling() else logits

    # its tracing is what is needed here; code made for the processor takes long
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = Changes()
    y, options = steady(model, images), {"early_stop": False, "seed": 3}
    compiled = attacks.run("pgd", model, images, y, THREAT, compile=True, **options)
    (text,) = doubts(recwarn)
    assert text.startswith("the compiled model's logits differ")
    assert torch.equal(compiled, attacks.run("pgd", model, images, y, THREAT, **options))
