"""What a page shows of a cell besides numbers: an attack's loss step by step, and pictures of a few images.

Made once, while the cell's model is loaded, and kept in the run's folder, so that a page needs neither models nor
images.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipdefense.attacks.context import predict
from clipdefense.attacks.forward import keyed, takes_keys
from clipdefense.defenses import InputDefense, ViewModule
from clipdefense.errors import UsageError
from clipdefense.evaluation.charts import Trace
from clipdefense.evaluation.report import Strip
from clipdefense.evaluation.runner import AttackSpec
from clipdefense.evaluation.targets import TRANSFER, UNDEFENDED, select, views_of
from clipdefense.runs.build import Facts, Subject
from clipdefense.runs.units import Cell
from clipdefense.weights import write_tensors

FOLDER = "exhibits"
LOOKED_AT, TRACED, PICTURED = 32, 8, 3
"""The first images of a cell; of those that are right, how many are followed, and of how many pictures are kept."""

GAIN = 10
SIDE = 160
"""Pictures are no larger than this on the page."""

_BY_GRADIENT = ("pgd", "apgd-ce", "apgd-dlr")
_IMAGE = (1 << 40) - 1  # an attack keys its draws by image number plus a multiple of 2^40 for the step


@dataclass(frozen=True)
class Exhibit:
    """What is kept of a cell.

    Attributes:
        attack: whose loss is followed.
        images: over how many images.
        traces: one for each thing attacked.
        strips: pictures.
    """

    attack: str
    images: int
    traces: tuple[Trace, ...] = ()
    strips: tuple[Strip, ...] = ()


class _Listening(nn.Module):
    """A target that keeps each image's cross-entropy whenever a gradient is taken of it."""

    def __init__(self, target: nn.Module, labels: dict[int, int]) -> None:
        super().__init__()
        self.target, self.labels, self.keyed = target, labels, takes_keys(target)
        self.losses: dict[int, list[Tensor]] = defaultdict(list)

    def forward(self, x: Tensor, ids: Tensor | None = None, seed: int | None = None) -> Tensor:
        logits: Tensor = self.target(x, ids=ids, seed=seed) if self.keyed else self.target(x)
        if torch.is_grad_enabled() and ids is not None:
            numbers = (ids & _IMAGE).tolist()
            y = torch.tensor([self.labels[number] for number in numbers], device=logits.device)
            loss = nn.functional.cross_entropy(logits.detach().float(), y, reduction="none").cpu()
            for number, value in zip(numbers, loss):
                self.losses[number].append(value)
        return logits

    def extra_loss(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The target's own term of the attacker's objective, where it has one."""
        own = getattr(self.target, "extra_loss", None)
        return None if own is None else own(x, y)

    def trace(self, label: str, draws: int) -> Trace | None:
        """Quartiles over the images, a step being so many draws; None where nothing was heard."""
        every = [torch.stack(values) for values in self.losses.values()]
        steps = min((len(values) // draws for values in every), default=0)
        if not steps:
            return None
        table = torch.stack([values[: steps * draws].reshape(steps, draws).mean(dim=1) for values in every])
        low, middle, high = torch.quantile(table, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        return Trace(label, tuple(middle.tolist()), tuple(low.tolist()), tuple(high.tolist()))


def followed(subject: Subject) -> AttackSpec:
    """The first attack of the cell that climbs one loss from one start; APGD-CE where there is none."""
    climbing = (s for s in subject.attacks if s.name in _BY_GRADIENT and s.option("objective") != "drift")
    spec = next(climbing, AttackSpec("apgd-ce"))
    kept = tuple((key, value) for key, value in spec.options if key not in ("restarts", "early_stop", "compile"))
    return AttackSpec(spec.name, kept)


def make(cell: Cell, subject: Subject, x: Tensor, y: Tensor, ids: Tensor, batch_size: int) -> Exhibit | None:
    """A cell's exhibit, from the first images that it gets right.

    Args:
        cell: what is judged.
        subject: the same, loaded.
        x, y, ids: the first images, on the model's device.
        batch_size: images a forward.

    Returns:
        None where the model gets none of them right.
    """
    right = _says(subject, x, ids, batch_size) == y
    rows = right.nonzero()[:TRACED, 0]
    if not len(rows):
        return None
    x, y, ids = x[rows], y[rows], ids[rows]
    spec = followed(subject)
    traces, attacked = [], []
    for label, module, draws in _targets(cell, subject):
        listening = _Listening(module, dict(zip(ids.tolist(), y.tolist())))
        attacked.append((label, _attack(spec, listening, subject, (x, y, ids), draws, batch_size)))
        trace = listening.trace(label, draws)
        traces += [trace] if trace is not None else []
    strips = _Pictures(cell, subject, x, y, ids, batch_size).strips(attacked)
    return Exhibit(str(spec), len(x), tuple(traces), strips)


def _targets(cell: Cell, subject: Subject) -> Iterator[tuple[str, nn.Module, int]]:
    yield (UNDEFENDED if subject.defense is None else TRANSFER), subject.model, 1
    for view in select(views_of(subject.model, subject.defense), cell.defense.views):
        draws = cell.defense.eot or view.eot
        module = ViewModule(view, subject.model, subject.seeds.start)
        yield f"adaptive view {view.name}" + (f", {draws} EOT draws" if draws > 1 else ""), module, draws


def _attack(
    spec: AttackSpec,
    target: nn.Module,
    subject: Subject,
    images: tuple[Tensor, Tensor, Tensor],
    draws: int,
    batch_size: int,
) -> Tensor:
    function, threat, options = spec.bind(replace(subject.threat, restarts=1))
    settings: dict[str, Any] = {"seed": subject.seeds.start, "batch_size": batch_size, "eot": draws}
    x, y, ids = images
    return function(target, x, y, threat, ids=ids, early_stop=False, **(settings | options))


def _says(subject: Subject, x: Tensor, ids: Tensor, batch_size: int) -> Tensor:
    """What the judged model says on its first draw, (n,)."""
    keys = keyed(subject.judge, ids, subject.seeds.start)
    return predict(subject.judge, x, batch_size=batch_size, **keys).argmax(dim=1)


class _Pictures:
    """Strips of a few images."""

    def __init__(self, cell: Cell, subject: Subject, x: Tensor, y: Tensor, ids: Tensor, batch_size: int) -> None:
        self.cell, self.subject, self.x, self.y, self.ids = cell, subject, x, y, ids
        self.batch_size = batch_size
        self.names = getattr(subject.model, "class_names", None)

    def strips(self, attacked: list[tuple[str, Tensor]]) -> tuple[Strip, ...]:
        """One for each of the first images: under the strongest attacker that breaks it, else the last."""
        said = [_says(self.subject, x_adv, self.ids, self.batch_size) for _, x_adv in attacked]
        broken = torch.stack(said) != self.y  # (targets, n)
        order = broken.any(dim=0).logical_not().argsort(stable=True)[:PICTURED]  # what fell shows more
        strips = []
        for i in order.tolist():
            fallen = broken[:, i].nonzero()[:, 0].tolist()
            target = fallen[-1] if fallen else len(attacked) - 1
            label, x_adv = attacked[target]
            title = f"image {int(self.ids[i])}, {self.name(int(self.y[i]))}; {label}"
            pictures = list(self.pictures(i, x_adv[i : i + 1], int(said[target][i])))
            strips.append(Strip(tuple((text, _small(image)) for text, image in pictures), title))
        return tuple(strips)

    def name(self, label: int) -> str:
        return str(self.names[label]) if self.names is not None else f"class {label}"

    def pictures(self, i: int, x_adv: Tensor, says: int) -> Iterator[tuple[str, Tensor]]:
        """(caption, (3, H, W) in [0, 1]) of one image."""
        x, y, ids = self.x[i : i + 1], self.y[i : i + 1], self.ids[i : i + 1]
        defense = self.subject.defense
        yield f"clean: {self.name(int(y))}", x[0]
        yield f"perturbation, x{GAIN} around grey", _visible(x_adv - x)
        acts = isinstance(defense, InputDefense)
        yield ("attacked" if acts else f"attacked: says {self.name(says)}"), x_adv[0]
        if isinstance(defense, InputDefense):
            counter = defense.perturbation(x_adv, ids=ids, seed=self.subject.seeds.start)
            yield f"{self.cell.defense.label} adds, x{GAIN} around grey", _visible(counter)
            yield f"after {self.cell.defense.label}: says {self.name(says)}", (x_adv + counter)[0]
        for text, image in (("clean", x), ("attacked", x_adv)):
            heat = attention(self.subject.model, image, y)
            if heat is not None:
                yield f"attention for {self.name(int(y))}, {text}", heat[0]


def attention(model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """Text-guided attention maps (TGA-ZSR, 2410.21802, section 3.2) over the images.

    Tokens, each channel divided by its norm over the tokens, times the text embedding of the label; scaled to [0, 1],
    enlarged, and laid over the image in grey.

    Args:
        model: the undefended one.
        x: (N, 3, H, W); y: (N,).

    Returns:
        (N, 3, H, W) in [0, 1]; None for a model without patch tokens in a square.
    """
    embed, head = getattr(model, "embed_tokens", None), getattr(model, "head", None)
    if embed is None or head is None:
        return None
    try:
        with torch.no_grad():
            pooled, tokens = embed(x)
    except UsageError:  # its tower has no tokens
        return None
    side = int(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1] or side < 2 or x.shape[1] != 3:
        return None
    every = torch.cat([pooled[:, None], tokens], dim=1)
    every = every / torch.linalg.vector_norm(every, dim=1, keepdim=True).clamp_min(1e-12)
    text = nn.functional.normalize(head.embeddings.detach().to(every), dim=1)[y]
    score = (every[:, 1:] * text[:, None]).sum(dim=2)
    score = score - score.amin(dim=1, keepdim=True)
    score = score / score.amax(dim=1, keepdim=True).clamp_min(1e-12)
    size = tuple(x.shape[2:])
    heat = nn.functional.interpolate(score.reshape(-1, 1, side, side), size=size, mode="bilinear")
    return 0.4 * x.mean(dim=1, keepdim=True) + 0.6 * _heat(heat)


def _heat(values: Tensor) -> Tensor:
    """(N, 1, H, W) in [0, 1] as colours from dark to yellow."""
    from matplotlib import colormaps

    table = torch.tensor(colormaps["inferno"].resampled(256)(range(256)), dtype=torch.float32)[:, :3]
    return table.to(values.device)[values.mul(255).round().long()[:, 0]].permute(0, 3, 1, 2)


def _visible(delta: Tensor) -> Tensor:
    return (0.5 + GAIN * delta[0]).clamp(0, 1)


def _small(image: Tensor) -> Tensor:
    """uint8 on the CPU, three channels, at most :data:`SIDE` wide; small ones as they are."""
    image = image.detach().float().cpu()
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image
    if max(image.shape[1:]) > SIDE:
        scale = SIDE / max(image.shape[1:])
        image = nn.functional.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
    return image.clamp(0, 1).mul(255).round().to(torch.uint8).contiguous()


def exhibit_file(folder: Path, cell: int) -> Path:
    """Where a cell's exhibit is."""
    return folder / FOLDER / f"cell-{cell}.safetensors"


def identity(cell: Cell, facts: Facts) -> str:
    """Of what an exhibit is: the cell's name, threat model and fingerprint, hashed."""
    what = {"name": cell.name, "threat": asdict(cell.threat.threat), "facts": facts}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def write(path: Path, exhibit: Exhibit, of: str) -> None:
    """Write it, whole or not at all.

    Args:
        path: the file.
        exhibit: what is kept.
        of: its :func:`identity`.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = {
        f"{number}.{place}": image
        for number, strip in enumerate(exhibit.strips)
        for place, (_, image) in enumerate(strip.pictures)
    }
    head = {
        "attack": exhibit.attack,
        "images": exhibit.images,
        "traces": [asdict(trace) for trace in exhibit.traces],
        "strips": [
            {"title": strip.title, "captions": [text for text, _ in strip.pictures]} for strip in exhibit.strips
        ],
    }
    write_tensors(path, tensors, {"exhibit": json.dumps(head), "of": of})


def read(path: Path, of: str) -> Exhibit | None:
    """What :func:`write` wrote; None where there is none, or where it is of something else.

    Raises:
        UsageError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata.get("of") != of:
                return None
            head = json.loads(metadata["exhibit"])
            strips = tuple(
                Strip(
                    tuple((text, file.get_tensor(f"{number}.{place}")) for place, text in enumerate(strip["captions"])),
                    strip["title"],
                )
                for number, strip in enumerate(head["strips"])
            )
        traces = tuple(Trace(t["label"], tuple(t["middle"]), tuple(t["low"]), tuple(t["high"])) for t in head["traces"])
        return Exhibit(head["attack"], head["images"], traces, strips)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"exhibit {str(path)!r} cannot be read ({error}); delete it, and the page is without it."
        ) from error
