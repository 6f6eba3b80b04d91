"""Reverse attention: robust accuracy under the paper's protocol, beside the attack on its auxiliary heads.

    python benchmarks/reverse_attention.py --out benchmarks/results/reverse_attention-cpu.json

Three networks of one shape (the ResNet of the paper, narrow, on scikit-learn's handwritten digits at 8 px), trained by
TRADES, by TRADES through reverse attention, and by ANCRA's released objective. The paper attacks the deployed logits,
by PGD-40 and AutoAttack. Whoever attacks the first auxiliary head, which decides, finds what that gradient hides. Every
attack is judged on the deployed decision, and the worst case is taken image by image.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clipdefense import ThreatModel, ZeroShotClassifier, attacks
from clipdefense.attacks.context import predict
from clipdefense.evaluation.statistics import wilson
from clipdefense.files import write_json
from clipdefense_ancra.ancra import ANCRA
from clipdefense_ancra.resnet import LogitHead, RAClassifier, ResNetRA
from clipdefense_ancra.reverse_attention import HeadModule
from common import heading

CLASSES = [str(k) for k in range(10)]
Attacks = dict[str, tuple[str, dict[str, Any]]]
PGD: Attacks = {"PGD-40": ("pgd", {}), "PGD-40, margin": ("pgd", {"objective": "margin"})}
DEPLOYED: Attacks = PGD | {"AutoAttack": ("autoattack", {})}
OTHERS: dict[str, Attacks] = {
    "aux0": PGD | {"APGD-T": ("apgd-t", {})},
    "aux1": PGD,
    "sum": PGD,
    "soft": PGD,
    "straight-through": PGD,
}


class Plain(nn.Module):
    """The same network without reverse attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = ResNetRA(len(CLASSES), width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks.body(self.blocks.stem(x))
        for block in self.blocks.reverse:
            h = block(h)
        logits: Tensor = self.blocks.fc(h.mean(dim=(2, 3)))
        return logits


def plain(width: int) -> ZeroShotClassifier:
    """A classifier of :class:`Plain`, on pixels as they are."""
    eye, none = torch.eye(len(CLASSES)), ((0.0,) * 3, (1.0,) * 3)
    model = ZeroShotClassifier(Plain(width), eye, class_names=CLASSES, image_size=8, mean=none[0], std=none[1])
    model.head = LogitHead(CLASSES)
    return model


def digits(n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,200 training images, and n test images; a seeded shuffle apart."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous() / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200 : 1200 + n]
    return (images[train], labels[train]), (images[test], labels[test])


def trained(through: bool, zeta: float, images: tuple[Tensor, Tensor], args: argparse.Namespace) -> ZeroShotClassifier:
    """The network after TRADES, with reverse attention or without, and ``zeta`` times the contrast."""
    threat = ThreatModel("linf", args.eps, step_size=0.22 * args.eps, steps=10)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = RAClassifier(CLASSES, width=args.width, image_size=8) if through else plain(args.width)
    budget: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-3, "batch_size": 50, "schedule": "cosine"}
    budget |= {"milestones": (), "weight_decay": 1e-4, "measure_every": 0, "show_progress": False, "seed": args.seed}
    trainer = ANCRA(model, variant="released", base="trades", zeta=zeta, threat=threat, **budget)
    trainer.fit(*images, epochs=args.epochs)
    return model.eval()


class Judge:
    """Attacks on heads, each judged on the deployed decision."""

    def __init__(self, model: ZeroShotClassifier, x: Tensor, y: Tensor, eps: float) -> None:
        self.model, self.x, self.y = model, x, y
        self.threat = ThreatModel("linf", eps, step_size=0.22 * eps, steps=40)
        self.clean = self.standing = self.right(x)

    def right(self, images: Tensor) -> Tensor:
        return predict(self.model, images).argmax(dim=1) == self.y

    def attacked(self, target: nn.Module, attack: str, options: dict[str, Any]) -> dict[str, Any]:
        # an image that fools a head need not fool the deployed one: every step is taken, where there are steps
        every = {} if attack == "autoattack" else {"early_stop": False}
        kept = self.right(attacks.run(attack, target, self.x, self.y, self.threat, **every, **options)) & self.clean
        self.standing = self.standing & kept
        return share(kept)


def share(kept: Tensor) -> dict[str, Any]:
    low, high = wilson(float(kept.double().mean()), len(kept))
    return {"accuracy": float(kept.double().mean()), "interval_95": [low, high]}


def judged(model: ZeroShotClassifier, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    """Clean accuracy, the paper's protocol, the attacks on other heads, and the worst case over all of them."""
    judge, through = Judge(model, x, y, eps), isinstance(model, RAClassifier)
    found: dict[str, Any] = {"clean": share(judge.clean)}
    found["deployed logits"] = {name: judge.attacked(model, *how) for name, how in DEPLOYED.items()}
    for head, made in OTHERS.items() if through else ():
        target = HeadModule(model, head)
        found[head] = {name: judge.attacked(target, *how) for name, how in made.items()}
    return found | {"worst case per image": share(judge.standing)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reverse_attention-cpu.json"))
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--n", type=int, default=100, help="test images, at most 597")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = f"--eps {args.eps} --epochs {args.epochs} --width {args.width} --n {args.n} --seed {args.seed}"
    content = heading("reverse_attention", f"python benchmarks/reverse_attention.py {options}")

    images, (x, y) = digits(args.n)
    rows: dict[str, Any] = {}
    trainings = {"TRADES": (False, 0.0), "TRADES through RA": (True, 0.0), "ANCRA (TRADES, contrast, RA)": (True, 3.0)}
    for name, (through, zeta) in trainings.items():
        begun = time.process_time()
        model = trained(through, zeta, images, args)
        after = time.process_time()
        rows[name] = judged(model, x, y, args.eps)
        rows[name]["cpu_seconds"] = {"training": after - begun, "attacks": time.process_time() - after}
        Console(stderr=True).print(name, rows[name])
    write_json(args.out, content | {"n": args.n, "eps": args.eps, "seed": args.seed, "networks": rows})


if __name__ == "__main__":
    main()
