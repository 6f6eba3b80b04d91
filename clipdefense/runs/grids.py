"""The glance, the means and the tests as tables of text, the same on the page, in Markdown and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from clipdefense.evaluation.counts import counted
from clipdefense.evaluation.report import WITHHELD, Grid, Section, percent_of
from clipdefense.evaluation.words import attack_in_words
from clipdefense.runs.joint import Joint
from clipdefense.runs.sums import Line, Mean, Paired, threats_of

OVER_DATASETS = "mean over data sets"


def sections(
    joint: Joint, lines: Sequence[Line], found: Sequence[Mean], pairs: Sequence[Paired]
) -> tuple[Section | None, Section | None, Section | None]:
    """At a glance, the means, against a baseline; None where there is nothing of the kind."""
    return glance_section(joint, lines, found), means_section(joint, found), against_section(joint, pairs)


def glance_section(joint: Joint, lines: Sequence[Line], found: Sequence[Mean]) -> Section | None:
    """A row for each model and defence under its data set and in the mean, a column for each threat model."""
    if len(joint.everything) < 2:
        return None
    columns = ("clean", *threats_of(joint))
    rows: list[tuple[str, ...]] = []
    for dataset in dict.fromkeys(line.dataset for line in lines):
        rows.append((dataset,))
        rows += [(one.model, one.defense, one.clean, *one.robust) for one in lines if one.dataset == dataset]
    if found:
        rows.append((OVER_DATASETS,))
        rows += [(*names, *means_beside(joint, found, *names)) for names in judged(found)]
    note = "In %, with the 95 % Wilson interval: images still right under every attack that was tried, and every draw."
    if any(one.missing for one in joint.everything):
        note += (
            " A number marked (k of n) is of k of n images: its combination is not finished. (all n) marks a finished "
            "one beside it."
        )
    note += _differing(joint)
    numbers = frozenset(range(2, 2 + len(columns)))
    return Section("At a glance", note, grid=Grid(("model", "defence", *columns), tuple(rows), numbers))


def _differing(joint: Joint) -> str:
    """What has to be said where one worst case is over more attacks than another."""
    if not joint.differing:
        return ""
    what = ", ".join(joint.differing)
    return (
        f" The runs differ in {what}: each number is over what its own run tried, and a difference may come from there."
    )


def means_section(joint: Joint, found: Sequence[Mean]) -> Section | None:
    """Means over data sets, under the model, defence and threat model that they are of."""
    if not found:
        return None
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for names, group in groupby(found, key=lambda mean: (mean.model, mean.defense, mean.threat)):
        rows.append((" | ".join(names),))
        for mean in group:
            if mean.bottom:
                strong.add(len(rows))
            rows.append((attack_in_words(mean.attack), mean.attacked, mean.counted, mean_text(mean)))
    note = (
        "Each data set counts once; the 95 % interval (Zou and Donner, from the Wilson limits) is about other images "
        "of the same data sets."
    )
    if joint.protocol is not None and joint.protocol.headline:
        note += f" The protocol's own mean is over {counted(len(joint.protocol.headline), 'data set')}."
    if any(mean.missing for mean in found):
        left = dict.fromkeys(label for mean in found for label in mean.missing)
        note += f" Combinations that are not finished are left out of the means ({', '.join(left)})."
    header = ("attack", "what the attacker had", "data sets", "mean accuracy")
    return Section("Mean over data sets", note, grid=Grid(header, tuple(rows), frozenset({2, 3}), frozenset(strong)))


def judged(found: Sequence[Mean]) -> tuple[tuple[str, str], ...]:
    """Each model and defence of the means."""
    return tuple(dict.fromkeys((mean.model, mean.defense) for mean in found))


def means_beside(joint: Joint, found: Sequence[Mean], model: str, defense: str) -> list[str]:
    """A model's and a defence's means as text: clean, over the most data sets, and the worst case under each threat."""
    own = [mean for mean in found if (mean.model, mean.defense) == (model, defense)]
    clean = max((mean for mean in own if mean.attack == "clean"), key=lambda mean: len(mean.datasets), default=None)
    worst = {mean.threat: mean for mean in own if mean.bottom}  # the last bottom line is the one over everything
    return [_beside(mean) for mean in (clean, *(worst.get(threat) for threat in threats_of(joint)))]


def _beside(mean: Mean | None) -> str:
    if mean is None:
        return ""
    caveat = re.search(r"\((.*)\)$", mean.attack) if mean.bottom else None
    partial = f"({mean.counted} data sets)" if mean.missing else ""
    return " ".join(filter(None, (mean_text(mean), caveat[1] if caveat else "", partial)))


def mean_text(mean: Mean) -> str:
    """The number with its interval, or that it is withheld."""
    return WITHHELD if mean.accuracy is None or mean.interval is None else percent_of(mean.accuracy, mean.interval)


def against_section(joint: Joint, pairs: Sequence[Paired]) -> Section | None:
    """McNemar's tests, under the cell and its baseline."""
    if not pairs:
        return None
    note = (
        "On the same images: how many only the first gets right (+), how many only the baseline (-), and the p of "
        "McNemar's exact test that either is as likely. A randomised defence is right where it is on every draw."
    )
    note += _differing(joint)
    header = ("attack", "n", "gained", "lost", "p")
    return Section("Against a baseline", note, grid=Grid(header, tuple(_pairs(pairs)), frozenset({1, 2, 3, 4})))


def _pairs(pairs: Sequence[Paired]) -> Iterator[tuple[str, ...]]:
    for (cell, differs), group in groupby(pairs, key=lambda pair: (pair.cell, pair.differs)):
        yield (f"{cell}, against {differs}",)
        for pair in group:
            if pair.p is None:
                yield pair.what, WITHHELD, "", "", ""
            else:
                n = f"{pair.n} of {pair.of}" if pair.partial else str(pair.n)
                yield pair.what, n, f"+{pair.gained}", f"-{pair.lost}", f"{pair.p:.3g}"
