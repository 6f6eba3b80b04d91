"""``clipdefense doctor``: what is installed here, what it can do, and what is known to go wrong with it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipdefense.errors import UsageError
from clipdefense.plugins import KINDS, registry

Status = Literal["ok", "note", "warn", "fail"]
LOW_SPACE = 2 * 2**30
MODERN_REQUESTS = "2.32.2"  # the oldest that Hugging Face's datasets takes


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: versions, devices, threads, folders, plugins or combinations.
        name: what was looked at.
        status: ``"fail"``: something does not work; ``"warn"``: it works, but slowly or not as one may think;
            ``"note"``: worth knowing; ``"ok"``.
        detail: what was found.
        advice: what to do about it.
    """

    section: str
    name: str
    status: Status
    detail: str
    advice: str = ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> Iterator[Finding]:
    """Python, this package, and everything that it requires; what an extra would bring is a note."""
    from packaging.requirements import Requirement

    ok = sys.version_info >= (3, 11)
    advice = "" if ok else "install Python 3.11 or newer"
    yield Finding("versions", "python", "ok" if ok else "fail", platform.python_version(), advice)
    try:
        own = distribution("clipdefense")
    except PackageNotFoundError:
        yield Finding("versions", "clipdefense", "warn", "not installed, only importable", "pip install -e .")
        return
    yield Finding("versions", "clipdefense", "ok", own.version)
    needs = {needed.name: needed for needed in map(Requirement, reversed(own.requires or []))}  # extras come last
    for needed in sorted(needs.values(), key=lambda needed: needed.name.lower()):
        extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        found = _version(needed.name)
        if not found:
            advice = f"pip install '{needed.name}{needed.specifier}'"
            if not extra:
                yield Finding("versions", needed.name, "fail", "not installed", advice)
        elif needed.specifier.contains(found, prereleases=True):
            yield Finding("versions", needed.name, "ok", found)
        else:
            advice = f"pip install '{needed.name}{needed.specifier}'"
            wanted = f"{found}; {needed.specifier} is wanted"
            yield Finding("versions", needed.name, "warn" if extra else "fail", wanted, advice)


def devices() -> Iterator[Finding]:
    """What torch computes on."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(found):
        facts = torch.cuda.get_device_properties(index)
        detail = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
        yield Finding("devices", f"cuda:{index}", "ok", detail)
    if not found and torch.version.cuda is not None:
        yield Finding(
            "devices",
            "cuda",
            "note",
            f"torch is built for CUDA {torch.version.cuda} and sees no GPU",
            "where there is one, look at the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
        )
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "note", "available, not used unless --device mps asks for it")
    yield Finding("devices", "cpu", "ok", f"{_processor()}, {_cores()} cores for this process")


def _processor() -> str:
    from clipdefense.evaluation.fingerprint import machine

    return str(machine()["processor"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> Iterator[Finding]:
    """CPU threads: too many slow everything down, and other numbers of them round differently."""
    import torch

    count, cores = torch.get_num_threads(), _cores()
    detail = f"{count} threads on {cores} cores"
    if count > cores:
        yield Finding("threads", "torch", "warn", detail, f"set OMP_NUM_THREADS={cores}; more threads only wait")
    elif count < cores:
        yield Finding("threads", "torch", "note", detail, f"OMP_NUM_THREADS={cores} would use them all")
    else:
        yield Finding("threads", "torch", "ok", detail)


def _folder(name: str, path: Path, variable: str, *, needed: bool = False) -> Finding:
    """Whether a folder can be used; one that does not exist is judged by the place where it would be made."""
    nearest = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    detail = f"{path} ({'' if path.exists() else 'not there yet, '}{free / 2**30:.1f} GiB free)"
    if not nearest.is_dir():
        return Finding("folders", name, "fail", f"{nearest} is not a folder", f"name another one with {variable}")
    if not os.access(nearest, os.R_OK | os.X_OK):
        return Finding("folders", name, "fail", f"{detail} cannot be read", f"name another one with {variable}")
    if not needed and not os.access(nearest, os.W_OK):
        return Finding("folders", name, "warn", f"{detail} cannot be written", f"name another one with {variable}")
    if not needed and free < LOW_SPACE:
        return Finding("folders", name, "warn", detail, f"make room, or name another one with {variable}")
    return Finding("folders", name, "ok", detail)


def folders() -> Iterator[Finding]:
    """Where this library and the model hub keep files, and where data are looked for."""
    from clipdefense.data.files import CACHE_VARIABLE, DATA_VARIABLE, cache_folder

    yield _folder("cache", cache_folder(), CACHE_VARIABLE)
    sets = os.environ.get("CLIPDEFENSE_DATASETS")
    yield _folder("data sets", Path(sets).expanduser() if sets else cache_folder("datasets"), "CLIPDEFENSE_DATASETS")
    data = os.environ.get(DATA_VARIABLE)
    if data and not Path(data).expanduser().is_dir():
        yield Finding("folders", "data", "fail", f"{data} is not a folder", f"correct or unset {DATA_VARIABLE}")
    elif data:
        yield _folder("data", Path(data).expanduser(), DATA_VARIABLE, needed=True)
    else:
        yield Finding("folders", "data", "note", f"{DATA_VARIABLE} is not set; tests that need real images skip")
    home = os.environ.get("HF_HOME")
    hub = os.environ.get("HF_HUB_CACHE") or (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"
    yield _folder("model hub", Path(hub).expanduser(), "HF_HOME")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("folders", "HF_HUB_OFFLINE", "note", "set: models come from the cache alone")


def plugins() -> Iterator[Finding]:
    """Plugins that failed, register nothing, share a name, or wait for a package; what models can be named."""
    try:
        found = registry()
    except UsageError as error:  # CLIPDEFENSE_STRICT, or a misspelt CLIPDEFENSE_PLUGINS
        yield Finding("plugins", "discovery", "fail", str(error))
        return
    for plugin in found.plugins:
        title = f"{plugin.name} of {plugin.distribution}"
        if plugin.error:
            yield Finding("plugins", title, "fail", plugin.error, "report it to its author, or uninstall it")
        elif not plugin.contributions:
            yield Finding("plugins", title, "warn", "registers nothing", "look at its hook functions")
    for (kind, name), claims in sorted(found.by_name.items()):
        if len(claims) > 1:
            owners = ", ".join(claim.distribution for claim in claims)
            advice = "uninstall one, or name those to keep in CLIPDEFENSE_PLUGINS"
            yield Finding("plugins", f"{kind} {name}", "fail", f"claimed by {owners}", advice)
        for claim in claims:
            if claim.missing:
                advice = f"pip install '{claim.install or ' '.join(claim.missing)}'"
                yield Finding("plugins", f"{kind} {name}", "note", f"needs {', '.join(claim.missing)}", advice)
            elif kind == "models" and len(claims) == 1:
                yield Finding("plugins", f"{kind} {name}", "ok", claim.summary)
    count = ", ".join(f"{len(found.names(kind))} {kind.replace('defenses', 'defences')}" for kind in KINDS)
    yield Finding("plugins", "found", "ok", f"{len(found.plugins)} plugins: {count}")


def combinations() -> Iterator[Finding]:
    """What is known to go wrong together."""
    yield _multiprocess()
    yield from _pins()
    yield from _quick_gelu()
    yield from _tf32()
    yield _compiler()


def _multiprocess() -> Finding:
    if importlib.util.find_spec("multiprocess") is not None:
        return Finding("combinations", "multiprocess", "ok", "there, as ART's AutoAttack needs it")
    return Finding(
        "combinations",
        "multiprocess",
        "fail",
        "missing: ART's AutoAttack imports it and does not declare it",
        "pip install multiprocess",
    )


def _pins() -> Iterator[Finding]:
    """Requirements that other installed packages state and that do not hold: requests~=2.25.1 is the usual one."""
    from packaging.requirements import InvalidRequirement, Requirement

    seen: set[str] = set()
    queue = ["clipdefense"]
    while queue:
        name = queue.pop().lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            stated = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for text in stated:
            try:
                needed = Requirement(text)
            except InvalidRequirement:
                continue
            found = _version(needed.name)
            active = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if found and (active or name == "clipdefense"):  # installed extras count as asked for
                queue.append(needed.name)
            if name == "clipdefense" or not found or not active:
                continue
            if needed.name == "requests" and found in needed.specifier and MODERN_REQUESTS not in needed.specifier:
                detail = f"keeps requests at {found} (it wants {needed.specifier})"
                advice = "packages that need a newer one, such as Hugging Face's datasets, go into another environment"
                yield Finding("combinations", name, "note", detail, advice)
            if not needed.specifier.contains(found, prereleases=True):
                detail = f"wants {needed.name}{needed.specifier}, but {found} is installed"
                advice = f"give what needs another {needed.name} an environment of its own, or uninstall {name}"
                yield Finding("combinations", name, "warn", detail, advice)


def _quick_gelu() -> Iterator[Finding]:
    installed = _version("open_clip_torch")
    if not installed:
        return
    detail = (
        f"open_clip_torch {installed} builds plain GELU for OpenAI's weights under names such as ViT-B-32 and only "
        "warns; this library's loader refuses that"
    )
    if int(installed.partition(".")[0]) >= 3:
        advice = "in code of your own, use the names that end in -quickgelu"
        yield Finding("combinations", "OpenAI weights without QuickGELU", "note", detail, advice)


def _tf32() -> Iterator[Finding]:
    """TF32 rounds to 10 bits; verdicts and fp32 gradients switch it off, code of one's own does not."""
    import torch

    if not torch.cuda.is_available():
        return
    try:
        on = {"matrix products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    except RuntimeError as error:  # torch refuses where its old and new switches were mixed
        yield Finding(
            "combinations", "TF32", "warn", f"cannot be read: {error}", "set only one of torch's two switches"
        )
        return
    what = " and ".join(name for name, used in on.items() if used)
    detail = f"on by default here for {what}; verdicts run with it off" if what else "off"
    advice = "in code of your own, set torch.backends.*.allow_tf32 = False before you judge" if what else ""
    yield Finding("combinations", "TF32", "note" if what else "ok", detail, advice)


def _compiler() -> Finding:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)
    if compiler:
        return Finding("combinations", "torch.compile", "ok", f"finds the C++ compiler {compiler}")
    advice = "install a C++ compiler, or leave compile=True out"
    return Finding("combinations", "torch.compile", "note", "no C++ compiler: compile=True fails on the CPU", advice)


SECTIONS: Mapping[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "devices": devices,
    "threads": threads,
    "folders": folders,
    "plugins": plugins,
    "combinations": combinations,
}


def examine() -> list[Finding]:
    """Every finding, section by section; a section that cannot be looked at is itself a finding."""
    findings: list[Finding] = []
    for name, section in SECTIONS.items():
        try:
            findings += section()
        except Exception as error:  # a broken installation is what this command is for
            findings.append(Finding(name, name, "fail", f"cannot be looked at ({type(error).__name__}: {error})"))
    return findings


def report(findings: list[Finding]) -> dict[str, Any]:
    """JSON-ready: the findings, how many there are of each status, and whether any failed."""
    count = {status: sum(each.status == status for each in findings) for status in ("ok", "note", "warn", "fail")}
    return {"ok": not count["fail"], "count": count, "findings": [asdict(each) for each in findings]}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON on standard output.")] = False,
) -> None:
    """Look at versions, devices, threads, folders, plugins and known-bad combinations. Exit code 1: something failed.

    Nothing is changed and nothing is fetched.
    """
    import json
    import warnings

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plugins that fail to load are findings
        findings = examine()
    summary = report(findings)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    else:
        colour = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "red"}
        table = Table("", "what", "found", "what to do", show_lines=False)
        for section in SECTIONS:
            table.add_section()
            for each in (each for each in findings if each.section == section):
                status = f"[{colour[each.status]}]{each.status}[/{colour[each.status]}]"
                table.add_row(status, escape(each.name), escape(each.detail), escape(each.advice))
        console = Console()
        console.print(table)
        console.print(", ".join(f"{number} {status}" for status, number in summary["count"].items()))
    if not summary["ok"]:
        raise typer.Exit(1)
