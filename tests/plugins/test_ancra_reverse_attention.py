"""Reverse attention: its formulas, its heads and views on CLIP and on the ResNet, and the gradient that it hides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import predict
from clipdefense.attacks.pgd import pgd
from clipdefense.errors import UsageError
from clipdefense.plugins import registry
from clipdefense.training.checkpoint import load_weights, save_model
from clipdefense_ancra.ancra import ANCRA
from clipdefense_ancra.bases import base_terms
from clipdefense_ancra.contrast import negative_contrast
from clipdefense_ancra.negatives import draw_negatives
from clipdefense_ancra.resnet import RAClassifier
from clipdefense_ancra.reverse_attention import (
    AllHeads,
    HeadModule,
    ReverseAttention,
    ReverseAttentionModel,
    all_heads_cross_entropy,
    hard_mask,
    head_logits,
    head_weights,
    soft_mask,
    straight_through_mask,
)

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def network() -> RAClassifier:
    """Width 4 at 16 px, with statistics and a last layer that spread its predictions."""
    model = RAClassifier(NAMES, width=4, image_size=16)
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(32, 3, 16, 16, generator=generator)
    with torch.no_grad():
        for _ in range(20):
            model(x)
        model.eval()
        p = model.logits(x, "aux0")
        model.tower.fc.bias -= p.mean(dim=0)
    return model


@pytest.fixture
def small() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))


# The formulas


def test_masks() -> None:
    weight, p = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(hard_mask(p, weight), weight[p.argmax(dim=1)])
    assert torch.equal(hard_mask(p, weight, torch.tensor([3, 0, 1, 1, 2])), weight[[3, 0, 1, 1, 2]])
    by_hand = sum(p.softmax(dim=1)[:, k, None] * weight[k] for k in range(4))
    torch.testing.assert_close(soft_mask(p, weight), by_hand)
    torch.testing.assert_close(soft_mask(p, weight, sharpness=1e4), hard_mask(p, weight))
    through = straight_through_mask(p, weight, 2.0)
    torch.testing.assert_close(through, hard_mask(p, weight))
    direction = torch.randn_like(weight[:1]).expand(5, 6)
    gradients = [torch.autograd.grad((m * direction).sum(), p)[0] for m in (through, soft_mask(p, weight, 2.0))]
    assert torch.equal(*gradients) and gradients[0].any()
    assert torch.autograd.gradcheck(lambda p: soft_mask(p, weight, 2.0), p)


def test_the_gradient_of_the_last_logits_has_its_signs_turned() -> None:
    weight, z = torch.randn(4, 50, dtype=torch.float64), torch.rand(50, dtype=torch.float64, requires_grad=True)
    p = weight @ z
    y = int(p.argmax())
    last = weight @ (z * hard_mask(p[None], weight)[0])
    for k in range(4):
        (gradient,) = torch.autograd.grad(last[k] - last[y], z, retain_graph=True)
        torch.testing.assert_close(gradient, (weight[k] - weight[y]) * weight[y])
    assert last[y] >= 0 and int(last.argmax()) == y  # and the choice confirms itself


def test_on_clip_by_hand(make_model: Callable[..., cd.ZeroShotClassifier], images: Tensor) -> None:
    model = make_model(classes=4, dtype=torch.float64)
    x = images.double()
    f, t = F.normalize(model.embed(x), dim=1), model.head.anchors
    plain = 100 * f @ t.T
    for centre, w in ((True, t - t.mean(dim=0)), (False, t)):
        chosen = plain.argmax(dim=1)
        raw = torch.stack([100 * w @ (f[i] * w[chosen[i]]) for i in range(12)])
        bounded = torch.stack([100 * w @ F.normalize(f[i] * w[chosen[i]], dim=0) for i in range(12)])
        for flag, expected in ((False, raw), (True, bounded)):
            wrapped = ReverseAttentionModel(model, head="ra", centre=centre, bounded=flag)
            torch.testing.assert_close(wrapped(x), expected)
            torch.testing.assert_close(wrapped.logits(x, "plain"), plain)
    assert len(plain.argmax(dim=1).unique()) > 1
    assert torch.equal((f @ (t - t.mean(dim=0)).T).argmax(dim=1), plain.argmax(dim=1))
    assert torch.equal(ReverseAttentionModel(model)(x), model(x))  # plain by default
    y = torch.arange(12) % 4
    labelled, _ = ReverseAttentionModel(model).heads(x, partial(hard_mask, y=y))
    w = t - t.mean(dim=0)
    torch.testing.assert_close(labelled, 100 * (f * w[y]) @ w.T)


def test_raw_text_weights_are_all_alike_under_a_mask_and_centred_ones_are_not(data_folder: Path) -> None:
    with np.load(data_folder / "clip_text_anchors.npz") as archive:
        t = F.normalize(torch.from_numpy(archive["laat_cifar100_emb"]).float(), dim=1)  # ViT-B/16
    means = {}
    for name, w in (("raw", t), ("centred", t - t.mean(dim=0))):
        effective = F.normalize(w[None] * w[:10, None], dim=2)  # (mask class, class, D)
        cosines = effective @ effective.mT
        means[name] = float((cosines.sum() - 10 * 100) / (10 * 100 * 99))
    assert means["raw"] > 0.99 and abs(means["centred"]) < 0.02


# The views


def test_every_head_is_a_view(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    defense = ReverseAttention(tiny_model)
    views = {view.name: view for view in defense.adaptive(tiny_model)}
    assert list(views) == ["ra", "plain", "sum", "soft", "straight-through"]
    ids = torch.arange(4)

    def gradient(name: str) -> Tensor:
        x = images[:4].clone().requires_grad_(True)
        (found,) = torch.autograd.grad(views[name].forward(x, ids, 0)[:, 3].sum(), x)
        return found

    logits = {name: view.forward(images, ids, 0) for name, view in views.items()}
    torch.testing.assert_close(logits["plain"], tiny_model(images))
    torch.testing.assert_close(logits["ra"], defense.wrap(tiny_model)(images))
    together = sum(logits[name].log_softmax(dim=1) for name in ("ra", "plain"))
    torch.testing.assert_close(logits["sum"], together)
    torch.testing.assert_close(logits["straight-through"], logits["ra"], atol=1e-4, rtol=1e-4)
    # the same value, but a gradient through the choice
    hard, through = gradient("ra"), gradient("straight-through")
    assert (through - hard).abs().max() > 0.01 * hard.abs().max()
    assert all(gradient(name).flatten(1).any(dim=1).all() for name in views)
    assert all(view.extra_loss is None and view.eot == 1 for view in views.values())


def test_evaluated_it_prints_the_paper_s_protocol_beside_the_auxiliary_head(
    tiny_model: cd.ZeroShotClassifier, images: Tensor
) -> None:
    deployed = ReverseAttention(tiny_model).wrap(tiny_model)
    y = predict(deployed, images).argmax(dim=1)
    threat = cd.ThreatModel("linf", eps=8 / 255, steps=5)
    found = cd.evaluate(tiny_model, images, y, threat, attacks=("pgd",), defense=ReverseAttention(tiny_model))
    rows = {row.attacked: row.accuracy for row in found.rows}
    assert found.adaptive and found.clean.accuracy == 1
    assert {f"adaptive view {name}" for name in ("ra", "plain", "sum", "soft", "straight-through")} < set(rows)
    assert found.worst_case().accuracy <= min(rows.values())
    plain = ReverseAttention(tiny_model, head="plain").wrap(tiny_model)
    assert torch.equal(plain(images), tiny_model(images))


def test_wrapping_changes_nothing(tiny_model: cd.ZeroShotClassifier, images: Tensor, untouched: Any) -> None:
    with untouched(tiny_model):
        defense = ReverseAttention(cd.CLIPClassifier(tiny_model))
        defense.wrap(tiny_model)
        for view in defense.adaptive(tiny_model):
            view.forward(images[:2], torch.arange(2), 0)


def test_it_is_registered_as_unsound() -> None:
    assert cd.get_defense("reverse-attention") is ReverseAttention
    found = registry().find("defenses", "reverse-attention")
    assert "hides the gradient" in found.known_unsound and "attack the logits that choose" in found.known_unsound
    assert not registry().find("defenses", "ancra").known_unsound


# The ResNet


def test_the_resnet_by_hand(network: RAClassifier, small: Tensor) -> None:
    tower = network.tower
    fc = tower.fc
    h = tower.body(tower.stem(small))
    assert h.shape == (8, 16, 4, 4)  # the last stage halves it once more
    auxiliary = []
    for block in tower.reverse:
        z = block(h)
        assert (z >= 0).all() and z.shape == (8, 32, 2, 2)
        pooled = z.mean(dim=(2, 3))
        auxiliary.append(pooled @ fc.weight.T + fc.bias)
        h = z * fc.weight[auxiliary[-1].argmax(dim=1)][:, :, None, None]
    final, aux0, aux1 = network.heads(small)
    torch.testing.assert_close((aux0, aux1), tuple(auxiliary))
    # p'_k = sum_j W_kj W_cj GAP(z)_j + b_k, so that the mask's class is never below its bias
    c = aux1.argmax(dim=1)
    torch.testing.assert_close(final, torch.einsum("kj,nj,nj->nk", fc.weight, fc.weight[c], pooled) + fc.bias)
    assert (final.gather(1, c[:, None])[:, 0] >= fc.bias[c]).all()
    torch.testing.assert_close(network(small), final)
    for head, logits in (("final", final), ("aux0", aux0), ("aux1", aux1)):
        assert torch.equal(network.logits(small, head), logits)
        assert torch.equal(network.tower.logits(small, head), logits)
    with pytest.raises(UsageError, match="head 'aux2' is unknown; did you mean 'aux1' or 'aux0'"):
        network.logits(small, "aux2")


def test_labels_choose_the_masks_and_the_weights_learn_through_them(network: RAClassifier, small: Tensor) -> None:
    y = torch.arange(8) % 4
    final, aux0, aux1 = network.heads(small, partial(hard_mask, y=y))
    assert torch.equal(aux0, network.heads(small)[1])  # the first block comes before any mask
    predicted = aux0.argmax(dim=1) == y
    assert not torch.equal(aux1[~predicted], network.heads(small)[2][~predicted])
    assert (final.gather(1, y[:, None])[:, 0] >= network.tower.fc.bias[y]).all()
    modes = [part.training for part in network.modules()]
    network.train()
    network.heads(small)
    assert all(part.training for part in network.modules())  # no forward sets a mode
    network.eval()
    assert [part.training for part in network.modules()] == modes
    z, mask = torch.rand(8, 32), hard_mask(aux1, network.tower.fc.weight, y)
    (gradient,) = torch.autograd.grad((z * mask).sum(), network.tower.fc.weight)
    torch.testing.assert_close(gradient, torch.stack([z[y == k].sum(dim=0) for k in range(4)]))


def test_it_is_a_classifier_of_this_library(network: RAClassifier, small: Tensor, tmp_path: Path) -> None:
    assert isinstance(network, cd.ZeroShotClassifier) and network.class_names == tuple(NAMES)
    assert torch.equal(network.embed(small), network(small))
    estimator = cd.CLIPClassifier(network)
    np.testing.assert_allclose(estimator.predict(small.numpy()), network(small).detach().numpy(), atol=1e-6)
    save_model(network, tmp_path / "ra.safetensors")
    other = RAClassifier(NAMES, width=4, image_size=16).eval()
    assert not torch.equal(other(small), network(small))
    load_weights(other, tmp_path / "ra.safetensors")
    assert torch.equal(other(small), network(small))
    full = RAClassifier([str(i) for i in range(10)])
    assert sum(weight.numel() for weight in full.parameters()) == 11_173_962  # ResNet-18 for small images


def test_its_views(network: RAClassifier, small: Tensor) -> None:
    names = ["final", "aux0", "aux1", "sum", "soft", "straight-through"]
    assert [view.name for view in network.adaptive()] == names
    defense = ReverseAttention(network, sharpness=3.0)
    assert [view.name for view in defense.adaptive(network)] == names
    for view in defense.adaptive(network):
        expected = head_logits(network, small, view.name, sharpness=3.0)
        assert torch.equal(view.forward(small, torch.arange(8), 0), expected)
        assert torch.equal(HeadModule(network, view.name, 3.0)(small), expected)
    assert torch.equal(defense.wrap(network)(small), network(small))
    assert torch.equal(ReverseAttention(network, head="plain").wrap(network)(small), network.logits(small, "aux0"))
    torch.testing.assert_close(network.logits(small, "straight-through"), network(small))


# The full objective


def test_all_heads_by_hand() -> None:
    assert head_weights(1, 2.0) == (1.0,) and head_weights(3, 2.0) == (1.0, 1.0, 1.0)
    assert head_weights(3, 5.0) == (1.0, 2.5, 2.5) and head_weights(2, 2.0) == (1.0, 2.0)
    logits, y = torch.randn(5, 12), torch.tensor([0, 3, 2, 1, 1])
    parts = [F.cross_entropy(logits[:, start : start + 4], y, reduction="none") for start in (0, 4, 8)]
    expected = parts[0] + 2.5 * (parts[1] + parts[2])
    torch.testing.assert_close(all_heads_cross_entropy(logits, y, head_weights(3, 5.0)), expected)


@pytest.mark.parametrize("masks", ["label", "predicted"])
def test_the_released_objective(masks: Any, network: RAClassifier, small: Tensor) -> None:
    defense = ANCRA(network, variant="released", cr_beta=3.0, reverse_attention=masks)
    y, rows = torch.arange(8) % 4, torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    batch = {"x": small, "y": y, "ids": torch.arange(8), "negatives": rows}
    batch |= {"x_adv": small.flip(2), "x_neg": small[rows].flip(3)}
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    terms = defense.losses(batch)
    assert int(network.tower.stem[1].num_batches_tracked - before["tower.stem.1.num_batches_tracked"]) == 3

    def heads(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return network.heads(x, partial(hard_mask, y=labels) if masks == "label" else hard_mask)

    clean, robust = heads(batch["x"], y), heads(batch["x_adv"], y)
    negative = heads(batch["x_neg"], y[rows])
    total = 0.0
    for weight, z, z_adv, z_neg in zip((1.0, 1.5, 1.5), clean, robust, negative):
        total += weight * sum(base_terms("trades", z, z_adv, y, 6.0).values())
        total += weight * 3.0 * negative_contrast(z, z_neg)
    assert list(terms) == ["natural", "robust", "anc"]
    torch.testing.assert_close(sum(terms.values()), total)


def test_the_released_attack_sees_all_heads(network: RAClassifier, small: Tensor) -> None:
    threat = cd.ThreatModel("linf", eps=0.03, step_size=0.01, steps=3)
    defense = ANCRA(network, variant="released", threat=threat)
    batch = {"x": small, "y": torch.arange(8) % 4, "ids": torch.arange(8)}
    noise = torch.zeros_like(small)
    rows = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    network.train()
    made = defense.inner_attack(batch, seed=0, negatives=rows, noise=noise, negative_noise=noise)
    network.eval()  # what attacks use
    y = batch["y"]

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return sum(F.cross_entropy(z, labels, reduction="none") for z in network.heads(x))  # cr_beta / 2 = 1

    for name, clean, sign in (("x_adv", small, 1), ("x_neg", small[rows], -1)):
        x = clean
        for _ in range(3):
            leaf = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(sign * loss(leaf, y).sum(), leaf)
            x = (clean + (x + 0.01 * gradient.sign() - clean).clamp(-0.03, 0.03)).clamp(0, 1)
        # float32, and the sign of a gradient of about 0
        assert ((made[name] - x).abs() > 1e-6).float().mean() < 0.01
    assert AllHeads(network)(small).shape == (8, 12)


def test_clip_can_train_through_it(tiny_model: cd.ZeroShotClassifier, images: Tensor) -> None:
    y = torch.arange(12) % 3
    options = {**QUIET, "lr": 3e-5, "batch_size": 12, "epochs": 3, "warmup_steps": 0}
    threat = cd.ThreatModel("linf", eps=1 / 255, steps=1)
    defense = ANCRA(tiny_model, reverse_attention="label", threat=threat, **options)
    batch = {"x": images, "y": y, "ids": torch.arange(12)}
    batch |= defense.inner_attack(batch, seed=0)
    wrapped = ReverseAttentionModel(tiny_model)
    expected = 0.0
    for weight, head in ((1.0, 0), (2.0, 1)):  # cr_beta on the one auxiliary head, CLIP's own
        z, z_adv, z_neg = (
            wrapped.heads(x, partial(hard_mask, y=labels))[head]
            for x, labels in ((images, y), (batch["x_adv"], y), (batch["x_neg"], y[batch["negatives"]]))
        )
        expected += weight * (F.cross_entropy(z_adv, y) + 3 * negative_contrast(z, z_neg))
    torch.testing.assert_close(sum(defense.losses(batch).values()), expected)
    before = [weight.clone() for weight in tiny_model.tower.parameters()]
    defense.fit(images, y)
    assert any(not torch.equal(a, b) for a, b in zip(before, tiny_model.tower.parameters()))


def test_trained_as_released_it_falls_to_an_attack_on_the_first_auxiliary_head() -> None:
    """Digits 0 to 3 at 8 px: PGD on the deployed logits, the paper's protocol, finds less than PGD on p_0 does."""
    digits = load_digits(n_class=4)
    x = torch.from_numpy(digits.images / 16).float()[:, None].repeat(1, 3, 1, 1)
    y = torch.from_numpy(digits.target)
    model = RAClassifier(NAMES, width=4, image_size=8)
    threat = cd.ThreatModel("linf", eps=0.2, step_size=0.08, steps=3)
    options = {**QUIET, "batch_size": 64, "lr": 0.05, "max_steps": 20}
    ANCRA(model, variant="released", threat=threat, **options).fit(x[:640], y[:640])
    model.eval()
    x, y = x[640:], y[640:]
    final = predict(model, x)
    assert torch.equal(final.argmax(dim=1), predict(HeadModule(model, "aux1"), x).argmax(dim=1))
    strong = cd.ThreatModel("linf", eps=0.3, steps=10)
    left = {}
    for head in ("final", "aux0"):
        x_adv = pgd(HeadModule(model, head), x, y, strong, early_stop=False)
        left[head] = float((predict(model, x_adv).argmax(dim=1) == y).float().mean())
    assert left["final"] - left["aux0"] > 0.1
    rows = draw_negatives(y, torch.arange(len(y)), 4, seed=0)
    anchors, negatives = (model.heads(x[i], partial(hard_mask, y=y[i])) for i in (torch.arange(len(y)), rows))
    active = [float(negative_contrast(a, b).detach()) for a, b in zip(anchors, negatives)]
    assert active[0] == active[2] == 0 < active[1]  # masked by their labels, a pair is confused at p_0 alone


# What cannot be used


def test_bad_input(network: RAClassifier, tiny_model: cd.ZeroShotClassifier, small: Tensor) -> None:
    for options, message in [
        ({"head": "final"}, "head 'final' is unknown; known: plain, ra"),
        ({"sharpness": 0}, "sharpness is 0; a number above 0 is expected"),
        ({"centred": True}, "option of ReverseAttention 'centred' is unknown; did you mean 'centre'"),
    ]:
        with pytest.raises(UsageError, match=message):
            ReverseAttention(tiny_model, **options)
    with pytest.raises(UsageError, match="model is a Linear; a ZeroShotClassifier, whose class embeddings"):
        ReverseAttention(nn.Linear(3, 4))
    with pytest.raises(UsageError, match="head 'soft' is unknown"):
        ReverseAttentionModel(tiny_model, head="soft")
    with pytest.raises(UsageError, match="reverse_attention is 'off', but the classifier is an RAClassifier"):
        ANCRA(network, reverse_attention="off")
    with pytest.raises(UsageError, match="contrast 'feature' compares embeddings"):
        ANCRA(network, contrast="feature")
    with pytest.raises(UsageError, match="last layer is trained for its own classes"):
        network.with_classes(["x", "y"])
    with pytest.raises(UsageError, match="width is 0; a whole number of at least 1"):
        RAClassifier(NAMES, width=0)
    with pytest.raises(UsageError, match="classes has the one class 'a'; a classifier needs at least two"):
        RAClassifier(["a"], width=4)
