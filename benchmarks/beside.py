"""Published numbers beside ours: which of our rows each of them is about, and how far apart they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from clipdefense.attacks.autoattack import stages_of
from clipdefense.data.protocols import Protocol
from clipdefense.evaluation.ensemble import AFTER
from clipdefense.evaluation.report import WITHHELD, kept
from clipdefense.evaluation.results import NAIVE, Evaluation, Row
from clipdefense.evaluation.runner import AttackSpec
from clipdefense.evaluation.statistics import macro
from clipdefense.runs.config import NO_DEFENSE
from clipdefense.runs.results import CellResult
from clipdefense.threat import format_eps

Judged = Mapping[str, Mapping[str, Evaluation]]
"""radius -> data set -> what was measured."""


@dataclass(frozen=True)
class Measured:
    """An evaluation of ours.

    Attributes:
        judged: the defence, or ``"undefended"``.
        dataset: as the protocol calls it.
        evaluation: of it, at one radius.
    """

    judged: str
    dataset: str
    evaluation: Evaluation

    @classmethod
    def of(cls, cell: CellResult) -> Measured:
        """A run's cell."""
        what = cell.cell
        plain = what.defense.spec == NO_DEFENSE
        return cls("undefended" if plain else what.defense.label, what.dataset.spec, cell.evaluation)


@dataclass(frozen=True)
class Line:
    """One data set, or a mean over several.

    Attributes:
        data: its name, or ``"mean of 16"``.
        ours: accuracy with its 95 % interval, in %; empty where there is none to set beside.
        published: in %, None where it was not.
        difference: ours less theirs, in points.
    """

    data: str
    ours: str
    published: float | None
    difference: float | None


@dataclass(frozen=True)
class Beside:
    """A published row and ours.

    Attributes:
        judged: ours, as :class:`Measured` calls it.
        method, attack, eps, source, note: of the publication.
        lines: data sets first.
    """

    judged: str
    method: str
    attack: str
    eps: str
    source: str
    note: str
    lines: tuple[Line, ...]


def published_name(attack: str) -> str:
    """What ``published.json`` calls an attack that is written as a run writes it.

    ``autoattack,stages=apgd-ce+apgd-dlr`` is ``apgd-ce and apgd-dlr``, AutoAttack's standard version ``AutoAttack``;
    of another attack steps and objective count.
    """
    spec = AttackSpec.parse(attack.removeprefix(AFTER))
    if spec.name == "autoattack":
        version, stages = spec.option("version", "standard"), spec.option("stages")
        if stages is not None:
            return " and ".join(name for name, _, _ in stages_of(version, stages))
        return "AutoAttack" if version == "standard" else str(spec)
    return str(AttackSpec(spec.name, tuple(pair for pair in spec.options if pair[0] in ("steps", "objective"))))


def radii(eps: str) -> list[str]:
    """The radii of a published row, of which it is the mean; none of a clean one."""
    return re.findall(r"[\d.]+/255", eps)


def join(measured: Sequence[Measured], entries: Sequence[Mapping[str, Any]], protocol: Protocol) -> list[Beside]:
    """One for each thing judged and each published row of which the attack and the radius are among ours.

    Args:
        measured: under the protocol.
        entries: of ``published.json``, under the same one.
        protocol: what says over which data sets a published mean runs, and on which of them the attack is another.
    """
    ours: dict[str, dict[str, dict[str, Evaluation]]] = {}
    for each in measured:
        of_radius = ours.setdefault(each.judged, {}).setdefault(format_eps(each.evaluation.threat.eps), {})
        of_radius[each.dataset] = each.evaluation
    found = []
    for label, judged in ours.items():
        for entry in entries:
            if lines := _lines(judged, entry, protocol):
                names = {key: str(entry[key]) for key in ("method", "attack", "eps", "source", "note")}
                found.append(Beside(label, **names, lines=tuple(lines)))
    return found


def _lines(judged: Judged, entry: Mapping[str, Any], protocol: Protocol) -> list[Line]:
    """The data sets that both have, and the mean; none where ours has not the attack or not the radius."""
    wanted = radii(entry["eps"]) or list(judged)[:1]  # any radius has the clean images
    if not set(wanted) <= judged.keys():
        return []
    ours: dict[str, list[Row]] = {}
    hidden = set()
    for dataset in judged[wanted[0]]:
        evaluations = [judged[radius][dataset] for radius in wanted if dataset in judged[radius]]
        rows = [_row(each, entry["attack"], dataset, protocol) for each in evaluations]
        if len(rows) == len(wanted) and None not in rows:
            ours[dataset] = [row for row in rows if row is not None]
            if not all(kept(each, row) for each, row in zip(evaluations, ours[dataset])):
                hidden.add(dataset)
    if not ours:
        return []
    theirs = entry["accuracy"]
    lines = [_line(name, {name: ours[name]}, theirs[name], name in hidden) for name in ours if name in theirs]
    whole = dict(protocol.means).get(entry.get("over", ""), protocol.headline)
    here = {name: rows for name, rows in ours.items() if name in whole}
    complete = len(here) == len(whole)
    if len(here) > 1 and not (complete and "mean" in theirs):
        both = [theirs[name] for name in here if name in theirs]
        mean = sum(both) / len(both) if len(both) == len(here) else None
        lines.append(_line(f"mean of {len(here)}", here, mean, bool(hidden & here.keys())))
    if "mean" in theirs:
        some = here if complete else {}
        lines.append(_line(f"mean of {len(whole)}", some, theirs["mean"], bool(hidden & some.keys())))
    return lines


def _row(evaluation: Evaluation, attack: str, dataset: str, protocol: Protocol) -> Row | None:
    """Our row of a published attack: on the undefended model, which is whom the publications attack."""
    found = {"clean": evaluation.clean}
    chain: tuple[str, ...] = ()
    for row in evaluation.rows:
        if row.kind in NAIVE:
            name = published_name(row.attack)
            chain = (*chain, name) if row.attack.startswith(AFTER) else (name,)
            found.setdefault(" and ".join(chain), row)  # the protocol's own attacks come first
    if attack not in found and protocol.rule(dataset).attacks:
        first, _, more = attack.partition(" and ")  # of a suite, a data set of two classes gets the first attack alone
        attack = first if more else attack
    return found.get(attack)


def _line(data: str, ours: Mapping[str, Sequence[Row]], published: float | None, hidden: bool) -> Line:
    if hidden or not ours:
        return Line(data, WITHHELD if hidden else "", published, None)
    over = [sum(row.accuracy for row in rows) / len(rows) for rows in ours.values()]
    mean, interval = macro([(share, rows[0].correct.shape[1]) for share, rows in zip(over, ours.values())])
    text = f"{100 * mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return Line(data, text, published, None if published is None else round(100 * mean - published, 2))


def table(joined: Sequence[Beside], protocol: str) -> Table:
    """A row for each published one, with a line a data set in it and two columns for each thing judged."""
    judged = list(dict.fromkeys(row.judged for row in joined))
    rows: dict[tuple[str, ...], dict[str, Beside]] = {}
    for row in joined:
        key = (row.method, row.attack, row.eps, "; ".join(filter(None, (row.source, row.note))))
        rows.setdefault(key, {})[row.judged] = row
    said = list(dict.fromkeys(key[-1] for key in rows))
    caption = "\n".join(f"{number} {text}" for number, text in enumerate(said, 1))
    shown = Table(title=f"Ours beside what was published under {protocol}, in %", title_justify="left")
    shown.caption, shown.caption_justify = escape(caption), "left"
    for column in ("method", "attack", "eps", "on"):
        shown.add_column(column)
    shown.add_column("published", justify="right", no_wrap=True)
    for name in judged:
        shown.add_column(escape(f"ours: {name}"), justify="right")
        shown.add_column("difference", justify="right", no_wrap=True)
    shown.add_column("source", justify="right")
    for (*names, source), found in rows.items():
        lines = dict.fromkeys(line.data for row in found.values() for line in row.lines)
        by_name = {name: {line.data: line for line in row.lines} for name, row in found.items()}
        theirs = {line.data: line.published for row in found.values() for line in row.lines}
        texts = [[*lines], ["-" if theirs[data] is None else f"{theirs[data]:.2f}" for data in lines]]
        for name in judged:
            ours = [by_name.get(name, {}).get(data) for data in lines]
            texts.append([line.ours if line is not None and line.ours else "-" for line in ours])
            texts.append(
                ["" if line is None or line.difference is None else f"{line.difference:+.1f}" for line in ours]
            )
        shown.add_row(*map(escape, (*names, *map("\n".join, texts))), str(said.index(source) + 1))
    return shown
