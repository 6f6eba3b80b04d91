"""How often the audit cries wolf: 20 clean models (4 recipes x 5 seeds) on scikit-learn's digits, as JSON.

    python benchmarks/audit_clean_models.py --out benchmarks/results/audit_clean_models.json

Aims: no INVALID, at most one WARN in 20.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import clipdefense as cd
from clipdefense.audit import Audit, Verdict, audit
from clipdefense.files import write_json
from common import heading

RECIPES = ("cnn", "batchnorm", "mlp", "adversarial")
SEEDS = range(5)
EPS = 0.1
IMAGES = 64
HELD_BACK = 400  # digits that no model is trained on


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1397, 1, 8, 8) in [0, 1] and labels, and the same of the 400 held back."""
    raw = load_digits()
    x, y = torch.as_tensor(raw.images)[:, None].float() / 16, torch.as_tensor(raw.target).long()
    return x[:-HELD_BACK], y[:-HELD_BACK], x[-HELD_BACK:], y[-HELD_BACK:]


class Digits(nn.Module):
    """A small classifier: features, then a linear head."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10)."""
        return self.head(self.features(x))


def build(recipe: str) -> Digits:
    """An untrained model of a recipe."""
    if recipe == "mlp":
        return Digits(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU()), 64)
    norm = nn.BatchNorm2d if recipe == "batchnorm" else lambda channels: nn.Identity()
    layers = [nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), norm(32), nn.ReLU()]
    return Digits(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.ReLU()), 64)


def train(recipe: str, seed: int, epochs: int = 15) -> nn.Module:
    """A trained model in eval mode; some seconds."""
    x, y, _, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(recipe)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        threat = cd.ThreatModel("linf", EPS, steps=5)
        for epoch in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                batch = x[rows]
                if recipe == "adversarial":
                    batch = cd.attacks.pgd(model, batch, y[rows], threat, seed=epoch, early_stop=False)
                loss = F.cross_entropy(model(batch), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def judged(recipe: str, seed: int) -> tuple[Audit, float]:
    """The audit of one model, and the seconds it took."""
    _, _, x, y = digits()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    model, began = train(recipe, seed), time.perf_counter()
    return audit(model, x[rows], y[rows], cd.ThreatModel("linf", EPS), seed=seed), time.perf_counter() - began


def main() -> None:
    """Audit all twenty and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    rows: list[dict[str, Any]] = []
    out = parser.parse_args().out
    for recipe in RECIPES:
        for seed in SEEDS:
            result, seconds = judged(recipe, seed)
            flagged = {f.name: f.verdict.name for f in result.findings if f.verdict > Verdict.PASS}
            row = {"recipe": recipe, "seed": seed, "verdict": result.verdict.name, "flagged": flagged}
            row |= {"clean": result.clean.value, "adaptive": result.adaptive and result.adaptive.value}
            rows.append(row | {"seconds": seconds, "measured": {f.name: dict(f.measured) for f in result.findings}})
            print(row)
    counts = {name: sum(row["verdict"] == name for row in rows) for name in ("PASS", "WARN", "INVALID")}
    head = heading("audit_clean_models", f"python benchmarks/audit_clean_models.py --out {out}")
    write_json(out, head | {"eps": EPS, "images": IMAGES, "counts": counts, "models": rows})
    print(counts)


if __name__ == "__main__":
    main()
