"""LAAT: its losses by hand, the trainer's settings, what a step computes, TeCoA as its special case."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from art.defences.trainer import Trainer
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import attack_mode, predict
from clipdefense.attacks.pgd import pgd
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError
from clipdefense.training.checkpoint import load_weights
from clipdefense.training.runtime import derive_seed
from clipdefense.training.schedule import learning_rate
from clipdefense.weights import read_sidecar
from clipdefense_laat.expansion import AnchorExpansion
from clipdefense_laat.laat import (
    LAAT,
    RepeatedPass,
    a_ce,
    cosine_logits,
    cosine_smoothness,
    kl_divergence,
    trades_kl,
)
from clipdefense_laat.towers import make_tower
from clipdefense_tecoa.tecoa import TeCoA

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
STRONG = cd.ThreatModel("linf", eps=8 / 255, step_size=2 / 255, steps=2)


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_ce_by_hand() -> None:
    f = double([3, 4], [0, -2])  # unit: (0.6, 0.8) and (0, -1)
    anchors = double([1, 0], [0, 1])
    torch.testing.assert_close(cosine_logits(f, anchors, 0.5), double([1.2, 1.6], [0, -2]))
    expected = (math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(2))) / 2
    assert float(a_ce(f, anchors, torch.tensor([0, 1]), tau=0.5)) == pytest.approx(expected, abs=1e-15)
    # scale 1: 64 classes that cannot be told apart cost ln 64, a perfect and orthogonal placement a little less
    same, perfect = torch.ones(64, 64), torch.eye(64)
    y = torch.arange(64)
    assert float(a_ce(same, torch.eye(64), y)) == pytest.approx(math.log(64), abs=1e-5)
    assert float(a_ce(perfect, torch.eye(64), y)) == pytest.approx(math.log(1 + 63 / math.e), abs=1e-5)


def test_smoothness_by_hand() -> None:
    clean, adv = double([1, 0], [0, 2], [3, 0]), double([5, 0], [3, 4], [-1, 0])
    assert float(cosine_smoothness(clean, adv)) == pytest.approx(-(1 + 0.8 - 1) / 3, abs=1e-15)


def test_trades_term_by_hand() -> None:
    clean, adv = double([math.log(3), 0], [0, 0]), double([0, 0], [0, 0])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(clean, adv).tolist() == pytest.approx([expected, 0.0], abs=1e-15)
    assert float(trades_kl(clean, adv)) == pytest.approx(expected / 2, abs=1e-15)
    reference = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")
    assert float(trades_kl(clean, adv)) == pytest.approx(float(reference), abs=1e-15)


def test_gradients_of_the_losses() -> None:
    f, g = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    anchors = F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    y = torch.tensor([0, 3, 4, 1])
    assert torch.autograd.gradcheck(lambda e: a_ce(e, anchors, y, 0.1), f)
    assert torch.autograd.gradcheck(cosine_smoothness, (f, g))  # no stop-gradient on either side
    assert torch.autograd.gradcheck(trades_kl, (f, g))
    # -cos(u, v): the gradient to u is -(v/|v| - cos u/|u|) / |u|
    u, v = double([3, 4]).requires_grad_(), double([0, 2])
    (gradient,) = torch.autograd.grad(cosine_smoothness(u, v), u)
    torch.testing.assert_close(gradient, -(double([0, 1]) - 0.8 * double([0.6, 0.8])) / 5)


def test_published_and_default_settings(tiny_model: ZeroShotClassifier) -> None:
    released, default = LAAT(tiny_model, variant="released"), LAAT(tiny_model)
    for defense, eps in ((released, 8 / 255), (default, 1 / 255)):
        threat = defense.threat
        assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", eps, eps / 4, 7)
        assert defense.config.train == "tower" and defense.config.mix == 1
    config = released.config
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert (config.batch_size, config.epochs) == (128, 100)
    rates = [learning_rate(config, epoch * 300, epoch, 30_000) for epoch in (0, 59, 60, 99)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])
    expected = {"tau": 1.0, "smoothness": 1.0, "expansion": True, "quantile": 1.0, "trades": False, "awp_gamma": 0.0}
    assert released.hyper_parameters() == expected
    assert default.hyper_parameters() == expected | {"tau": 0.05}
    assert (default.config.optimizer, default.config.lr) == ("adamw", 1e-5)
    assert LAAT(tiny_model, variant="released", tau=0.07).tau == 0.07


def test_it_is_an_art_trainer_and_found_by_name(tiny_model: ZeroShotClassifier) -> None:
    assert cd.get_defense("laat") is LAAT
    estimator = cd.CLIPClassifier(tiny_model)
    trainer = LAAT(estimator, threat=STRONG)
    assert isinstance(trainer, Trainer) and trainer.get_classifier() is estimator


def test_making_the_trainer_changes_nothing_and_a_fit_expands_the_head(
    tiny_model: ZeroShotClassifier, images: Tensor
) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    defense = LAAT(tiny_model, tau=0.1, threat=STRONG, **QUIET, batch_size=12, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    defense.fit(images, torch.arange(12) % 10)
    head = tiny_model.head
    assert torch.equal(head.embeddings, before["head.embeddings"])
    expansion = AnchorExpansion.fit(head.embeddings)
    assert isinstance(head.transform, AnchorExpansion)
    assert torch.equal(head.transform.m, expansion.m) and torch.equal(head.transform.theta_max, expansion.theta_max)
    torch.testing.assert_close(head.anchors, expansion(head.embeddings))
    assert float(head.scale) == 10
    with torch.no_grad():
        f = tiny_model.embed(images)
        torch.testing.assert_close(tiny_model(images), F.normalize(f, dim=1) @ head.anchors.T / 0.1)
    # a second fit keeps the map, also on other classes
    novel = tiny_model.with_classes(tiny_model.class_names[:4])
    kept = novel.head.transform
    LAAT(novel, threat=STRONG, **QUIET, batch_size=12, epochs=1).fit(images, torch.arange(12) % 4)
    assert novel.head.transform is kept and float(novel.head.scale) == pytest.approx(20)


def test_what_the_losses_are(make_model: Any, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    x, x_adv, y = images[:4].double(), images[4:8].double(), torch.tensor([1, 5, 7, 0])
    batch = {"x": x, "x_adv": x_adv, "y": y, "ids": torch.arange(4)}
    defense = LAAT(model, tau=0.2, smoothness=0.5)
    defense.begin()
    f, f_adv = model.embed(x), model.embed(x_adv)
    z, z_adv = (F.normalize(e, dim=1) @ model.head.anchors.T / 0.2 for e in (f, f_adv))
    terms = defense.losses(batch)
    assert terms.keys() == {"a_ce", "smoothness"}
    torch.testing.assert_close(terms["a_ce"], F.cross_entropy(z_adv, y))
    torch.testing.assert_close(terms["smoothness"], -0.5 * F.cosine_similarity(f, f_adv).mean())
    trades = LAAT(model, tau=0.2, smoothness=6, trades=True)
    terms = trades.losses(batch)
    assert terms.keys() == {"a_ce", "kl"}
    torch.testing.assert_close(terms["a_ce"], F.cross_entropy(z, y))
    expected = F.kl_div(z_adv.log_softmax(1), z.log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(terms["kl"], 6 * expected)


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 2), ({"smoothness": 0}, 1), ({"trades": True}, 2), ({"trades": True, "smoothness": 0}, 1)],
)
def test_each_image_set_is_encoded_once(
    options: dict[str, Any], passes: int, tiny_model: ZeroShotClassifier, images: Tensor
) -> None:
    seen: list[int] = []
    defense = LAAT(tiny_model, **options)
    defense.begin()
    handle = tiny_model.tower.register_forward_hook(lambda *_: seen.append(1))
    defense.losses({"x": images, "x_adv": images.flip(0), "y": torch.arange(12) % 10})
    handle.remove()
    assert len(seen) == passes


def test_tecoa_is_the_special_case(make_model: Any, images: Tensor) -> None:
    y = torch.arange(12) % 10
    settings: dict[str, Any] = {**QUIET, "batch_size": 4, "epochs": 1, "lr": 1e-3, "warmup_steps": 0}
    published, special = make_model(), make_model()
    tecoa = TeCoA(published, **settings)
    LAAT(special, expansion=False, smoothness=0, tau=0.01, threat=tecoa.threat, config=tecoa.config).fit(images, y)
    tecoa.fit(images, y)
    state = special.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in published.state_dict().items())
    assert not torch.equal(published.tower.proj, make_model().tower.proj)


@pytest.mark.parametrize("trades", [False, True])
def test_a_step_is_the_gradient_of_the_losses_alone(trades: bool, make_model: Any, images: Tensor) -> None:
    """One SGD update against one by hand, with the attack on frozen weights of a copy."""
    model, lr = make_model(dtype=torch.float64), 1e-2
    x, y, ids = images.double(), torch.arange(12) % 10, torch.arange(12)
    defense = LAAT(copy.deepcopy(model), tau=0.1, trades=trades, threat=STRONG, variant="released", **QUIET,
                   batch_size=12, epochs=1, momentum=0.0, weight_decay=0.0, lr=lr)  # fmt: skip
    by_hand = LAAT(model, tau=0.1, trades=trades, threat=STRONG)
    by_hand.begin()
    batch = {"x": x, "y": y, "ids": ids}
    with attack_mode(model):
        batch |= by_hand.inner_attack(batch, seed=derive_seed(0, "attack", 0))
    assert not batch["x_adv"].requires_grad and all(weight.grad is None for weight in model.parameters())
    total = sum(by_hand.losses(batch).values())
    weights = list(model.tower.parameters())
    gradients = torch.autograd.grad(total, weights)
    defense.fit(x, y)
    for weight, gradient, trained in zip(weights, gradients, defense.model.tower.parameters()):
        torch.testing.assert_close(trained, weight - lr * gradient, atol=1e-9, rtol=0)
        assert trained.grad is None


def test_the_attack_ascends_what_the_method_says(make_model: Any, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    batch = {"x": images.double(), "y": torch.arange(12) % 10, "ids": torch.arange(12)}
    defense = LAAT(model, threat=STRONG, smoothness=3)
    defense.begin()
    every: dict[str, Any] = {"early_stop": False, "seed": 5, "ids": batch["ids"]}
    x_adv = defense.inner_attack(batch, seed=5)["x_adv"]
    assert torch.equal(x_adv, pgd(model, batch["x"], batch["y"], STRONG, objective="ce", **every))

    def divergence(x: Tensor) -> Tensor:
        return kl_divergence(predict(model, batch["x"]), predict(model, x))

    x_kl = LAAT(model, threat=STRONG, trades=True).inner_attack(batch, seed=5)["x_adv"]
    assert float((x_kl - batch["x"]).abs().max()) <= STRONG.eps + 1e-9
    start = pgd(model, batch["x"], batch["y"], cd.ThreatModel("linf", eps=8 / 255, step_size=1e-9, steps=1), **every)
    assert bool((divergence(x_kl) > divergence(start)).all())
    assert float(divergence(x_kl).sum()) > float(divergence(x_adv).sum())
    # each image is held to its own clean prediction, whatever the batch and the labels
    part = {name: values[3:7] for name, values in batch.items()} | {"y": torch.zeros(4, dtype=torch.int64)}
    torch.testing.assert_close(LAAT(model, threat=STRONG, trades=True).inner_attack(part, seed=5)["x_adv"], x_kl[3:7])


def test_released_moves_batchnorm_as_three_passes_do() -> None:
    tower = make_tower("resnet12", 16, widths=(4, 6, 8, 10)).train()
    anchors, names = torch.randn(3, 16), ["a", "b", "c"]
    x, x_adv, y = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    for variant in ("released", "default"):
        for low_memory in (False, True):
            model = ZeroShotClassifier(copy.deepcopy(tower), anchors, class_names=names, image_size=32)
            expected = copy.deepcopy(model)
            for images in (x_adv, x, x_adv)[: 3 if variant == "released" else 2]:
                expected.embed(images)
            defense = LAAT(model, variant=variant)
            defense.low_memory = low_memory
            sum(defense.losses({"x": x, "x_adv": x_adv, "y": y}).values()).backward()
            found = dict(model.tower.named_buffers())
            for name, value in expected.tower.named_buffers():
                torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
            assert all(weight.grad is not None for weight in model.tower.parameters())


def test_frozen_statistics_stay() -> None:
    norm = nn.BatchNorm1d(3).eval()
    first = RepeatedPass(norm)
    norm(torch.rand(4, 3))
    first.over()
    first.repeat()
    assert norm.running_mean.tolist() == [0, 0, 0] and int(norm.num_batches_tracked) == 0


class Interrupted(LAAT):
    """Stops in the middle of its fourth update."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        if self.history is not None and len(self.history.steps) == 3:
            raise KeyboardInterrupt
        return super().losses(batch)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return a.state_dict().keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in a.state_dict().items()
    )


def test_a_stopped_run_resumes_and_its_file_brings_the_expansion(
    make_model: Any, images: Tensor, tmp_path: Path
) -> None:
    y = torch.arange(12) % 10
    settings: dict[str, Any] = {**QUIET, "batch_size": 6, "lr": 1e-3, "threat": STRONG, "epochs": 3}
    kept = settings | {"checkpoint": str(tmp_path), "checkpoint_every": 1}
    whole, stopped, resumed = make_model(), make_model(), make_model()
    LAAT(whole, **settings).fit(images, y)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(stopped, **kept).fit(images, y)
    with pytest.raises(UsageError, match=r"hyper_parameters\.tau is 0\.1, was 0\.05"):
        LAAT(make_model(), **kept, tau=0.1, resume=True).fit(images, y)
    LAAT(resumed, **kept, resume=True).fit(images, y)
    assert same(whole, resumed) and not same(whole, stopped)

    facts = read_sidecar(tmp_path / "model.safetensors")
    assert facts["method"] == "laat" and facts["hyper_parameters"]["tau"] == 0.05
    fresh = make_model()
    fresh.head.transform = AnchorExpansion.identity(32)
    load_weights(fresh, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(images), whole(images))


def learnable(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Red images and blue ones, further apart than eps, under noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.3 + 0.3 * torch.rand(n, 3, 32, 32, generator=generator)
    x[y == 0, 0] += 0.2
    x[y == 1, 2] += 0.2
    return x, y


@pytest.mark.parametrize("trades", [False, True])
def test_robust_accuracy_rises_on_a_learnable_set(trades: bool) -> None:
    model = cd.load_model("laat:conv4-512", ["red", "blue"], embeddings=lambda names: torch.randn(2, 16) + 2,
                          trunk_options={"width": 16})  # fmt: skip
    threat = cd.ThreatModel("linf", eps=8 / 255, step_size=2 / 255, steps=3)
    x, y = learnable(40, seed=9)

    def robust() -> float:
        x_adv = pgd(model, x, y, threat, seed=1)
        return float((predict(model, x_adv).argmax(dim=1) == y).double().mean())

    before = robust()
    defense = LAAT(model, variant="released", trades=trades, threat=threat, **QUIET, batch_size=16, epochs=5,
                   milestones=(4,))  # fmt: skip
    defense.fit(*learnable(64, seed=2))
    assert before <= 0.5
    assert robust() >= 0.9
    torch.testing.assert_close(model.head.anchors[0], -model.head.anchors[1])  # two classes: opposite
    loss = [record["loss"] for record in defense.history.steps]
    assert loss[-1] < loss[0]


def test_bad_input(make_model: Any, images: Tensor) -> None:
    model, y = make_model(), torch.arange(12) % 10
    for options, message in [
        ({"tau": 0}, r"tau is 0; a number above 0"),
        ({"tau": float("nan")}, r"tau is nan"),
        ({"smoothness": -1}, r"smoothness is -1; a number of at least 0"),
        ({"awp_gamma": -1}, r"awp_gamma is -1; a number of at least 0"),
        ({"quantile": 2}, r"quantile is 2; a number above 0 and at most 1"),
        ({"variant": "relased"}, r"did you mean 'released'"),
        ({"smothness": 1}, r"'smothness' is unknown"),
        ({"trades": True, "threat": cd.ThreatModel("linf", eps=0.1, restarts=2)}, r"trades is True with 2 restarts"),
    ]:
        with pytest.raises(UsageError, match=message):
            LAAT(model, **options)
    centred = ZeroShotClassifier(model.tower, torch.randn(3, 32), transform=nn.Identity(), image_size=32)
    with pytest.raises(UsageError, match="the head has a Identity as its transform"):
        LAAT(centred)
    assert LAAT(centred, expansion=False).expansion is False
    expanded = ZeroShotClassifier(model.tower, torch.randn(3, 32), transform=AnchorExpansion.identity(32))
    with pytest.raises(UsageError, match="expanded already"):
        LAAT(expanded, expansion=False)
    before = {name: value.clone() for name, value in model.tower.state_dict().items()}
    alien = ZeroShotClassifier(model.tower, torch.randn(10, 7), image_size=32)
    with pytest.raises(UsageError, match="class embeddings have dimension 7, but the tower VisionTransformer gives 32"):
        LAAT(alien, **QUIET, batch_size=12).fit(images, y)
    equal = ZeroShotClassifier(model.tower, torch.ones(10, 32), image_size=32)
    with pytest.raises(UsageError, match="fewer than two distinct embeddings"):
        LAAT(equal, **QUIET, batch_size=12).fit(images, y)
    assert equal.head.transform is None and float(equal.head.scale) == 100
    assert all(torch.equal(value, before[name]) for name, value in model.tower.state_dict().items())
