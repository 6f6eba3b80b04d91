"""``clipdefense report``: a run's summaries and its page, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="The page; report.html in the folder otherwise.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The model or defence of the run that the others are compared with."),
    ] = None,
) -> None:
    """Summaries (JSON, CSV, Markdown) and one self-contained HTML page of a run, also while it is under way.

    clipdefense report results/grid --baseline none
    """
    from rich.console import Console

    from clipdefense.cli import check_places
    from clipdefense.runs.page import write_page
    from clipdefense.runs.results import write_summary

    check_places(html)
    write_summary(folder)
    page = write_page(folder, html, baseline=baseline)
    Console().print(f"wrote {page}", soft_wrap=True, markup=False, highlight=False)
