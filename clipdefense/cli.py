"""The command line. Heavy imports happen inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipdefense.errors import UsageError
from clipdefense.plugins import KINDS, registry

if TYPE_CHECKING:
    from clipdefense.classifier import ZeroShotClassifier
    from clipdefense.data import ImageDataset
    from clipdefense.defenses import TestTimeDefense

app = typer.Typer(
    help="Adversarial defences for CLIP-style zero-shot classifiers, and an evaluation that can be believed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="plugin:name[@weights], e.g. open_clip:ViT-B-32-quickgelu@openai.")
]
Data = Annotated[str, typer.Option("--data", "-d", help="plugin:name, e.g. torchvision:cifar10 or npz:images.npz.")]
Count = Annotated[int | None, typer.Option("--n", min=1, help="Number of images, drawn evenly over the classes.")]
Eps = Annotated[str, typer.Option("--eps", help="Radius in [0, 1] pixels, e.g. 1/255.")]
NormName = Annotated[str, typer.Option("--norm", help="linf or l2.")]
Seed = Annotated[int, typer.Option("--seed", help="Of images drawn, attacks and defence noise.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; a GPU when there is one.")]
Split = Annotated[str | None, typer.Option("--split", help="train or test, where the data set has both.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Resize and crop to this side; native otherwise.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="key=value for the defence or method; may be repeated.")
]


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``["steps=2", "eps=4/255"]`` as keyword arguments."""
    from clipdefense.evaluation.runner import literal

    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r} is not of the form key=value.")
        options[key.strip().replace("-", "_")] = literal(value.strip())
    return options


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name!r} cannot be used here ({reason}); cpu always can.") from error
    return name


def _load(
    model: str, data: str, n: int | None, seed: int, split: str | None, size: int | None, device: str
) -> tuple[ZeroShotClassifier, ImageDataset]:
    """The data set, and the model with the data set's classes."""
    from clipdefense.plugins import load_dataset, load_model

    given = {"split": split, "size": size}
    images = load_dataset(data, **{key: value for key, value in given.items() if value is not None})
    if n is not None and n < len(images):
        images = images.sample(n, seed=seed)
    return load_model(model, classes=images.classes).to(device), images


def _construct(cls: Any, name: str, *args: Any, **options: Any) -> Any:
    """Build a defence from options that a user typed: a misspelt one is the user's mistake, not a crash."""
    import inspect

    from clipdefense.errors import unknown_name

    parameters = inspect.signature(cls.__init__).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in known:
                raise unknown_name(f"option of {name!r}", option, known)
    return cls(*args, **options)


@app.command()
def plugins() -> None:
    """List what is installed: models, defences, attacks, data sets, commands, and plugins that failed."""
    from rich.console import Console
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
            table.add_row(
                f"{name}:..." if takes_more else name, ", ".join(c.distribution for c in claims), "; ".join(notes)
            )
        if table.row_count:
            console.print(table)
    for plugin in found.plugins:
        if plugin.error:
            console.print(f"[red]failed[/red]: plugin {plugin.name!r} of {plugin.distribution}: {plugin.error}")


@app.command()
def evaluate(
    model: Model,
    data: Data,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help="name[,key=value...], e.g. pgd,steps=100,objective=margin. Repeatable."),
    ] = None,
    eps: Eps = "1/255",
    norm: NormName = "linf",
    defense: Annotated[str | None, typer.Option("--defense", help="A test-time defence to judge, e.g. ttc.")] = None,
    option: Options = None,
    n: Count = None,
    split: Split = None,
    size: Size = None,
    eot: Annotated[int | None, typer.Option("--eot", min=1, help="Gradient draws a step on adaptive views.")] = None,
    verdict_seeds: Annotated[int, typer.Option(min=1, help="Draws that judge a randomised defence.")] = 5,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 128,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Clean and robust accuracy of a model, or of a test-time defence around it.

    A test-time defence is judged on transferred images and by an attacker who knows it. Example:

    clipdefense evaluate -m open_clip:ViT-B-32-quickgelu@openai -d torchvision:cifar10 --defense ttc --n 200
    """
    from rich.console import Console

    from clipdefense.evaluation import evaluate as run
    from clipdefense.evaluation import report
    from clipdefense.plugins import get_defense
    from clipdefense.threat import ThreatModel, parse_eps

    threat = ThreatModel(norm, parse_eps(eps))  # type: ignore[arg-type]
    target = _device(device)
    if option and defense is None:
        raise UsageError("--option is for a defence; name one with --defense, or put attack options behind --attack.")
    cls = None if defense is None else get_defense(defense)
    classifier, images = _load(model, data, n, seed, split, size, target)
    chosen: TestTimeDefense | None = (
        None if cls is None else _construct(cls, str(defense), classifier, **_options(option))
    )
    x, y = images.tensors()
    console = Console(stderr=True, quiet=quiet)
    with console.status("loading") as status:
        result = run(
            classifier,
            x.to(target),
            y.to(target),
            threat,
            attacks=attack or ["pgd,steps=10", "apgd-ce"],
            defense=chosen,
            name=defense or model,
            eot=eot,
            verdict_seeds=verdict_seeds,
            seed=seed,
            batch_size=batch_size,
            progress=status.update,
        )
    Console().print(report.table([result]))
    if out is not None:
        report.write_json(out, {"data": data, **result.to_dict()})
    if html is not None:
        summary = [f"{defense or 'no defence'} on {model}, {data}, {len(x)} images."]
        report.write_html(html, report.Page(f"clipdefense: {defense or model}", summary, [result]))


@app.command()
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder for the hardened weights and checkpoints.")],
    method: Annotated[str, typer.Option("--method", help="A trainer defence, e.g. tecoa.")] = "tecoa",
    eps: Eps = "1/255",
    norm: NormName = "linf",
    attack_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the inner attack.")] = None,
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

    Options are fields of the training configuration: --option epochs=2 --option lr=1e-5. Example:

    clipdefense train -m open_clip:ViT-B-32-quickgelu@openai -d folder:photos --out hardened --option epochs=2
    """
    from dataclasses import replace

    from rich.console import Console

    from clipdefense.plugins import get_defense
    from clipdefense.threat import ThreatModel, parse_eps
    from clipdefense.training.checkpoint import save_model

    cls = get_defense(method)
    threat = ThreatModel(norm, parse_eps(eps))  # type: ignore[arg-type]
    classifier, images = _load(model, data, n, seed, split, size, _device(device))
    settings = {"seed": seed, "show_progress": not quiet, **_options(option)}
    trainer = _construct(cls, method, classifier, variant=variant, **settings)
    steps = attack_steps if attack_steps is not None else trainer.threat.steps
    trainer.threat = replace(threat, steps=steps)
    trainer.fit(images)
    path = out / "model.safetensors"
    save_model(trainer.model, path, **trainer.record())
    Console().print(f"wrote {path}")


def main() -> None:
    """Entry point of ``clipdefense``: a user's mistake is one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        found = registry()
        for name in found.names("commands"):
            command = found.find("commands", name)
            app.command(name, help=command.summary or None)(command.load())
        app()
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(130) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line for people, without the source line."""
    sys.stderr.write(f"warning: {message}\n")
