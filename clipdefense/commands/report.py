"""``clipdefense report``: the summaries and the page of a run, or of several together, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Runs' folders, shards and unfinished ones too.", metavar="FOLDER...")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, help="Where the files go; needed for several runs, else the run's own."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="The page; report.html in that folder otherwise.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The model or defence of the runs that the others are compared with."),
    ] = None,
) -> None:
    """Summaries (JSON, CSV, Markdown, LaTeX) and one self-contained HTML page of a run, also while it is under way.

    Several runs stand in one table where a label means the same in each of them.

    clipdefense report results/grid --baseline none

    clipdefense report results/grid results/mine --out results/both
    """
    from rich.console import Console

    from clipdefense.cli import check_places
    from clipdefense.errors import UsageError
    from clipdefense.runs.page import write_page
    from clipdefense.runs.results import read
    from clipdefense.runs.store import stores_in
    from clipdefense.runs.summary import write

    if out is None and len(folders) > 1:
        raise UsageError(f"{len(folders)} runs are to stand together; name a folder for their files with --out.")
    target = folders[0] if out is None else out
    if stores_in(target) and (len(folders) > 1 or target.resolve() != folders[0].resolve()):
        raise UsageError(
            f"--out {str(target)!r} holds a run, whose own summaries would be overwritten; name another folder."
        )
    check_places(html, target)
    runs = [read(folder, shards=True) for folder in folders]
    write(runs, target, baseline)
    page = write_page(runs, target / "report.html" if html is None else html, baseline=baseline)
    Console().print(f"wrote {page}; the summaries are in {target}", soft_wrap=True, markup=False, highlight=False)
