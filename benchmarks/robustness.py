"""Every trainer defence on real images, with one budget: the MobileNetV2 + CLIP-anchors model at 64 px.

    python benchmarks/robustness.py --data "$CLIPDEFENSE_DATA" --out benchmarks/results/robustness-cpu.json

Fine-tuned on Tiny-ImageNet, judged on Tiny-ImageNet's validation images and, zero-shot, on CIFAR-10, the 36
Caltech-101 names that were not trained on, and PACS. Images, epochs, optimiser and inner attack are the same for all.
Each method is trained at every learning rate of one grid, and the model that keeps most of 200 further training images
under PGD-10 is the one that is judged; nothing is chosen on the data sets of the table. What is done is kept in
``--work``, a file a method, and a second call goes on from there; several calls with ``--methods`` share the work.

LAAT stands in it twice: on the base model of all others, whose centred anchors take the place of its expansion, and on
a base whose projection was trained towards the expanded anchors. Comp-TGA needs text embeddings of negated prompts, and
there is no text tower here.
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

from anchors_model import Anchors, build, covered, training_set
from clipdefense import ThreatModel, ZeroShotClassifier, evaluate, get_defense, load_dataset
from clipdefense.data import ImageDataset
from clipdefense.evaluation.statistics import mcnemar
from clipdefense.files import write_json
from clipdefense.threat import parse_eps
from clipdefense.training.guard import DivergedError
from clipdefense_laat.expansion import AnchorExpansion
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
    "laat, expanded": ("laat", {}),  # on a base of its own, see EXPANDED
    "ancra": ("ancra", {}),
}
EXPANDED = ("laat, expanded",)
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
HELD_OUT = 200
BUDGET: dict[str, Any] = {
    "optimizer": "adamw",
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


def base(method: str, args: argparse.Namespace) -> ZeroShotClassifier:
    """The model that a method starts from."""
    anchors = Anchors.read(args.data)
    expansion = None
    if method in EXPANDED:
        expansion = AnchorExpansion.fit(anchors.table(training_set(args.data, anchors, SIDE).classes))
    return build(args.data, device=args.device, side=SIDE, transform=expansion)[0]


def training_images(folder: Path, images: int) -> tuple[ImageDataset, ImageDataset]:
    """Those to train on, and those held out to choose the learning rate on; both from the training set."""
    data = training_set(folder, Anchors.read(folder), SIDE)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    images = min(images, len(data) - HELD_OUT)
    return data.select(order[:images]), data.select(order[images:][:HELD_OUT])


def train(
    original: ZeroShotClassifier, method: str, args: argparse.Namespace
) -> tuple[ZeroShotClassifier, dict[str, dict[str, float]]]:
    """The model of the learning rate that keeps most held-out images, and what each rate kept."""
    name, options = METHODS[method]
    best, kept = original, {}
    if not name:
        return best, kept
    seen, unseen = training_images(args.data, args.images)
    x, y = (tensor.to(args.device) for tensor in unseen.tensors())
    for lr in LEARNING_RATES:
        model = copy.deepcopy(original)
        try:
            get_defense(name)(model, threat=INNER, lr=lr, **BUDGET, **options).fit(*seen.tensors(), epochs=args.epochs)
        except DivergedError as error:
            kept[f"{lr:g}"] = {"clean": 0.0, "robust": 0.0, "diverged": str(error)}
            continue
        result = evaluate(model.eval(), x, y, ThreatModel("linf", INNER.eps), attacks=["pgd,steps=10"], batch_size=64)
        row = {"clean": result.clean.accuracy, "robust": result.worst_case().accuracy}
        if all(row["robust"] > other["robust"] for other in kept.values()):
            best = model
        kept[f"{lr:g}"] = row
    return best, kept


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
    done = {method: json.loads(path.read_text(encoding="utf-8")) for method, path in parts.items()}
    rows = {method: part["judged"] for method, part in done.items()}
    for row in rows.values():
        for name, by_eps in row.items():
            for eps, cell in by_eps.items():
                cell["against tecoa"] = paired(cell["standing"], rows["tecoa"][name][eps]["standing"])
    options = f"--images {args.images} --epochs {args.epochs} --n {args.n} --steps {args.steps}"
    content = heading("robustness", f'python benchmarks/robustness.py --data "$CLIPDEFENSE_DATA" {options}')
    budget = BUDGET | {"images": args.images, "epochs": args.epochs, "inner attack": "PGD-2, eps 1/255, step 1/255"}
    return content | {
        "model": "MobileNetV2 + CLIP ViT-B/32 anchors, 64 px",
        "budget": budget,
        "learning rates, on held-out training images": {method: part["kept"] for method, part in done.items()},
        "methods": rows,
    }


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
    trained = training_set(args.data, Anchors.read(args.data), SIDE).classes
    sets = datasets(args.data, trained, args.n)
    for method in args.methods:
        path = args.work / f"{method}.json"
        if path.is_file():
            continue
        model, kept = train(base(method, args), method, args)
        console.print(f"{method}: trained, {kept}")
        write_json(path, {"kept": kept, "judged": judge(model, sets, args)})
        console.print(f"{method}: judged")
    content = assemble(args)
    if content is None:
        console.print("some methods are not done yet; call again for the table.")
        return
    write_json(args.out, content)
    Console(width=240).print(table(content))


if __name__ == "__main__":
    main()
