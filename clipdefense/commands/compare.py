"""``clipdefense compare``: which images changed verdict between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipdefense.cli import Device, check_places


def compare(
    a: Annotated[Path, typer.Argument(help="A run's folder.")],
    b: Annotated[Path, typer.Argument(help="Another's, on the same data set.")],
    cell_a: Annotated[str | None, typer.Option("--cell-a", help="A cell of A by name, where it has several.")] = None,
    cell_b: Annotated[str | None, typer.Option("--cell-b", help="A cell of B by name.")] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Also try A's perturbations (--save-adv) on B's model.")
    ] = False,
    across_threats: Annotated[
        bool, typer.Option("--across-threats", help="Compare cells of another norm or eps, too.")
    ] = False,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", dir_okay=False, help="Write the result as JSON here.")] = None,
) -> None:
    """Which images are right in one run and wrong in the other, with McNemar's exact test.

    clipdefense compare results/undefended results/defended --transfer
    """
    from rich.console import Console

    from clipdefense.files import write_json
    from clipdefense.runs.compare import compare as changes_of
    from clipdefense.runs.compare import transfer as try_on
    from clipdefense.runs.show import changes, transfers

    check_places(out)
    found = changes_of(a, b, cell_a=cell_a, cell_b=cell_b, across_threats=across_threats)
    changes(Console(), found)
    tried = try_on(a, b, cell_a=cell_a, cell_b=cell_b, device=device) if transfer else []
    transfers(Console(), tried)
    if out is not None:
        write_json(out, {"changes": [c.to_dict() for c in found], "transfer": [t.to_dict() for t in tried]})
