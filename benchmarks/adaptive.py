"""Test-time defences under attackers who know them: what transfer promises, and what is left of it.

    python benchmarks/adaptive.py --data "$CLIPDEFENSE_DATA" --out benchmarks/results/adaptive-cpu.json

TTC at its published hyper-parameters on the real-data model (the 432 Caltech-101 images of names it was not trained
on, 128 px) and on the demo model (all 454 test digits), the other four defences at their defaults on the demo model.
Nothing is chosen on these images.

Every attack but the dear ones (``ON_STANDING``) sees each image that is right on some draw of the defence, so its
accuracy is its own; the dear ones see only what all those above left standing. ``standing`` counts the images that
are right on every draw, clean and under everything so far: the last one is the worst case per image. A finished part
(model, defence, eps) is a file in ``--work``; a second call goes on from there, several calls with ``--parts`` share
the work, and parts of another budget are made anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from anchors_model import Anchors, build, covered
from clipdefense import ThreatModel, ZeroShotClassifier, get_defense, load_dataset, load_model
from clipdefense.attacks.context import predict
from clipdefense.defenses import InputDefense, TestTimeDefense
from clipdefense.evaluation.fingerprint import constructed
from clipdefense.evaluation.statistics import wilson
from clipdefense.evaluation.targets import Surrogate
from clipdefense.files import write_json
from clipdefense.plugins import get_attack
from clipdefense.threat import parse_eps
from common import heading, seconds_of

PARTS: dict[str, tuple[str, ...]] = {  # model:defence -> eps
    "demo:ttc": ("1/255", "4/255", "6/255"),
    "real-data:ttc": ("1/255", "4/255"),
    "demo:random-noise": ("1/255", "4/255"),
    "demo:anti-adversary": ("1/255", "4/255"),
    "demo:hedge": ("1/255", "4/255"),
    "demo:tte": ("1/255", "4/255"),
}
ON_STANDING = ("smoothed", "gate-forced-on", "square")
SEED, BATCH = 0, 64


@dataclass(frozen=True)
class Budget:
    """What an attack may spend on an image.

    Attributes:
        steps: of APGD-CE, on everything that has a gradient.
        eot: draws a step.
        dear_eot: the same for what unrolls the defence, and for each query of Square.
        queries: of Square.
        seeds: defence draws that judge a randomised defence.
        n: images, evenly over the classes; None takes all.
    """

    steps: int
    eot: int
    dear_eot: int
    queries: int
    seeds: int
    n: int | None


class Attacker(NamedTuple):
    """One row: what is attacked, by what, with how many draws a step."""

    title: str
    module: nn.Module
    attack: str
    options: dict[str, Any]
    draws: int = 1


class Subject(NamedTuple):
    model: ZeroShotClassifier
    x: Tensor
    y: Tensor


def demo(n: int | None, device: str) -> Subject:
    model, data = load_model("demo:digits", device=device), load_dataset("digits:test", n=n)
    x, y = data.tensors()
    return Subject(model, x.to(device), y.to(device))


def real_data(folder: Path, n: int | None, device: str) -> Subject:
    model, trained = build(folder, device=device)
    caltech = load_dataset(f"npz:{folder / 'caltech101_64.npz'}", size=model.image_size)
    data = covered(caltech, Anchors.read(folder), without=trained)
    x, y = (data if n is None else data.sample(n, seed=0)).tensors()
    return Subject(model.with_classes(data.classes), x.to(device), y.to(device))


def attackers(model: nn.Module, defense: TestTimeDefense, judge: nn.Module, budget: Budget) -> Iterator[Attacker]:
    """From the one who knows nothing of the defence to those who know it, the dear ones last."""
    apgd = {"steps": budget.steps}
    yield Attacker("transfer, PGD-10", model, "pgd", {})
    yield Attacker("transfer", model, "apgd-ce", apgd)
    random = defense.traits.randomized
    yield Attacker("bpda" if isinstance(defense, InputDefense) else "own gradient", judge, "apgd-ce", apgd)
    views = sorted(defense.adaptive(model), key=lambda view: view.name in ON_STANDING)
    for view in views:
        if view.name != "bpda":  # that is the row above
            draws = min(view.eot, budget.dear_eot if view.name in ON_STANDING else budget.eot)
            yield Attacker(view.name, Surrogate(view, model, judge, SEED), "apgd-ce", apgd, draws)
    yield Attacker("square", judge, "square", {"queries": budget.queries}, budget.dear_eot if random else 1)


class Trial:
    """One defence around one model at one eps."""

    def __init__(self, subject: Subject, defense: TestTimeDefense, eps: str, budget: Budget) -> None:
        self.model, self.x, self.y = subject
        self.defense, self.budget = defense, budget
        self.threat = ThreatModel("linf", parse_eps(eps))
        self.judge = defense.wrap(self.model)
        self.ids = torch.arange(len(self.x), device=self.x.device)
        self.seeds = range(SEED, SEED + (budget.seeds if defense.traits.randomized else 1))

    def right(self, x: Tensor, rows: Tensor) -> Tensor:
        """(draws, N) verdicts; of images outside rows, False."""
        found = torch.zeros(len(self.seeds), len(self.x), dtype=torch.bool)
        for index, seed in enumerate(self.seeds if rows.any() else ()):
            keys = {"ids": self.ids[rows], "seed": seed} if self.defense.traits.randomized else {}
            logits = predict(self.judge, x[rows], batch_size=BATCH, **keys)
            found[index, rows.cpu()] = (logits.argmax(dim=1) == self.y[rows]).cpu()
        return found

    def made(self, attacker: Attacker, rows: Tensor) -> Tensor:
        """All images, those of rows attacked; no image leaves early, one that is just broken says little."""
        x_adv = self.x.clone()
        if rows.any():
            keys = {
                "eot": attacker.draws,
                "early_stop": attacker.attack == "autoattack",
                "batch_size": BATCH,
                "seed": SEED,
            }
            x_adv[rows] = get_attack(attacker.attack)(
                attacker.module, self.x[rows], self.y[rows], self.threat, ids=self.ids[rows], **attacker.options, **keys
            )
        return x_adv

    def run(self, say: Any) -> dict[str, Any]:
        """Every row, see the module."""
        every = torch.ones_like(self.y, dtype=torch.bool)
        clean = self.right(self.x, every)
        standing = clean.all(dim=0)
        rows = [self.row("clean", "none", 0, clean, standing, 0.0)]
        undefended = {}
        for attacker in attackers(self.model, self.defense, self.judge, self.budget):
            alone = attacker.title not in ON_STANDING
            chosen = (clean.any(dim=0) if alone else standing).to(self.x.device)
            (x_adv, correct), seconds = seconds_of(partial(self.tried, attacker, chosen), self.x.device.type)
            standing = standing & correct.all(dim=0)
            options = "".join(f",{key}={value}" for key, value in attacker.options.items())
            spec = attacker.attack + options
            rows.append(self.row(attacker.title, spec, attacker.draws, correct if alone else None, standing, seconds))
            if attacker.module is self.model:
                undefended[attacker.title] = self.undefended(x_adv)
            own = rows[-1]["accuracy"]
            said = "" if own is None else f"{own:.3f}, "
            say(f"{attacker.title}: {said}standing {standing.float().mean():.3f}, {seconds:.0f} s")
        return {
            "n": len(self.x),
            "eps": self.threat.eps,
            "budget": asdict(self.budget),
            "defense": constructed(self.defense),
            "undefended": {"clean": self.undefended(self.x)} | undefended,
            "rows": rows,
        }

    def tried(self, attacker: Attacker, rows: Tensor) -> tuple[Tensor, Tensor]:
        of_model = predict(self.model, self.x, batch_size=BATCH).argmax(dim=1) == self.y
        x_adv = self.made(attacker, rows | of_model if attacker.module is self.model else rows)
        return x_adv, self.right(x_adv, rows)

    def undefended(self, x: Tensor) -> dict[str, Any]:
        """The model alone on images that were made on it."""
        right = predict(self.model, x, batch_size=BATCH).argmax(dim=1) == self.y
        return share(float(right.float().mean()), len(x))

    def row(
        self, title: str, attack: str, draws: int, correct: Tensor | None, standing: Tensor, seconds: float
    ) -> dict[str, Any]:
        n = len(self.x)
        own = {"accuracy": None, "interval_95": None} if correct is None else share(float(correct.float().mean()), n)
        left = share(float(standing.float().mean()), n)
        return {
            "attacker": title,
            "attack": attack,
            "eot_draws": draws,
            "ran_on": "all that the defence gets right" if correct is not None else "those left standing",
            "verdict_seeds": len(self.seeds),
            **own,
            "standing": left["accuracy"],
            "standing_interval_95": left["interval_95"],
            "seconds": round(seconds, 1),
        }


def share(value: float, n: int) -> dict[str, Any]:
    return {"accuracy": value, "interval_95": list(wilson(value, n))}


def budget_of(model: str, args: argparse.Namespace) -> Budget:
    own = {name: getattr(args, f"{model.replace('-', '_')}_{name}") for name in ("steps", "queries", "eot")}
    return Budget(dear_eot=args.dear_eot, seeds=args.seeds, n=args.n, **own)


def place(work: Path, part: str, eps: str) -> Path:
    return work / f"{part.replace(':', '-')}-{eps.replace('/', '_')}.json"


def read(path: Path, budget: Budget) -> dict[str, Any] | None:
    """A finished part of this budget."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content["budget"] == asdict(budget) else None


def work_through(args: argparse.Namespace, console: Console) -> None:
    """Every part of ``--parts`` that is not there yet."""
    subjects: dict[str, Subject] = {}
    for part in args.parts:
        of, name = part.split(":")
        budget = budget_of(of, args)
        for eps in PARTS[part]:
            path = place(args.work, part, eps)
            if read(path, budget) is not None:
                continue
            if of not in subjects:
                subjects = {
                    of: demo(args.n, args.device) if of == "demo" else real_data(args.data, args.n, args.device)
                }
            console.print(f"{time.strftime('%H:%M:%S')} {part} at {eps}")
            defense = get_defense(name)(subjects[of].model)
            write_json(path, {"part": part, **Trial(subjects[of], defense, eps, budget).run(console.print)})


def autoattack(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """AutoAttack's version for random models (APGD-CE and APGD-DLR, 100 steps, 20 draws) through TTC, few images."""
    path, eps = args.work / "demo-ttc-autoattack.json", "4/255"
    if path.is_file():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["n"] == args.autoattack_n:
            return content
    console.print(f"{time.strftime('%H:%M:%S')} AutoAttack rand through TTC at {eps}")
    subject = demo(args.autoattack_n, args.device)
    trial = Trial(subject, get_defense("ttc")(subject.model), eps, budget_of("demo", args))
    clean = trial.right(subject.x, torch.ones_like(subject.y, dtype=torch.bool))
    spec = Attacker("autoattack rand", trial.judge, "autoattack", {"version": "rand"}, 20)
    chosen = clean.any(dim=0).to(subject.x.device)
    (_, correct), seconds = seconds_of(partial(trial.tried, spec, chosen), subject.x.device.type)
    standing = clean.all(dim=0)
    rows = [
        trial.row("clean", "none", 0, clean, standing, 0.0),
        trial.row(spec.title, "autoattack,version=rand", 20, correct, standing & correct.all(dim=0), seconds),
    ]
    content = {"n": len(subject.x), "eps": trial.threat.eps, "defense": constructed(trial.defense), "rows": rows}
    write_json(path, content)
    return content


def assemble(args: argparse.Namespace, aa: dict[str, Any] | None) -> dict[str, Any] | None:
    """Everything, once every part is done."""
    found: dict[str, dict[str, Any]] = {}
    for part, radii in PARTS.items():
        for eps in radii:
            content = read(place(args.work, part, eps), budget_of(part.split(":")[0], args))
            if content is None:
                return None
            found.setdefault(part, {})[eps] = content
    names = (
        "demo_steps",
        "real_data_steps",
        "demo_queries",
        "real_data_queries",
        "demo_eot",
        "real_data_eot",
        "dear_eot",
        "seeds",
        "autoattack_n",
    )
    options = "".join(f" --{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    options += "" if args.n is None else f" --n {args.n}"
    content = heading("adaptive", f'python benchmarks/adaptive.py --data "$CLIPDEFENSE_DATA"{options}')
    return content | {"parts": found, "autoattack_rand_through_ttc": aa}


def table(content: dict[str, Any]) -> Table:
    out = Table(title="Right under the attack, mean over draws, %; in brackets what is left standing so far")
    for column in ("model:defence", "eps", "rows"):
        out.add_column(column, overflow="fold")
    for part, by_eps in content["parts"].items():
        for eps, cell in by_eps.items():
            rows = (
                f"{row['attacker']} {'' if row['accuracy'] is None else format(100 * row['accuracy'], '.1f')}"
                f" ({100 * row['standing']:.1f})"
                for row in cell["rows"]
            )
            out.add_row(part, eps, "; ".join(rows))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds caltech101_64.npz and the others")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adaptive-cpu.json"))
    parser.add_argument("--work", type=Path, default=Path("build/adaptive"), help="a file a finished part")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--n", type=int, default=None, help="images a model; all otherwise")
    parser.add_argument("--demo-steps", type=int, default=20, help="of APGD-CE on the demo model")
    parser.add_argument("--real-data-steps", type=int, default=10, help="of APGD-CE on the real-data model")
    parser.add_argument("--demo-queries", type=int, default=100, help="of Square on the demo model")
    parser.add_argument("--real-data-queries", type=int, default=50, help="of Square on the real-data model")
    parser.add_argument("--demo-eot", type=int, default=4, help="draws a step on the demo model")
    parser.add_argument("--real-data-eot", type=int, default=2, help="draws a step on the real-data model")
    parser.add_argument("--dear-eot", type=int, default=2, help="draws a step of what is unrolled, and a query")
    parser.add_argument("--seeds", type=int, default=5, help="draws that judge a randomised defence")
    parser.add_argument("--autoattack-n", type=int, default=20, help="images for AutoAttack rand through TTC; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    console = Console(stderr=True, width=160)
    work_through(args, console)
    content = assemble(args, autoattack(args, console) if args.autoattack_n else None)
    if content is None:
        console.print("some parts are not done yet; call again for the whole.")
        return
    write_json(args.out, content)
    Console(width=200).print(table(content))


if __name__ == "__main__":
    main()
