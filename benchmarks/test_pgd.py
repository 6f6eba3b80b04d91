"""PGD's time per step over the floor: one forward and one backward-to-input of the bare tower; peers beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier

from clipdefense import ThreatModel, attacks
from clipdefense.attacks.context import frozen
from common import Passes, bare_step, interleaved, make_images, make_model


def test_pgd_time_per_step(size: str, device: str, record: Callable[..., None]) -> None:
    model = make_model(size, device)
    batch, repeats, steps = (256, 20, 10) if size == "full" else (32, 7, 5)
    x = make_images(model, batch)
    y = attacks.predict(model, x).argmax(dim=1)
    normalised = model.preprocess(x)
    eps, alpha = 8 / 255, 2 / 255
    threat = ThreatModel("linf", eps, step_size=alpha, steps=steps)

    passes = Passes(model.tower)
    attacks.pgd(model, x, y, threat, early_stop=False, batch_size=batch)
    counted = {"forward": sum(passes.forward) / batch, "backward": sum(passes.backward) / batch}
    passes.stop()
    assert counted == {"forward": steps, "backward": steps}

    def floor() -> None:
        with frozen(model):
            for _ in range(steps):
                bare_step(model.tower, normalised)

    art = PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=100,
        clip_values=(0, 1),
        preprocessing=None,
        device_type="gpu" if device == "cuda" else "cpu",
    )
    theirs = ProjectedGradientDescentPyTorch(
        art, eps=eps, eps_step=alpha, max_iter=steps, num_random_init=1, batch_size=batch, verbose=False
    )
    arrays = x.cpu().numpy(), np.eye(100, dtype=np.float32)[y.cpu().numpy()]
    peer = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps)
    seconds = interleaved(
        {
            "bare tower": floor,
            "clipdefense": lambda: attacks.pgd(model, x, y, threat, early_stop=False, batch_size=batch),
            "clipdefense, early stop": lambda: attacks.pgd(model, x, y, threat, batch_size=batch),
            "torchattacks": lambda: peer(x, y),
            "ART": lambda: theirs.generate(*arrays),
        },
        repeats,
        device,
    )
    figures = {
        "model": "ViT-B/32, 224 px" if size == "full" else "ViT, 6 layers, width 256, 64 px, patch 8",
        "batch": batch,
        "steps": steps,
        "passes per image": counted,
        "ms per step": {name: 1000 * value / steps for name, value in seconds.items()},
        "over the bare tower": {name: value / seconds["bare tower"] for name, value in seconds.items()},
    }
    record("pgd_step", figures)
