"""The demo: one real model, three ways to use it, the same attacks on each, and what they say.

Everything that could be chosen (eps, TTC's and TeCoA's settings) was chosen on the validation images.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from clipdefense import ThreatModel, ZeroShotClassifier, attacks, evaluate, get_defense, load_dataset
from clipdefense.attacks.context import predict
from clipdefense.defenses import InputDefense
from clipdefense.evaluation import Evaluation, report
from clipdefense.evaluation.fingerprint import machine
from clipdefense.files import write_json
from clipdefense.threat import format_eps
from clipdefense_demo.digits import CLASSES
from clipdefense_demo.hardened import hardened_digits_clip
from clipdefense_demo.model import cached_model, digits_clip

THREAT = ThreatModel("linf", eps=6 / 255, steps=10)
ATTACKS = ("pgd,steps=10", "pgd,steps=100,objective=margin", "apgd-ce")
# The counterattack gets the attacker's eps; beta and threshold are the published ones.
TTC_SETTINGS: dict[str, Any] = {"eps": 6 / 255, "step_size": 2 / 255, "steps": 2, "beta": 2.0, "threshold": 0.2}
VIEW = "smoothed"  # bpda-eot leaves several times as many images standing, and takes as long
EOT_DRAWS = 5
CURVE_EPS = tuple(k / 255 for k in (0, 2, 4, 6, 8, 12))
CURVE_IMAGES = 60
PARTS = 2  # processes for TTC


def run(out: Path, *, n: int = 300, quiet: bool = False) -> list[Evaluation]:
    """Run the whole demo; prints the table, writes ``report.html`` and ``results.json`` into ``out``.

    Args:
        out: folder for the two files.
        n: test images, drawn evenly over the ten digits.
        quiet: no progress.
    """
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # three processes on two cores: more threads would only wait for each other
    try:
        evaluations, curves, strips = _measure(n, quiet)
    finally:
        torch.set_num_threads(threads)
    _report(out, evaluations, curves, strips, time.perf_counter() - began)
    return evaluations


def _measure(n: int, quiet: bool) -> tuple[list[Evaluation], list[report.Curve], list[report.Strip]]:
    console = Console(stderr=True, quiet=quiet)
    files = cached_model()
    if not files.weights.exists():
        console.print(f"First use: training a small CLIP on handwritten digits, kept in {files.folder} (14 MB).")
    model = digits_clip(progress=not quiet).to(_device())
    # TTC takes twice as long as all the rest, so it gets processes of its own; spawned, because CUDA cannot be forked
    with ProcessPoolExecutor(PARTS, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        around = [pool.submit(_judge_ttc, n, part) for part in range(PARTS)]
        hardened = hardened_digits_clip(model, progress=not quiet).to(_device())
        with console.status("attacking the plain model and the fine-tuned one, and TTC beside them"):
            x, y = _images(n)
            plain, tuned = (
                _judge(name, target, n, None) for name, target in (("plain CLIP", model), ("TeCoA fine-tune", hardened))
            )
            curves = _curves([("plain CLIP", model), ("TeCoA", hardened)], x, y)
            strips = _strips(model, _ttc(model), x, y)
            ttc = Evaluation.joined([part.result()[0] for part in around])
            more_curves = around[-1].result()[1]
    return [plain, ttc, tuned], [curves[0], *more_curves, *curves[1:]], strips


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ttc(model: ZeroShotClassifier) -> InputDefense:
    defense: InputDefense = get_defense("ttc")(model, **TTC_SETTINGS)
    return defense


def _images(n: int) -> tuple[Tensor, Tensor]:
    x, y = load_dataset("digits:test").sample(n, seed=0).tensors()
    return x.to(_device()), y.to(_device())


def _judge(
    name: str, model: ZeroShotClassifier, n: int, defense: InputDefense | None, rows: slice = slice(None)
) -> Evaluation:
    x, y = _images(n)
    return evaluate(
        model,
        x[rows],
        y[rows],
        THREAT,
        ids=torch.arange(len(x), device=x.device)[rows],
        attacks=ATTACKS,
        defense=defense,
        views=[VIEW] if defense is not None else None,
        cumulative=True,
        name=name,
        eot=None if defense is None else EOT_DRAWS,
    )


def _judge_ttc(n: int, part: int) -> tuple[Evaluation, list[report.Curve]]:
    """In a process of its own: TTC on every ``PARTS``-th image, and in the last part its curves."""
    model = digits_clip(progress=False).to(_device())
    result = _judge("TTC around it", model, n, _ttc(model), slice(part, None, PARTS))
    last = part == PARTS - 1
    return result, _curves([("TTC", model)], *_images(n), _ttc(model)) if last else []


def _curves(
    models: list[tuple[str, ZeroShotClassifier]], x: Tensor, y: Tensor, defense: InputDefense | None = None
) -> list[report.Curve]:
    """Accuracy under PGD-10 on the margin at several eps; for a defence the transfer number and the adaptive one."""
    x, y = x[:CURVE_IMAGES], y[:CURVE_IMAGES]
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, model in models:
        for eps in CURVE_EPS:
            result = evaluate(
                model,
                x,
                y,
                replace(THREAT, eps=eps),
                attacks=["pgd,objective=margin"],
                defense=defense,
                views=[VIEW] if defense is not None else None,
                eot=None if defense is None else 2,
                verdict_seeds=3,
            )
            for row in result.rows:
                kind = "" if defense is None else ", transfer" if "transfer" in row.attacked else ", adaptive"
                points.setdefault(name + kind, []).append((eps, row.accuracy, *row.interval))
    return [report.Curve(label, tuple(values)) for label, values in points.items()]


def _strips(model: ZeroShotClassifier, ttc: InputDefense, x: Tensor, y: Tensor) -> list[report.Strip]:
    """The first three images that PGD breaks: clean, perturbation, adversarial, counterattack, defended."""
    x_adv = attacks.pgd(model, x, y, THREAT, early_stop=False)
    clean, broken = (predict(model, images).argmax(dim=1) for images in (x, x_adv))
    rows = torch.nonzero((clean == y) & (broken != y))[:3, 0]
    ids = torch.arange(len(x), device=x.device)
    counter = ttc.perturbation(x_adv, ids=ids)
    after = predict(model, x_adv + counter).argmax(dim=1)
    gain = 0.5 / THREAT.eps

    def visible(delta: Tensor) -> Tensor:
        return (0.5 + gain * delta).clamp(0, 1)

    return [
        report.Strip(
            (
                (f"clean: {CLASSES[clean[i]]}", x[i]),
                (f"perturbation, x{gain:.0f}", visible(x_adv[i] - x[i])),
                (f"attacked: {CLASSES[broken[i]]}", x_adv[i]),
                (f"counterattack, x{gain:.0f}", visible(counter[i])),
                (f"after TTC: {CLASSES[after[i]]}", x_adv[i] + counter[i]),
            )
        )
        for i in rows.tolist()
    ]


def _summary(evaluations: list[Evaluation]) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    plain, ttc, tecoa = evaluations
    transfer = min(row.accuracy for row in ttc.rows if "transfer" in row.attacked)
    adaptive = min(row.accuracy for row in ttc.rows if "adaptive" in row.attacked)

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    return [
        f"Plain CLIP: {percent(plain.clean.accuracy)} on clean digits, {percent(plain.worst_case().accuracy)} once "
        f"every pixel may change by {format_eps(THREAT.eps)}.",
        f"TTC: {percent(transfer)} if the attacker does not know of it, {percent(adaptive)} if he does, "
        f"{percent(ttc.worst_case().accuracy)} in the worst case over attacks and draws. The first number alone is "
        "how test-time defences are usually published.",
        f"TeCoA: {percent(tecoa.clean.accuracy)} clean, {percent(tecoa.worst_case().accuracy)} in the worst case over "
        f"the same attacks; the training costs accuracy or time, and the robustness is in the weights.",
        "Three gradient attacks are not a proof: AutoAttack and more adaptive attacks may break more.",
    ]


def _report(
    out: Path, evaluations: list[Evaluation], curves: list[report.Curve], strips: list[report.Strip], seconds: float
) -> None:
    """The table and what it says on the terminal, the page and the JSON file in the folder."""
    facts = machine()
    summary = _summary(evaluations)
    page = report.Page(
        "clipdefense demo: handwritten digits",
        summary,
        evaluations,
        curves,
        f"PGD-10 on the margin, the first {CURVE_IMAGES} of the images; bands are 95 % Wilson intervals.",
        strips,
        "What the model says is under each picture. Perturbations are shown around grey.",
        {
            "data": "scikit-learn's handwritten digits, test split, 32 px",
            "threat model": str(THREAT),
            "attacks": "; ".join(ATTACKS) + "; each on the images that those above it left standing",
            "TTC": ", ".join(f"{key}={value:.4g}" for key, value in TTC_SETTINGS.items()),
            "weights": evaluations[0].fingerprint["weights_sha256"],
            "machine": f"{facts['processor']}, {facts['threads']} threads, {facts['gpu'] or 'no GPU'}",
            "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            "seconds": f"{seconds:.0f}",
        },
    )
    content = {"command": "clipdefense demo", "seconds": round(seconds, 1), "machine": facts, "summary": summary}
    report.write_html(out / "report.html", page)
    write_json(out / "results.json", {**content, "evaluations": [e.to_dict() for e in evaluations]})
    console = Console()
    console.print(report.table(evaluations))
    console.print(
        "Each attack runs on the images that those above it left standing (right on most draws); numbers are what is "
        "left.\n"
    )
    for line in summary:
        console.print(line)
    console.print(f"\nPage: {out / 'report.html'}    JSON: {out / 'results.json'}    ({seconds:.0f} s)")
