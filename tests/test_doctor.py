"""``clipdefense doctor``: each thing it can find, found by bringing it about."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from clipdefense import plugins as plugin_module
from clipdefense.commands import doctor as module
from clipdefense.commands.doctor import Finding, doctor, examine, report
from clipdefense.plugins import Contribution, PluginInfo, Registry


def named(findings: Iterable[Finding], name: str) -> Finding:
    (found,) = [each for each in findings if each.name == name]
    return found


def test_here_nothing_fails_and_every_section_says_something() -> None:
    findings = examine()
    assert [each for each in findings if each.status == "fail"] == []
    assert {each.section for each in findings} == set(module.SECTIONS)
    versions = {each.name.lower().replace("_", "-"): each.detail for each in findings if each.section == "versions"}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["clipdefense"] == importlib.metadata.version("clipdefense")


def test_json_is_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is True and sum(content["count"].values()) == len(content["findings"])
    assert {"section", "name", "status", "detail", "advice"} == content["findings"][0].keys()


def test_the_table_names_each_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "examine", lambda: [Finding("devices", "cpu [old]", "warn", "slow", "buy another")])
    doctor()
    out = capsys.readouterr().out
    assert "cpu [old]" in out and "buy another" in out and "1 warn" in out


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "examine", lambda: [Finding("devices", "cpu", "fail", "on fire")])
    with pytest.raises(typer.Exit) as caught:
        doctor(as_json=True)
    assert caught.value.exit_code == 1 and json.loads(capsys.readouterr().out)["ok"] is False


def test_a_section_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("driver gone")

    monkeypatch.setattr(module, "SECTIONS", {"devices": broken, "threads": module.threads})
    findings = examine()
    assert named(findings, "devices") == Finding(
        "devices", "devices", "fail", "cannot be looked at (OSError: driver gone)"
    )
    assert [each.section for each in findings] == ["devices", "threads"]


class Installed:
    """Stand-in for the metadata of what is installed."""

    def __init__(self, versions: dict[str, str], requires: dict[str, list[str]]) -> None:
        self.versions, self.stated = versions, requires

    def version(self, name: str) -> str:
        if name.lower() not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name.lower()]

    def distribution(self, name: str) -> Any:
        number = self.version(name)
        return type("Distribution", (), {"requires": self.stated.get(name.lower()), "version": number})()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(versions: dict[str, str], requires: dict[str, list[str]]) -> None:
        stand_in = Installed(versions, requires)
        monkeypatch.setattr(module, "version", stand_in.version)
        monkeypatch.setattr(module, "distribution", stand_in.distribution)

    return install


def test_requirements_of_its_own(installed: Any) -> None:
    needs = ["torch>=2.4", "timm>=1.0.9", "rich>=13.7", "attacks==3.5.1; extra == 'attacks'", "h5; extra == 'h5'"]
    installed({"clipdefense": "0.1.0", "torch": "2.3.0", "rich": "14.0", "attacks": "3.6"}, {"clipdefense": needs})
    findings = list(module.versions())
    assert named(findings, "torch").status == "fail" and ">=2.4" in named(findings, "torch").detail
    assert named(findings, "timm").detail == "not installed"
    assert named(findings, "timm").advice == "pip install 'timm>=1.0.9'"
    assert named(findings, "rich").status == "ok" and named(findings, "attacks").status == "warn"
    assert "h5" not in [each.name for each in findings]  # an extra that nobody asked for


def test_pins_that_hold_others_back_or_do_not_hold(installed: Any) -> None:
    requires = {
        "clipdefense": ["torchattacks==3.5.1; extra == 'torchattacks'", "hub>=1"],
        "torchattacks": ["requests~=2.25.1"],
        "hub": ["requests>=2.20", "tool>=2; extra == 'cli'"],
    }
    versions = {"clipdefense": "0.1.0", "torchattacks": "3.5.1", "hub": "1.0", "tool": "1.0"}
    installed(versions | {"requests": "2.25.1"}, requires)
    (held,) = module._pins()
    assert held.name == "torchattacks" and held.status == "note" and "keeps requests at 2.25.1" in held.detail
    installed(versions | {"requests": "2.32.3"}, requires)
    (broken,) = module._pins()
    assert broken.status == "warn" and broken.detail == "wants requests~=2.25.1, but 2.32.3 is installed"


def test_art_without_multiprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._multiprocess().status == "ok"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "multiprocess" else find(name))
    finding = module._multiprocess()
    assert finding.status == "fail" and finding.advice == "pip install multiprocess"


def test_quick_gelu_is_a_matter_of_open_clip_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: "3.3.0")
    (finding,) = module._quick_gelu()
    assert finding.status == "note" and "-quickgelu" in finding.advice
    monkeypatch.setattr(module, "version", lambda name: "2.32.0")
    assert list(module._quick_gelu()) == []


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, cores, status in ((8, 2, "warn"), (2, 2, "ok"), (1, 4, "note")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(module, "_cores", lambda cores=cores: cores)
        (finding,) = module.threads()
        assert finding.status == status and f"{threads} threads on {cores} cores" in finding.detail
        assert status == "ok" or f"OMP_NUM_THREADS={cores}" in finding.advice


def test_tf32_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = type("Properties", (), {"name": "A GPU", "total_memory": 80 * 2**30, "major": 9, "minor": 0})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert named(module.devices(), "cuda:0").detail == "A GPU, 80 GiB, compute 9.0"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    (finding,) = module._tf32()
    assert finding.status == "note" and "convolutions" in finding.detail


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_CACHE", str(tmp_path / "new"))
    monkeypatch.setenv("CLIPDEFENSE_DATASETS", str(tmp_path))
    monkeypatch.setenv("CLIPDEFENSE_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = list(module.folders())
    assert named(findings, "cache").status == "ok" and "not there yet" in named(findings, "cache").detail
    assert not (tmp_path / "new").exists()
    assert named(findings, "data").status == "fail" and "CLIPDEFENSE_DATA" in named(findings, "data").advice
    assert str(tmp_path / "hub") in named(findings, "model hub").detail
    assert named(findings, "HF_HUB_OFFLINE").status == "note"


def test_a_folder_that_is_full_read_only_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert module._folder("cache", tmp_path / "file" / "inside", "PLACE").status == "fail"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    finding = module._folder("cache", tmp_path, "PLACE")
    assert finding.status == "warn" and "cannot be written" in finding.detail and "PLACE" in finding.advice
    assert module._folder("data", tmp_path, "PLACE", needed=True).status == "ok"  # only read
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 2**20})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert module._folder("cache", tmp_path, "PLACE").advice.startswith("make room")


def test_plugins_that_are_broken_empty_or_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Contribution("attacks", "same", "a:b", "one", "dist-one")
    two = Contribution("attacks", "same", "a:b", "two", "dist-two", requires=("no_such_package",), install="nothing")
    found = Registry(
        (
            PluginInfo("one", "dist-one", "1", (one,)),
            PluginInfo("two", "dist-two", "1", (two,)),
            PluginInfo("bad", "dist-bad", "1", error="ImportError: no"),
            PluginInfo("empty", "dist-empty", "1"),
        ),
        {("attacks", "same"): [one, two]},
    )
    monkeypatch.setattr(module, "registry", lambda: found)
    findings = list(module.plugins())
    assert named(findings, "bad of dist-bad").status == "fail"
    assert named(findings, "empty of dist-empty").status == "warn"
    clash, waiting = [each for each in findings if each.name == "attacks same"]
    assert clash.status == "fail" and "dist-one, dist-two" in clash.detail
    assert waiting.status == "note" and waiting.advice == "pip install 'nothing'"


def test_a_misspelt_plugin_list_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEFENSE_PLUGINS", "no-such-plugin")
    plugin_module.registry.cache_clear()
    try:
        (finding,) = module.plugins()
    finally:
        plugin_module.registry.cache_clear()
    assert finding.status == "fail" and "no-such-plugin" in finding.detail


def test_the_summary_counts() -> None:
    findings = [Finding("threads", str(i), status, "") for i, status in enumerate(("ok", "ok", "note", "warn"))]  # type: ignore[arg-type]
    assert report(findings)["count"] == {"ok": 2, "note": 1, "warn": 1, "fail": 0} and report(findings)["ok"]
