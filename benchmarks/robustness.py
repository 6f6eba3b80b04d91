"""Every trainer defence on real images, with one budget: the MobileNetV2 + CLIP-anchors model at 64 px.

    python benchmarks/robustness.py --data "$CLIPDEFENSE_DATA" --out benchmarks/results/robustness-cpu.json

Fine-tuned on Tiny-ImageNet, judged on Tiny-ImageNet's validation images and, zero-shot, on CIFAR-10, the 36
Caltech-101 names that were not trained on, and PACS. Images, epochs, optimiser, learning rate and inner attack are the
same for all; they were set beforehand and nothing was tuned, so a method's own learning rate might serve it better.
Each model is kept in ``--work`` when it is done, and a second call goes on from there; several calls with ``--methods``
share the work.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from anchors_model import Anchors, build, covered
from clipdefense import ThreatModel, ZeroShotClassifier, evaluate, get_defense, load_dataset
from clipdefense.data import ImageDataset
from clipdefense.evaluation.statistics import mcnemar
from clipdefense.files import write_json
from clipdefense.threat import parse_eps
from common import heading

SIDE = 64
# what a method needs beside the budget, and why
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "tecoa": ("tecoa", {}),
    "fare": ("fare", {}),
    "pmg-aft": ("pmg-aft", {}),
    "tga-zsr": ("tga-zsr", {}),
    "laat": ("laat", {"expansion": False}),  # the head's centring takes the expansion's place
    "ancra": ("ancra", {}),
}
BUDGET: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-4,
    "weight_decay": 1e-4,
    "batch_size": 50,
    "warmup_steps": 8,
    "max_grad_norm": None,
    "measure_every": 0,
    "show_progress": False,
    "seed": 0,
}
INNER = ThreatModel("linf", 1 / 255, step_size=1 / 255, steps=2)
EPS = ("1/255", "4/255")


def datasets(folder: Path, trained: tuple[str, ...], n: int) -> dict[str, ImageDataset]:
    anchors = Anchors.read(folder)

    def read(name: str, without: tuple[str, ...] = ()) -> ImageDataset:
        data = load_dataset(f"npz:{folder / name}.npz", size=SIDE)
        return covered(data, anchors, without=without).sample(n, seed=0)

    return {
        "Tiny-ImageNet": read("tiny_imagenet_val4k"),
        "CIFAR-10": read("cifar10_png4000"),
        "Caltech-101": read("caltech101_64", without=trained),
        "PACS": read("pacs_64"),
    }


def train(model: ZeroShotClassifier, method: str, folder: Path, images: int, epochs: int) -> None:
    name, options = METHODS[method]
    if not name:
        return
    data = covered(load_dataset(f"npz:{folder / 'tiny_imagenet_train10k.npz'}", size=SIDE), Anchors.read(folder))
    x, y = data.sample(min(images, len(data)), seed=0).tensors()
    get_defense(name)(model, threat=INNER, **BUDGET, **options).fit(x, y, epochs=epochs)
    model.eval()


def judge(model: ZeroShotClassifier, sets: dict[str, ImageDataset], args: argparse.Namespace) -> dict[str, Any]:
    """Clean and robust verdicts of each image, by data set and eps."""
    found: dict[str, Any] = {}
    for name, data in sets.items():
        x, y = (tensor.to(args.device) for tensor in data.tensors())
        found[name] = {}
        for eps in EPS:
            attacks = [f"apgd-ce,steps={args.steps}", f"apgd-t,steps={args.steps},targets=3"]
            result = evaluate(
                model.with_classes(data.classes),
                x,
                y,
                ThreatModel("linf", parse_eps(eps)),
                attacks=attacks,
                cumulative=True,
                batch_size=64,
            )
            worst = result.worst_case()
            found[name][eps] = {
                "n": result.n,
                "attacks": attacks,
                "clean": result.clean.accuracy,
                "clean_interval_95": list(result.clean.interval),
                "robust": worst.accuracy,
                "robust_interval_95": list(worst.interval),
                "standing": "".join("01"[int(bit)] for bit in worst.correct[0]),
            }
    return found


def paired(ours: str, theirs: str) -> dict[str, Any]:
    """Images that one method keeps and the other loses, and the exact two-sided p of McNemar's test."""
    a, b = (np.array(list(text)) == "1" for text in (ours, theirs))
    only, other = int((a & ~b).sum()), int((~a & b).sum())
    return {"only this": only, "only tecoa": other, "p": mcnemar(only, other)}


def assemble(args: argparse.Namespace) -> dict[str, Any] | None:
    """The whole table, once every method is done."""
    parts = {method: args.work / f"{method}.json" for method in METHODS}
    if not all(path.is_file() for path in parts.values()):
        return None
    rows = {method: json.loads(path.read_text(encoding="utf-8")) for method, path in parts.items()}
    for row in rows.values():
        for name, by_eps in row.items():
            for eps, cell in by_eps.items():
                cell["against tecoa"] = paired(cell["standing"], rows["tecoa"][name][eps]["standing"])
    options = f"--images {args.images} --epochs {args.epochs} --n {args.n} --steps {args.steps}"
    content = heading("robustness", f'python benchmarks/robustness.py --data "$CLIPDEFENSE_DATA" {options}')
    budget = BUDGET | {"images": args.images, "epochs": args.epochs, "inner attack": "PGD-2, eps 1/255, step 1/255"}
    return content | {"model": "MobileNetV2 + CLIP ViT-B/32 anchors, 64 px", "budget": budget, "methods": rows}


def table(content: dict[str, Any]) -> Table:
    methods = content["methods"]
    out = Table(title="Standing after APGD-CE + APGD-T (3 targets), %; p of McNemar's test against TeCoA")
    for column in ("method", *(f"{name} {part}" for name in methods["none"] for part in ("clean", *EPS))):
        out.add_column(column)
    for method, row in methods.items():
        cells = [method]
        for by_eps in row.values():
            cells.append(f"{100 * by_eps[EPS[0]]['clean']:.1f}")
            cells += [f"{100 * by_eps[e]['robust']:.1f} (p {by_eps[e]['against tecoa']['p']:.2g})" for e in EPS]
        out.add_row(*cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image packs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/robustness-cpu.json"))
    parser.add_argument("--work", type=Path, default=Path("build/robustness"), help="a file a finished method")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--images", type=int, default=2000, help="of Tiny-ImageNet's training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--n", type=int, default=200, help="images a data set")
    parser.add_argument("--steps", type=int, default=50, help="of both attacks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    console = Console(stderr=True)
    original, trained = build(args.data, device=args.device, side=SIDE)
    sets = datasets(args.data, trained, args.n)
    for method in args.methods:
        path = args.work / f"{method}.json"
        if path.is_file():
            continue
        model = copy.deepcopy(original)
        train(model, method, args.data, args.images, args.epochs)
        console.print(f"{method}: trained")
        write_json(path, judge(model, sets, args))
        console.print(f"{method}: judged")
    content = assemble(args)
    if content is None:
        console.print("some methods are not done yet; call again for the table.")
        return
    write_json(args.out, content)
    Console(width=240).print(table(content))


if __name__ == "__main__":
    main()
