"""Documentation that cannot fall behind: generated parts, links, trees, examples."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tools.docs import documents, regenerated
from unigrpo_cli import __version__
from unigrpo_cli.config import config_keys, load_config
from unigrpo_cli.rewards.batch import COLUMNS
from unigrpo_cli.rewards.hooks import Hooks

ROOT = Path(__file__).parents[1]


def test_generated_parts_are_up_to_date() -> None:
    """Hooks with their signatures, commands with their options, configuration keys, rewards."""
    found = documents()
    assert len(found) >= 3
    for path in found:
        assert path.read_text() == regenerated(path.read_text()), (
            f"{path.relative_to(ROOT)} is stale: run `python -m tools.docs`"
        )


def test_every_hook_column_and_key_is_somewhere() -> None:
    rewards = (ROOT / "docs" / "rewards.md").read_text()
    for name in vars(Hooks):
        if name.startswith("unigrpo_"):
            assert f"### `{name}(" in rewards
    for column in COLUMNS:
        assert f"`{column}`" in rewards
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    for key in config_keys():
        assert f"| `{key}` |" in configuration


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"[^\\]\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_troubleshooting_quotes_messages_as_they_are() -> None:
    """Of each quoted message, the words between placeholders stand in the code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Checkpoints and resuming")[2]
    code = "".join(path.read_text() for path in ROOT.glob("unigrpo_cli/**/*.py"))
    code = re.sub(r'["\']\s*f?["\']', "", code)  # literals over several lines
    table = page.partition("## Refused input")[0]
    messages = re.findall(r"^\| `(.*?)`[^|]*\|", table, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        for words in re.split(r"\b[A-Z]+\b|\w*_N\b|\.\.\.|[():]|->", message):
            assert words.strip(" ;") in code, f"{message}: no message says {words!r}"


def test_the_readme_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    (tree,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    for name in named:
        assert (ROOT / name).exists(), f"the README's tree names {name}"
    inside = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    for name in inside:
        assert (ROOT / "unigrpo_cli" / name.rstrip("/")).exists(), f"the README's tree names unigrpo_cli/{name}"
    ours = {p.name for p in (ROOT / "unigrpo_cli").iterdir() if not p.name.startswith(("__", "py.typed"))}
    assert ours == {name.rstrip("/") for name in inside}


def test_every_log_of_a_change_names_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.toml")))
def test_example_configurations_are_valid(path: Path) -> None:
    if path.name != "pyproject.toml":
        load_config(file=path)
    tomllib.loads(path.read_text())


def test_presets_explain_every_value() -> None:
    """In a preset, each value has a comment above it or beside it that says why."""
    for path in (ROOT / "unigrpo_cli" / "config" / "presets").glob("*.toml"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "=" in line and not line.startswith("#"):
                assert "#" in line or lines[number - 1].startswith("#"), f"{path.name}:{number + 1}: {line}"


def test_nothing_names_a_workplace() -> None:
    """The project speaks of itself alone: no absolute paths of anybody's machine."""
    pattern = re.compile(r"/(?:work|home|root|Users)/\w+")
    for path in [
        *ROOT.glob("**/*.md"),
        *ROOT.glob("unigrpo_cli/**/*.py"),
        *ROOT.glob("plugins/*.py"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        if not {".venv", ".git"} & set(path.relative_to(ROOT).parts) and path != Path(__file__):
            assert not pattern.search(path.read_text()), path
