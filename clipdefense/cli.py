"""The command line. Heavy imports happen inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdefense.errors import UsageError, check_options
from clipdefense.plugins import KINDS, registry

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier
    from clipdefense.data import ImageDataset

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="plugin:name or plugin:name@weights, e.g. open_clip:ViT-B-32-quickgelu@openai."),
]
Data = Annotated[str, typer.Option("--data", "-d", help="plugin:name, e.g. torchvision:cifar10 or npz:images.npz.")]
Count = Annotated[int | None, typer.Option("--n", min=1, help="Number of images, drawn evenly over the classes.")]
Eps = Annotated[str, typer.Option("--eps", help="Radius in [0, 1] pixels, e.g. 1/255.")]
NormName = Annotated[str, typer.Option("--norm", help="linf or l2.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Of images drawn, attacks and defence noise.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; a GPU when there is one.")]
Split = Annotated[str | None, typer.Option("--split", help="train or test, where the data set has both.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Resize and crop to this side; native otherwise.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="key=value for the defence or method. Repeatable.")
]


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``["steps=2", "eps=4/255"]`` as keyword arguments."""
    from clipdefense.evaluation.runner import literal

    return {key: literal(value) for key, value in map(split_option, pairs or [])}


def split_option(pair: str) -> tuple[str, str]:
    """``"step-size=4/255"`` -> ``("step_size", "4/255")``.

    Raises:
        UsageError: no equals sign, or nothing before it.
    """
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise UsageError(f"--option {pair!r} is not of the form key=value.")
    return key.strip().replace("-", "_"), value.strip()


def _device(name: str | None) -> str:
    from clipdefense.runs.build import choose_device

    return choose_device(name, argument="--device")


def _load(
    model: str, data: str, n: int | None, seed: int, split: str | None, size: int | None, device: str
) -> tuple[ZeroShotClassifier, ImageDataset]:
    """The data set, and the model with the data set's classes."""
    from clipdefense.plugins import load_dataset, load_model

    given = {"split": split, "size": size}
    images = load_dataset(data, **{key: value for key, value in given.items() if value is not None})
    if n is not None:
        images = images.sample(n, seed=seed)
    return load_model(model, classes=images.classes, device=device), images


def _construct(cls: Any, name: str, *args: Any, **options: Any) -> Any:
    """Build a defence from options that a user typed: a misspelt one is the user's mistake, not a crash."""
    check_options(cls.__init__, options, f"option of {name!r}", given=1 + len(args))
    try:
        return cls(*args, **options)
    except TypeError as error:
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"{name!r} cannot use the options {given}: {error}.") from error


def _kind(name: str, kind: str) -> Any:
    """The class of a test-time or a trainer defence; one of the other kind is the user's mistake."""
    from clipdefense.defenses import TestTimeDefense
    from clipdefense.plugins import get_defense
    from clipdefense.trainers import TrainerDefense

    cls = get_defense(name)
    if kind == "test-time" and not issubclass(cls, TestTimeDefense):
        raise UsageError(f"{name!r} is not a test-time defence; `clipdefense train --method {name}` trains with it.")
    if kind == "trainer" and not issubclass(cls, TrainerDefense):
        raise UsageError(f"{name!r} trains nothing; `clipdefense evaluate --defense {name}` judges it.")
    return cls


def plugins() -> None:
    """List what is installed: models, defences, attacks, data sets, commands, and plugins that failed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    found = registry()
    for kind in KINDS:
        table = Table("name", "from", "what it is", title=kind.replace("defenses", "defences"), title_justify="left")
        for name in found.names(kind):
            claims = found.by_name[kind, name]
            notes = [claims[0].summary] if len(claims) == 1 else ["AMBIGUOUS: claimed by each of these"]
            notes += [f"not installed: pip install '{c.install or ' '.join(c.missing)}'" for c in claims if c.missing]
            notes += [f"known unsound: {c.known_unsound}" for c in claims if c.known_unsound]
            takes_more = kind in ("models", "datasets")
            cells = (
                f"{name}:..." if takes_more else name,
                ", ".join(c.distribution for c in claims),
                "; ".join(filter(None, notes)),
            )
            table.add_row(*map(escape, cells))
        if table.row_count:
            console.print(table)
    for plugin in found.plugins:
        title = f"plugin {plugin.name!r} of {plugin.distribution}"
        if plugin.error:
            console.print(f"[red]failed[/red]: {escape(f'{title}: {plugin.error}')}", soft_wrap=True)
        elif not plugin.contributions:
            console.print(f"[red]empty[/red]: {escape(title)} registers nothing", soft_wrap=True)


def check_places(*places: Path | None) -> None:
    """Results can be written where they are to go, so that nothing is lost after an hour's work."""
    for place in filter(None, places):
        nearest = next(folder for folder in place.absolute().parents if folder.exists())
        if not nearest.is_dir() or not os.access(place if place.exists() else nearest, os.W_OK):
            raise UsageError(f"{str(place)!r} cannot be written; name a place where it can.")


def train(
    model: Model,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Folder for the hardened weights and checkpoints.")
    ],
    method: Annotated[str, typer.Option("--method", help="A trainer defence, e.g. tecoa.")],
    eps: Annotated[str | None, typer.Option(help="Radius of the inner attack; the method's own if not given.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2; the method's own if not given.")] = None,
    attack_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the inner attack; likewise.")] = None,
    variant: Annotated[str, typer.Option(help="default, or released: what the released code computes.")] = "default",
    option: Options = None,
    n: Count = None,
    split: Split = None,
    size: Size = None,
    seed: Seed = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune an image tower with a trainer defence, and write it as safetensors.

    Options are fields of the training configuration: --option epochs=2 --option lr=1e-5. A run that was interrupted
    goes on with --option resume=true. Example:

    clipdefense train --method tecoa -m open_clip:ViT-B-32-quickgelu@openai -d folder:photos --out hardened -o epochs=2
    """
    from dataclasses import replace

    from rich.console import Console

    from clipdefense.threat import ThreatModel, parse_eps
    from clipdefense.training.state import MODEL_FILE

    cls = _kind(method, "trainer")
    check_places(out)
    given = {"norm": norm, "eps": None if eps is None else parse_eps(eps), "steps": attack_steps}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes:
        ThreatModel(**{"norm": "linf", "eps": 0.0, **changes})  # a mistake shows before anything is loaded
        changes["step_size"] = None  # the method's own goes with its own radius and steps
    settings = {"checkpoint": str(out), "seed": seed, "show_progress": not quiet, **_options(option)}
    classifier, images = _load(model, data, n, seed, split, size, _device(device))
    trainer = _construct(cls, method, classifier, variant=variant, **settings)
    trainer.threat = replace(trainer.threat, **changes)
    trainer.fit(images)
    Console().print(f"wrote {out / MODEL_FILE}", soft_wrap=True, markup=False, highlight=False)


def application() -> typer.Typer:
    """The command line: a subcommand for each registered command, the ones of this module and plugins' alike."""
    app = typer.Typer(
        help="Adversarial defences for CLIP-style zero-shot classifiers, and an evaluation that can be believed.",
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(lambda: None)  # without a callback, a lone command would lose its name
    found = registry()
    for name in found.names("commands"):
        try:
            function = found.find("commands", name).load()
        except UsageError as error:
            anything = {"ignore_unknown_options": True, "allow_extra_args": True}
            app.command(name, help=f"Unusable: {error}", context_settings=anything)(_unusable(error))
        else:
            app.command(name)(function)
    return app


def _unusable(error: UsageError) -> Callable[[], None]:
    """What stands for a command that could not be loaded: the others work, this one says why it does not."""

    def command() -> None:
        raise error

    return command


def main() -> None:
    """Entry point of ``clipdefense``: a user's mistake is one line on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        code = application()(args=sys.argv[1:] or ["--help"], prog_name="clipdefense", standalone_mode=False)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(130) from None
    except Exception as error:
        message = _mistake(error)
        if message is None:
            raise
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _mistake(error: Exception) -> str | None:
    """What a user did wrong, in words; None for a bug."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError):  # a file that cannot be read or written
        return f"{error.strerror}: {error.filename!r}" if error.filename else str(error)
    parse = getattr(error, "format_message", None)  # typer's own errors; the class has moved between its versions
    if parse is None:
        return None
    command = getattr(getattr(error, "ctx", None), "command_path", "clipdefense")
    message = parse().rstrip()
    return f"{message if message.endswith(('.', '?')) else message + '.'} `{command} --help` shows what there is."


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line for people, without the source line."""
    sys.stderr.write(f"warning: {message}\n")
