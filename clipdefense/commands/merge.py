"""``clipdefense merge``: shards joined into one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders of shards, or their store files.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the joined run.")],
) -> None:
    """Join the shards of one run; refuses shards that overlap or that were made otherwise, naming the field.

    clipdefense merge results/grid --out results/grid-merged
    """
    from rich.console import Console

    from clipdefense.runs.merge import merge as join
    from clipdefense.runs.page import write_page
    from clipdefense.runs.terminal import tables

    join(sources, out)
    page = write_page(out)
    tables(Console(), out, page)
    Console().print(
        f"verdicts and summaries are in {out}, the page is {page}", soft_wrap=True, markup=False, highlight=False
    )
