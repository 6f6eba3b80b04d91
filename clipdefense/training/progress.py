"""What a person watching a run sees."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar with every loss term and the last measured accuracies; nothing at all when quiet."""

    def __init__(self, title: str, total: int | None, done: int, show: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            disable=not show,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, terms="")
        self._accuracies = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, record: dict[str, float]) -> None:
        """One more update, with its record of :class:`clipdefense.training.state.History`."""
        if "clean_accuracy" in record:
            clean, robust = record["clean_accuracy"], record["robust_accuracy"]
            self._accuracies = f"  batch accuracy: clean {clean:.0%}, robust {robust:.0%}"
        hidden = {"step", "epoch", "lr", "gradient_norm", "clean_accuracy", "robust_accuracy"}
        if len(record.keys() - hidden) == 2:  # one term, and the loss which equals it
            hidden.add("loss")
        terms = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in hidden)
        self._bar.update(self._task, advance=1, terms=f"epoch {record['epoch']:.0f}  {terms}{self._accuracies}")
