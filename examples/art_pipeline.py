"""A defence in an ART pipeline that is there already.

    python examples/art_pipeline.py [--n 50] [--steps 10]

``evaluate_with_art`` stands for what a team has: it takes any ART classifier, attacks it, and reports. It has never
heard of this library. What changes is how the classifier is made: first as it is in production, then with a test-time
defence as an ART preprocessing defence, then fine-tuned by an ART trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

import clipdefense as cd

EPS = 6 / 255


def evaluate_with_art(
    classifier: PyTorchClassifier, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], steps: int
) -> Mapping[str, float]:
    """The pipeline as it was: accuracy on clean images and under two of ART's attacks."""
    settings: dict[str, Any] = {"eps": EPS, "max_iter": steps, "verbose": False}
    attacks = {
        "PGD": ProjectedGradientDescent(classifier, eps_step=EPS / 4, **settings),
        "Auto-PGD": AutoProjectedGradientDescent(classifier, eps_step=2 * EPS, nb_random_init=1, **settings),
    }
    images = {"clean": x, **{name: attack.generate(x, y) for name, attack in attacks.items()}}
    return {name: float(np.mean(classifier.predict(each).argmax(1) == y)) for name, each in images.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="test images")
    parser.add_argument("--steps", type=int, default=10, help="of ART's attacks")
    parser.add_argument("--train", type=int, default=500, help="training images of the fine-tune")
    parser.add_argument("--epochs", type=int, default=8, help="of the fine-tune")
    parser.add_argument("--model", default="demo:digits", help="plugin:name[@weights]")
    args = parser.parse_args()

    test = cd.load_dataset("digits:test").sample(args.n)
    x, y = (tensor.numpy() for tensor in test.tensors())

    model = cd.load_model(args.model, classes=test.classes)
    classifier = cd.CLIPClassifier(model)
    print("as it is   ", dict(evaluate_with_art(classifier, x, y, args.steps)))

    ttc = cd.get_defense("ttc")(model, eps=EPS, step_size=EPS / 3)
    defended = cd.CLIPClassifier(model, preprocessing_defences=[ttc])
    print("with TTC   ", dict(evaluate_with_art(defended, x, y, args.steps)))

    threat = cd.ThreatModel("linf", eps=EPS, step_size=EPS / 2, steps=3)
    trainer = cd.get_defense("tecoa")(classifier, threat=threat, optimizer="adamw", lr=2e-3, warmup_steps=20)
    seen = cd.load_dataset("digits:train").sample(args.train).tensors()
    trainer.fit(*seen, nb_epochs=args.epochs, batch_size=50, verbose=False)
    print("after TeCoA", dict(evaluate_with_art(trainer.get_classifier(), x, y, args.steps)))

    print(
        "ART's gradient through TTC is the straight-through one, a weak guide: judge TTC by "
        "clipdefense.evaluate(..., defense=ttc), whose adaptive views break it."
    )


if __name__ == "__main__":
    main()
