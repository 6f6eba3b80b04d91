"""LAAT's adversarial weight perturbation: the step by hand, the update of a fit by hand, what it costs and refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.attacks.context import attack_mode
from clipdefense.errors import UsageError
from clipdefense.training.runtime import derive_seed
from clipdefense_laat.awp import moved, perturbation, perturbed_weights, step_uphill, with_weights
from clipdefense_laat.laat import LAAT, a_ce
from clipdefense_laat.towers import make_tower

QUIET: dict[str, Any] = {"show_progress": False, "measure_every": 0}
STRONG = cd.ThreatModel("linf", eps=8 / 255, step_size=2 / 255, steps=2)


def test_the_step_by_hand() -> None:
    weight, gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    # ||W|| = 5, ||g|| = 2: a tenth of W's length along g
    torch.testing.assert_close(step_uphill(weight, gradient, 0.1), torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    assert not step_uphill(weight, torch.zeros(2, 2), 0.1).any()
    tower = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    tower[2].weight.requires_grad_(False)
    assert perturbed_weights(tower) == ("0.weight",)  # no bias, no normalisation, nothing frozen


def test_weights_are_lent_and_a_gradient_there_is_one_here() -> None:
    tower, x = nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        tower.weight.copy_(torch.tensor([[3.0, 4.0]]))
    v = perturbation(tower, ("weight",), lambda: tower(x).pow(2).sum(), 0.2)
    # g = 2 (w x) x points along x = (1, 2), so v has length 0.2 * 5 in that direction
    torch.testing.assert_close(v["weight"], x / 5**0.5)
    assert tower.weight.grad is None and tower.weight.tolist() == [[3.0, 4.0]]
    loss = with_weights(tower, moved(tower, v), lambda: tower(x).pow(2).sum())
    assert float(loss.detach()) == pytest.approx((11 + 5**0.5) ** 2)
    loss.backward()
    torch.testing.assert_close(tower.weight.grad, 2 * (11 + 5**0.5) * x)
    assert tower.weight.tolist() == [[3.0, 4.0]] and isinstance(tower.weight, nn.Parameter)


@pytest.mark.parametrize("trades", [False, True])
def test_an_update_is_the_gradient_at_the_perturbed_weights(trades: bool, make_model: Any, images: Tensor) -> None:
    model, lr, gamma = make_model(dtype=torch.float64), 1e-2, 0.05
    x, y, ids = images.double(), torch.arange(12) % 10, torch.arange(12)
    options: dict[str, Any] = {"tau": 0.1, "trades": trades, "threat": STRONG, "variant": "released"}
    settings: dict[str, Any] = {**QUIET, "batch_size": 12, "epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "lr": lr}
    defense = LAAT(copy.deepcopy(model), awp_gamma=gamma, **options, **settings)
    plain = LAAT(model, **options)
    plain.begin()
    batch = {"x": x, "y": y, "ids": ids}
    batch |= plain.inner_attack(batch, seed=derive_seed(0, "attack", 0))
    assert set(batch) == {"x", "y", "ids", "x_adv"}

    def adversarial() -> Tensor:  # the smoothness and the KL term take no part
        return a_ce(model.embed(batch["x_adv"]), model.head.anchors, y, 0.1)

    before = copy.deepcopy(model.tower.state_dict())
    weights = {name: w for name, w in model.tower.named_parameters() if w.dim() > 1}
    uphill = torch.autograd.grad(adversarial(), list(weights.values()))
    low = float(adversarial().detach())
    with torch.no_grad():
        for weight, g in zip(weights.values(), uphill):
            weight.add_(gamma * weight.norm() * g / g.norm())
    assert float(adversarial().detach()) > low
    gradients = torch.autograd.grad(sum(plain.losses(batch).values()), list(model.tower.parameters()))
    defense.fit(x, y)
    trained = dict(defense.model.tower.named_parameters())
    for (name, _), gradient in zip(model.tower.named_parameters(), gradients):
        torch.testing.assert_close(trained[name], before[name] - lr * gradient, atol=1e-9, rtol=0)
        assert trained[name].grad is None
    assert trained.keys() == dict(model.tower.named_parameters()).keys()


def test_statistics_move_as_without_it_and_one_pass_is_added() -> None:
    tower = make_tower("conv4-512", 16, width=4)
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    counts, passes = {}, {}
    for gamma in (0.0, 0.005):
        model = cd.ZeroShotClassifier(
            copy.deepcopy(tower), torch.randn(3, 16), class_names=["a", "b", "c"], image_size=32
        )
        seen: list[bool] = []
        model.tower.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        settings: dict[str, Any] = {"batch_size": 8, "epochs": 1, "milestones": (1,)}
        LAAT(model, variant="released", threat=STRONG, awp_gamma=gamma, **settings, **QUIET).fit(x, y)
        counts[gamma] = [int(v) for name, v in model.tower.named_buffers() if name.endswith("num_batches_tracked")]
        passes[gamma] = (len(seen), sum(seen))
    assert counts[0.0] == counts[0.005] == [3] * 4
    assert passes[0.005] == (passes[0.0][0] + 1, passes[0.0][1])  # in eval mode


def test_what_does_not_go_together(make_model: Any, images: Tensor) -> None:
    defense = LAAT(make_model(), awp_gamma=0.005, low_memory=True, **QUIET, batch_size=12, epochs=1)
    with pytest.raises(UsageError, match=r"awp_gamma is 0\.005 with low_memory, which computes passes again"):
        defense.fit(images, torch.arange(12) % 10)
    assert defense.hyper_parameters()["awp_gamma"] == 0.005
    with attack_mode(defense.model):  # frozen weights: nothing to move
        assert perturbed_weights(defense.model.tower) == ()
