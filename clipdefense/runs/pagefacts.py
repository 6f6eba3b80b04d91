"""What a page's numbers depend on, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clipdefense.runs.joint import Joint, options_of
from clipdefense.runs.results import CellResult

SHOWN_TEMPLATES = 3


def facts_of(joint: Joint) -> dict[str, str]:
    """Each fact by what it is of; where a model or a defence is another on another data set, by both."""
    facts: dict[str, str] = {}
    if joint.protocol is not None:
        protocol = joint.protocol
        facts["protocol"] = f"{protocol.name}: {protocol.title} ({protocol.source})"
        facts["what to know of the protocol"] = " ".join(protocol.notes)
    for label in joint.contents:
        facts[f"data set {label}"] = "; ".join(_dataset(joint, label))
    facts |= _by_label("model", joint, lambda cell: cell.cell.model.label, _model)
    facts |= _by_label("prompts of", joint, lambda cell: cell.cell.model.label, _prompts)
    facts |= _by_label("defence", joint, lambda cell: cell.cell.defense.label, _defense)
    places = {
        f"{device}, {threads} threads, {bucket} a forward"
        for cell in joint.cells
        for device, threads, bucket in cell.made_on
    }
    facts["computed on"] = "; ".join(sorted(places))
    facts |= _of_runs(joint)
    if any(run.config.save_adv for run in joint.runs):
        facts["to prove it again"] = "clipdefense verify FOLDER classifies every broken image once more, on any machine"
    return facts


def _dataset(joint: Joint, label: str) -> Iterator[str]:
    content = joint.contents[label]
    side = " x ".join(str(length) for length in content["attacked_at"])
    yield f"{content['images']} images of {len(content['classes'])} classes, attacked at {side} px"
    known = {
        "resize": "resized by {}",
        "names": "class names {}",
        "names_sha256": "their table {}",
        "class_names_sha256": "class names as used {}",
    }
    said = content.get("said", {})
    yield from (text.format(said[key]) for key, text in known.items() if said.get(key))
    yield f"labels {content['labels_sha256']}"


def _model(cell: CellResult) -> str:
    return f"{cell.facts.get('model')}, weights {cell.facts.get('weights_sha256')}"


def _prompts(cell: CellResult) -> str:
    templates, digest = cell.facts.get("templates"), cell.facts.get("templates_sha256")
    said = ""
    if isinstance(templates, (list, tuple)) and templates:
        few = ", ".join(f'"{template}"' for template in templates[:SHOWN_TEMPLATES])
        more = len(templates) > SHOWN_TEMPLATES
        said = f"{len(templates)} templates: {few}, ..." if more else few
    return "; ".join(filter(None, (said, f"hash {digest}" if digest else "")))


def _defense(cell: CellResult) -> str:
    return ", ".join(f"{key}={value}" for key, value in options_of(cell.facts.get("defense") or {}).items())


def _by_label(
    what: str, joint: Joint, label: Callable[[CellResult], str], said: Callable[[CellResult], str]
) -> dict[str, str]:
    """One fact a label where all its cells agree, else one a data set, else one a model and data set."""
    found: dict[str, list[CellResult]] = {}
    for cell in joint.cells:
        if said(cell):
            found.setdefault(label(cell), []).append(cell)
    keys: tuple[Callable[[CellResult], str], ...] = (
        lambda cell: "",
        lambda cell: f" on {cell.cell.dataset.label}",
        lambda cell: f" of model {cell.cell.model.label} on {cell.cell.dataset.label}",
    )
    facts: dict[str, str] = {}
    for name, cells in found.items():
        for key in keys:
            by_key: dict[str, dict[str, None]] = {}
            for cell in cells:
                by_key.setdefault(key(cell), {})[said(cell)] = None
            if all(len(values) == 1 for values in by_key.values()) or key is keys[-1]:
                break
        facts |= {f"{what} {name}{where}": " / ".join(values) for where, values in by_key.items()}
    return facts


def _of_runs(joint: Joint) -> dict[str, str]:
    """Seeds and versions, run by run where the runs differ."""
    facts: dict[str, str] = {}
    for run in joint.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.facts["versions"].items())
        for key, value in (("seed", str(run.config.seed)), ("versions", versions)):
            if facts.setdefault(key, value) != value:
                facts[f"{key} of {run.folder.name}"] = value
    return facts
