"""The demo: one real model, three ways to use it, the same attacks on each, and what they say.

Everything that could be chosen (eps, TTC's and TeCoA's settings) was chosen on the validation images.
"""

from __future__ import annotations

import time
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
from clipdefense_demo.hardened import hardened_digits_clip
from clipdefense_demo.model import cached_model, digits_clip

THREAT = ThreatModel("linf", eps=8 / 255, steps=10)
ATTACKS = ("pgd,steps=10", "pgd,steps=100,objective=margin", "apgd-ce")
TTC_SETTINGS: dict[str, Any] = {"eps": 8 / 255, "step_size": 4 / 255, "steps": 4, "threshold": 0.3}
EOT_DRAWS = 5
CURVE_EPS = tuple(k / 255 for k in (0, 2, 4, 8, 12, 16))
CURVE_IMAGES = 100


def run(out: Path, *, n: int = 300, quiet: bool = False) -> list[Evaluation]:
    """Run the whole demo; prints the table, writes ``report.html`` and ``results.json`` into ``out``.

    Args:
        out: folder for the two files.
        n: test images, drawn evenly over the ten digits.
        quiet: no progress.
    """
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True, quiet=quiet)
    files = cached_model()
    if not files.weights.exists():
        console.print(f"First use: training a small CLIP on handwritten digits, to be kept in {files.folder} (13 MB).")
    model = digits_clip(progress=not quiet).to(device)
    hardened = hardened_digits_clip(model, THREAT, progress=not quiet).to(device)
    ttc = get_defense("ttc")(model, **TTC_SETTINGS)

    data = load_dataset("digits:test").sample(n, seed=0)
    x, y = (tensor.to(device) for tensor in data.tensors())
    judged: list[tuple[str, ZeroShotClassifier, InputDefense | None]] = [
        ("plain CLIP", model, None),
        ("TTC around it", model, ttc),
        ("TeCoA fine-tune", hardened, None),
    ]
    evaluations = []
    with console.status("attacking") as status:
        for name, target, defense in judged:
            evaluations.append(
                evaluate(
                    target,
                    x,
                    y,
                    THREAT,
                    attacks=ATTACKS,
                    defense=defense,
                    name=name,
                    eot=EOT_DRAWS,
                    progress=status.update,
                )
            )
        status.update("accuracy against eps")
        curves = _curves(model, hardened, ttc, x[:CURVE_IMAGES], y[:CURVE_IMAGES])
        strips = _strips(model, ttc, x, y, data.classes)
    Console().print(report.table(evaluations))
    seconds = time.perf_counter() - began
    page = _page(evaluations, curves, strips, seconds)
    report.write_html(out / "report.html", page)
    content = {"demo": "clipdefense demo", "seconds": seconds, "machine": machine()}
    write_json(out / "results.json", {**content, "evaluations": [e.to_dict() for e in evaluations]})
    for line in page.summary:
        Console().print(line)
    Console().print(f"\nPage: {out / 'report.html'}    JSON: {out / 'results.json'}    ({seconds:.0f} s)")
    return evaluations


def _curves(
    model: ZeroShotClassifier, hardened: ZeroShotClassifier, ttc: InputDefense, x: Tensor, y: Tensor
) -> list[report.Curve]:
    """Accuracy under PGD-10 at several eps; for TTC the transfer number and the adaptive one."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for eps in CURVE_EPS:
        threat = replace(THREAT, eps=eps)
        for name, target, defense in (("plain CLIP", model, None), ("TTC", model, ttc), ("TeCoA", hardened, None)):
            result = evaluate(target, x, y, threat, attacks=["pgd"], defense=defense, name=name, eot=2, verdict_seeds=2)
            for row in result.rows:
                label = name if defense is None else f"{name}, {row.attacked.split(',')[0]}"
                points.setdefault(label, []).append((eps, row.accuracy, *row.interval))
    return [report.Curve(label, tuple(values)) for label, values in points.items()]


def _strips(
    model: ZeroShotClassifier, ttc: InputDefense, x: Tensor, y: Tensor, classes: tuple[str, ...]
) -> list[report.Strip]:
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
                (f"clean: {classes[clean[i]]}", x[i]),
                (f"perturbation, x{gain:.0f}", visible(x_adv[i] - x[i])),
                (f"attacked: {classes[broken[i]]}", x_adv[i]),
                (f"counterattack, x{gain:.0f}", visible(counter[i])),
                (f"after TTC: {classes[after[i]]}", x_adv[i] + counter[i]),
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


def _page(
    evaluations: list[Evaluation], curves: list[report.Curve], strips: list[report.Strip], seconds: float
) -> report.Page:
    facts = machine()
    return report.Page(
        "clipdefense demo: handwritten digits",
        _summary(evaluations),
        evaluations,
        curves,
        f"PGD-10 on the first {CURVE_IMAGES} of the images, bands are 95 % Wilson intervals; TTC judged over 2 draws.",
        strips,
        "What the model says is under each picture. Perturbations are shown around grey.",
        {
            "data": "scikit-learn's handwritten digits, test split, 32 px",
            "threat model": str(THREAT),
            "attacks": "; ".join(ATTACKS),
            "TTC": ", ".join(f"{key}={value:.4g}" for key, value in TTC_SETTINGS.items()),
            "weights": evaluations[0].fingerprint["weights_sha256"],
            "machine": f"{facts['processor']}, {facts['threads']} threads, {facts['gpu'] or 'no GPU'}",
            "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            "seconds": f"{seconds:.0f}",
        },
    )
