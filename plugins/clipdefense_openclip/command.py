"""``clipdefense export-open-clip``. Only typer is imported here, so that ``clipdefense --help`` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_open_clip(
    model: Annotated[str, typer.Option("--model", "-m", help="open_clip:ARCHITECTURE@FILE, the model to export.")],
    out: Annotated[Path, typer.Option("--out", dir_okay=False, help="The checkpoint to write, *.safetensors.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Tag or file that has the text tower; what the model was made from if not given."),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", help="Prompt of the model's classes, with {}. Repeatable.")
    ] = None,
    tower_only: Annotated[bool, typer.Option("--tower-only", help="The image tower alone.")] = False,
) -> None:
    """Write a hardened model as a checkpoint for plain open_clip.

    It refuses, naming what would be lost, where open_clip could not give the same answers. Example:

    clipdefense export-open-clip -m open_clip:ViT-B-32-quickgelu@hardened/model.safetensors --out clip.safetensors
    """
    from rich.console import Console

    from clipdefense_openclip.export import export_open_clip as export
    from clipdefense_openclip.export import read_for_export

    found = read_for_export(model, base=base, templates=template, tower_only=tower_only)
    written = export(found, out, tower_only=tower_only)
    use = "pretrained_image_path" if tower_only else "pretrained"
    line = f"wrote {written}, for open_clip.create_model(..., {use}={str(written)!r})"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)
