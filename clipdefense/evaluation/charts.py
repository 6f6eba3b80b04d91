"""Figures and pictures of a page: SVG whose ink is the page's own, legible on light and dark, and PNG in the page."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipdefense.threat import format_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # in the figure; `currentColor` on the page
COLOURS = ("#2f7ed8", "#e07b00", "#1a9c5b", "#c2449b", "#8b6fd8", "#b8860b", "#d8493f", "#2aa5a5")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Legible on white and on near-black, and told apart by marks where colours are not."""


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps under one attack: points are (eps, accuracy, low, high)."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Trace:
    """An attack's loss from step to step, over a few images.

    Attributes:
        label: what was attacked.
        middle, low, high: median and quartiles of the images' cross-entropy, in nats, a value each step.
    """

    label: str
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def draw_curves(curves: Sequence[Curve]) -> Figure:
    """Accuracy in % against eps, each curve with its band."""
    figure, axes = _figure()
    for number, curve in enumerate(curves):
        eps, accuracy, low, high = (list(values) for values in zip(*curve.points))
        band = ([100 * value for value in low], [100 * value for value in high])
        _line(axes, number, curve.label, eps, [100 * value for value in accuracy], band)
    ticks = sorted({point[0] for curve in curves for point in curve.points})
    axes.set_xticks(ticks, [format_eps(tick) for tick in ticks])
    axes.set_xlabel("eps")
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(-2, 102)
    return _finish(figure, axes)


def draw_traces(traces: Sequence[Trace]) -> Figure:
    """Cross-entropy in nats against the attack's step."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure()
    for number, trace in enumerate(traces):
        steps = list(range(len(trace.middle)))
        _line(axes, number, trace.label, steps, list(trace.middle), (list(trace.low), list(trace.high)))
    axes.set_xlabel("step of the attack")
    axes.set_ylabel("cross-entropy, nats")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return _finish(figure, axes)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    return figure, figure.subplots()


def _line(
    axes: Axes,
    number: int,
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    band: tuple[Sequence[float], Sequence[float]],
) -> None:
    colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
    axes.plot(x, y, marker=mark, markersize=5, markevery=max(1, len(x) // 10), label=label, color=colour)
    axes.fill_between(x, *band, alpha=0.15, color=colour, linewidth=0)


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.25, color=INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))
    figure.legend(loc="outside lower left", fontsize=9, frameon=False, labelcolor=INK, ncols=1)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element on a transparent ground, its ink taken from the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": "clipdefense"}):  # the same figure is the same text
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    # every figure numbers its parts from the start, and a page has several: a digest of the figure keeps them apart
    return _apart(text[text.index("<svg") :].replace(INK, "currentColor"))


def _apart(text: str) -> str:
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{mark}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{mark}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{mark}-\1)", text)


def png(image: Tensor) -> str:
    """A (3, H, W) picture, float in [0, 1] or uint8, as a data URI."""
    from PIL import Image

    if image.is_floating_point():
        image = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
