"""Third-party plugins, really installed from distributions of their own under tests/third_party."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipdefense import plugins
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.defenses import InputDefense
from clipdefense.errors import MissingPackageError, UsageError
from clipdefense.evaluation import evaluate
from clipdefense.threat import ThreatModel

THIRD_PARTY = Path(__file__).parent / "third_party"


def python(*arguments: str, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the installed plugins."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CLIPDEFENSE_")}
    path = os.pathsep.join([str(target), *filter(None, [inherited.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": path, "COLUMNS": "200", **environment},
        cwd=target,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed every distribution of tests/third_party."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    sources = sorted(str(path.parent) for path in THIRD_PARTY.glob("*/pyproject.toml"))
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), *sources], check=True)
    return target


@pytest.fixture
def discover(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., plugins.Registry]]:
    """``discover(only=None, strict=False)`` in this process, with the installed plugins on the path."""
    monkeypatch.syspath_prepend(str(installed))

    def run(only: str | None = None, strict: bool = False) -> plugins.Registry:
        monkeypatch.delenv("CLIPDEFENSE_PLUGINS", raising=False)
        if only is not None:
            monkeypatch.setenv("CLIPDEFENSE_PLUGINS", only)
        monkeypatch.setenv("CLIPDEFENSE_STRICT", "1" if strict else "0")
        plugins.registry.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plugins.registry()

    yield run
    plugins.registry.cache_clear()
    for name in [name for name in sys.modules if name.startswith("thirdparty_")]:
        del sys.modules[name]


def test_a_strangers_plugin_works_from_another_process(installed: Path) -> None:
    script = """if True:
        import json, sys, warnings
        warnings.simplefilter("ignore")
        import clipdefense as cd
        assert "torch" not in sys.modules
        good = next(p for p in cd.list_plugins() if p.distribution == "thirdparty-good")
        assert "torch" not in sys.modules and "thirdparty_good.parts" not in sys.modules  # nothing loads unused
        images = cd.load_dataset("good-ramps:9", size=16)
        model = cd.load_model("good-cells:16", classes=images.classes)
        x, _ = images.tensors()
        y = model(x).argmax(1)
        smooth = cd.get_defense("good-smooth")(model)
        result = cd.evaluate(
            model, x, y, cd.ThreatModel("linf", eps=0.5), attacks=["good-corner", "good:steps-3"], defense=smooth
        )
        names = [contribution.name for contribution in good.contributions]
        json.dump({"version": good.version, "names": names, **result.to_dict()}, sys.stdout)
    """
    done = python("-c", script, target=installed)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["version"] == "1.2.3"
    assert result["names"] == ["good-cells", "good-smooth", "good-corner", "good:", "good-ramps", "good-hello"]
    assert [(row["attack"], row["attacked"]) for row in result["attacks"]] == [
        (attack, attacked)
        for attacked in ("transfer from the undefended model", "adaptive view bpda")
        for attack in ("good-corner", "good:steps-3")
    ]
    assert result["attacks"][3]["accuracy"] < result["clean"]["accuracy"]


def test_the_command_line_names_what_is_broken_and_runs_the_rest(installed: Path) -> None:
    listed = python("-m", "clipdefense", "plugins", target=installed)
    assert listed.returncode == 0
    lines = listed.stdout.splitlines()
    (broken,) = (line for line in lines if line.startswith("failed: plugin 'broken'"))
    assert "thirdparty-broken" in broken and "thirdparty_package_that_does_not_exist" in broken
    (misspelt,) = (line for line in lines if line.startswith("failed: plugin 'misspelt'"))
    assert "thirdparty-misspelt" in misspelt and "unknown hook 'register_defences'" in misspelt

    def row(name: str) -> str:
        return next(line for line in lines if line.startswith(f"│ {name} "))

    assert "thirdparty-good" in row("good-cells:...")
    assert "4 x 4 cells [as embedding]" in row("good-cells:...")  # not taken for markup
    assert "clipdefense" in row("pgd") and "thirdparty-taken" in row("pgd") and "AMBIGUOUS" in row("pgd")
    assert "not installed: pip install 'thirdparty-optional[fast]'" in row("optional-declared")
    assert "known unsound: masks [gradients]" in row("odd-fine")
    warned = [line for line in listed.stderr.splitlines() if line]
    assert len(warned) == 2
    assert all(line.startswith("warning: plugin ") and "is skipped" in line for line in warned)

    hello = python("-m", "clipdefense", "good-hello", "--name", "you", target=installed)
    assert (hello.returncode, hello.stdout) == (0, "hello you\n")


def test_a_command_that_cannot_be_used_says_why_and_breaks_no_other(installed: Path) -> None:
    environment = {"CLIPDEFENSE_PLUGINS": "good,taken"}
    shown = python("-m", "clipdefense", "--help", target=installed, **environment)
    assert shown.returncode == 0 and "Unusable" in shown.stdout and "Say hello." in shown.stdout
    claimed = python("-m", "clipdefense", "train", "--method", "tecoa", target=installed, **environment)
    assert claimed.returncode == 2 and claimed.stdout == ""
    assert claimed.stderr.startswith("error: the command name 'train' is claimed by clipdefense (plugin 'core') and")
    assert "thirdparty-taken" in claimed.stderr and claimed.stderr.count("\n") == 1
    gone = python("-m", "clipdefense", "odd-command", target=installed, **environment)
    assert gone.returncode == 2 and "thirdparty-odd" in gone.stderr and "thirdparty_odd.nowhere" in gone.stderr


def test_parts_of_a_plugin_are_what_they_are_registered_as(
    discover: Callable[..., plugins.Registry], tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    discover("good")
    threat = ThreatModel("linf", eps=8 / 255)
    adversarial = plugins.get_attack("good-corner")(tiny_model, images, labels, threat)
    assert 0 < float((adversarial - images).abs().max()) <= threat.eps + 1e-6
    defense = plugins.get_defense("good-smooth")(tiny_model, strength=0.5)
    assert isinstance(defense, InputDefense)
    smooth = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    torch.testing.assert_close(defense.defend(images), (images + smooth) / 2)
    assert evaluate(tiny_model, images, labels, threat, attacks=["good:steps-2"]).rows[0].accuracy < 1
    with pytest.raises(UsageError, match="option of attack 'good-corner' 'step' is unknown"):
        evaluate(tiny_model, images, labels, threat, attacks=["good-corner,step=2"])


def test_broken_plugins_are_skipped_by_name_and_the_rest_loads(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    with pytest.warns(UserWarning) as caught:
        found = plugins.discover()
    messages = sorted(str(warning.message) for warning in caught)
    assert messages[0].startswith("plugin 'broken' of thirdparty-broken is skipped: ModuleNotFoundError")
    assert messages[1].startswith("plugin 'misspelt' of thirdparty-misspelt is skipped: PluginValidationError")
    failed = {plugin.name: plugin.error for plugin in found.plugins if plugin.error}
    assert set(failed) == {"broken", "misspelt"}
    assert "register_defences" in failed["misspelt"]
    assert found.find("attacks", "good-corner").distribution == "thirdparty-good"
    assert found.find("attacks", "apgd-ce").distribution == "clipdefense"
    assert ("defenses", "misspelt") not in found.by_name


@pytest.mark.parametrize("name", ["broken", "misspelt"])
def test_strict_raises_for_a_broken_plugin(discover: Callable[..., plugins.Registry], name: str) -> None:
    with pytest.raises(UsageError, match=f"plugin '{name}' of thirdparty-{name} cannot be loaded: .*"):
        discover(name, strict=True)
    discover("good,ttc", strict=True)


def test_a_name_claimed_twice_fails_when_it_is_used_and_names_both(discover: Callable[..., plugins.Registry]) -> None:
    discover("taken,ttc,good")
    for get, kind, name, owner in (
        (plugins.get_attack, "attack", "pgd", "core"),
        (plugins.get_defense, "defence", "ttc", "ttc"),
    ):
        with pytest.raises(UsageError, match=f"the {kind} name '{name}' is claimed by") as caught:
            get(name)
        assert f"clipdefense (plugin '{owner}')" in str(caught.value)
        assert "thirdparty-taken (plugin 'taken')" in str(caught.value)
    assert callable(plugins.get_attack("apgd-ce"))
    assert plugins.get_attack("taken-own") == "thirdparty_taken"
    with pytest.raises(UsageError, match="claimed by"):
        discover("taken,ttc", strict=True)
    discover("ttc")
    assert callable(plugins.get_attack("pgd"))


def test_a_missing_optional_package_says_what_to_install(discover: Callable[..., plugins.Registry]) -> None:
    discover("optional")
    with pytest.raises(MissingPackageError) as declared:
        plugins.get_attack("optional-declared")
    assert "thirdparty_absent, thirdparty_absent.part, which is not installed" in str(declared.value)
    assert str(declared.value).endswith("pip install 'thirdparty-optional[fast]'")
    with pytest.raises(MissingPackageError) as undeclared:
        plugins.get_attack("optional-undeclared")
    assert str(undeclared.value).endswith(
        "needs thirdparty_absent, which is not installed: pip install 'thirdparty_absent'"
    )
    assert isinstance(undeclared.value, ImportError)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("odd-module", "No module named 'thirdparty_odd.nowhere'"),
        ("odd-attribute", "has no attribute 'nothing'"),
        ("odd-code", "RuntimeError: this module raises when it is imported"),
    ],
)
def test_a_target_that_does_not_load_names_the_plugin(
    discover: Callable[..., plugins.Registry], name: str, reason: str
) -> None:
    discover("good")
    with pytest.raises(UsageError) as caught:
        plugins.get_attack(name)
    assert not isinstance(caught.value, MissingPackageError)
    assert "of thirdparty-odd" in str(caught.value) and reason in str(caught.value)


def test_entry_points_of_one_name_from_two_distributions_both_load(discover: Callable[..., plugins.Registry]) -> None:
    found = discover("good")
    assert {plugin.distribution for plugin in found.plugins} == {"clipdefense", "thirdparty-good", "thirdparty-odd"}
    assert found.find("attacks", "odd-fine").known_unsound == "masks [gradients]"


def test_the_environment_limits_the_set(discover: Callable[..., plugins.Registry]) -> None:
    assert [plugin.name for plugin in discover("").plugins] == ["core"]
    assert [plugin.name for plugin in discover(" ttc ,taken,").plugins] == ["core", "taken", "ttc"]
    with pytest.raises(UsageError, match="CLIPDEFENSE_PLUGINS entry 'tttc' is unknown; did you mean 'ttc'"):
        discover("good,tttc")


def test_every_built_in_plugin_loads_strictly_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_STRICT", "1")
    found = plugins.discover()
    assert {plugin.distribution for plugin in found.plugins} == {"clipdefense"}
    assert {plugin.name for plugin in found.plugins} >= {"core", "arrays", "art", "openclip", "tecoa", "timm", "ttc"}
    assert all(plugin.contributions for plugin in found.plugins)
    for (kind, name), (claim,) in found.by_name.items():
        assert not claim.missing, claim
        assert claim.load() is not None, (kind, name)
        assert claim.summary, (kind, name)


@pytest.mark.parametrize(
    ("get", "name", "message"),
    [
        (plugins.get_attack, "pdg", "attack 'pdg' is unknown; did you mean 'pgd'"),
        (plugins.get_attack, "PGD", "did you mean 'pgd'"),
        (plugins.get_attack, "atr:DeepFool", "attack 'atr:DeepFool' is unknown"),
        (plugins.get_defense, "ttcc", "defence 'ttcc' is unknown; did you mean 'ttc'"),
        (plugins.get_defense, "zzz", "defence 'zzz' is unknown; known: "),
        (plugins.load_model, "openclip:ViT-B-32", "model 'openclip' is unknown; did you mean 'open_clip'"),
        (plugins.load_model, "ViT-B-32", "model 'ViT-B-32' is not of the form 'plugin:name'; installed: .*open_clip:"),
        (plugins.load_dataset, "npz:", "dataset 'npz:' is not of the form 'plugin:name'"),
        (plugins.load_dataset, "nzp:a.npz", "dataset 'nzp' is unknown; did you mean 'npz'"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest(get: Callable[[str], object], name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get(name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plugins.load_model("open_clip:ViT-B-32@/no/file", templtes=["a {}"]),
            "option of model 'open_clip' 'templtes' is unknown; did you mean 'templates'",
        ),
        (lambda: plugins.load_model("timm:resnet18@/no/file", weights="x"), "option of model 'timm' 'weights' is unkn"),
        (lambda: plugins.load_model("demo:digits", progres=False), "'progres' is unknown; did you mean 'progress'"),
        (
            lambda: plugins.load_dataset("npz:/no/file.npz", splt="test"),
            "option of dataset 'npz' 'splt' is unknown; did you mean 'split'",
        ),
        (lambda: plugins.load_dataset("digits:test", path="x"), "option of dataset 'digits' 'path' is unknown"),
        (
            lambda: plugins.get_defense("ttc")(None, treshold=0.1),
            "option of TTC 'treshold' is unknown; did you mean 'threshold'",
        ),
    ],
)
def test_a_misspelt_option_comes_with_the_nearest_before_any_work(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def _loader_with_device(name: str, weights: str | None, *, classes: object, device: str) -> tuple[object, ...]:
    return name, weights, classes, device


class _Movable:
    device = "where it was made"

    def to(self, device: str) -> _Movable:
        self.device = device
        return self


def _loader_without_device(name: str, weights: str | None, *, classes: object) -> _Movable:
    return _Movable()


def test_every_model_goes_to_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = {
        ("models", name): [plugins.Contribution("models", name, f"{__name__}:_loader_{name}_device", "p", "d")]
        for name in ("with", "without")
    }
    monkeypatch.setattr(plugins, "registry", lambda: plugins.Registry((), claims))
    assert plugins.load_model("with:a@b", ["c", "d"], device="cuda:1") == ("a", "b", ["c", "d"], "cuda:1")
    assert plugins.load_model("without:a", device="cuda:1").device == "cuda:1"
    assert plugins.load_model("without:a").device == "where it was made"


class _Hooks:
    """A hook module made by hand, for what a plugin's author may get wrong in a call."""

    def __init__(self, *arguments: object, **fields: object) -> None:
        self.call = arguments, fields

    @plugins.hookspecs.hookimpl
    def register_attacks(self, register: Callable[..., None]) -> None:
        arguments, fields = self.call
        register(*arguments, **fields)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (_Hooks("a", "module.attribute"), "target 'module.attribute' of 'a' is not of the form"),
        (_Hooks("a", "module:"), "target 'module:' of 'a' is not of the form"),
        (_Hooks("a", "m:f", requires="torch"), "requires of 'a' is the string 'torch'; a tuple"),
        (_Hooks("a", "m:f", sumary="x"), "unexpected keyword argument 'sumary'"),
    ],
)
def test_a_wrong_registration_is_named(hooks: _Hooks, message: str) -> None:
    manager = plugins.pluggy.PluginManager("clipdefense")
    manager.add_hookspecs(plugins.hookspecs)
    with pytest.raises((UsageError, TypeError), match=message):
        plugins._admit(manager, hooks, "hooks", "somebody")  # type: ignore[arg-type]
    assert manager.get_plugins() == set()
