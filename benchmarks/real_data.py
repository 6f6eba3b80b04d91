"""Zero-shot on real images: the MobileNetV2 + CLIP-anchors model, clean and under attack, with and without TTC.

    python benchmarks/real_data.py --data "$CLIPDEFENSE_DATA" --out benchmarks/results/real_data.json

36 Caltech-101 names that the model was not trained on (all 432 images) and CIFAR-10, attacked at the model's 128 px.
TTC runs at its published hyper-parameters: nothing here is chosen on these images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from anchors_model import SIDE, Anchors, build, covered
from clipdefense import ThreatModel, ZeroShotClassifier, evaluate, load_dataset
from clipdefense.data import ImageDataset
from clipdefense.evaluation import Evaluation, report
from clipdefense.files import write_json
from clipdefense_ttc.ttc import TTC
from common import heading

README_CLEAN = {"caltech101": 37.0, "cifar10": 36.2}  # measured for the data folder's README, 3 seeds, in %


def datasets(folder: Path, trained: tuple[str, ...], n_cifar: int) -> dict[str, ImageDataset]:
    anchors = Anchors.read(folder)
    caltech = load_dataset(f"npz:{folder / 'caltech101_64.npz'}", size=SIDE)
    cifar = load_dataset(f"npz:{folder / 'cifar10_png4000.npz'}", size=SIDE)
    return {
        "caltech101": covered(caltech, anchors, without=trained),
        "cifar10": covered(cifar, anchors).sample(n_cifar, seed=0),
    }


def judge(model: ZeroShotClassifier, data: ImageDataset, name: str, args: argparse.Namespace) -> list[Evaluation]:
    """The model alone, then TTC around it: transfer beside adaptive."""
    classifier = model.with_classes(data.classes)
    x, y = (tensor.to(args.device) for tensor in data.tensors())
    threat = ThreatModel("linf", 1 / 255, step_size=0.25 / 255)
    console = Console(stderr=True)
    found = []
    for title, defense in (("no defence", None), ("TTC", TTC(classifier))):
        result = evaluate(
            classifier,
            x,
            y,
            threat,
            attacks=["pgd,steps=10", f"apgd-ce,steps={args.steps}"],
            defense=defense,
            views=None if defense is None else ["bpda-eot"],
            cumulative=True,
            name=f"{name}: {title}",
            eot=args.eot,
            verdict_seeds=args.verdict_seeds,
            batch_size=64,
            progress=console.print,
        )
        found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds caltech101_64.npz and the others")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_data.json"))
    parser.add_argument("--n-cifar", type=int, default=300, help="CIFAR-10 images, drawn evenly over the classes")
    parser.add_argument("--steps", type=int, default=100, help="of APGD-CE")
    parser.add_argument("--eot", type=int, default=2, help="gradient draws a step on TTC's adaptive view")
    parser.add_argument("--verdict-seeds", type=int, default=3, help="draws that judge TTC")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, trained = build(args.data, device=args.device)
    results: list[Evaluation] = []
    for name, data in datasets(args.data, trained, args.n_cifar).items():
        results += judge(model, data, name, args)
    Console(width=160).print(report.table(results))
    options = f" --n-cifar {args.n_cifar} --steps {args.steps} --eot {args.eot} --verdict-seeds {args.verdict_seeds}"
    content = heading("real_data", f"python benchmarks/real_data.py --data $CLIPDEFENSE_DATA{options}")
    content["clean_accuracy_of_the_data_readme"] = README_CLEAN
    content["evaluations"] = [result.to_dict() for result in results]
    write_json(args.out, content)


if __name__ == "__main__":
    main()
