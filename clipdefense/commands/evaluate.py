"""``clipdefense evaluate``: models x defences x data sets x threat models, kept in a folder or shown and forgotten."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdefense.cli import Device, Options, Quiet, Size, Split, check_places, split_option
from clipdefense.errors import UsageError

if TYPE_CHECKING:
    from clipdefense.runs.config import RunConfig
    from clipdefense.runs.run import Progress

File = Annotated[Path | None, typer.Argument(help="A TOML file; flags replace what it says.")]
Folder = Annotated[
    Path | None,
    typer.Option("--run", file_okay=False, help="Keep every verdict in this folder; an unfinished run in it goes on."),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="plugin:name@weights, e.g. open_clip:ViT-B-32-quickgelu@openai. Repeatable."),
]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--data", "-d", help="plugin:name, e.g. torchvision:cifar10; a protocol's own name. Repeatable."),
]
ProtocolName = Annotated[
    str | None, typer.Option("--protocol", help="tecoa-native, tga-224, ttc-224, robustvlm-1k or clipdefense-1.")
]
Root = Annotated[str | None, typer.Option("--root", help="The folder that holds the protocol's data sets.")]
Defenses = Annotated[list[str] | None, typer.Option("--defense", help="A test-time defence, or none. Repeatable.")]
Views = Annotated[
    list[str] | None, typer.Option("--view", help="An adaptive view of the defence, repeatable; all otherwise.")
]
Eot = Annotated[int | None, typer.Option("--eot", min=1, help="Gradient draws a step on adaptive views.")]
Radii = Annotated[list[str] | None, typer.Option("--eps", help="Radius in [0, 1] pixels; 1/255 otherwise. Repeatable.")]
RadiiNorm = Annotated[str | None, typer.Option("--norm", help="linf or l2, of each --eps; linf otherwise.")]
Attacks = Annotated[
    list[str] | None,
    typer.Option("--attack", "-a", help="E.g. pgd,steps=100,objective=margin; pgd,steps=10 and apgd-ce otherwise."),
]
Also = Annotated[list[str] | None, typer.Option("--also", help="An attack besides the protocol's. Repeatable.")]
Cumulative = Annotated[
    bool | None,
    typer.Option("--cumulative/--separate", help="Each attack only on what those before it left standing."),
]
AdaptiveSuite = Annotated[
    bool | None,
    typer.Option(
        "--adaptive/--no-adaptive",
        help="Attack through the defence in every known way: more EOT draws, black box, embeddings.",
    ),
]
Images = Annotated[int | None, typer.Option("--n", min=1, help="Number of images, drawn evenly over the classes.")]
VerdictSeeds = Annotated[int | None, typer.Option(min=1, help="Draws that judge a randomised defence; 5 otherwise.")]
RunSeed = Annotated[int | None, typer.Option(min=0, max=2**62, help="Of images drawn, attacks and defence noise.")]
SaveAdv = Annotated[
    bool | None, typer.Option("--save-adv/--no-save-adv", help="Keep the perturbation that broke each image.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a forward; halved when memory runs out.")]
Part = Annotated[str | None, typer.Option("--shard", help="i/n: do every n-th work unit, i from 0 to n-1.")]
Audited = Annotated[
    bool, typer.Option("--audit", help="Twenty checks of each combination; INVALID withholds its robust accuracy.")
]
Out = Annotated[
    Path | None, typer.Option("--out", dir_okay=False, help="Write the result of one combination as JSON here.")
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=100,
        help="Percent: exit code 1 where less stays right in the worst case, it is withheld, or is transfer only.",
    ),
]
Html = Annotated[Path | None, typer.Option("--html", dir_okay=False, help="Write one HTML page here.")]


def evaluate(
    file: File = None,
    run: Folder = None,
    model: Models = None,
    data: Datasets = None,
    protocol: ProtocolName = None,
    root: Root = None,
    defense: Defenses = None,
    option: Options = None,
    view: Views = None,
    eot: Eot = None,
    eps: Radii = None,
    norm: RadiiNorm = None,
    attack: Attacks = None,
    also: Also = None,
    cumulative: Cumulative = None,
    adaptive: AdaptiveSuite = None,
    n: Images = None,
    split: Split = None,
    size: Size = None,
    verdict_seeds: VerdictSeeds = None,
    seed: RunSeed = None,
    save_adv: SaveAdv = None,
    batch_size: BatchSize = None,
    shard: Part = None,
    audit: Audited = False,
    fail_under: FailUnder = None,
    device: Device = None,
    out: Out = None,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Clean and robust accuracy: models x defences x data sets x threat models, from flags, a TOML file or a protocol.

    A test-time defence is judged on transferred images and by an attacker who knows it. With --run every verdict is
    kept, with summaries and a page; killed at any moment, `clipdefense evaluate --run FOLDER` goes on. Shards may share
    the folder (`clipdefense merge` joins them); `accelerate launch` or `torchrun` gives each process one. Example:

    clipdefense evaluate -m open_clip:ViT-B-32-quickgelu@openai -d torchvision:cifar10 --defense ttc --n 200

    clipdefense evaluate grid.toml --run results/grid --shard 0/4

    clipdefense evaluate -m open_clip:ViT-B-32-quickgelu@openai --protocol ttc-224 --root /data --run results/ttc
    """
    tables = {"models": model, "datasets": _datasets(data, n, split, size, protocol), "threats": _threats(eps, norm)}
    tables |= {"defenses": _defenses(defense, option, view, eot), "attacks": attack, "also": also}
    settings = {"protocol": protocol, "root": root, "cumulative": cumulative, "adaptive": adaptive, "seed": seed}
    settings |= {"verdict_seeds": verdict_seeds, "save_adv": save_adv, "batch_size": batch_size}
    config = _config(file, run, tables, **settings)
    check_places(out, html)
    _check_part(shard, run, {"--out": out, "--html": html, "--audit": audit or None, "--fail-under": fail_under})
    _check_outputs(config, run, out, save_adv)
    with nullcontext(str(run)) if run is not None else tempfile.TemporaryDirectory() as place:
        done = _run(config, Path(place), run is not None, shard, device, audit, quiet)
        _tell(Path(place), run, done, out, html)
        _fail(Path(place), fail_under)


def _fail(folder: Path, percent: float | None) -> None:
    """Exit code 1, and why, where a combination is under the floor."""
    missed = [] if percent is None else _missed(folder, percent)
    if missed:
        typer.echo("\n".join(missed), err=True)
        raise typer.Exit(1)


def _missed(folder: Path, percent: float) -> list[str]:
    """Why each combination under the floor is there."""
    from clipdefense.runs.results import read
    from clipdefense.runs.units import cells

    result, found = read(folder), []
    judged = {cell.cell.name for cell in result.cells if cell.evaluation.n}
    found += [f"{cell.name}: no image was judged" for cell in cells(result.config) if cell.name not in judged]
    for cell in result.cells:
        accuracy, caveat = cell.evaluation.worst_case().accuracy, cell.evaluation.caveat
        stay = f"{100 * accuracy:.1f} % stay right in the worst case" + (f" ({caveat})" if caveat else "")
        if cell.withheld:
            found.append(f"{cell.cell.name}: its robust accuracy is withheld: {cell.withheld}")
        elif 100 * accuracy < percent:
            found.append(f"{cell.cell.name}: {stay}, under {percent:g} %")
        elif caveat:
            found.append(f"{cell.cell.name}: {stay}; no attacker who knows the defence was tried, so no floor is held")
    return found


def _run(
    config: RunConfig, folder: Path, kept: bool, shard: str | None, device: str | None, audit: bool, quiet: bool
) -> int:
    """The work units that are not done yet, and the audit; how many units they were."""
    from clipdefense.runs.build import choose_device
    from clipdefense.runs.run import run
    from clipdefense.runs.units import Shard

    part = None if shard is None else Shard.parse(shard)
    target = None if device is None else choose_device(device, argument="--device")
    try:
        with shown(quiet) as progress:
            done = run(config, folder, shard=part, device=target, progress=progress)
            if audit:
                _audit(folder, target, progress)
    except KeyboardInterrupt:
        if kept:
            typer.echo(f"every finished work unit is safe; clipdefense evaluate --run {folder} goes on", err=True)
        raise
    return done


def _config(file: Path | None, run: Path | None, tables: dict[str, Any], **settings: Any) -> RunConfig:
    """What the file and the flags say; of a run that has begun, what it was asked for."""
    from clipdefense.runs.config import read_config
    from clipdefense.runs.results import config_of
    from clipdefense.runs.store import reading, stores_in

    if file is not None or tables["models"] is not None:
        return read_config({} if file is None else file, **tables, **settings)
    begun = [] if run is None else stores_in(run)
    if not begun:
        raise UsageError(
            "Missing option '--model' / '-m', or a TOML file, or --run with the folder of a run that has begun. "
            "`clipdefense evaluate --help` shows them."
        )
    with reading(begun[0]) as connection:
        return read_config(config_of(connection).model_dump(mode="json"), **tables, **settings)


def _check_outputs(config: RunConfig, run: Path | None, out: Path | None, save_adv: bool | None) -> None:
    """What is asked for has a place to go to."""
    if save_adv and run is None:
        raise UsageError("--save-adv is for a run that is kept; name its folder with --run DIR.")
    several = len(config.models) * len(config.defenses) * len(config.datasets) * len(config.threats)
    if out is not None and (several > 1 or run is not None):
        where = "the folder of --run holds summary.json" if run is not None else "--run DIR keeps them all"
        raise UsageError(f"--out is for one combination without --run ({several} here); {where}.")


def _check_part(shard: str | None, run: Path | None, whole: dict[str, Any]) -> None:
    """A part of a run, of --shard or of a launcher, is kept, and is asked for nothing that needs all of it."""
    from clipdefense.runs.units import Shard

    asked = Shard() if shard is None else Shard.parse(shard)
    part = asked.launched()
    if part.count == 1:
        return
    launched = part.count > asked.count
    if run is None and not launched:
        raise UsageError("--shard is for a run that is kept; name its folder with --run DIR.")
    if run is None:
        raise UsageError(
            f"RANK and WORLD_SIZE, which torchrun and accelerate launch set, make this process the part {part} of a "
            "run, and a part has to be kept: name one folder for all processes with --run DIR, or unset both."
        )
    for flag, given in whole.items():
        if given is not None:
            why = "RANK and WORLD_SIZE make" if launched else "--shard makes"
            raise UsageError(
                f"{flag} is for a run in one piece, and {why} this process the part {part} of one: leave it out, and "
                f"when all parts are done, merge first (clipdefense merge {run} --out MERGED), then {_then(flag)}."
            )


def _then(flag: str) -> str:
    """What gives for a merged run what the flag would have given."""
    if flag == "--out":
        return "read MERGED/summary.json"
    return "clipdefense report MERGED --html PAGE" if flag == "--html" else f"clipdefense evaluate --run MERGED {flag}"


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _datasets(
    data: list[str] | None, n: int | None, split: str | None, size: int | None, protocol: str | None
) -> list[Any] | None:
    more = _given(n=n, split=split, size=size)
    if data is None and protocol is not None and more:
        from clipdefense.data.protocols import get_protocol

        data = list(get_protocol(protocol).datasets)
    if data is None and more:
        raise UsageError(f"--{next(iter(more))} is for the data set of --data; in a TOML file it is a key of datasets.")
    return None if data is None else [{"spec": spec, **more} for spec in data]


def _defenses(
    defense: list[str] | None, option: list[str] | None, view: list[str] | None, eot: int | None
) -> list[Any] | None:
    options = dict(map(split_option, option or ()))
    if options and defense is None:
        raise UsageError("--option is for a defence; name one with --defense, or put an attack's behind --attack.")
    more = _given(options=options or None, views=view or None, eot=eot)
    if more and defense is not None and len(defense) != 1:
        raise UsageError(
            f"--option, --view and --eot are for the one defence of --defense, and there are {len(defense)}; "
            "several have their own in a TOML file, under [[defenses]]."
        )
    if defense is None and more:  # a model may have adaptive views of its own
        defense = ["none"]
    return None if defense is None else [{"spec": spec, **more} for spec in defense]


def _threats(eps: list[str] | None, norm: str | None) -> list[Any] | None:
    if eps is None and norm is None:
        return None
    return [{"eps": value, **_given(norm=norm)} for value in eps or ["1/255"]]


def _audit(folder: Path, device: str | None, progress: Any) -> None:
    """The audit of every combination of a finished run that has none yet."""
    from clipdefense.audit import audit as examine
    from clipdefense.files import write_json
    from clipdefense.runs.build import Builder, choose_device
    from clipdefense.runs.results import audit_file, read
    from clipdefense.runs.run import Progress, first_images
    from clipdefense.runs.summary import write

    result = read(folder)
    builder = Builder(result.config, choose_device(device))
    for number, cell in enumerate(result.cells):
        path = audit_file(folder, cell.cell.number)
        if path.exists():
            continue
        subject = builder.subject(cell.cell)
        x, y = first_images(builder, cell.cell)

        def say(text: str, done: int = number, name: str = cell.cell.name) -> None:
            progress(Progress(done, len(result.cells), f"audit of {name}, {text}"))

        found = examine(
            subject.model, x, y, subject.threat, defense=subject.defense, seed=result.config.seed, progress=say
        )
        write_json(path, {"cell": cell.cell.name, **found.to_dict()})
    write(read(folder), folder)


class shown:
    """A bar of work units on stderr, with what runs now; lines where stderr is no terminal; nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        console = Console(stderr=True)
        self.quiet, self.lines, self.said = quiet, not console.is_terminal, ""
        self.bar = Bar(*columns, console=console, transient=True, disable=quiet or self.lines)
        self.task = self.bar.add_task("loading", total=None)

    def __enter__(self) -> Any:
        self.bar.start()
        return self.tell

    def tell(self, progress: Progress) -> None:
        """One thing that begins, or how far it is."""
        from rich.markup import escape

        from clipdefense.evaluation.counts import counted

        status, new = progress.status, progress.what != self.said
        self.said = progress.what
        if self.quiet:
            return
        if new and self.lines:
            typer.echo(f"[{progress.done}/{progress.total}] {progress.what}", err=True)
        elif new and ": about " in progress.what:
            self.bar.console.print(escape(progress.what))  # how long it will take stays to be read
        part = "" if status is None else f", {status.done} of {counted(status.total, 'image')}"
        text = escape(progress.what + part)
        self.bar.update(self.task, completed=progress.done, total=progress.total, description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _tell(folder: Path, run: Path | None, done: int, out: Path | None, html: Path | None) -> None:
    """The tables of a run in one piece; of a shard, what comes next."""
    from rich.console import Console

    from clipdefense.evaluation.counts import counted
    from clipdefense.files import write_json
    from clipdefense.runs.page import write_page
    from clipdefense.runs.results import read
    from clipdefense.runs.store import in_shards
    from clipdefense.runs.terminal import tables

    def say(text: str) -> None:
        Console().print(text, soft_wrap=True, markup=False, highlight=False)

    if in_shards(folder):
        units = f"{counted(done, 'work unit')} of this shard now"
        say(f"{units}; when all are done: clipdefense merge {folder} --out MERGED")
        return
    page = None if run is None else write_page(folder)
    tables(Console(), folder, page)
    if out is not None:
        (cell,) = read(folder).cells
        table = cell.cell.dataset
        write_json(out, {"data": table.spec, "split": table.split, "size": table.size, **cell.evaluation.to_dict()})
    if html is not None:
        write_page(folder, html)
    if page is not None:
        say(f"{counted(done, 'work unit')} now; verdicts and summaries are in {folder}, the page is {page}")
