"""The loop against updates made by hand, and what it does when something is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.data_generators import NumpyDataGenerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.estimator import CLIPClassifier
from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig
from clipdefense.training.guard import DivergedError
from clipdefense.training.parameters import training_only
from clipdefense.training.runtime import derive_seed
from clipdefense_tecoa.tecoa import TeCoA

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0, "warmup_steps": 0}
Make = Callable[..., ZeroShotClassifier]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def images_and_labels(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, 32, 32, generator=generator, dtype=dtype), torch.arange(n) % 10


def test_two_updates_equal_plain_torch(make_model: Make) -> None:
    """SGD with momentum, weight decay and clipping on PGD images of the same seed, bit for bit."""
    x, y = images_and_labels(8)
    trained, plain = make_model(), make_model()
    options = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "schedule": "constant"}
    TeCoA(trained, **QUIET, **options, batch_size=8, epochs=2).fit(x, y)

    threat = TeCoA(plain).threat
    velocity: dict[str, Tensor] = {}
    for epoch in range(2):
        # the order within the batch enters through rounding only, but it does enter
        rows = rows_of_epoch(8, 8, epoch)[0]
        seed = derive_seed(0, "attack", epoch)
        x_adv = pgd(plain, x[rows], y[rows], threat, early_stop=False, seed=seed, ids=rows)
        for weight in plain.parameters():
            weight.grad = None
        F.cross_entropy(plain(x_adv), y[rows]).backward()
        norm = torch.sqrt(sum(weight.grad.square().sum() for weight in plain.tower.parameters()))
        for name, weight in plain.tower.named_parameters():
            gradient = weight.grad / norm + 0.1 * weight.detach()
            velocity[name] = 0.9 * velocity[name] + gradient if epoch else gradient
            weight.data -= 1e-3 * velocity[name]
    for name, weight in plain.tower.named_parameters():
        torch.testing.assert_close(dict(trained.tower.named_parameters())[name], weight, rtol=1e-5, atol=1e-7)


def rows_of_epoch(n: int, batch_size: int, epoch: int) -> list[Tensor]:
    from clipdefense.training.data import Arrays, Share

    x = torch.zeros(n, 3, 1, 1)
    source = Arrays(x, torch.zeros(n).long(), 10, True, batch_size=batch_size, seed=0)
    return [batch["ids"] for batch in source.batches(epoch, 0, Share())]


def test_one_update_is_exactly_that_of_weights_frozen_during_the_attack(make_model: Make) -> None:
    x, y = images_and_labels(8)
    trained, plain = make_model(), make_model()
    TeCoA(trained, **QUIET, lr=1e-3, batch_size=8, epochs=1).fit(x, y)
    rows = rows_of_epoch(8, 8, 0)[0]
    for weight in plain.parameters():
        weight.requires_grad_(False)
    x_adv = pgd(
        plain, x[rows], y[rows], TeCoA(plain).threat, early_stop=False, seed=derive_seed(0, "attack", 0), ids=rows
    )
    weights = list(plain.tower.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(F.cross_entropy(plain(x_adv), y[rows]), weights)
    for trained_weight, weight, gradient in zip(trained.tower.parameters(), weights, gradients):
        assert torch.equal(trained_weight, torch.add(weight.detach(), gradient, alpha=-1e-3))


def test_the_attack_leaves_nothing_in_the_weights(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(4)
    defense = TeCoA(tiny_model)
    with training_only(tiny_model, tiny_model.tower.parameters()):
        batch = {"x": x, "y": y, "ids": torch.arange(4)}
        x_adv = defense.inner_attack(batch, seed=0)["x_adv"]
        assert all(weight.grad is None and weight.requires_grad for weight in tiny_model.tower.parameters())
        assert tiny_model.tower.training
    assert not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= 1 / 255 + 1e-7 and not torch.equal(x_adv, x)


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_accumulation_makes_the_same_update(make_model: Make, pieces: int) -> None:
    x, y = images_and_labels(10, torch.float64)
    whole, cut = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    options = {**QUIET, "lr": 1e-3, "batch_size": 5, "epochs": 2}
    first, second = TeCoA(whole, **options), TeCoA(cut, **options, accumulate=pieces)
    first.fit(x, y)
    second.fit(x, y)
    for weight, other in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)
    for record, other_record in zip(first.history.steps, second.history.steps):
        assert record == pytest.approx(other_record, rel=1e-9)


@pytest.mark.parametrize("train", ["last_blocks:1", "layernorm", "head"])
def test_what_is_not_selected_stays_bit_for_bit(make_model: Make, train: str) -> None:
    model = make_model()
    before = weights_of(model)
    defense = TeCoA(model, **QUIET, lr=1e-2, batch_size=4, epochs=1, train=train)
    chosen = {id(weight) for weight in defense.trainable_parameters(train)}
    names = {name for name, weight in model.named_parameters() if id(weight) in chosen}
    defense.fit(*images_and_labels(4))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


def test_nothing_else_is_touched(tiny_model: ZeroShotClassifier, untouched: Callable[..., Any]) -> None:
    with untouched(tiny_model):
        TeCoA(tiny_model, show_progress=False, batch_size=4, epochs=1, validation=0.3).fit(*images_and_labels(12))


def test_adamw_and_bf16(make_model: Make) -> None:
    model, plain = make_model(), make_model()
    options = {**QUIET, "lr": 1e-3, "batch_size": 6, "epochs": 1, "optimizer": "adamw", "weight_decay": 0.1}
    seen: list[torch.dtype] = []
    attacked: list[torch.dtype] = []
    block = model.tower.transformer.resblocks[0].mlp.c_fc
    block.register_forward_hook(lambda m, i, out: (seen if m.weight.requires_grad else attacked).append(out.dtype))
    TeCoA(model, **options, bf16=True).fit(*images_and_labels(6))
    TeCoA(plain, **options).fit(*images_and_labels(6))
    assert set(seen) == {torch.bfloat16} and set(attacked) == {torch.float32}
    # AdamW's first step has size lr wherever the gradient is not tiny: bf16 noise flips few signs
    moved = [(a - b).abs().max() for a, b in zip(model.tower.parameters(), plain.tower.parameters())]
    assert max(moved) <= 2.01e-3 and any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    before = make_model()
    for name, weight in plain.tower.named_parameters():
        step = weight - dict(before.tower.named_parameters())[name] * (1 - 1e-3 * 0.1)
        assert step.abs().max() <= 1e-3 * 1.001


def test_mix_interpolates_with_the_original_weights(make_model: Make) -> None:
    mixed, trained, original = make_model(), make_model(), make_model()
    options = {**QUIET, "lr": 1e-2, "batch_size": 4, "epochs": 1}
    TeCoA(trained, **options).fit(*images_and_labels(8))
    TeCoA(mixed, **options, mix=0.3).fit(*images_and_labels(8))
    for a, b, c in zip(original.parameters(), trained.parameters(), mixed.parameters()):
        torch.testing.assert_close(c, 0.7 * a + 0.3 * b)


def test_history_and_validation(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(20)
    defense = TeCoA(tiny_model, show_progress=False, measure_every=2, batch_size=4, epochs=2, validation=0.2, lr=1e-3)
    defense.fit(x, y)
    steps, epochs = defense.history.steps, defense.history.epochs
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["epoch"] for record in steps] == [1] * 4 + [2] * 4
    assert ["clean_accuracy" in record for record in steps] == [True, False] * 4
    assert all(record["loss"] == record["ce"] and record["gradient_norm"] > 0 for record in steps)
    assert steps[0]["lr"] == 1e-3 and steps[-1]["lr"] < 1e-4
    assert epochs[0]["ce"] == pytest.approx(np.mean([record["ce"] for record in steps[:4]]))
    assert {record["epoch"] for record in epochs} == {1, 2}
    assert all(
        0 <= record["validation_robust_accuracy"] <= record["validation_clean_accuracy"] <= 1 for record in epochs
    )


def test_validation_on_a_passed_set_measures_the_trained_model(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(8)
    defense = TeCoA(tiny_model, **QUIET, batch_size=4, epochs=1, lr=1e-3)
    held_out, answers = images_and_labels(6)
    defense.fit(x, y, validation_data=(held_out, answers))
    with torch.no_grad():
        right = (tiny_model(held_out).argmax(dim=1) == answers).double().mean()
    assert defense.history.epochs[0]["validation_clean_accuracy"] == pytest.approx(float(right))
    assert len(defense.history.steps) == 2  # none of the eight is held out


def test_loaders_arrays_and_datasets_train_alike(make_model: Make) -> None:
    """One batch an epoch: the sources differ in the order within it only."""
    x, y = images_and_labels(8, torch.float64)
    options = {**QUIET, "lr": 1e-3, "epochs": 1, "batch_size": 8}
    models = [make_model(dtype=torch.float64) for _ in range(5)]
    TeCoA(models[0], **options).fit(x.numpy(), np.eye(10)[y])
    TeCoA(models[1], **options).fit(TensorDataset(x, y))
    TeCoA(models[2], **options).fit_loader(DataLoader(TensorDataset(x, y), batch_size=8))
    TeCoA(models[3], **options).fit_loader([(x, y)])
    TeCoA(models[4], **options).fit_generator(NumpyDataGenerator(x.numpy(), y.numpy(), batch_size=8, shuffle=False))
    for model in models[1:]:
        for weight, other in zip(models[0].parameters(), model.parameters()):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)


def test_max_steps_ends_a_run(tiny_model: ZeroShotClassifier) -> None:
    defense = TeCoA(tiny_model, **QUIET, batch_size=4, epochs=9, max_steps=5)
    defense.fit(*images_and_labels(12))
    assert [record["epoch"] for record in defense.history.steps] == [1, 1, 1, 2, 2]
    assert defense.history.steps[-1]["lr"] < defense.history.steps[0]["lr"] / 5


class Exploding(TeCoA):
    """The cross-entropy and a term that is not finite from the third update on."""

    def begin(self) -> None:
        self.calls = 0
        self.after_second: dict[str, Tensor] = {}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 2:
            self.after_second = weights_of(self.model)
        drift = self.model.embed(batch["x"]).square().mean()
        return {**super().losses(batch), "drift": drift * (float("inf") if self.calls == 3 else 0.0)}


def test_a_term_that_is_not_finite_stops_the_run_by_name(tiny_model: ZeroShotClassifier) -> None:
    defense = Exploding(tiny_model, **QUIET, batch_size=4, epochs=2, lr=1e-3)
    with pytest.raises(DivergedError, match=r"stopped at step 3: drift is inf; .* Lower lr \(it was 0.00") as caught:
        defense.fit(*images_and_labels(12))
    assert (caught.value.step, caught.value.term) == (3, "drift")
    assert len(defense.history.steps) == 2
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, defense.after_second[name])


def test_weights_that_blew_up_are_taken_back(make_model: Make) -> None:
    """The update overflows at this learning rate, which shows in the next inner attack only."""
    model, before = make_model(), make_model()
    defense = TeCoA(model, **QUIET, batch_size=4, epochs=2, lr=1e38, schedule="constant")
    with pytest.raises(DivergedError, match="stopped at step 2: inner attack is nan"):
        defense.fit(*images_and_labels(8))
    for weight, original in zip(model.parameters(), before.parameters()):
        assert torch.equal(weight, original)


def test_the_last_update_is_looked_at_too(make_model: Make) -> None:
    model, before = make_model(), make_model()
    with pytest.raises(DivergedError, match="the updated weights"):
        TeCoA(model, **QUIET, batch_size=4, epochs=1, lr=3e38, max_steps=1, schedule="constant").fit(
            *images_and_labels(8)
        )
    for weight, original in zip(model.parameters(), before.parameters()):
        assert torch.equal(weight, original)


class Greedy(nn.Module):
    """A tower that asks for a pebibyte as soon as it sees more than two images."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            torch.empty(2**50)
        return self.tower(x)


def test_out_of_memory_says_what_was_tried_and_what_to_try(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.tower = Greedy(tiny_model.tower)
    message = r"out of memory on cpu with 8 images at once \(batch_size 8, accumulate 1\); accumulate=2 makes the same"
    with pytest.raises(UsageError, match=message):
        TeCoA(tiny_model, **QUIET, batch_size=8).fit(*images_and_labels(8))
    TeCoA(tiny_model, **QUIET, batch_size=8, accumulate=4, epochs=1).fit(*images_and_labels(8))


def broken(kind: str) -> tuple[Any, Any]:
    x, y = images_and_labels(8)
    return {
        "range": (x * 255, y),
        "uint8": ((x * 255).byte(), y),
        "nan": (x.masked_fill(x > 0.99, float("nan")), y),
        "no labels": (x, None),
        "too many labels": (x, y + 5),
        "one-hot": (x, F.one_hot(y, 12)),
        "short": (x[:3], y[:3]),
        "list": (x.tolist(), y),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("range", "x has values in .* divide by 255"),
        ("uint8", "x has dtype torch.uint8"),
        ("nan", "x contains NaN"),
        ("no labels", "y is None, but this method learns from labels"),
        ("too many labels", r"y has labels in \[5, 12\]; \[0, 9\] is expected"),
        ("one-hot", "y is one-hot over 12 classes, but the model's head has 10"),
        ("short", "there are 3 training images, fewer than one batch of 4; pass batch_size=3"),
        ("list", "x is a list"),
    ],
)
def test_data_that_cannot_be_used(tiny_model: ZeroShotClassifier, kind: str, message: str) -> None:
    before = weights_of(tiny_model)
    with pytest.raises(UsageError, match=message):
        TeCoA(tiny_model, **QUIET, batch_size=4).fit(*broken(kind))
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_options_that_cannot_be_used(tiny_model: ZeroShotClassifier) -> None:
    x, y = images_and_labels(8)
    with pytest.raises(UsageError, match="training option 'epoch' is unknown; did you mean 'epochs'"):
        TeCoA(tiny_model, epoch=3)
    with pytest.raises(UsageError, match="training option 'learning_rate' is unknown"):
        TeCoA(tiny_model).fit(x, y, learning_rate=1.0)
    with pytest.raises(UsageError, match="a loader's images cannot be held out"):
        TeCoA(tiny_model, validation=0.5).fit_loader([(x, y)])
    with pytest.raises(UsageError, match="the loader has no length"):
        TeCoA(tiny_model).fit_loader(iter([(x, y)]))


def test_models_that_cannot_be_used(make_model: Make) -> None:
    with pytest.raises(UsageError, match=r"the model's weights are torch\.bfloat16, in which small updates are lost"):
        TeCoA(make_model(dtype=torch.bfloat16), **QUIET, batch_size=4).fit(*images_and_labels(8))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    estimator = CLIPClassifier(plain, input_shape=(3, 2, 2), nb_classes=3)
    with pytest.raises(UsageError, match="classifier holds a Sequential; a ZeroShotClassifier"):
        TeCoA(estimator)


def test_progress_names_the_terms_and_quiet_is_quiet(
    tiny_model: ZeroShotClassifier, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    TeCoA(tiny_model, batch_size=4, epochs=1, show_progress=False).fit(*images_and_labels(8))
    assert capsys.readouterr() == ("", "")
    TeCoA(tiny_model, batch_size=4, epochs=1).fit(*images_and_labels(8))
    shown = capsys.readouterr().err
    assert shown.startswith("tecoa epoch 1/1  2 updates  ce ") and "batch accuracy: clean" in shown


def test_a_narrow_terminal_shows_everything(
    tiny_model: ZeroShotClassifier, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    defense = TwoPasses(tiny_model)
    defense.fit(*images_and_labels(12), validation=0.25, measure_every=1, batch_size=3, epochs=2, show_progress=True)
    shown = capsys.readouterr().err.replace("\n", " ")
    assert "6/6" in shown and "epoch 2  " in shown
    for word in ("clean ", "robust ", "loss ", "batch accuracy: ", "held out: clean "):
        assert word in shown


def test_an_epochs_record_has_the_accuracies_of_the_steps_that_measured(tiny_model: ZeroShotClassifier) -> None:
    defense = TeCoA(tiny_model, show_progress=False, measure_every=2, batch_size=4, epochs=1)
    defense.fit(*images_and_labels(12))  # the last of the three steps measures, the second does not
    steps, (epoch,) = defense.history.steps, defense.history.epochs
    assert epoch["clean_accuracy"] == pytest.approx((steps[0]["clean_accuracy"] + steps[2]["clean_accuracy"]) / 2)
    defense.fit(*images_and_labels(8))
    steps, (epoch,) = defense.history.steps, defense.history.epochs
    assert "clean_accuracy" not in steps[1] and epoch["clean_accuracy"] == steps[0]["clean_accuracy"]


class Unlabelled(TrainerDefense):
    """Embeddings of attacked images near those of clean ones; what a plugin without labels looks like."""

    needs_labels = False

    def default_threat(self) -> Any:
        return TeCoA.default_threat(self)  # type: ignore[arg-type]

    def default_config(self) -> Any:
        return TeCoA.default_config(self)  # type: ignore[arg-type]

    def begin(self) -> None:
        self.frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    def inner_attack(self, batch: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
        target = self.frozen.embed(batch["x"])

        class Embedding(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return self.model.embed(x)

        def distance(embedding: Tensor, row: Tensor) -> Tensor:
            return (embedding - target[row]).square().sum(dim=1)

        rows = torch.arange(len(target))
        options = {"early_stop": False, "seed": seed, "ids": batch["ids"]}
        x_adv = pgd(Embedding(self.model), batch["x"], rows, self.threat, objective=distance, **options)
        return {"x_adv": x_adv, "target": target}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"drift": (self.model.embed(batch["x_adv"]) - batch["target"]).square().sum(dim=1).mean()}


def test_a_method_without_labels_or_logits_fits_the_same_loop(tiny_model: ZeroShotClassifier) -> None:
    x, _ = images_and_labels(8)
    original = copy.deepcopy(tiny_model)
    defense = Unlabelled(tiny_model, show_progress=False, measure_every=1, batch_size=8, epochs=2, lr=1e-4)
    defense.fit(x)
    rows = rows_of_epoch(8, 8, 0)[0]
    by_hand = Unlabelled(original)
    by_hand.begin()
    batch = {"x": x[rows], "ids": rows}
    first = by_hand.losses(by_hand.inner_attack(batch, seed=derive_seed(0, "attack", 0)))["drift"].detach()
    assert defense.history.steps[0]["drift"] == pytest.approx(float(first), rel=1e-6)
    assert "clean_accuracy" not in defense.history.steps[0]
    assert not torch.equal(tiny_model.tower.proj, original.tower.proj)
    defense.fit_loader([x])


def test_a_context_is_not_left_open_by_an_error(
    tiny_model: ZeroShotClassifier, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    with untouched(tiny_model), pytest.raises(DivergedError):
        Exploding(tiny_model, **QUIET, batch_size=4, epochs=2).fit(*images_and_labels(12))


class TwoPasses(TrainerDefense):
    """Clean and adversarial cross-entropy: two graphs at once, two calls of the head."""

    name = "two-passes"

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=2 / 255, step_size=1 / 255, steps=2)

    def default_config(self) -> TrainingConfig:
        return TrainingConfig(batch_size=6, epochs=1, lr=1e-2, show_progress=False, measure_every=0)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part: F.cross_entropy(self.logits(batch[part]), batch["y"]) for part in ("x", "x_adv")}


def test_low_memory_gives_the_same_weights_for_one_more_forward_each(
    make_model: Callable[..., ZeroShotClassifier], images: Tensor, labels: Tensor
) -> None:
    models, passes = [make_model(), make_model()], [0, 0]
    for number, model in enumerate(models):

        def count(*_: Any, number: int = number) -> None:
            passes[number] += 1

        model.tower.register_forward_pre_hook(count)  # a recomputation ends once all that was saved is there again
        TwoPasses(model).fit(images[:6], labels[:6], low_memory=bool(number))
    for plain, recomputed in zip(models[0].tower.parameters(), models[1].tower.parameters()):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert passes == [4, 6]


def test_low_memory_counts_batch_statistics_once(images: Tensor) -> None:
    towers = []
    for low_memory in (False, True):
        torch.manual_seed(0)
        tower = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))
        model = ZeroShotClassifier(tower, torch.randn(4, 16), image_size=32)
        TwoPasses(model).fit(images[:6], torch.arange(6) % 4, low_memory=low_memory)
        towers.append(tower)
    for plain, recomputed in zip(towers[0].state_dict().values(), towers[1].state_dict().values()):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-7)
    assert int(towers[1][1].num_batches_tracked) == 2


def test_a_defence_is_told_when_the_fit_is_over(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    calls: list[str] = []

    class Told(TwoPasses):
        def begin(self) -> None:
            calls.append("begin")

        def end(self) -> None:
            calls.append("end")

    Told(tiny_model).fit(images, labels, batch_size=12)
    with pytest.raises(UsageError, match="training stopped at step"):
        Told(tiny_model).fit(images, labels, batch_size=12, lr=1e30, epochs=3)
    assert calls == ["begin", "end", "begin", "end"]
