"""``clipdefense audit``: twenty checks before a robust accuracy is believed; a build can fail on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdefense.cli import Data, Device, Eps, Model, NormName, Options, Quiet, Seed, Size, Split

if TYPE_CHECKING:
    from clipdefense.audit import Audit


def audit(
    model: Model,
    data: Data,
    eps: Eps = "1/255",
    norm: NormName = "linf",
    defense: Annotated[str | None, typer.Option("--defense", help="A test-time defence to audit, e.g. ttc.")] = None,
    option: Options = None,
    n: Annotated[
        int, typer.Option("--n", min=8, max=64, help="At most so many images, drawn evenly over the classes.")
    ] = 64,
    split: Split = None,
    size: Size = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", help="adaptive=PERCENT or transfer=PERCENT; less gives exit code 1. Repeatable."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", dir_okay=False, help="Write the result as JSON here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Twenty checks of a model or of a test-time defence around it; INVALID withholds the robust accuracy.

    Exit code 1 where the audit is INVALID or an accuracy is under its floor. Example:

    clipdefense audit -m demo:digits -d digits:test --eps 6/255 --fail-under adaptive=30
    """
    from rich.console import Console

    from clipdefense import cli
    from clipdefense.audit import Floor, Verdict, show
    from clipdefense.errors import UsageError
    from clipdefense.files import write_json
    from clipdefense.threat import ThreatModel, parse_eps

    threat = ThreatModel(norm, parse_eps(eps))  # type: ignore[arg-type]
    floors = [Floor.parse(text) for text in fail_under or ()]
    target = cli._device(device)
    if option and defense is None:
        raise UsageError("--option is for a defence; name one with --defense.")
    cli.check_places(out)
    cls = None if defense is None else cli._kind(defense, "test-time")
    classifier, images = cli._load(model, data, None, seed, split, size, target)
    chosen = None if cls is None else cli._construct(cls, str(defense), classifier, **cli._options(option))
    with Console(stderr=True, quiet=quiet).status("loading"):
        x, y = (tensor.to(target) for tensor in images.sample(min(n, len(images)), seed).tensors())
    result = examine(classifier, x, y, threat, chosen, seed, quiet)
    console = Console()
    missed = [text for text in (floor.missed(result) for floor in floors) if text]
    show(console, result, missed)
    if out is not None:
        of = {"model": model, "data": data, "split": split, "size": size, "fail_under": fail_under or []}
        write_json(out, {**of, **result.to_dict(), "missed": missed})
    if missed or result.verdict is Verdict.INVALID:
        raise typer.Exit(1)


def examine(model: Any, x: Any, y: Any, threat: Any, defense: Any, seed: int, quiet: bool) -> Audit:
    """The audit, with the check it is at on stderr."""
    from rich.console import Console

    from clipdefense.audit import audit as run

    with Console(stderr=True, quiet=quiet).status("audit") as status:
        return run(model, x, y, threat, defense=defense, seed=seed, progress=status.update)
