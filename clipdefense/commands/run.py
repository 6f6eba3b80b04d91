"""``clipdefense run``: models x defences x datasets x threat models, resumable and in shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdefense.cli import Device, Options, Quiet, Size, Split
from clipdefense.errors import UsageError

if TYPE_CHECKING:
    from clipdefense.runs.config import RunConfig
    from clipdefense.runs.run import Progress


Out = Annotated[Path, typer.Option("--out", file_okay=False, help="The run's folder; an unfinished run in it goes on.")]
File = Annotated[Path | None, typer.Argument(help="A TOML file; flags replace what it says.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="plugin:name or plugin:name@weights. Repeatable.")
]
Datasets = Annotated[list[str] | None, typer.Option("--data", "-d", help="plugin:name. Repeatable.")]
Defenses = Annotated[list[str] | None, typer.Option("--defense", help="A test-time defence, or none. Repeatable.")]
Views = Annotated[
    list[str] | None, typer.Option("--view", help="An adaptive view of the defence, repeatable; all otherwise.")
]
Eot = Annotated[int | None, typer.Option("--eot", min=1, help="Gradient draws a step on adaptive views.")]
Radii = Annotated[list[str] | None, typer.Option("--eps", help="Radius in [0, 1] pixels, e.g. 1/255. Repeatable.")]
RadiiNorm = Annotated[str | None, typer.Option("--norm", help="linf or l2, of each --eps.")]
Attacks = Annotated[
    list[str] | None, typer.Option("--attack", "-a", help="A name, and options: pgd,steps=100. Repeatable.")
]
AdaptiveSuite = Annotated[
    bool | None, typer.Option("--adaptive/--no-adaptive", help="All that an adaptive evaluation attacks.")
]
Images = Annotated[int | None, typer.Option("--n", min=1, help="Number of images, evenly over the classes.")]
VerdictSeeds = Annotated[int | None, typer.Option(min=1, help="Draws that judge a randomised defence.")]
RunSeed = Annotated[int | None, typer.Option(min=0, max=2**62, help="Of images, attacks and defence noise.")]
SaveAdv = Annotated[
    bool | None, typer.Option("--save-adv/--no-save-adv", help="Keep the perturbation that broke each image.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a forward; halved when memory runs out.")]
Part = Annotated[str | None, typer.Option("--shard", help="i/n: do every n-th work unit, i from 0 to n-1.")]


def run(
    out: Out,
    file: File = None,
    model: Models = None,
    data: Datasets = None,
    defense: Defenses = None,
    option: Options = None,
    view: Views = None,
    eot: Eot = None,
    eps: Radii = None,
    norm: RadiiNorm = None,
    attack: Attacks = None,
    adaptive: AdaptiveSuite = None,
    n: Images = None,
    split: Split = None,
    size: Size = None,
    verdict_seeds: VerdictSeeds = None,
    seed: RunSeed = None,
    save_adv: SaveAdv = None,
    batch_size: BatchSize = None,
    shard: Part = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate models x defences x datasets x threat models; killed at any moment, the same command goes on.

    Verdicts are kept image by image in the folder, with a summary as JSON, CSV and Markdown. Shards may share a folder
    (`clipdefense merge` joins them), and `accelerate launch` or `torchrun` gives each process one. Example:

    clipdefense run grid.toml --out results/grid --shard 0/4
    """
    from clipdefense.runs.run import run as begin
    from clipdefense.runs.units import Shard

    tables = {
        "models": model,
        "datasets": _datasets(data, n, split, size),
        "defenses": _defenses(defense, option, view, eot),
        "threats": _threats(eps, norm),
        "attacks": attack,
    }
    config = _config(
        file,
        tables,
        adaptive=adaptive,
        verdict_seeds=verdict_seeds,
        seed=seed,
        save_adv=save_adv,
        batch_size=batch_size,
    )
    part = None if shard is None else Shard.parse(shard)
    with _shown(quiet) as progress:
        done = begin(config, out, shard=part, device=device, progress=progress)
    _tell(out, done)


def _config(file: Path | None, tables: dict[str, Any], **settings: Any) -> RunConfig:
    from clipdefense.runs.config import read_config

    return read_config({} if file is None else file, **tables, **settings)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _datasets(data: list[str] | None, n: int | None, split: str | None, size: int | None) -> list[Any] | None:
    more = _given(n=n, split=split, size=size)
    if data is None and more:
        raise UsageError(f"--{next(iter(more))} is for the data set of --data; in a TOML file it is a key of datasets.")
    return None if data is None else [{"spec": spec, **more} for spec in data]


def _defenses(
    defense: list[str] | None, option: list[str] | None, view: list[str] | None, eot: int | None
) -> list[Any] | None:
    options = dict(_pair(text) for text in option or ())
    more = _given(options=options or None, views=view or None, eot=eot)
    if more and (defense is None or len(defense) != 1):
        raise UsageError(
            f"--option, --view and --eot are for the one defence of --defense, and there are {len(defense or ())}; "
            "several have their own in a TOML file, under [[defenses]]."
        )
    return None if defense is None else [{"spec": spec, **more} for spec in defense]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--option {text!r} is not of the form key=value.")
    return key.strip().replace("-", "_"), value.strip()


def _threats(eps: list[str] | None, norm: str | None) -> list[Any] | None:
    if eps is None and norm is not None:
        raise UsageError("--norm is for --eps; in a TOML file it is a key of threats.")
    return None if eps is None else [{"eps": value, **_given(norm=norm)} for value in eps]


class _shown:
    """A bar of work units on stderr, with what runs now; nothing where it is to be quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        console = Console(stderr=True)
        self.bar = Bar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task("loading", total=None)

    def __enter__(self) -> Any:
        self.bar.start()

        def show(status: Progress) -> None:
            self.bar.update(self.task, completed=status.done, total=status.total, description=status.what)

        return show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _tell(out: Path, done: int) -> None:
    """The tables of a run in one piece; of a shard, what comes next."""
    from rich.console import Console
    from rich.markup import escape

    from clipdefense.runs.show import tables
    from clipdefense.runs.store import stores_in

    console = Console()
    if (out / "summary.json").exists() and len(stores_in(out)) == 1:
        tables(console, out)
        console.print(escape(f"{done} work units now; verdicts and summaries are in {out}"), soft_wrap=True)
    else:
        console.print(
            escape(f"{done} work units of this shard now; when all are done: clipdefense merge {out} --out MERGED"),
            soft_wrap=True,
        )
