"""The command line as a user meets it: real models and images on disk, and every mistake in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdefense import plugins
from clipdefense.cli import main
from clipdefense.training.checkpoint import save_model

NAMES = ("cat", "dog", "fish")
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def clipdefense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The entry point, called with arguments as a shell would pass them."""
    monkeypatch.setenv("COLUMNS", "200")
    show = warnings.showwarning

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["clipdefense", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            main()
        text = capsys.readouterr()
        return Outcome(int(str(leave.value.code)), text.out, text.err)

    yield run
    warnings.showwarning = show


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny open_clip model, a folder of images, and a file of arrays."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(open_clip.model.CLIP(**CONFIG).state_dict(), folder / "tiny.safetensors")
        model = plugins.load_model(f"open_clip:{folder / 'tiny.json'}@{folder / 'tiny.safetensors'}", NAMES)
        # without the direction that all its embeddings share, an untrained tower's predictions spread over the classes
        with torch.no_grad():
            common = torch.nn.functional.normalize(model.embed(torch.rand(64, 3, 16, 16)).mean(dim=0), dim=0)
        anchors = torch.randn(len(NAMES), 16)
        model.head.embeddings.copy_(anchors - anchors @ common[:, None] * common)
    save_model(model, folder / "spread.safetensors")
    generator = np.random.default_rng(0)
    for name in NAMES:
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, 3) * np.linspace(0, 1, 24)[None, :, None] * np.ones((20, 1, 1))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / name / f"{number}.png")
    np.savez(folder / "arrays.npz", x=generator.random((6, 3, 16, 16), dtype=np.float32), y=np.arange(6) % 2)
    return folder


@pytest.fixture
def request_of(files: Path) -> Callable[..., list[str]]:
    """``request_of(model=..., data=..., **options)``: arguments of ``evaluate`` that work unless changed."""

    def arguments(**changes: str | None) -> list[str]:
        options = {
            "model": f"open_clip:{files / 'tiny.json'}@{files / 'tiny.safetensors'}",
            "data": f"folder:{files / 'photos'}",
            "size": "16",
            "device": "cpu",
            **{key.replace("_", "-"): value for key, value in changes.items()},
        }
        given = (("--" + key, value) for key, value in options.items() if value is not None)
        return ["evaluate", *(part for pair in given for part in pair)]

    return arguments


def test_no_command_is_a_request_for_help(clipdefense: Callable[..., Outcome]) -> None:
    bare, asked = clipdefense(), clipdefense("--help")
    assert bare == asked and bare.code == 0 and bare.err == ""
    for command in ("evaluate", "train", "plugins", "demo"):
        assert command in bare.out


@pytest.mark.parametrize("command", ["evaluate", "train", "plugins", "demo"])
def test_every_command_explains_itself(clipdefense: Callable[..., Outcome], command: str) -> None:
    shown = clipdefense(command, "--help")
    assert shown.code == 0 and shown.err == ""
    assert f"Usage: clipdefense {command}" in shown.out
    if command in ("evaluate", "train"):
        assert f"clipdefense {command} " in shown.out.partition("Example:")[2]
        assert "plugin:name@weights" in shown.out  # nothing in brackets is lost to markup


def test_plugins_lists_what_is_registered(clipdefense: Callable[..., Outcome]) -> None:
    listed = clipdefense("plugins")
    assert listed.code == 0 and "failed" not in listed.out
    for (kind, name), (claim,) in plugins.registry().by_name.items():
        shown = f"{name}:..." if kind in ("models", "datasets") else name
        assert any(f"│ {shown} " in line and claim.distribution in line for line in listed.out.splitlines()), name


def test_evaluate_prints_a_table_and_writes_what_it_printed(
    clipdefense: Callable[..., Outcome], request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, html = tmp_path / "new" / "result.json", tmp_path / "page.html"
    request = request_of(out=str(out), html=str(html), eps="8/255", n="9", defense="ttc", eot="2", verdict_seeds="2")
    extra = ["-o", "steps=1", "-o", "threshold=0.5", "-a", "pgd,steps=2,objective=margin", "-a", "apgd-ce,steps=3"]
    done = clipdefense(*request, *extra)
    assert done.code == 0, done.err
    result = json.loads(out.read_text())
    assert result["eps"] == 8 / 255 and " | ttc | " in result["name"] and result["data"].startswith("folder:")
    assert result["fingerprint"]["model"].startswith("open_clip:")
    views = [
        f"adaptive view {name}, 2 EOT draws" for name in ("bpda-eot", "smoothed", "gate-evasion", "gate-forced-on")
    ]
    attacked = ["transfer from the undefended model", *views]
    attacks = ["pgd,steps=2,objective=margin", "apgd-ce,steps=3"]
    assert [(row["attacked"], row["attack"]) for row in result["attacks"]] == [
        (t, a) for t in attacked for a in attacks
    ]
    page = html.read_text()
    for row in (result["clean"], *result["attacks"], result["worst_case"]):
        assert row["n"] == 9 and row["verdict_seeds"] == (1 if row is result["worst_case"] else 2)
        low, high = row["interval_95"]
        number = f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert number in done.out and number in page


def test_a_smaller_n_is_the_same_images_with_the_same_draws(
    clipdefense: Callable[..., Outcome], files: Path, request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    spread = f"open_clip:{files / 'tiny.json'}@{files / 'spread.safetensors'}"
    options = {"attack": "pgd,steps=1", "eps": "8/255", "defense": "ttc", "eot": "1", "model": spread}
    results = []
    for n in ("5", None):
        out = tmp_path / f"{n}.json"
        assert clipdefense(*request_of(n=n, out=str(out), **options), "-o", "eps=64/255").code == 0
        result = json.loads(out.read_text())
        results.append([row["correct"] for row in (result["clean"], result["attacks"][0])])  # without and by transfer
    ids = plugins.load_dataset(request_of()[4]).sample(5, seed=0).ids.tolist()
    few, all_images = results
    assert few == [["".join(seed[i] for i in ids) for seed in row] for row in all_images]
    assert len({seed for row in few for seed in row}) > 1  # the draws matter here


def test_train_writes_weights_that_evaluate_reads(
    clipdefense: Callable[..., Outcome], files: Path, request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    model, data = request_of()[2], request_of()[4]
    arguments = ["train", "--method", "tecoa", "-m", model, "-d", data, "--size", "16", "--device", "cpu", "--quiet"]
    options = ["-o", "epochs=1", "-o", "batch_size=6", "-o", "lr=0.01", "-o", "warmup_steps=0", "--attack-steps", "1"]
    done = clipdefense(*arguments, *options, "--out", tmp_path / "hard", "--eps", "2/255")
    assert done.code == 0, done.err
    weights = tmp_path / "hard" / "model.safetensors"
    assert done.out.split() == ["wrote", str(weights)]
    sidecar = json.loads(weights.with_name("model.safetensors.json").read_text())
    assert sidecar["method"] == "tecoa" and sidecar["class_names"] == ["cat", "dog", "fish"]
    assert sidecar["threat"] == {"norm": "linf", "eps": 2 / 255, "step_size": None, "steps": 1, "restarts": 1}

    spec = f"open_clip:{files / 'tiny.json'}@{weights}"
    judged = clipdefense(*request_of(model=spec, attack="pgd,steps=1", out=str(tmp_path / "hard.json")))
    assert judged.code == 0, judged.err
    assert clipdefense(*request_of(attack="pgd,steps=1", out=str(tmp_path / "plain.json"))).code == 0
    hashes = {
        json.loads((tmp_path / f"{name}.json").read_text())["fingerprint"]["weights_sha256"]
        for name in ("hard", "plain")
    }
    assert len(hashes) == 2
    again = clipdefense(*arguments, *options, "--out", tmp_path / "hard", "--eps", "2/255")
    assert again.code == 2 and "holds the state of a run" in again.err and "resume" in again.err


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"model": "opn_clip:x@y"}, [], "model 'opn_clip' is unknown; did you mean 'open_clip'?"),
        ({"model": "tiny"}, [], "model 'tiny' is not of the form 'plugin:name'; installed: "),
        ({"model": "open_clip:ViT-B-23@openai"}, [], "did you mean 'ViT-B-32'"),
        ({"model": "open_clip:nowhere.json@w.safetensors"}, [], "nowhere.json"),
        ({"data": "foldr:photos"}, [], "dataset 'foldr' is unknown; did you mean 'folder'?"),
        ({"data": "folder:/no/such/folder"}, [], "/no/such/folder"),
        ({"data": "npz:/no/such/file.npz"}, [], "/no/such/file.npz"),
        ({"attack": "pdg"}, [], "attack 'pdg' is unknown; did you mean 'pgd'?"),
        ({"attack": "pgd,step=3"}, [], "option of attack 'pgd' 'step' is unknown; did you mean 'steps'"),
        ({"attack": "pgd,steps"}, [], "has the part 'steps'; name,key=value,key=value is expected"),
        ({"attack": "pgd,steps=many"}, [], "steps is 'many'; a whole number of at least 0 is expected"),
        ({"attack": "art:DeepFol"}, [], "DeepFool"),
        ({"defense": "tcc"}, [], "defence 'tcc' is unknown; did you mean 'ttc'"),
        (
            {"defense": "tecoa"},
            [],
            "'tecoa' is not a test-time defence; train with it (`clipdefense train --method tecoa`)",
        ),
        (
            {"defense": "ttc"},
            ["-o", "threshhold=1"],
            "option of 'ttc' 'threshhold' is unknown; did you mean 'threshold'",
        ),
        ({"defense": "ttc"}, ["-o", "threshold"], "--option 'threshold' is not of the form key=value"),
        ({"defense": "ttc"}, ["-o", "steps=many"], "steps is 'many'"),
        ({"defense": "ttc"}, ["-o", "eps=many"], "eps is 'many'; a number in [0, 1] pixel units is expected"),
        ({"defense": "ttc"}, ["-o", "eps=4"], "did you mean 4/255"),
        ({}, ["-o", "steps=2"], "--option is for a defence; name one with --defense"),
        ({}, ["--view", "bpda-eot"], "views is ['bpda-eot'], but no defence is judged"),
        ({"eot": "3"}, [], "eot is 3, but no defence is judged"),
        ({"defense": "ttc"}, ["-o", "seed=abc"], "seed is 'abc'; a whole number is expected"),
        ({}, ["--seed", "99999999999999999999"], "'--seed': "),
        ({"device": "meta"}, [], "--device 'meta' cannot be used here"),
        ({}, ["--html", "/dev/null/page.html"], "'/dev/null/page.html' cannot be written"),
        ({"eps": "-1"}, [], "eps is -1.0; it must be at least 0"),
        ({"eps": "8"}, [], "eps is 8.0, but images are in [0, 1]; did you mean 8/255 = 0.0314?"),
        ({"eps": "a lot"}, [], "eps 'a lot' is not a number; write it as 1/255 or 0.0039"),
        ({"norm": "l_inf"}, [], "norm 'l_inf' is unknown; did you mean 'linf'"),
        ({"n": "0"}, [], "'--n': "),
        ({"n": "some"}, [], "'--n': "),
        ({"n": "500"}, [], "n is 500; a whole number from 1 to 12"),
        ({"eot": "0"}, [], "'--eot': "),
        ({"size": None, "data": "folder:MIXED"}, [], "several shapes"),
        ({"split": "validation"}, [], "validation"),
        ({"device": "gpu7"}, [], "--device 'gpu7' cannot be used here"),
        (
            {"model": None},
            [],
            "Missing option '--model' / '-m', or a TOML file, or --run with the folder of a run that has begun. `clip",
        ),
        ({}, ["--epps", "1"], "--epps"),
        ({}, ["--out", "."], "'.' is a directory"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    clipdefense: Callable[..., Outcome],
    request_of: Callable[..., list[str]],
    tmp_path: Path,
    changes: dict[str, str | None],
    extra: list[str],
    message: str,
) -> None:
    if changes.get("data") == "folder:MIXED":
        for number, side in enumerate((16, 24)):
            (tmp_path / str(number)).mkdir()
            Image.new("RGB", (side, side)).save(tmp_path / str(number) / "a.png")
        changes = changes | {"data": f"folder:{tmp_path}"}
    done = clipdefense(*request_of(**changes), *extra)
    assert done.code == 2, done
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    assert message in lines[0]
    assert len(lines[0]) < 500


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "tecoah"], "defence 'tecoah' is unknown; did you mean 'tecoa'?"),
        (["--method", "ttc"], "'ttc' trains nothing; `clipdefense evaluate --defense ttc` judges it"),
        (["--method", "tecoa", "--out", "/dev/null/hardened"], "'/dev/null/hardened' cannot be written"),
        (["--method", "tecoa", "--eps", "8"], "did you mean 8/255"),
        (["--method", "tecoa", "--variant", "relased"], "variant 'relased' is unknown; did you mean 'released'"),
        (["--method", "tecoa", "-o", "epoch=2"], "training option 'epoch' is unknown; did you mean 'epochs'"),
        (["--method", "tecoa", "-o", "epochs=0"], "epochs is 0; a whole number of at least 1 is expected"),
        (["--method", "tecoa", "-o", "lr=fast"], "lr is 'fast'"),
        ([], "Missing option '--method'"),
    ],
)
def test_a_mistake_in_training_is_one_line_and_leaves_nothing(
    clipdefense: Callable[..., Outcome],
    request_of: Callable[..., list[str]],
    tmp_path: Path,
    extra: list[str],
    message: str,
) -> None:
    model, data = request_of()[2], request_of()[4]
    out = tmp_path / "hardened"
    done = clipdefense("train", "-m", model, "-d", data, "--size", "16", "--device", "cpu", "--out", out, *extra)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done
    assert not out.exists()


def test_a_checkpoint_that_does_not_fit_is_one_line(
    clipdefense: Callable[..., Outcome], files: Path, request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole = (files / "tiny.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"state_dict": Path("/a/path/object")}, tmp_path / "pickle.pt")
    for name in ("cut.safetensors", "other.safetensors", "pickle.pt", "missing.safetensors"):
        done = clipdefense(*request_of(model=f"open_clip:{files / 'tiny.json'}@{tmp_path / name}"))
        assert done.code == 2 and done.out == "", done
        assert done.err.count("\n") == 1 and done.err.startswith("error: ") and name in done.err


def test_a_page_that_cannot_be_written_is_one_line(
    clipdefense: Callable[..., Outcome], request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = clipdefense(*request_of(attack="pgd,steps=1", out=str(tmp_path / "file" / "result.json")))
    assert done.code == 2 and done.err.startswith("error: ") and str(tmp_path / "file") in done.err
    assert done.err.count("\n") == 1


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "clipdefense", "evaluat"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: No such command 'evaluat'. Did you mean 'evaluate'? `clipdefense --help` shows what there is.\n"
    )


def test_a_bug_is_not_dressed_up_as_a_mistake(
    clipdefense: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipdefense", "plugins"])
    monkeypatch.setattr("rich.console.Console.print", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main()
