"""``clipdefense verify``: every "not robust" of a run proved again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipdefense.cli import Device, Quiet, check_places


def verify(
    folder: Annotated[Path, typer.Argument(help="A run made with --save-adv.")],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Draws that judge a randomised defence; the run's otherwise.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Where the run's one model is found here.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Where the run's one data set is found here.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward; the run's otherwise.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", dir_okay=False, help="Write the proofs as JSON here; verify.json in the run otherwise."),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Classify every image that a run calls not robust again, one forward each; exit code 1 where a claim fails.

    clipdefense verify results/grid
    """
    from rich.console import Console

    from clipdefense.runs.show import proofs
    from clipdefense.runs.verify import verify as prove

    check_places(out)
    with Console(stderr=True, quiet=quiet).status("loading") as status:
        found = prove(
            folder,
            device=device,
            batch_size=batch_size,
            seeds=seeds,
            model=model,
            data=data,
            out=out,
            progress=status.update,
        )
    proofs(Console(), found)
    if not all(proof.holds for proof in found):
        raise typer.Exit(1)
