"""Who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def _room(module: str) -> str | None:
    """The sub-package, top-level module or plugin package that a module name belongs to."""
    parts = module.split(".")
    if parts[0] == "unigrpo_plugins":
        return "plugins"
    if parts[0] != "unigrpo_cli" or len(parts) < 2:
        return None
    here = ROOT / "unigrpo_cli" / parts[1]
    return parts[1] if here.is_dir() or here.with_suffix(".py").is_file() else None


def _graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        if path == ROOT / "unigrpo_cli" / "__init__.py":
            continue
        own = "plugins" if "plugins" in path.relative_to(ROOT).parts[:1] else _room_of_file(path)
        graph.setdefault(own, set())
        graph[own] |= {r for r in map(_room, _imports(path)) if r and r != own}
    return graph


def _room_of_file(path: Path) -> str:
    relative = path.relative_to(ROOT / "unigrpo_cli")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_no_two_rooms_import_each_other() -> None:
    graph = _graph()
    assert len(graph) > 15
    mutual = {(a, b) for a in graph for b in graph[a] if a < b and a in graph.get(b, set())}
    assert not mutual


def test_there_is_no_cycle_at_all() -> None:
    graph, done, path = _graph(), set(), []

    def visit(node: str) -> None:
        assert node not in path, f"import cycle: {' -> '.join([*path[path.index(node) :], node])}"
        if node not in done:
            path.append(node)
            for other in sorted(graph.get(node, ())):
                visit(other)
            path.pop()
            done.add(node)

    for node in sorted(graph):
        visit(node)


def test_the_algorithm_knows_nothing_of_us() -> None:
    """algo/ imports torch, the standard library's mathematics and itself."""
    allowed = {"torch", "math", "hashlib", "dataclasses", "collections", "__future__"}
    for path in (ROOT / "unigrpo_cli" / "algo").glob("*.py"):
        for name in _imports(path):
            own = name.startswith("unigrpo_cli.algo")
            assert own or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_plugins_use_the_public_door() -> None:
    """Built-in rewards import what a stranger may: the package, its errors, and the shapes world."""
    public = ("unigrpo_cli.errors", "unigrpo_cli.toy")
    exported = {f"unigrpo_cli.{name}" for name in __import__("unigrpo_cli").__all__}
    for path in (ROOT / "plugins").glob("*.py"):
        for name in _imports(path):
            if name.startswith("unigrpo_cli."):
                assert name in exported or name.startswith(public), f"{path.name} imports {name}"


def test_nobody_imports_the_programs_that_made_the_weights() -> None:
    graph = _graph()
    assert not [room for room in graph if "rebuild" in graph[room]]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["rewards", "list"], ["--version"]])
def test_help_and_listing_import_no_torch_and_take_half_a_second(arguments: list[str]) -> None:
    """CPU seconds of a fresh process, the least of three: a busy machine must not decide."""
    code = (
        "import sys, time\n"
        f"sys.argv = ['unigrpo', *{arguments!r}]\n"
        "from unigrpo_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'transformers', 'open_clip') if m in sys.modules])\n"
        "print('SECONDS', time.process_time())\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "HEAVY []" in done.stdout, done.stdout
        seconds.append(float(done.stdout.split("SECONDS")[1]))
    assert min(seconds) < 0.5


def test_no_file_runs_code_when_it_is_read() -> None:
    """No pickle, no torch.load, no eval anywhere."""
    banned = ("pickle", "torch.load", "torch.save", "yaml.load(", "eval(", "exec(")
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        text = path.read_text().replace("network.eval()", "").replace("model.eval()", "").replace("exec_module(", "")
        assert not [word for word in banned if word in text], path


def test_no_room_is_named_after_nothing() -> None:
    """House rule: nouns of the field."""
    for path in [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        assert path.stem not in ("utils", "helpers", "misc", "base")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Processor", "Handler", "Helper", "Base")), node.name
