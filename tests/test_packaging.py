"""The wheel, built and installed outside the repository, and what importing it costs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "torchvision",
    "art",
    "open_clip",
    "timm",
    "torchattacks",
    "accelerate",
    "numpy",
    "scipy",
    "matplotlib",
}


def run(command: list[str], **options: Any) -> str:
    """What a command prints; where it fails, all that it said is in the failure."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(build)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--target", str(target), str(wheel)])
    return target


@pytest.fixture(scope="session")
def distribution(installed: Path) -> Distribution:
    (found,) = distributions(path=[str(installed)])
    return found


def python(script: str, target: Path, *arguments: str) -> str:
    """What a script prints in a fresh interpreter that sees the installed wheel before the repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CLIPDEFENSE_")}
    return run([sys.executable, "-c", script, *arguments], env={**environment, "PYTHONPATH": str(target)}, cwd=target)


def test_top_level_packages_are_the_core_and_the_plugins(installed: Path, project: dict[str, Any]) -> None:
    built_in = set(project["project"]["entry-points"]["clipdefense"].values())
    assert built_in == {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert packages == {"clipdefense"} | built_in


def test_every_plugin_has_an_entry_point_of_its_own(distribution: Distribution, project: dict[str, Any]) -> None:
    points = {point.name: point.value for point in distribution.entry_points if point.group == "clipdefense"}
    assert points == project["project"]["entry-points"]["clipdefense"]
    assert len(set(points.values())) == len(points)
    (script,) = (point for point in distribution.entry_points if point.group == "console_scripts")
    assert (script.name, script.value) == ("clipdefense", "clipdefense.cli:main")


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = [(ROOT, ROOT / "clipdefense"), (ROOT / "plugins", ROOT / "plugins")]
    sources = {
        str(path.relative_to(base))
        for base, folder in folders
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources
    packages = {name.partition("/")[0] for name in packed}
    assert {f"{package}/py.typed" for package in packages} <= packed
    assert "clipdefense/evaluation/templates/report.html.j2" in packed


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the source distribution, below its folder."""
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    (built,) = folder.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_source_distribution_holds_what_its_tests_and_documentation_need(sdist: set[str]) -> None:
    for folder, pattern in (
        ("docs", "*"),
        ("examples", "*"),
        ("benchmarks", "*.py"),
        ("benchmarks/results", "*.json"),
        ("clipdefense", "*"),
        ("plugins", "*"),
    ):
        wanted = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted and wanted <= sdist, sorted(wanted - sdist)
    texts = {f"{name}.md" for name in ("README", "ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "SECURITY")}
    others = {"CITATION.cff", "mkdocs.yml", "pyproject.toml", "tests/test_packaging.py", "tests/parity/parity.npz"}
    assert texts | others <= sdist
    assert not [name for name in sdist if name.startswith((".venv", "build/", "runs/")) or name.endswith(".pyc")]


def test_the_documentation_is_built_without_torchattacks(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert any(each.startswith("mkdocs-material") for each in extras["docs"])
    assert not any("torchattacks" in each or "clipdefense" in each for each in extras["docs"])
    assert not any("torchattacks" in each for each in project["project"]["dependencies"])
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'optional-dependencies"]["docs"]' in steps and "mkdocs build --quiet --strict" in steps


def test_the_citation_is_of_this_version(project: dict[str, Any]) -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    versions = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    assert versions == [project["project"]["version"]]
    assert f"({versions[0]})" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_importing_it_imports_nothing_heavy_and_plugins_are_found(installed: Path) -> None:
    script = """if True:
        import json, sys
        import clipdefense
        alone = set(sys.modules)
        found = clipdefense.list_plugins()
        print(json.dumps({
            "file": clipdefense.__file__,
            "alone": sorted({name.partition(".")[0] for name in alone}),
            "discovered": sorted({name.partition(".")[0] for name in sys.modules}),
            "plugins": {p.name: p.error for p in found if p.distribution == "clipdefense"},
            "public": [name for name in clipdefense.__all__ if name not in dir(clipdefense)],
        }))
    """
    result = json.loads(python(script, installed))
    assert Path(result["file"]).is_relative_to(installed)
    assert HEAVY.isdisjoint(result["alone"])
    assert HEAVY.isdisjoint(result["discovered"])
    assert set(result["plugins"]) >= {
        "core",
        "arrays",
        "art",
        "demo",
        "openclip",
        "tecoa",
        "timm",
        "torchattacks",
        "ttc",
    }
    assert not any(result["plugins"].values())
    assert result["public"] == []


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["plugins"]])
def test_the_command_line_imports_nothing_heavy(installed: Path, arguments: list[str]) -> None:
    script = """if True:
        import sys
        from clipdefense.cli import main
        try:
            main()
        except SystemExit as leave:
            print(f"\\nexit {leave.code}", *sorted({name.partition(".")[0] for name in sys.modules}), sep="\\n")
    """
    *shown, listed = python(script, installed, *arguments).partition("\nexit 0\n")
    assert "evaluate" in shown[0]
    assert "clipdefense" in listed.split()
    assert HEAVY.isdisjoint(listed.split())


def test_the_public_names_resolve_and_the_version_is_the_projects() -> None:
    import clipdefense as cd

    assert cd.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert all(getattr(cd, name) is not None for name in cd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        cd.evalute  # noqa: B018
