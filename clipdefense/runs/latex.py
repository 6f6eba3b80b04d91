"""A run as one LaTeX table: a row for each model and defence, data sets x threat models across."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from clipdefense.runs.grids import mean_text
from clipdefense.runs.joint import Joint
from clipdefense.runs.sums import Line, Mean, threats_of

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def latex(joint: Joint, lines: Sequence[Line], found: Sequence[Mean]) -> str:
    """A plain ``tabular``, which needs no package.

    Args:
        joint: the runs.
        lines: of their glance.
        found: their means over data sets; a last group of columns where there are any.

    Returns:
        LaTeX. Numbers are in %, clean and worst case per image, with their 95 % intervals, their caveats, and their
        image counts where they are not finished.
    """
    threats = threats_of(joint)
    columns = ("clean", *threats)
    datasets = tuple(dict.fromkeys(line.dataset for line in lines))
    groups = [*datasets, *(["mean over data sets"] if found else [])]
    rows = []
    for model, defense in dict.fromkeys((line.model, line.defense) for line in lines):
        own = {
            line.dataset: (line.clean, *line.robust) for line in lines if (line.model, line.defense) == (model, defense)
        }
        values = [value for dataset in datasets for value in own.get(dataset, ("",) * len(columns))]
        values += _means(found, model, defense, threats) if found else []
        rows.append(_row((model, defense, *values)))
    spans = [rf"\multicolumn{{{len(columns)}}}{{c}}{{{_escaped(group)}}}" for group in groups]
    return "\n".join(
        [
            "% Accuracy in %: clean, and the worst case per image over all attacks that were tried, with intervals",
            "% (95 %: Wilson; of means: Zou and Donner). (24 of 40): not finished, of so many images alone.",
            rf"\begin{{tabular}}{{ll{('r' * len(columns)) * len(groups)}}}",
            r"\hline",
            " & ".join(["", "", *spans]).lstrip() + r" \\",
            _row(("model", "defence", *columns * len(groups))),
            r"\hline",
            *rows,
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def _means(found: Sequence[Mean], model: str, defense: str, threats: Sequence[str]) -> list[str]:
    """The clean mean over the most data sets, and the worst case under each threat model."""
    own = [mean for mean in found if (mean.model, mean.defense) == (model, defense)]
    clean = max((mean for mean in own if mean.attack == "clean"), key=lambda mean: len(mean.datasets), default=None)
    worst = {threat: list(group)[-1] for threat, group in groupby(own, key=lambda mean: mean.threat)}
    return [_mean(mean) for mean in (clean, *(worst.get(threat) for threat in threats))]


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return ""
    caveat = re.search(r"\(.*\)$", mean.attack) if mean.bottom else None
    partial = f"({mean.counted} data sets)" if mean.missing else ""
    return " ".join(filter(None, (mean_text(mean), caveat[0][1:-1] if caveat else "", partial)))


def _row(texts: Sequence[str]) -> str:
    return " & ".join("{" + _escaped(text) + "}" if text.startswith("[") else _escaped(text) for text in texts) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
