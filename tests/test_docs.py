"""The documentation: its code blocks run, at smoke size, and every block that does not run says why.

A block is preceded by a comment: ``<!-- run -->`` (``<!-- run: exit 1 -->`` where a command is to fail), ``<!-- file:
NAME -->`` for what is to be saved as a file, or ``<!-- not run: why -->``. The blocks of a page run in order, in one
folder and one namespace, commands through the command line's own entry.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdefense.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
SHOWN = {"", "text", "yaml"}  # nothing to run
ELSEWHERE = ("demo", "test", "script: art", "script: torchattacks")  # test_readme.py, and .ci/run
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
# What stands for weights of hundreds of megabytes and for hours: a tiny CLIP, few images, few steps.
SMALLER = {
    "open_clip:ViT-B-32-quickgelu@openai": "open_clip:tiny.json@tiny.safetensors",
    "open_clip:ViT-B-32-quickgelu@hardened/": "open_clip:tiny.json@hardened/",
    "--base openai": "--base tiny.safetensors",
    "--data torchvision:cifar10": "--data folder:photos/val",
    "--size 224": "--size 16",
    "--n 500": "--n 8",
    "--n 16": "--n 8",
    "epochs=2": "epochs=1 --option batch_size=4",
    "--attack apgd-t": "--attack apgd-t,steps=3,targets=1",
    "--attack apgd-ce ": "--attack apgd-ce,steps=3 --view bpda-eot --eot 1 --verdict-seeds 2 ",
}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        mark: the comment before it.
        language: after the fence.
        code: the text.
    """

    mark: str
    language: str
    code: str


def blocks(path: Path) -> list[Block]:
    return [
        Block(match["mark"] or "", match["language"], match["code"])
        for match in FENCE.finditer(path.read_text(encoding="utf-8"))
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def workshop(digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, on the path, with a tiny CLIP and photos; modules made in it are forgotten after."""
    import open_clip

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(digits_cache))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    save_file(open_clip.model.CLIP(**TINY).state_dict(), tmp_path / "tiny.safetensors")
    for folder in (
        tmp_path / "photos" / split / label for split in ("train", "val") for label in ("cat", "dog", "fish")
    ):
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


def run_commands(code: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of a shell block, each of which must be a command of ours."""
    for line in code.replace("\\\n", " ").splitlines():
        arguments = shlex.split(line, comments=True)
        if not arguments:
            continue
        assert arguments[0] == "clipdefense", f"not a command of ours: {line}"
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left:
            main()
            sys.exit(0)
        assert (left.value.code or 0) == status, line


def runnable(path: Path) -> bool:
    return any(block.mark.startswith(("run", "file:")) for block in blocks(path))


@pytest.mark.parametrize("path", [path for path in PAGES if runnable(path)], ids=name_of)
def test_the_blocks_of_a_page_run(path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.mark.startswith("file: "):
            file = workshop / block.mark.removeprefix("file: ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
        elif block.mark.startswith("run"):
            code = block.code
            if block.language == "sh":
                for text, smaller in SMALLER.items():
                    code = code.replace(text, smaller)
                run_commands(code, int(block.mark.partition("exit ")[2] or 0), monkeypatch)
            else:
                exec(compile(code, f"{name_of(path)}: {block.code[:40]!r}", "exec"), space)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_runs_or_says_why_not(path: Path) -> None:
    for block in blocks(path):
        marked = (
            block.mark in ELSEWHERE or block.mark == "run" or block.mark.startswith(("run: ", "file: ", "not run: "))
        )
        assert marked or block.language in (*SHOWN, "toml"), f"{name_of(path)}: {block.code[:60]!r} has no mark"
        if block.language == "toml":
            tomllib.loads(block.code)
        if block.language == "python":
            compile(block.code, name_of(path), "exec")


def test_every_abbreviation_is_of_something() -> None:
    """A replacement of what no page says any more would let the pages' real text go unrun."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [shortened for shortened in SMALLER if shortened not in text] == []


def test_nothing_in_the_documentation_is_fetched_from_elsewhere() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config
    assert "http" not in config
    for path in PAGES:
        assert not re.search(r"!\[[^]]*\]\(https?:|<(?:script|img|link|iframe)\b", path.read_text(encoding="utf-8")), (
            path
        )


def test_every_method_and_every_public_name_has_its_place() -> None:
    import clipdefense

    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    methods = "".join(text for path, text in pages.items() if path.parent.name == "methods")
    for plugin in clipdefense.list_plugins():
        for contribution in plugin.contributions:
            if contribution.kind == "defenses" and plugin.distribution == "clipdefense":
                assert f"`{contribution.name}`" in methods, contribution.name
    reference = "".join(text for path, text in pages.items() if path.parent.name == "api")
    for name in set(clipdefense.__all__) - {"__version__", "attacks", "data", "evaluation", "training", "hookimpl"}:
        assert f".{name}\n" in reference, name
