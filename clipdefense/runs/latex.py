"""A run as one LaTeX table: a row for each model and defence, data sets x threat models across."""

from __future__ import annotations

from collections.abc import Sequence

from clipdefense.runs.grids import OVER_DATASETS, means_beside
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
    columns = ("clean", *threats_of(joint))
    datasets = tuple(dict.fromkeys(line.dataset for line in lines))
    groups = [*datasets, *([OVER_DATASETS] if found else [])]
    rows = []
    for model, defense in dict.fromkeys((line.model, line.defense) for line in lines):
        own = {
            line.dataset: (line.clean, *line.robust) for line in lines if (line.model, line.defense) == (model, defense)
        }
        values = [value for dataset in datasets for value in own.get(dataset, ("",) * len(columns))]
        values += means_beside(joint, found, model, defense) if found else []
        rows.append(_row((model, defense, *values)))
    spans = [rf"\multicolumn{{{len(columns)}}}{{c}}{{{_escaped(group)}}}" for group in groups]
    return "\n".join(
        [
            "% Accuracy in %: clean, and the worst case per image over all attacks that were tried, with intervals",
            "% (95 %: Wilson; of means: Zou and Donner). (24 of 40): not finished, of these alone; (all 40): finished.",
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


def _row(texts: Sequence[str]) -> str:
    return " & ".join("{" + _escaped(text) + "}" if text.startswith("[") else _escaped(text) for text in texts) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
