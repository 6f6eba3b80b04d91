"""The loop under the attacks: who leaves when, on whose word, and what is told meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdefense import ThreatModel, UsageError, ZeroShotClassifier, attacks
from clipdefense.attacks import engine
from clipdefense.attacks.context import predict
from clipdefense.attacks.options import Options, Status, progress_bar

THREAT = ThreatModel("linf", 1 / 255, steps=8)
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("pgd", {}),
    ("apgd-ce", {"steps": 8}),
    ("apgd-t", {"steps": 8, "targets": 2}),
    ("fab-t", {"steps": 6, "targets": 2}),
    ("square", {"queries": 40}),
]


@pytest.mark.parametrize(("name", "options"), RUNS)
@pytest.mark.parametrize("batch_size", [5, 12])
def test_a_verdict_read_one_step_late_changes_no_result(
    name: str,
    options: dict[str, Any],
    batch_size: int,
    make_model: Callable[..., ZeroShotClassifier],
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make_model(dtype=torch.float64), images.double()
    y = predict(model, x).argmax(dim=1)

    def attack() -> Tensor:
        return attacks.run(name, model, x, y, THREAT, batch_size=batch_size, **options)

    at_once = attack()
    assert (predict(model, at_once).argmax(1) != y).any()
    monkeypatch.setattr(engine, "reads_late", lambda device: True)  # what CUDA does
    torch.testing.assert_close(attack(), at_once, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_bf16_gradients_leave_on_fp32_verdicts(
    name: str, options: dict[str, Any], tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    seen: set[torch.dtype] = set()
    hook = tiny_model.tower.transformer.register_forward_hook(
        lambda m, i, out: seen.add(m.resblocks[0].mlp[0](out).dtype)
    )
    left: list[Status] = []
    x_adv = attacks.run(
        name, tiny_model, images, labels, THREAT, gradient_dtype="bf16", progress=left.append, **options
    )
    hook.remove()
    assert seen == {torch.bfloat16, torch.float32}
    assert x_adv.dtype == torch.float32
    broken = predict(tiny_model, x_adv).argmax(1) != labels
    assert broken.any() or name == "square"  # forty queries are few
    # every image that left as broken is broken in fp32
    assert len(images) - left[-1].robust <= int(broken.sum())


def test_a_break_that_only_bf16_sees_is_none(images: Tensor) -> None:
    class Rounds(nn.Module):
        """Wrong wherever it is not computed in fp32."""

        def forward(self, x: Tensor) -> Tensor:
            low = torch.is_autocast_enabled(x.device.type)
            score = x.flatten(1).mean(1) * 1e-3 + (1.0 if low else -1.0)
            return torch.stack([torch.zeros_like(score), score], dim=1)

    y, told = torch.zeros(len(images), dtype=torch.long), list[Status]()
    attacks.pgd(Rounds(), images, y, THREAT, gradient_dtype="bf16", progress=told.append)
    assert told[-1].robust == len(images)


def test_logits_of_a_classifier_are_fp32_under_autocast(tiny_model: ZeroShotClassifier, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny_model(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_compiled_forwards_agree_and_are_padded(images: Tensor) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(x).mean((2, 3))) * 50

    model, x = Small().double(), images[:5].double()
    y = predict(model, x).argmax(1)
    threat = ThreatModel("linf", 1e-4, steps=4)
    plain = attacks.pgd(model, x, y, threat, batch_size=6)
    compiled = attacks.pgd(model, x, y, threat, batch_size=6, compile=True)  # five images on six places
    torch.testing.assert_close(compiled, plain, atol=1e-9, rtol=0)


def test_images_from_a_second_unit_wait_for_the_first(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    sizes: list[int] = []

    class Robust(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return torch.stack([x.flatten(1).mean(1) + 9, x.flatten(1).mean(1)], dim=1)

    monkeypatch.setattr(engine, "UNIT", 7)
    attacks.pgd(Robust(), images, torch.zeros(12, dtype=torch.long), ThreatModel("linf", 0.1, steps=2), batch_size=4)
    assert sizes == [4, 4, 3, 3, 4, 4, 1, 1]


def test_a_broken_images_place_is_taken_at_once() -> None:
    sizes: list[int] = []

    class Threshold(nn.Module):
        """Image i breaks once its mean passes 1/2: dark ones never do."""

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], dim=1)

    x = torch.tensor([0.49, 0.1, 0.49, 0.1, 0.49, 0.1])[:, None, None, None].expand(6, 1, 2, 2)
    threat = ThreatModel("linf", 0.02, step_size=0.02, steps=3)
    attacks.pgd(Threshold(), x, torch.zeros(6, dtype=torch.long), threat, random_start=False, batch_size=2)
    # bright images need two forwards, dark ones three: nobody's place is ever empty until nobody waits
    assert sum(sizes) == 3 * 2 + 3 * 3
    assert sizes == [2] * 6 + [1] * 3


def test_non_finite_logits_in_mid_attack_are_no_break(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    class Overflows(nn.Module):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            logits = tiny_model(x)
            return logits if self.forwards < 3 else logits.index_fill(0, torch.tensor([1]), float("inf"))

    with pytest.raises(UsageError, match="NaN or infinite logits for 1 images"):
        attacks.pgd(Overflows(), images, labels, ThreatModel("linf", 1e-6, steps=8))


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t"])
def test_zero_gradients_are_reported(name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    class Quantised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tiny_model(x - x.detach() + (x.detach() * 255).round() / 255) * 0 + tiny_model(x.detach())

    with pytest.warns(attacks.AttackWarning, match="exactly zero on 12 of 12 images.*must not be called robust"):
        attacks.run(name, Quantised(), images, labels, THREAT, **({} if name == "pgd" else {"steps": 2}))


def test_progress_counts_to_the_end(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    told: list[Status] = []
    x_adv = attacks.run("apgd-ce", tiny_model, images, labels, THREAT, steps=8, batch_size=5, progress=told.append)
    assert [status.done for status in told] == sorted({status.done for status in told})
    assert told[-1].done == told[-1].total == len(images) and told[-1].seconds_left == 0
    assert told[-1].robust == int((predict(tiny_model, x_adv).argmax(1) == labels).sum())
    assert all(status.seconds_left >= 0 for status in told)


def test_progress_names_the_target(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    told: list[Status] = []
    attacks.apgd_t(tiny_model, images, labels, ThreatModel("linf", 0.2 / 255), steps=2, targets=2, progress=told.append)
    assert {status.stage for status in told} == {"target 1 of 2", "target 2 of 2"}


def test_progress_bar_shows_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress(Status("apgd-ce", 3, 8, 5, 1.0))
        progress(Status("square", 1, 5, 5, 1.0))
    assert capsys.readouterr().out == ""  # stdout is left to what the caller prints


def test_quiet_by_default(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    attacks.run("pgd", tiny_model, images, labels, THREAT)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "autoattack"])
def test_shared_options_are_in_every_signature_and_checked(
    name: str, tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    from clipdefense.plugins import get_attack

    parameters = inspect.signature(get_attack(name)).parameters
    for field in ("seed", "ids", "batch_size", "eot", "early_stop", "gradient_dtype", "compile", "progress"):
        assert parameters[field].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field].default == getattr(Options(), field)
    for wrong, message in [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eot": 1.5}, "eot is 1.5"),
        ({"gradient_dtype": "fp16"}, "gradient_dtype 'fp16' is unknown"),
        ({"bach_size": 3}, "'bach_size' is unknown; did you mean 'batch_size'"),
    ]:
        with pytest.raises(UsageError, match=message):
            attacks.run(name, tiny_model, images, labels, THREAT, **wrong)
        with pytest.raises(UsageError, match=message):
            get_attack(name)(tiny_model, images, labels, THREAT, **wrong)


def test_keyed_draws_depend_on_no_neighbour(images: Tensor) -> None:
    from clipdefense import randomness

    class Noisy(nn.Module):
        """Logits on noisy pixels, the noise keyed as a wrapped defence keys it."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.randn(3 * 32 * 32, 4, generator=torch.Generator().manual_seed(3)).double()

        def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
            assert ids is not None and seed is not None
            noise = randomness.normal(tuple(x.shape[1:]), ids, seed=seed, dtype=x.dtype)
            return torch.tanh((x + 0.1 * noise).flatten(1)) @ self.w

    model, x = Noisy(), images.double()
    y = torch.arange(12) % 4
    options = {"steps": 4, "eot": 3, "early_stop": False, "seed": 5}
    ids = torch.arange(50, 62)
    whole = attacks.apgd_ce(model, x, y, THREAT, ids=ids, **options)
    split = attacks.apgd_ce(model, x, y, THREAT, ids=ids, batch_size=5, **options)
    alone = attacks.apgd_ce(model, x[4:5], y[4:5], THREAT, ids=ids[4:5], **options)
    torch.testing.assert_close(split, whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(alone, whole[4:5], atol=1e-9, rtol=0)
