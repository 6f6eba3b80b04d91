"""ANCRA: contrast, bases and negatives by hand, its targeted attack, its steps in the loop."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.pgd import pgd
from clipdefense.errors import UsageError
from clipdefense.randomness import normal
from clipdefense_ancra import contrast as ct
from clipdefense_ancra.ancra import ANCRA, NEGATIVE_STREAM, START_STREAM
from clipdefense_ancra.bases import base_terms, boosted_cross_entropy, divergence, mart_robust, trades_robust
from clipdefense_ancra.negatives import draw_negatives, pick_negatives
from clipdefense_tecoa.tecoa import TeCoA

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
Make = Callable[..., cd.ZeroShotClassifier]


def logs(*rows: list[float]) -> Tensor:
    """Logits whose softmax are these rows over their sums."""
    return torch.tensor(rows, dtype=torch.float64).log()


# The contrast


def test_contrast_by_hand() -> None:
    # confused: sqrt(1/2 * 3/4); not confused: 0
    logits, logits_neg = logs([2, 1, 1], [1, 1, 2]), logs([6, 1, 1], [2, 1, 1])
    assert ct.confusion(logits, logits_neg).tolist() == pytest.approx([math.sqrt(0.375), 0.0], abs=1e-15)
    # over all N pairs, not over the confused ones
    assert float(ct.negative_contrast(logits, logits_neg)) == pytest.approx(math.sqrt(0.375) / 2, abs=1e-15)


def test_smooth_variants_by_hand() -> None:
    logits, logits_neg, y = logs([2, 1, 1], [1, 1, 2]), logs([6, 1, 1], [2, 1, 1]), torch.tensor([1, 0])
    shared = [math.sqrt(1 / 4 * 1 / 8), math.sqrt(1 / 4 * 1 / 2)]
    overlap = [math.sqrt(12 / 32) + 2 * math.sqrt(1 / 32), 2 * math.sqrt(2 / 16) + math.sqrt(1 / 16)]
    assert ct.shared_label(logits, logits_neg, y).tolist() == pytest.approx(shared, abs=1e-15)
    assert ct.bhattacharyya(logits, logits_neg).tolist() == pytest.approx(overlap, abs=1e-15)
    assert float(ct.per_class_contrast(logits, logits_neg, y)) == pytest.approx(sum(shared) / 2, abs=1e-15)
    assert float(ct.bhattacharyya_contrast(logits, logits_neg)) == pytest.approx(sum(overlap) / 2, abs=1e-15)
    f, f_neg = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [0.0, 5.0], [1.0, 1.0]])
    expected = [0.5, 0.0, math.sqrt(0.5) - 0.5]  # cosines 1, 0, sqrt(1/2)
    assert ct.feature_overlap(f, f_neg, 0.5).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(ct.feature_contrast(f, f_neg, margin=0.5)) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_all_agree_where_both_are_sure_of_the_same_class() -> None:
    sure = 1000 * F.one_hot(torch.tensor([2, 0]), 4).double()
    for similarity in (ct.confusion, ct.bhattacharyya, lambda a, b: ct.shared_label(a, b, torch.tensor([2, 0]))):
        assert similarity(sure, sure).tolist() == [1.0, 1.0]
        assert similarity(sure, sure.flip(0)).tolist() == pytest.approx([0.0, 0.0], abs=1e-200)


Y = torch.tensor([1, 0, 3, 3, 2])
SIMILARITIES: dict[str, tuple[ct.Similarity, Callable[..., Tensor]]] = {
    "strict": (ct.confusion, ct.negative_contrast),
    "smooth": (partial(ct.shared_label, y=Y), lambda a, b, alpha: ct.per_class_contrast(a, b, Y, alpha=alpha)),
    "bhattacharyya": (ct.bhattacharyya, ct.bhattacharyya_contrast),
    "feature": (partial(ct.feature_overlap, margin=-0.9), lambda a, b, alpha: ct.feature_contrast(a, b, alpha=alpha)),
}


def pairs(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two sets of (5, 4), the first three pairs confused."""
    logits, logits_neg = (scale * torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    logits[:3, 1] += 5 * scale
    logits_neg[:3, 1] += 5 * scale
    return logits.requires_grad_(True), logits_neg.requires_grad_(True)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_have_the_gradients_of_their_values(name: str) -> None:
    similarity, _ = SIMILARITIES[name]
    assert torch.autograd.gradcheck(similarity, pairs())


@pytest.mark.parametrize("name", SIMILARITIES)
@settings(deadline=None, max_examples=15)
@given(alpha=st.floats(0, 1))
def test_alpha_weighs_gradients_and_leaves_the_value(name: str, alpha: float) -> None:
    similarity, contrast = SIMILARITIES[name]
    torch.manual_seed(1)
    logits, logits_neg = pairs()
    plain = contrast(logits.detach(), logits_neg.detach(), alpha=1.0)
    value = contrast(logits, logits_neg, alpha=alpha)
    assert float(value.detach()) == pytest.approx(float(plain), rel=1e-14) and plain > 0
    if name == "feature":
        similarity = partial(ct.feature_overlap, margin=0.0)
    whole = torch.autograd.grad(similarity(logits, logits_neg).mean(), (logits, logits_neg))
    found = torch.autograd.grad(value, (logits, logits_neg), allow_unused=True)
    for share, both, one in zip((1 - alpha, alpha), whole, found):
        torch.testing.assert_close(torch.zeros_like(both) if one is None else one, share * both, atol=1e-15, rtol=1e-12)
        assert both.abs().max() > 1e-4


def test_the_gradient_by_hand() -> None:
    logits, logits_neg = pairs()
    (gradient,) = torch.autograd.grad(ct.negative_contrast(logits, logits_neg), logits_neg)
    p_neg, s = logits_neg.detach().softmax(dim=1), ct.confusion(logits, logits_neg).detach()
    expected = 0.5 * s[:, None] * (F.one_hot(p_neg.argmax(dim=1), 4) - p_neg) / 5
    torch.testing.assert_close(gradient, expected)
    assert s[:3].all() and gradient[:3].any(dim=1).all()
    assert not gradient[s == 0].any()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_gradients_stay_finite_where_probabilities_underflow(name: str) -> None:
    logits, logits_neg = (z.detach().float().requires_grad_(True) for z in pairs(scale=300.0))
    gradients = torch.autograd.grad(SIMILARITIES[name][1](logits, logits_neg, alpha=0.5), (logits, logits_neg))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# The bases


def test_bases_by_hand() -> None:
    logits, logits_adv, y = logs([2, 1, 1], [1, 3, 4]), logs([1, 2, 1], [1, 1, 2]), torch.tensor([0, 2])
    kl = [
        0.5 * math.log(2) + 0.25 * math.log(0.5),
        1 / 8 * math.log(0.5) + 3 / 8 * math.log(1.5),
    ]
    assert divergence(logits, logits_adv).tolist() == pytest.approx(kl, abs=1e-15)
    assert float(trades_robust(logits, logits_adv)) == pytest.approx(sum(kl) / 2, abs=1e-15)
    # -log P_y(x') - log(1 - the largest other)
    bce = [-math.log(1 / 4) - math.log(1 - 1 / 2), -math.log(1 / 2) - math.log(1 - 1 / 4)]
    assert float(boosted_cross_entropy(logits_adv, y)) == pytest.approx(sum(bce) / 2, abs=1e-15)
    weighted = [kl[0] * (1 - 1 / 2), kl[1] * (1 - 1 / 2)]
    assert float(mart_robust(logits, logits_adv, y)) == pytest.approx(sum(weighted) / 2, abs=1e-15)

    ce, ce_adv = (-math.log(1 / 2) - math.log(1 / 2)) / 2, (-math.log(1 / 4) - math.log(1 / 2)) / 2
    expected = {
        "tecoa": {"ce": ce_adv},
        "trades": {"natural": ce, "robust": 6 * sum(kl) / 2},
        "mart": {"bce": sum(bce) / 2, "robust": 5 * sum(weighted) / 2},
    }
    for base, beta in (("tecoa", 0.0), ("trades", 6.0), ("mart", 5.0)):
        terms = base_terms(base, logits, logits_adv, y, beta)
        assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected[base], abs=1e-14)


def test_base_gradients() -> None:
    logits, logits_adv = pairs()
    assert torch.autograd.gradcheck(trades_robust, (logits, logits_adv))  # the clean side is not detached
    assert torch.autograd.gradcheck(lambda a, b: mart_robust(a, b, Y), (logits, logits_adv))
    assert torch.autograd.gradcheck(lambda z: boosted_cross_entropy(z, Y), logits_adv)


def test_a_sure_mistake_costs_its_margin_and_never_infinity() -> None:
    # float32 has 1 - P_k = 0 here; both logarithms are minus the margin
    logits = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([1]))
    assert float(loss.detach()) == pytest.approx(400.0, abs=0.02)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all() and gradient[0, 0] == pytest.approx(2.0)
    assert divergence(logits, -logits).isfinite().all()


# The negatives


def test_the_smallest_keys_win() -> None:
    y = torch.tensor([0, 0, 2, 2, 3])
    class_keys = torch.tensor([[0.1, 0.0, 0.5, 0.4]]).repeat(5, 1)  # class 1 is absent
    class_keys[4] = torch.tensor([0.9, 0.0, 0.5, 0.1])  # 3 is its own
    member_keys = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]]).repeat(5, 1)
    assert pick_negatives(y, class_keys, member_keys).tolist() == [4, 4, 1, 1, 3]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 2**40), st.randoms())
def test_negatives_are_of_another_class_and_know_no_order(labels: list[int], seed: int, random: Any) -> None:
    y, ids = torch.tensor(labels), torch.arange(len(labels)) + 100
    if len(set(labels)) == 1:
        with pytest.raises(UsageError, match=rf"y has the one class {labels[0]} in a batch .* of {len(y)} images"):
            draw_negatives(y, ids, 5, seed=seed)
        return
    rows = draw_negatives(y, ids, 5, seed=seed)
    assert (y[rows] != y).all()
    order = torch.tensor(random.sample(range(len(y)), len(y)))
    assert torch.equal(ids[order][draw_negatives(y[order], ids[order], 5, seed=seed)], ids[rows][order])
    # taking away an image that nobody has for a negative changes nobody's
    spare = [row for row in range(len(y)) if row not in rows.tolist() and y[row] in y[rows]]
    for row in spare[:2]:
        kept = torch.tensor([other for other in range(len(y)) if other != row])
        assert torch.equal(ids[kept][draw_negatives(y[kept], ids[kept], 5, seed=seed)], ids[rows][kept])


def test_classes_and_then_images_are_drawn_evenly() -> None:
    y = torch.tensor([0] * 1200 + [1] * 6 + [2] * 2)
    rows = draw_negatives(y, torch.arange(1208), 4, seed=5)[:1200]
    drawn = Counter(rows.tolist())
    # half each of classes 1 and 2, whatever their sizes: 600 +- 5 standard deviations of 17
    assert abs(sum(drawn[row] for row in range(1200, 1206)) - 600) < 87
    assert all(abs(drawn[row] - 100) < 48 for row in range(1200, 1206))
    assert all(abs(drawn[row] - 300) < 75 for row in (1206, 1207))


# The trainer


class Passes:
    """Counts images through the tower, forward and backward, by hooks."""

    def __init__(self, model: cd.ZeroShotClassifier) -> None:
        self.forward = self.backward = 0
        model.tower.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def batch_of(images: Tensor, classes: int = 10) -> dict[str, Tensor]:
    return {"x": images, "y": torch.arange(len(images)) % classes, "ids": torch.arange(len(images)) + 7}


def test_settings(tiny_model: cd.ZeroShotClassifier) -> None:
    assert cd.get_defense("ancra") is ANCRA
    default, released = ANCRA(tiny_model), ANCRA(tiny_model, variant="released")
    assert (default.base, default.beta, released.base, released.beta) == ("tecoa", 0.0, "trades", 6.0)
    assert ANCRA(tiny_model, base="mart").beta == 5.0 and ANCRA(tiny_model, base="trades", beta=1.5).beta == 1.5
    for defense in (default, released):
        assert (defense.alpha, defense.zeta, defense.start, defense.contrast) == (1.0, 3.0, 0.001, "strict")
        assert defense.reverse_attention == "off" and defense.cr_beta == 2.0
    threat, config = released.threat, released.config
    assert (threat.norm, threat.eps, threat.alpha, threat.steps) == ("linf", 8 / 255, 0.007, 10)
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("sgd", 0.01, 0.9, 2e-4)
    assert (config.batch_size, config.epochs, config.milestones, config.gamma) == (128, 120, (75, 90, 100), 0.1)
    assert (default.threat.eps, default.threat.steps) == (1 / 255, 10)
    assert default.threat.alpha / default.threat.eps == pytest.approx(0.007 / (8 / 255))
    assert default.config == TeCoA(tiny_model).config
    assert default.record()["hyper_parameters"] == {
        "base": "tecoa",
        "contrast": "strict",
        "alpha": 1.0,
        "zeta": 3.0,
        "beta": 0.0,
        "start": 0.001,
        "margin": 0.0,
        "reverse_attention": "off",
        "cr_beta": 2.0,
    }


@pytest.mark.parametrize("base", ["tecoa", "trades", "mart"])
@pytest.mark.parametrize("contrast", ["strict", "smooth", "bhattacharyya", "feature"])
def test_losses_are_their_terms(base: Any, contrast: Any, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    defense = ANCRA(tiny_model, base=base, contrast=contrast, alpha=0.8, zeta=2.0, margin=-0.5)
    batch = batch_of(images[:6], classes=3)
    y, rows = batch["y"], torch.tensor([1, 2, 0, 4, 5, 3])
    batch |= {"x_adv": images[6:12], "x_neg": images[rows].flip(3), "negatives": rows}
    terms = defense.losses(batch)

    f, f_adv, f_neg = (tiny_model.embed(batch[name]) for name in ("x", "x_adv", "x_neg"))
    z, z_adv, z_neg = (tiny_model.head(e) for e in (f, f_adv, f_neg))
    value = {
        "strict": lambda: ct.negative_contrast(z, z_neg, alpha=0.8),
        "smooth": lambda: ct.per_class_contrast(z, z_neg, y, alpha=0.8),
        "bhattacharyya": lambda: ct.bhattacharyya_contrast(z, z_neg, alpha=0.8),
        "feature": lambda: ct.feature_contrast(f, f_neg, alpha=0.8, margin=-0.5),
    }[contrast]()
    name = "anc" if contrast == "strict" else f"{contrast}_contrast"
    expected = base_terms(base, z, z_adv, y, defense.beta) | {name: 2.0 * value}
    assert list(terms) == list(expected)
    weights = list(tiny_model.tower.parameters())
    for key, term in terms.items():
        torch.testing.assert_close(term, expected[key])
    found, wanted = (torch.autograd.grad(sum(parts.values()), weights) for parts in (terms, expected))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_contrast_reaches_the_weights_as_finite_differences_say(make_model: Make, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    defense = ANCRA(model, contrast="smooth", alpha=1.0, zeta=3.0)
    batch = batch_of(images[:4].double())
    batch |= {"x_adv": batch["x"], "x_neg": images[4:8].double(), "negatives": torch.tensor([1, 2, 3, 0])}
    (weight,) = defense.trainable_parameters("head")
    (gradient,) = torch.autograd.grad(defense.losses(batch)["smooth_contrast"], weight)
    with torch.no_grad():
        frozen = model(batch["x"])  # at alpha = 1 the anchors' side is a constant
    direction, step, values = torch.randn_like(weight), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(3 * float(ct.shared_label(frozen, model(batch["x_neg"]), batch["y"]).mean()))
            weight -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_without_contrast_it_is_tecoa(make_model: Make, images: Tensor) -> None:
    ours, theirs = make_model(), make_model()
    options = {**QUIET, "batch_size": 6, "epochs": 1, "lr": 1e-3, "warmup_steps": 0}
    x, y = images, torch.zeros(12, dtype=torch.long)  # one class is enough, then
    threat = cd.ThreatModel("linf", eps=1 / 255, steps=0)
    ANCRA(ours, zeta=0, threat=threat, **options).fit(x, y)
    TeCoA(theirs, threat=threat, **options).fit(x, y)
    before = make_model().state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert any(not torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_attacks_are_pgd_from_a_normal_start(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    defense, batch = ANCRA(tiny_model), batch_of(images)
    x, y, ids = batch["x"], batch["y"], batch["ids"]
    made = defense.inner_attack(batch, seed=3)
    rows = made["negatives"]
    assert torch.equal(rows, draw_negatives(y, ids, 10, seed=3))
    every = {"early_stop": False}
    noise, negative_noise = (normal((3, 32, 32), ids, seed=3, stream=s) for s in (START_STREAM, NEGATIVE_STREAM))
    x_adv = pgd(tiny_model, x, y, defense.threat, init=0.001 * noise, **every)
    x_neg = pgd(tiny_model, x[rows], y[rows], defense.threat, target=y, init=0.001 * negative_noise, **every)
    assert torch.equal(made["x_adv"], x_adv) and torch.equal(made["x_neg"], x_neg)
    given_all = defense.inner_attack(batch, seed=9, negatives=rows, noise=noise, negative_noise=negative_noise)
    assert all(torch.equal(given_all[name], made[name]) for name in made)
    assert not torch.equal(defense.inner_attack(batch, seed=4)["x_adv"], x_adv)

    assert (x_neg - x[rows]).abs().max() <= 1 / 255 + 1e-7
    assert x_neg.min() >= 0 and x_neg.max() <= 1

    def towards(pictures: Tensor) -> Tensor:
        return -F.cross_entropy(predict(tiny_model, pictures), y, reduction="none")

    assert (towards(x_neg) > towards(x[rows])).all()
    one = cd.ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=1)
    leaf = (x[rows] + 0.001 * negative_noise).clamp(0, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(tiny_model(leaf), y, reduction="sum"), leaf)
    by_hand = (x[rows] + (leaf.detach() - gradient.sign() / 255 - x[rows]).clamp(-1 / 255, 1 / 255)).clamp(0, 1)
    stepped = ANCRA(tiny_model, threat=one).inner_attack(batch, seed=3)["x_neg"]
    differing = (stepped - by_hand).abs() > 1e-6  # the sign of a gradient of about 0
    assert differing.float().mean() < 1e-3


def test_an_image_keeps_its_draws_among_other_neighbours(make_model: Make, images: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    defense, batch = ANCRA(model), batch_of(images.double())
    whole, order = defense.inner_attack(batch, seed=1), torch.randperm(12)
    mixed = defense.inner_attack({name: value[order] for name, value in batch.items()}, seed=1)
    for name in ("x_adv", "x_neg"):
        torch.testing.assert_close(mixed[name], whole[name][order], atol=1e-12, rtol=0)


def test_passes_equal_theory(make_model: Make, images: Tensor) -> None:
    n, steps = 6, 4
    threat = cd.ThreatModel("linf", eps=1 / 255, steps=steps)
    for base, trained in (("tecoa", 2), ("trades", 3)):
        model = make_model()
        defense, passes = ANCRA(model, base=base, threat=threat), Passes(model)
        batch = batch_of(images[:n])
        batch |= defense.inner_attack(batch, seed=0)
        assert (passes.forward, passes.backward) == (2 * steps * n, 2 * steps * n)
        passes.forward = passes.backward = 0
        sum(defense.losses(batch).values()).backward()
        assert (passes.forward, passes.backward) == (3 * n, trained * n)


def test_attack_gradients_stay_out_of_the_weights(
    tiny_model: cd.ZeroShotClassifier, images: Tensor, untouched: Any
) -> None:
    defense = ANCRA(tiny_model)
    with untouched(tiny_model):
        defense.inner_attack(batch_of(images), seed=0)


@pytest.mark.parametrize("base", ["tecoa", "trades", "mart"])
def test_a_few_steps_lower_the_loss(base: Any, tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    before = copy.deepcopy(tiny_model.head.state_dict())
    threat = cd.ThreatModel("linf", eps=2 / 255, steps=2)
    options = {**QUIET, "batch_size": 12, "epochs": 6, "lr": 3e-5, "warmup_steps": 0, "schedule": "constant"}
    defense = ANCRA(tiny_model, base=base, threat=threat, **options)
    defense.fit(images, torch.arange(12) % 3)
    loss = [record["loss"] for record in defense.history.steps]
    assert loss[-1] < loss[0] - 2
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.head.state_dict().items())


@pytest.mark.parametrize(("contrast", "share"), [("strict", 0.7), ("bhattacharyya", 0.98)])
def test_descent_on_the_contrast_moves_fixed_pairs_apart(
    contrast: Any, share: float, tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    defense, batch = ANCRA(tiny_model, contrast=contrast, zeta=1.0), batch_of(images, classes=3)
    batch |= defense.inner_attack(batch, seed=0)
    optimizer = torch.optim.SGD(tiny_model.tower.parameters(), lr=3e-4)
    values = []
    for _ in range(10):
        term = list(defense.losses(batch).values())[-1]
        values.append(float(term.detach()))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert values[0] > 0.05 and values[-1] < share * values[0]


def test_low_memory_computes_the_same(make_model: Make, images: Tensor) -> None:
    states = []
    for low_memory in (False, True):
        model = make_model(dtype=torch.float64)
        threat = cd.ThreatModel("linf", eps=1 / 255, steps=1)
        options = {**QUIET, "batch_size": 6, "epochs": 1, "lr": 1e-3, "warmup_steps": 0, "low_memory": low_memory}
        ANCRA(model, base="trades", threat=threat, **options).fit(images.double(), torch.arange(12) % 3)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-12, rtol=0)


def test_bad_input(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    one_restart = cd.ThreatModel("linf", eps=1 / 255, restarts=2)
    for options, message in [
        ({"base": "trade"}, "base 'trade' is unknown; did you mean 'trades'"),
        ({"contrast": None}, "contrast 'None' is unknown; known: bhattacharyya, feature, smooth, strict"),
        ({"contrast": "strickt"}, "contrast 'strickt' is unknown; did you mean 'strict'"),
        ({"reverse_attention": "on"}, "reverse_attention 'on' is unknown"),
        ({"alpha": 1.5}, "alpha is 1.5; a number of at least 0 and at most 1 is expected"),
        ({"zeta": -1}, "zeta is -1; a number of at least 0 is expected"),
        ({"beta": math.nan, "base": "mart"}, "beta is nan; a number of at least 0"),
        ({"beta": 6.0}, "beta is 6.0 with base 'tecoa', which has no KL term"),
        ({"cr_beta": True}, "cr_beta is True; a number of at least 0"),
        ({"start": 8}, "start is 8; a number of at least 0 and at most 1"),
        ({"margin": 2}, "margin is 2; a number of at least -1 and at most 1"),
        ({"contrast": "feature", "reverse_attention": "label"}, "contrast 'feature' compares embeddings"),
        ({"threat": one_restart}, "threat has 2 restarts; ANCRA's attacks have one start"),
        ({"batch_size": 4, "accumulate": 3}, "batch_size is 4 with accumulate 3; a piece needs at least 2 images"),
        ({"variant": "relased"}, "variant 'relased' is unknown; did you mean 'released'"),
        ({"epoch": 2}, "training option 'epoch' is unknown; did you mean 'epochs'"),
    ]:
        with pytest.raises(UsageError, match=message):
            ANCRA(tiny_model, **options)

    defense, batch = ANCRA(tiny_model, **QUIET, batch_size=6), batch_of(images)
    with pytest.raises(
        UsageError, match=r"y has the one class 4 in a batch \(or piece of one\) of 6 images; .*shuffle"
    ):
        defense.fit(images[:6], torch.full((6,), 4))
    with pytest.raises(UsageError, match=r"y has the one class 0 in a batch .* of 2 images; .*lower accumulate"):
        defense.fit(images[:6], torch.tensor([0, 0, 0, 0, 0, 0]), accumulate=3)
    for option, value, message in [
        ("negatives", torch.arange(12), "negatives gives image 0 one of its own class 0"),
        ("negatives", torch.arange(1, 13), r"negatives has labels in \[1, 12\]; \[0, 11\] is expected"),
        ("noise", torch.zeros(12, 3, 8, 8), r"noise has shape \(12, 3, 8, 8\)"),
        ("negative_noise", torch.zeros(1, 3, 32, 32), r"negative_noise has shape \(1, 3, 32, 32\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            defense.inner_attack(batch, seed=0, **{option: value})
