"""The house rules, read off the source: which way imports run, whom the core may name, how large things may be."""

from __future__ import annotations

import ast
import graphlib
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from clipdefense.plugins import registry

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "clipdefense").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))

# A unit imports units of a lower rank only, or itself. Public names load lazily, so nothing is above `clipdefense`.
RANKS = [
    {"__init__", "errors", "generators", "hookspecs", "randomness"},
    {"checks", "files", "native", "plugins", "resize", "threat"},
    {"classifier", "data"},
    {"attacks", "weights"},
    {"estimator", "defenses", "trainers"},
    {"evaluation"},
    {"training"},  # its model files carry the evaluation's fingerprint; the evaluation knows nothing of training
    {"runs"},
    {"audit"},
    {"conformance"},
    {"cli"},
    {"commands"},
    {"__main__"},
]
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}

# What may be imported from above inside a function: `fit` and what belongs to it load the loop when they are called.
LAZY = {("trainers", "training"), ("trainers", "estimator")}

SEVEN = ("__init__", "hookspecs", "plugins", "threat", "classifier", "estimator", "defenses")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def unit_of(module: str) -> str:
    """``clipdefense.attacks.pgd`` -> ``attacks``."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[: -1 if parts[-1] == "__init__" else None])


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, is it inside a function) for each import that runs; those for type checkers do not."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                yield from ((name.name, lazy) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                assert child.module is not None
                submodules = child.module == "clipdefense"  # `from clipdefense import hookspecs`
                names = [f"{child.module}.{name.name}" for name in child.names] if submodules else [child.module]
                yield from ((name, lazy) for name in names)
            else:
                inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, inside)

    return walk(tree(path), False)


def docstrings(path: Path) -> set[int]:
    """Ids of the constants that are docstrings, of attributes too."""
    return {
        id(node.value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each string in code."""
    skip = docstrings(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            yield node.lineno, node.value


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    described: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and id(node.value) in docstrings(path):
            described.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in skipped and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - described)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_unit_of_the_core_has_its_place() -> None:
    assert {unit_of(module_of(path)) for path in CORE} == set(RANK)


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    own = unit_of(module_of(path))
    wrong = [
        imported
        for imported, lazy in imports(path)
        if imported.partition(".")[0] == "clipdefense"
        and unit_of(imported) != own
        and RANK[unit_of(imported)] >= RANK[own]
        and not (lazy and (own, unit_of(imported)) in LAZY)
    ]
    assert not wrong


def test_the_command_line_is_imported_by_its_own_commands_alone() -> None:
    others = [
        path for path in [*CORE, *PLUGINS] if unit_of(module_of(path)) != "commands"
    ]  # they share its option types
    users = [relative(path) for path in others if any(m == "clipdefense.cli" for m, _ in imports(path))]
    assert users == ["clipdefense/__main__.py"]


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_imports_no_plugin_and_names_none(path: Path) -> None:
    packages = {folder.name for folder in (ROOT / "plugins").iterdir() if folder.is_dir()}
    assert len(packages) >= 9
    assert not [imported for imported, _ in imports(path) if imported.partition(".")[0] in packages]
    claims = [claim for claims in registry().by_name.values() for claim in claims if claim.plugin != "core"]
    names = {claim.name for claim in claims} | {claim.name.removesuffix(":") for claim in claims if ":" in claim.name}
    # a package that the project depends on may be named (its version is recorded), and so may what is plain English
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names -= {dependency.partition(">")[0] for dependency in dependencies} | {"arrays", "folder"}
    assert {"ttc", "tecoa", "open_clip", "npz", "art:"} <= names
    prefixes = {f"{name.removesuffix(':')}:" for name in names}
    named = [
        (line, text)
        for line, text in strings(path)
        if text in names
        or any(text.startswith(prefix) and " " not in text for prefix in prefixes)  # "art:DeepFool"
        or any(package in text for package in packages)
    ]
    assert not named


def test_plugins_that_build_on_other_plugins_do_so_one_way() -> None:
    users: dict[str, set[str]] = {}
    for path in PLUGINS:
        own = path.relative_to(ROOT / "plugins").parts[0]
        used = {imported.partition(".")[0] for imported, _ in imports(path)} - {own}
        users.setdefault(own, set()).update(name for name in used if name.startswith("clipdefense_"))
    assert list(graphlib.TopologicalSorter(users).static_order())  # a CycleError names the circle


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*/__init__.py")), ids=relative)
def test_a_hook_module_imports_pluggy_and_the_standard_library_alone(path: Path) -> None:
    assert {imported for imported, lazy in imports(path) if not lazy} <= {"pluggy", "__future__", "importlib", "typing"}


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=relative)
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    long = {(f.name, f.lineno): (f.end_lineno or 0) - f.lineno + 1 for f in functions(path)}
    assert not {name: lines for name, lines in long.items() if lines > 60}


def test_the_core_is_seven_small_files() -> None:
    lines = {name: lines_of_code(ROOT / "clipdefense" / f"{name}.py") for name in SEVEN}
    assert sum(lines.values()) < 1000, lines
    assert max(lines.values()) < 300, lines


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=relative)
def test_library_code_prints_nothing_and_moves_nothing_to_a_gpu_by_itself(path: Path) -> None:
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not [call.lineno for call in calls if isinstance(call, ast.Attribute) and call.attr == "cuda"]
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, (ast.Global, ast.Nonlocal))]


def test_the_core_without_training_or_evaluation_needs_torch_and_art_alone() -> None:
    """The seven files and what they import at their top."""
    allowed = {"clipdefense", "torch", "art", "numpy", "pluggy"}
    for name in (*SEVEN, "errors", "checks", "randomness", "native"):
        packages = {module.partition(".")[0] for module, _ in imports(ROOT / "clipdefense" / f"{name}.py")}
        assert packages - sys.stdlib_module_names <= allowed, name
