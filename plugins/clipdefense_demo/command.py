"""``clipdefense demo``. Only typer is imported here, so that ``clipdefense --help`` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the page and the JSON file.")] = Path(
        "clipdefense-demo"
    ),
    n: Annotated[int, typer.Option("--n", min=20, max=400, help="Test images.")] = 300,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
) -> None:
    """Attack a small CLIP, defend it with TTC and TeCoA, and read the verdict. No network, about two minutes.

    The data are scikit-learn's real handwritten digits. The model is trained on first use and kept in the user's
    cache folder (about 14 MB; CLIPDEFENSE_CACHE names another).
    """
    from clipdefense_demo.run import run

    run(out, n=n, quiet=quiet)
