"""Rewards by strangers: an installed package, and the few lines that docs/rewards.md shows, by every door."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.commands import Process, unigrpo
from unigrpo_cli.cli.common import load_plugins
from unigrpo_cli.io.entry_points import entry_points
from unigrpo_cli.rewards.conformance import check_reward
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.run.console import Display

ROOT = Path(__file__).parents[1]
AUTOLOAD = "UNIGRPO_DISABLE_PLUGIN_AUTOLOAD"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the example package, unpacked as pip does it; building leaves the checkout alone."""
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(ROOT / "examples" / "unigrpo-reward-sharpness", source)
    target = tmp_path_factory.mktemp("target")
    code, _, errors = Process(_build, source, target).ended()
    assert code == 0, errors
    (wheel,) = target.glob("*.whl")
    shutil.unpack_archive(wheel, target, "zip")
    return target


def _build(source: Path, target: Path) -> None:
    from setuptools import build_meta

    os.chdir(source)
    build_meta.build_wheel(str(target))


def test_the_example_package_is_found_tested_and_trained_on(
    installed: Path, tmp_path: Path, small_model: Path, one_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its installation alone."""
    (found,) = distributions(path=[str(installed)])
    assert [(p.group, p.name) for p in found.entry_points] == [("unigrpo.rewards", "sharpness")]
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delenv(AUTOLOAD)
    small = ["train.prompts_per_step=2", "train.group_size=4", one_prompt, "eval.steps=2"]
    small += ["train.trace_every=0", "doctor.at_start=off"]
    settings = [word for setting in small for word in ("--set", setting)]
    run = tmp_path / "run"
    commands = [
        ["rewards", "list"],
        ["rewards", "test", "sharpness@half=0.01"],
        ["train", "--reward", "sharpness", "--steps", "1", "--out", run, "--model", small_model, *settings],
    ]
    done = [unigrpo(*command, "--json") for command in commands]
    assert [result.exit_code for result in done] == [0, 0, 0], done[-1].output
    listed, tested, trained = (json.loads(result.stdout) for result in done)
    (row,) = [row for row in listed["rewards"] if row["name"] == "sharpness"]
    assert (row["origin"], row["version"], row["state"]) == ("unigrpo-reward-sharpness", "0.1.0", "ok")
    assert row["range"] == [0, 1]
    assert len(tested["checks"]) >= 9
    assert all(check["ok"] for check in tested["checks"])
    assert 0 < trained["eval_after"]["sharpness"] < 1
    assert json.loads((run / "metrics.jsonl").read_text())["reward/sharpness"] > 0


def run_pytest(*arguments: str) -> None:
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))


def test_the_example_packages_own_tests_pass() -> None:
    package = str(ROOT / "examples" / "unigrpo-reward-sharpness")
    tests = Process(run_pytest, "-c", f"{package}/pyproject.toml", "--rootdir", package, package)
    code, output, _ = tests.ended()
    assert code == 0, output


def _from_the_docs() -> str:
    """The first reward of docs/rewards.md, as a reader would copy it."""
    text = (ROOT / "docs" / "rewards.md").read_text()
    code = re.search(r"## Write one\n\n```python\n(.*?)```", text, re.DOTALL)
    assert code
    return code[1]


def _by_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    (folder / "mine.py").write_text(_from_the_docs())
    return load_plugins([str(folder / "mine.py")], None, Display())


def _by_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    (folder / "mine.py").write_text(_from_the_docs())
    return load_plugins(None, folder, Display())


def _by_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    (folder / "mine.py").write_text(_from_the_docs())
    facts = folder / "strangers_rewards-3.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-rewards\nVersion: 3.2\n")
    (facts / "entry_points.txt").write_text("[unigrpo.rewards]\nredness = mine:redness\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv(AUTOLOAD)
    return load_plugins(None, None, Display())


@pytest.mark.parametrize(
    ("door", "origin"), [(_by_file, "mine"), (_by_directory, "mine"), (_by_entry_point, "strangers-rewards")]
)
def test_what_the_docs_show_works_by_every_door(
    door: Callable[[Path, pytest.MonkeyPatch], Plugins],
    origin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len([line for line in _from_the_docs().splitlines() if line.strip()]) < 10
    plugins = door(tmp_path, monkeypatch)
    assert plugins.rewards.find("redness").address == f"{origin}/redness"
    checks = check_reward("redness", plugins=plugins)
    assert all(check.ok for check in checks), checks
    sys.modules.pop("mine", None)


def test_new_files_of_every_kind_pass_their_own_tests(tmp_path: Path) -> None:
    """What `rewards new` writes works as it is written, judge and package included."""
    folders = [tmp_path / "files"] * 4 + [tmp_path / "package"]
    for kind, folder in zip(("function", "class", "segments", "vlm", "package"), folders, strict=True):
        made = unigrpo("rewards", "new", f"my_{kind}", "--kind", kind, "--out", folder)
        assert made.exit_code == 0, made.output
        again = unigrpo("rewards", "new", f"my_{kind}", "--kind", kind, "--out", folder)
        assert again.exit_code == 2
    package = tmp_path / "package" / "unigrpo-reward-my-package"
    assert 'my_package = "unigrpo_reward_my_package:my_package"' in (package / "pyproject.toml").read_text()
    folders = [str(tmp_path / "files"), str(package)]
    tests = Process(run_pytest, "-c", str(package / "pyproject.toml"), "--rootdir", str(package), *folders)
    code, output, _ = tests.ended()
    assert code == 0, output
    assert "5 passed" in output


def test_a_package_that_is_installed_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert not entry_points("unigrpo.tried")
    package = tmp_path / "later-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: later\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[unigrpo.tried]\nthing = json:dumps\n")
    assert [point.name for point in entry_points("unigrpo.tried")] == ["thing"]
