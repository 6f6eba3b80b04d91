"""The page of figures, made from every JSON file under benchmarks/results/ (``python benchmarks/readme_tables.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from figures import figure, render, table
from summaries import (
    adaptive_rows,
    attacks_table,
    audit_table,
    evaluations_table,
    kills_table,
    reverse_attention_table,
    robustness_table,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

HEAD = frozenset({"benchmark", "date", "commit", "command", "machine", "size", "name", "title"})

# What each benchmark asks, in the order of the page; one that is not listed comes last, under its own name.
QUESTIONS: dict[str, tuple[str, str]] = {
    "demo": ("The demo", "What `clipdefense demo` prints."),
    "real_data": ("Real images", "A frozen ImageNet MobileNetV2 mapped to CLIP text embeddings, zero-shot, and TTC."),
    "robustness": ("Fine-tuned on real images", "Every trainer with one budget; p is McNemar's, against TeCoA."),
    "adaptive": ("Test-time defences under an adaptive attacker", "Transfer and adaptive numbers side by side."),
    "laat_scratch": ("LAAT from scratch", "Zero-shot episodes on classes that training did not see."),
    "reverse_attention": ("Reverse attention", "The published protocol beside an attack on the head that decides."),
    "audit_clean_models": ("The audit's false alarms", "Models without a defect, which should pass."),
    "attacks_verdicts": ("Verdicts and time beside torchattacks", "The same images, budgets and hyper-parameters."),
    "attacks_art": ("Time beside ART's AutoAttack", "Another suite than AutoAttack; both at their own defaults."),
    "attacks_overhead": ("Time over the bare tower, memory over PGD", "1 is the floor: the counted passes alone."),
    "attacks_growth": ("Growth with images and classes", "Milliseconds an image."),
    "attacks_passes": ("Passes beside what the algorithm needs", "Forward and backward passes of the tower."),
    "attacks_precision": ("Precision of the gradients", "Speed, and what still stands."),
    "pgd_step": ("A PGD step", "Over one forward and one backward of the bare tower, peers beside it."),
    "ttc": ("TTC's passes", "Beside the theory: benign, attacked and mixed batches."),
    "training": ("A training step", "Passes, time and memory, method by method."),
    "training_text": ("A training step with a text tower", "Class embeddings are computed once."),
    "kills": ("Killed runs", "SIGKILL at random moments and at the worst ones, a full disk, shards."),
    "runs": ("Runs", "Work units, resumed and in shards."),
}

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": evaluations_table,
    "real_data": evaluations_table,
    "robustness": robustness_table,
    "adaptive": adaptive_rows,
    "attacks_verdicts": attacks_table,
    "audit_clean_models": audit_table,
    "kills": kills_table,
    "reverse_attention": reverse_attention_table,
}


def benchmark_of(path: Path, content: Mapping[str, Any]) -> str:
    """The benchmark's name; a file's own, less its size, where the result does not say."""
    return str(content.get("benchmark") or path.stem.rpartition("-")[0] or path.stem)


def _question(name: str) -> tuple[int, str, str]:
    """(place, title, sentence): of the longest listed name that this one begins with."""
    listed = [key for key in QUESTIONS if name == key or name.startswith(f"{key}_")]
    if not listed:
        return len(QUESTIONS), name.replace("_", " "), ""
    best = max(listed, key=len)
    title, sentence = QUESTIONS[best]
    rest = name.removeprefix(best).strip("_").replace("_", " ")
    return list(QUESTIONS).index(best), f"{title}: {rest}" if rest else title, sentence


def origin(content: Mapping[str, Any], link: str) -> list[str]:
    """Machine, commit, date, command and file of one result."""
    machine = content.get("machine") or {}
    place = machine.get("gpu") or machine.get("processor")
    threads = f", {machine['threads']} of {machine['cores']} cores" if machine.get("threads") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items() if version)
    rows = [
        ("machine", f"{place}{threads}" if place else "not recorded"),
        ("software", f"Python {machine['python']}, {versions}" if versions else "not recorded"),
        ("commit", str(content.get("commit", "not recorded"))),
        ("date", str(content.get("date", "not recorded"))),
        ("command", f"`{content['command']}`" if content.get("command") else "not recorded"),
        ("file", link),
    ]
    return [f"- {key}: {value}" for key, value in rows] + [""]


def section(path: Path, content: dict[str, Any], link: str) -> list[str]:
    """One result's part of the page."""
    name = benchmark_of(path, content)
    _, title, sentence = _question(name)
    size = content.get("size") or path.stem.removeprefix(name).strip("-")
    lines = [f"## {title}{f' ({size})' if size else ''}", ""]
    lines += [sentence, ""] if sentence else []
    if name in TABLES:
        return [*lines, TABLES[name](content), "", *origin(content, link)]
    figures = content.get("figures")
    rest = {key: value for key, value in content.items() if key not in HEAD | {"figures"}}
    lines += render({**rest, **figures} if isinstance(figures, dict) else rest)
    return [*lines, *origin(content, link)]


def results() -> list[tuple[Path, dict[str, Any]]]:
    """Every result, in the order of the page."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda each: (_question(benchmark_of(*each))[0], each[0].name))


def page(link: str) -> str:
    """The whole page.

    Args:
        link: where a result's file is, as Markdown with ``{}`` for its name.
    """
    every = results()
    sections = [section(path, content, link.format(path.name)) for path, content in every]
    index = table(
        ["figures", "date", "commit", "machine"],
        (
            [
                f"[{lines[0].removeprefix('## ')}](#{_anchor(lines[0])})",
                str(content.get("date", "-")),
                str(content.get("commit", "-")),
                figure((content.get("machine") or {}).get("gpu") or (content.get("machine") or {}).get("processor")),
            ]
            for lines, (_, content) in zip(sections, every)
        ),
    )
    intro = [
        "# Figures",
        "",
        "Every figure comes from a JSON file under `benchmarks/results/`, written by the command named with it; "
        "`python benchmarks/readme_tables.py` writes this page, the README's tables and its picture from them, and a "
        "test checks that they agree. Peers (torchattacks, ART, the bare tower) are measured in the same run, in "
        "turns, on the same images. `smoke` shows that a benchmark runs, and is no measurement of speed. On one "
        "thread of a CPU, seconds are that thread's CPU seconds. A commit marked `+changes` had uncommitted changes "
        "in its working tree.",
        "",
        *index,
    ]
    return "\n".join([*intro, *(line for lines in sections for line in lines)]).rstrip() + "\n"


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    text = heading.removeprefix("## ").lower()
    return "".join(c for c in text if c.isalnum() or c in " -_").strip().replace(" ", "-")
