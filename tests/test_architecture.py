"""Which module imports which, and the cost of an import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path

import pytest

from tests.commands import unigrpo
from unigrpo_cli.algo import objective

ROOT = Path(__file__).parents[1]


ROOMS = (
    ("__main__",),
    ("cli", "testing"),
    ("report",),
    ("run",),
    ("sft",),
    ("train",),
    ("evaluate", "training"),
    ("replay",),
    ("rollout",),
    ("rewards",),
    ("suites", "models", "programs"),
    ("episode",),
    ("toy", "config"),
    ("parallel",),
    ("io", "algo"),
    ("errors",),
)
"""Rooms from top to bottom; a room imports only rooms of lower lines."""


def _modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.glob("unigrpo_cli/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def _statements(path: Path) -> list[ast.AST]:
    """All statements of a file, of functions and classes too; expressions hold no import and no class."""
    found: list[ast.AST] = [ast.parse(path.read_text())]
    for node in found:
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            found += getattr(node, name, ())
    return found


@cache
def _imports(path: Path) -> set[str]:
    """Names that a file imports anywhere: inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in _statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def _graph() -> dict[str, set[str]]:
    """Modules of the package and the modules that each imports; `from a import b` with a module b is `a.b`."""
    modules = _modules()
    graph = {}
    for name, path in modules.items():
        found = _imports(path) & modules.keys()
        graph[name] = {m for m in found if not any(other.startswith(f"{m}.") for other in found)} - {name}
    return graph


def test_rooms_depend_downwards_only() -> None:
    line = {room: k for k, rooms in enumerate(ROOMS) for room in rooms}
    graph = _graph()
    assert len(graph) > 100
    wrong = []
    for module, imported in graph.items():
        for other in imported:
            above, below = (m.split(".")[1] if "." in m else None for m in (module, other))
            if above and below and above != below and line[above] >= line[below]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_circle_of_modules() -> None:
    graph, done = _graph(), set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"import circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_the_algorithm_knows_nothing_of_us() -> None:
    """algo/ imports torch, the standard library's mathematics and itself."""
    allowed = {"torch", "math", "hashlib", "dataclasses", "collections", "__future__"}
    for path in (ROOT / "unigrpo_cli" / "algo").glob("*.py"):
        for name in _imports(path):
            own = name.startswith("unigrpo_cli.algo")
            assert own or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_plugins_use_the_public_door() -> None:
    """Built-in rewards import what other packages may: public names, errors, files within limits, the shapes world."""
    public = ("unigrpo_cli.errors", "unigrpo_cli.toy", "unigrpo_cli.io")
    exported = {f"unigrpo_cli.{name}" for name in __import__("unigrpo_cli").__all__}
    for path in (ROOT / "plugins").glob("*.py"):
        for name in _imports(path):
            if name.startswith("unigrpo_cli."):
                assert name in exported or name.startswith(public), f"{path.name} imports {name}"


def test_the_package_imports_no_tool() -> None:
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        assert not [name for name in _imports(path) if name.split(".")[0] in ("tools", "benchmarks", "tests")], path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["sft", "--help"], ["rewards", "list"], ["models", "list"], ["--version"]],
)
def test_help_and_listing_import_no_torch_and_take_half_a_second(arguments: list[str]) -> None:
    """CPU seconds of a fresh process, of three at most; half as many more, so that a busy machine does not decide."""
    code = (
        "import sys, time\n"
        f"sys.argv = ['unigrpo', *{arguments!r}]\n"
        "from unigrpo_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'transformers', 'open_clip') if m in sys.modules])\n"
        "print('SECONDS', time.process_time())\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "HEAVY []" in done.stdout, done.stdout
        if (seconds := float(done.stdout.split("SECONDS")[1])) < 0.75:
            break
    assert seconds < 0.75


def test_no_file_runs_code_when_it_is_read() -> None:
    """No pickle, no torch.load, no eval anywhere."""
    banned = ("pickle", "torch.load", "torch.save", "yaml.load(", "eval(", "exec(")
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        text = path.read_text().replace(".eval()", "").replace("exec_module(", "")
        assert not [word for word in banned if word in text], path


def test_names_are_nouns_of_the_field() -> None:
    """House rule: nouns of the field."""
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        assert path.stem not in ("utils", "helpers", "misc", "base")
        for node in _statements(path):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Processor", "Handler", "Helper", "Base")), node.name


def test_the_calls_to_the_clipped_ratio_are_those_of_the_docs(
    tmp_path: Path, small_model: Path, one_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command to `clipped_surrogate`, on the stack of a real run: at most eight calls, no closure."""
    page = (ROOT / "docs" / "algorithm.md").read_text().split("<!-- calls -->")[1].split("\n\n")[0]
    listed = [re.findall(r"`(?:\w+\.)?(\w+)`", line)[:2] for line in page.strip().splitlines()]
    stacks: list[list[tuple[str, str]]] = []
    own = objective.clipped_surrogate

    def traced(*given: object) -> object:
        frames = [f for f in traceback.extract_stack()[:-1] if "/unigrpo_cli/" in f.filename]
        stacks.append([(Path(f.filename).stem, f.name) for f in frames if f.name != "<listcomp>"])
        return own(*given)

    monkeypatch.setattr(objective, "clipped_surrogate", traced)
    small = ["train.prompts_per_step=2", "train.group_size=2", one_prompt, "eval.steps=1"]
    small += ["train.samples_every=0", "train.trace_every=0", "doctor.at_start=off"]
    settings = [part for setting in small for part in ("--set", setting)]
    run = ["--reward", "clean", "--steps", 1, "--model", small_model, "--out", tmp_path / "run"]
    done = unigrpo("train", *run, *settings)
    assert done.exit_code == 0, done.output
    kinds = set()
    for stack in stacks:
        calls = [name for _, name in stack[stack.index(("train", "train")) + 1 :]] + ["clipped_surrogate"]
        assert len(calls) == len(listed) <= 8
        assert all(call in names for call, names in zip(calls, listed, strict=True)), calls
        kinds.add(calls[-2])
    assert kinds == {"text_term", "image_term"}
