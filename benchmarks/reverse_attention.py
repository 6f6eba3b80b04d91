"""Reverse attention: robust accuracy under the paper's protocol, beside the attack on its auxiliary heads.

    python benchmarks/reverse_attention.py --out benchmarks/results/reverse_attention-cpu.json

The ResNet with reverse-attention blocks, trained by ANCRA's released objective on handwritten digits (scikit-learn's,
8 px), with the plain TRADES base beside it. The paper attacks the deployed logits; whoever attacks the first auxiliary
head, which decides, finds what that gradient hides. Every attack is judged on the deployed decision, and the worst case
is taken image by image.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor

from clipdefense import ThreatModel, attacks
from clipdefense.evaluation.statistics import wilson
from clipdefense.files import write_json
from clipdefense_ancra.ancra import ANCRA
from clipdefense_ancra.resnet import RAClassifier
from clipdefense_ancra.reverse_attention import HeadModule
from common import heading

ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "PGD-40": ("pgd", {}),
    "PGD-40, margin": ("pgd", {"objective": "margin"}),
    "APGD-T": ("apgd-t", {}),
}
HEADS = ("final", "aux0", "aux1", "sum", "soft", "straight-through")


def digits(n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training images, and n test images; a seeded shuffle apart."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous() / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200 : 1200 + n]
    return (images[train], labels[train]), (images[test], labels[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reverse_attention-cpu.json"))
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()

    (x, y), (x_test, y_test) = digits(args.n)
    threat = ThreatModel("linf", args.eps, step_size=args.eps / 4, steps=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RAClassifier([str(k) for k in range(10)], width=args.width, image_size=8)
    budget: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-3, "batch_size": 100, "schedule": "cosine", "seed": 0}
    budget |= {"milestones": (), "weight_decay": 1e-4, "measure_every": 0, "show_progress": False}
    ANCRA(model, variant="released", base="trades", threat=threat, **budget).fit(x, y, epochs=args.epochs)
    model.eval()

    def right(images: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return (attacks.predict(model, images).argmax(dim=1) == y_test).numpy()

    clean, rows, standing = right(x_test), {}, right(x_test)
    judged = ThreatModel("linf", args.eps, step_size=args.eps / 10, steps=40)
    for head in HEADS:
        for name, (attack, options) in ATTACKS.items():
            target = HeadModule(model, head)
            # an image that fools a head need not fool the deployed one: every step is taken
            x_adv = attacks.run(attack, target, x_test, y_test, judged, early_stop=False, **options)
            kept = right(x_adv) & clean
            standing &= kept
            low, high = wilson(float(kept.mean()), args.n)
            rows[f"{name} on {head}"] = {"accuracy": float(kept.mean()), "interval_95": [low, high]}
            Console(stderr=True).print(name, head, float(kept.mean()))
    low, high = wilson(float(standing.mean()), args.n)
    options = f"--eps {args.eps} --epochs {args.epochs} --width {args.width} --n {args.n}"
    content = heading("reverse_attention", f"python benchmarks/reverse_attention.py {options}")
    content |= {"n": args.n, "eps": args.eps, "clean": float(clean.mean()), "attacks": rows}
    content["worst case per image"] = {"accuracy": float(standing.mean()), "interval_95": [low, high]}
    write_json(args.out, content)


if __name__ == "__main__":
    main()
