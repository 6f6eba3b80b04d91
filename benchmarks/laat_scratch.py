"""LAAT from scratch: 5-way zero-shot episodes on classes that training never saw, with and without the expansion.

    python benchmarks/laat_scratch.py --data "$CLIPDEFENSE_DATA" --out benchmarks/results/laat_scratch-cpu.json

The Tiny-ImageNet classes whose names have a CLIP ViT-B/32 text embedding, split by a seeded shuffle in the proportions
64/16/20 into training, validation and novel classes. On a CPU the network is Conv4 at 32 px and narrow, the run is
short, the temperature lower and the radius smaller: it shows that everything works and which way the expansion points,
not the paper's numbers. ``--network resnet12 --width 0 --epochs 100 --tau 1 --eps 8 --augment --episodes 2000
--attacked 100`` on a GPU is the paper's setting. The validation classes are kept aside and not used, because nothing is
chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from anchors_model import Anchors, covered
from clipdefense import ThreatModel, ZeroShotClassifier, get_defense, load_dataset
from clipdefense.data import ImageDataset
from clipdefense.files import write_json
from clipdefense_laat.augmentation import Augmented, cifar_fs
from clipdefense_laat.episodes import Episode, MeanAccuracy, evaluate_episodes, sample_episodes
from clipdefense_laat.towers import make_tower
from common import heading

SIDE = 32
Rows = dict[str, MeanAccuracy]


def split(data: ImageDataset, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and novel classes, 64 : 16 : 20."""
    names = [data.classes[i] for i in torch.randperm(len(data.classes), generator=torch.Generator().manual_seed(seed))]
    first, second = round(0.64 * len(names)), round(0.8 * len(names))
    return names[:first], names[first:second], names[second:]


def mean(value: MeanAccuracy) -> dict[str, Any]:
    """Of episodes, with Student's t interval."""
    return {"mean": value.mean, "interval_95": list(value.interval), "episodes": len(value.values)}


def evaluated(model: ZeroShotClassifier, x: Tensor, y: Tensor, drawn: list[Episode], args: argparse.Namespace) -> Rows:
    """Clean, PGD-20 and AutoAttack accuracy; the last on the first of the episodes alone."""
    threat = ThreatModel("linf", args.eps / 255, step_size=args.eps / 4 / 255, steps=20)
    pgd = evaluate_episodes(model, x, y, episodes=drawn, attack="pgd", threat=threat)
    auto = evaluate_episodes(model, x, y, episodes=drawn[: args.attacked], attack="autoattack", threat=threat)
    assert pgd.robust is not None and auto.robust is not None
    return {"clean": pgd.clean, "PGD-20": pgd.robust, "AutoAttack": auto.robust}


def difference(one: MeanAccuracy, other: MeanAccuracy) -> MeanAccuracy:
    """Of the same episodes, one by one."""
    return MeanAccuracy.of([a - b for a, b in zip(one.values, other.values, strict=True)])


def trained(data: ImageDataset, anchors: Anchors, args: argparse.Namespace, *, expansion: bool) -> ZeroShotClassifier:
    width = {"width": args.width} if args.network == "conv4-512" and args.width else {}
    tower = make_tower(args.network, anchors.bank.shape[1], seed=0, **width)
    model = ZeroShotClassifier(
        tower,
        anchors.table(data.classes),
        class_names=data.classes,
        image_size=SIDE,
        mean=(0.48, 0.448, 0.398),
        std=(0.277, 0.269, 0.282),
        class_encoder=anchors.table,
    ).to(args.device)
    options: dict[str, Any] = {"epochs": args.epochs, "milestones": (max(round(0.6 * args.epochs), 1),), "seed": 0}
    options |= {"measure_every": 0, "show_progress": False, "tau": args.tau}
    options |= {"threat": ThreatModel("linf", args.eps / 255, step_size=args.eps / 4 / 255, steps=7)}
    trainer = get_defense("laat")(model, variant="released", expansion=expansion, **options)
    if args.augment:
        trainer.fit(Augmented(data, cifar_fs()))
    else:
        trainer.fit(*data.tensors())
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image packs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/laat_scratch-cpu.json"))
    parser.add_argument("--network", default="conv4-512")
    parser.add_argument("--width", type=int, default=16, help="channels of Conv4; 0 for the published 512")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tau", type=float, default=0.1, help="temperature; 1 is published")
    parser.add_argument("--eps", type=float, default=2.0, help="radius in 255ths; 8 is published")
    parser.add_argument("--augment", action="store_true", help="crops, flips and rotations, as published")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--attacked", type=int, default=4, help="episodes under AutoAttack, the first of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("network", "width", "epochs", "tau", "eps"))
    options += f"{' --augment' if args.augment else ''} --episodes {args.episodes} --attacked {args.attacked}"
    content = heading("laat_scratch", f'python benchmarks/laat_scratch.py --data "$CLIPDEFENSE_DATA" {options}')

    anchors, console = Anchors.read(args.data), Console(stderr=True)
    train = covered(load_dataset(f"npz:{args.data / 'tiny_imagenet_train10k'}.npz", size=SIDE), anchors)
    seen, aside, novel = split(train)
    images = train.only(novel)
    x, y = images.tensors()
    drawn = sample_episodes(y, ways=5, shots=0, queries=20, count=args.episodes, seed=0, names=images.classes)
    found: dict[str, Rows] = {}
    for title, expansion in (("with the expansion", True), ("without", False)):
        model = trained(train.only(seen), anchors, args, expansion=expansion)
        found[title] = evaluated(model.with_classes(images.classes), x, y, drawn, args)
        console.print(title, {name: str(value) for name, value in found[title].items()})
    with_it, without = found["with the expansion"], found["without"]
    results = {title: {name: mean(value) for name, value in rows.items()} for title, rows in found.items()}
    results["with less without"] = {name: mean(difference(with_it[name], without[name])) for name in with_it}
    classes = {"training": len(seen), "validation, not used": len(aside), "novel": len(novel)}
    settings = {"eps": args.eps / 255, "ways": 5, "queries": 20, "chance": 0.2, "classes": classes}
    write_json(args.out, content | settings | {"results": results})


if __name__ == "__main__":
    main()
