"""What a person watching a run sees, on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINES = 100  # at most so many of the epochs of a run get a line of their own
_SECONDS = 60.0  # between lines where nothing can be redrawn: a file, a cluster's log

_NO_TERM = {"step", "epoch", "lr", "gradient_norm"}


class TrainingProgress:
    """A bar, and below it every loss term and the last measured accuracies; a line that stays for each epoch.

    Where the output is no terminal there is no bar, but a line a minute. Nothing at all when quiet.
    """

    def __init__(self, title: str, total: int | None, done: int, epochs: int, show: bool) -> None:
        """
        Args:
            title: of the run.
            total: updates of the run, or None.
            done: updates made before.
            epochs: of the run.
            show: False for quiet.
        """
        self._console = Console(stderr=True, quiet=not show)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._title, self._total, self._epochs = title, total, epochs
        self._line, self._accuracies = Text(""), ""
        self._live = Live(get_renderable=self._drawn, console=self._console, transient=True)
        self._redraws = show and self._console.is_terminal
        self._last = time.monotonic()

    def _drawn(self) -> Group:
        return Group(self._bar, self._line)

    def __enter__(self) -> TrainingProgress:
        if self._redraws:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redraws:
            self._live.stop()

    def step(self, record: dict[str, float]) -> None:
        """One more update, with its record of :class:`clipdefense.training.state.History`."""
        self._accuracies = _accuracies(record) or self._accuracies
        late = not self._redraws and time.monotonic() - self._last > _SECONDS
        if not (self._redraws or late):
            return
        words = [f"epoch {record['epoch']:.0f}", *_terms(record), self._accuracies]
        self._line = Text("  ".join(filter(None, words)))
        self._bar.update(self._task, completed=record["step"])
        if late:
            total = "" if self._total is None else f"/{self._total}"
            self._print(f"{self._title} {record['step']:.0f}{total}  {self._line}")

    def epoch(self, record: dict[str, float]) -> None:
        """The end of an epoch, with its record."""
        number = int(record["epoch"])
        if number % max(self._epochs // _LINES, 1) and number != self._epochs:
            return
        words = [f"{self._title} epoch {number}/{self._epochs}", f"{record['step']:.0f} updates", *_terms(record)]
        held_out = _accuracies(record, "validation_", "held out")
        self._print("  ".join(filter(None, [*words, _accuracies(record), held_out])))

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _terms(record: dict[str, float]) -> list[str]:
    """``["ce 1.2", ...]``; the loss only where it is more than its one term."""
    shown = {name: value for name, value in record.items() if name not in _NO_TERM and "accuracy" not in name}
    if len(shown) == 2:
        shown.pop("loss", None)
    return [f"{name} {value:.4g}" for name, value in shown.items()]


def _accuracies(record: dict[str, float], prefix: str = "", of: str = "batch accuracy") -> str:
    parts = [(word, record.get(f"{prefix}{word}_accuracy")) for word in ("clean", "robust")]
    known = ", ".join(f"{word} {value:.1%}" for word, value in parts if value is not None)
    return f"{of}: {known}" if known else ""
