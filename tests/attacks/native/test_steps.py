"""How the native attacks spend their steps: restarts, early stop, EOT, APGD's schedule, the start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.apgd import checkpoints
from clipdefense.attacks.context import frozen, full_fp32, predict
from clipdefense.attacks.engine import Evaluation
from clipdefense.attacks.forward import evaluate
from clipdefense.attacks.norms import BALLS


def test_restarts_go_on_with_the_unbroken_only(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    passes: list[int] = []
    tiny_model.tower.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    one = attacks.pgd(tiny_model, images, labels, ThreatModel("linf", 0.5 / 255, steps=3))
    robust = (predict(tiny_model, one).argmax(1) == labels).sum().item()
    assert 0 < robust < len(images)
    passes.clear()
    attacks.pgd(tiny_model, images, labels, ThreatModel("linf", 0.5 / 255, steps=3, restarts=2))
    first, between = passes[:3], passes[3]
    assert first[0] == len(images)
    assert robust <= between <= first[2]  # the verdict between restarts, on those not seen broken
    assert passes[4] == robust


def test_early_stop_spends_passes_on_unbroken_images_only(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    passes: list[int] = []
    hook = tiny_model.tower.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    threat = ThreatModel("linf", 1 / 255, steps=8)
    attacks.pgd(tiny_model, images, labels, threat)
    spent = sum(passes)
    hook.remove()
    # an image broken by the iterate after k steps needs k + 1 forwards; one that is never broken needs 8
    needed = torch.full((len(images),), 8)
    for steps in range(7, -1, -1):
        short = ThreatModel("linf", 1 / 255, step_size=threat.alpha, steps=steps)
        if steps == 0:
            start = BALLS["linf"].uniform(images, torch.arange(len(images)), threat.eps, seed=0, stream=0)
            iterate = (images + start).clamp(0, 1)
        else:
            iterate = attacks.pgd(tiny_model, images, labels, short, early_stop=False)
        broken = predict(tiny_model, iterate).argmax(1) != labels
        needed[broken] = steps + 1
    assert spent == int(needed.sum())


def test_eot_averages_the_gradient() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draws = iter([1.0, 3.0, 5.0])

        def forward(self, x: Tensor) -> Tensor:
            total = next(self.draws) * x.sum((1, 2, 3))
            return torch.stack([torch.zeros_like(total), total], dim=1)

    model, x = Noisy(), torch.full((1, 1, 2, 2), 0.25)
    loss, gradient, logits = evaluate(
        lambda z, draw: model(z), x, lambda z: attacks.margin(z, torch.tensor([0])), eot=3
    )
    torch.testing.assert_close(gradient, torch.full_like(x, 3.0))
    torch.testing.assert_close(loss, torch.tensor([3.0]))
    torch.testing.assert_close(logits, torch.tensor([[[0.0, 1.0]], [[0.0, 3.0]], [[0.0, 5.0]]]))


def test_apgd_checkpoints_of_the_paper() -> None:
    # p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_halves_the_step_when_it_stalls() -> None:
    # A loss that cannot rise halves eta at every checkpoint: 2 eps / 2^(checkpoints passed).
    from clipdefense.attacks.apgd import _APGD

    method = _APGD(BALLS["linf"], 0.1, 10, seed=0, stream=0, alpha=0.75, rho=0.75)
    x = torch.full((1, 1, 2, 2), 0.5)
    state = method.start(x, torch.tensor([0]))
    etas = []
    still = Evaluation(torch.zeros(1), torch.ones_like(x), torch.zeros(1, dtype=torch.bool))
    for k in range(11):
        state = method.advance(state, still, torch.tensor([k]))
        etas.append(round(float(state["eta"]), 6))
    # ceil of 10 p: 3, 5, 6, 7, 8, 9, 10; never an ascent after k = 0, so condition 1 holds at each
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    expected = [0.2 / 2 ** sum(w <= k for w in checkpoints(10)) for k in range(11)]
    assert etas == [round(value, 6) for value in expected]


def test_apgd_returns_the_best_point(make_model: Callable[..., ZeroShotClassifier], images: Tensor) -> None:
    model, x = make_model(dtype=torch.float64), images.double()
    y = predict(model, x).argmax(dim=1)
    seen: list[Tensor] = []

    def recording(logits: Tensor, labels: Tensor) -> Tensor:
        loss = attacks.cross_entropy(logits, labels)
        seen.append(loss.detach())
        return loss

    threat = ThreatModel("linf", 1 / 255)
    x_adv = attacks.apgd_ce(model, x, y, threat, objective=recording, steps=12, early_stop=False)
    final = attacks.cross_entropy(predict(model, x_adv), y)
    torch.testing.assert_close(final, torch.stack(seen).amax(dim=0), atol=1e-9, rtol=0)
    assert len(seen) == 13  # the start and every iterate


def test_pgd_from_init_takes_the_given_start(tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor) -> None:
    init = torch.full_like(images, 0.5)  # far outside: projected first
    threat = ThreatModel("linf", 1 / 255, step_size=1e-12, steps=1)
    x_adv = attacks.pgd(tiny_model, images, labels, threat, init=init, early_stop=False)
    torch.testing.assert_close(x_adv, (images + 1 / 255).clamp(max=1), atol=1e-6, rtol=0)


def test_full_fp32_is_restored() -> None:
    knob = torch.backends.cuda.matmul
    before = knob.fp32_precision
    with full_fp32():
        assert knob.fp32_precision == "ieee"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pass
    assert knob.fp32_precision == before
    with torch.autocast("cpu", dtype=torch.bfloat16), full_fp32():
        assert not torch.is_autocast_enabled("cpu")


def test_frozen_restores_after_an_error(tiny_model: ZeroShotClassifier) -> None:
    tiny_model.train()
    with pytest.raises(RuntimeError, match="stop"), frozen(tiny_model):
        assert not tiny_model.tower.training and not any(p.requires_grad for p in tiny_model.parameters())
        raise RuntimeError("stop")
    assert tiny_model.tower.training and all(p.requires_grad for p in tiny_model.parameters())
