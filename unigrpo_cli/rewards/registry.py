"""The known rewards and where they come from.

A reward comes from an entry point of group `unigrpo.rewards` (name = reward, value = `module:object`), from the hook
`unigrpo_register_rewards`, or from a file or module given with `--plugin`. Built-in rewards use entry points too. An
entry point is listed without being imported. A broken plugin cannot break `--help`, and is fatal only to a run that
uses it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from unigrpo_cli.errors import RewardError, UnigrpoError, UsageError, one_line, suggest
from unigrpo_cli.io.entry_points import OURS, distribution, entry_points, only_ours
from unigrpo_cli.io.secrets import redacted
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.programs import PROGRAMS
from unigrpo_cli.rewards.function import MARK
from unigrpo_cli.rewards.hooks import PROJECT, Hooks

REWARD_GROUP, PLUGIN_GROUP = "unigrpo.rewards", "unigrpo"
PLUGINS_ENV, PLUGINS_DIR_ENV = "UNIGRPO_PLUGINS", "UNIGRPO_PLUGINS_DIR"


@dataclass
class RewardEntry:
    """A known reward. `load` imports it and may raise anything."""

    name: str
    origin: str
    version: str
    load: Callable[[], Any]
    override: bool = False
    _factory: Any = field(default=None, repr=False)
    _error: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """The unique name: `origin/name`."""
        return f"{self.origin}/{self.name}"

    def factory(self) -> Any:
        if self._factory is None and not self._error:
            try:
                with WorkingDirectory().entered():
                    found = self.load()
            except (Exception, SystemExit) as error:  # a plugin may raise anything at import
                self._error = message_of(error)
            else:
                self._factory = getattr(found, MARK, found)
                if not callable(getattr(self._factory, "score", None)):
                    self._error = "it has no `score` method and is not decorated with @reward"
                    self._factory = None
        if self._error:
            raise RewardError(
                f"reward {self.name!r} from {self.origin} cannot be loaded: {self._error}; fix the plugin or remove "
                "the reward"
            )
        return self._factory


class RewardRegistry:
    """All known rewards. Several may share a name; then each is selected as `origin/name`."""

    def __init__(self) -> None:
        self.entries: list[RewardEntry] = []
        self.problems: list[str] = []
        self._origin: tuple[str, str] = ("", "")

    def add(self, name: str, factory: Any, *, override: bool = False) -> None:
        """Add a reward class or decorated function; for `unigrpo_register_rewards`.

        `override=True` gives it `name` although another plugin has that name too.
        """
        self.add_entry(RewardEntry(name, *self._origin, load=lambda: factory, override=override))

    def add_entry(self, entry: RewardEntry) -> None:
        if any(e.address == entry.address for e in self.entries):
            raise RewardError(f"{entry.origin} offers two rewards named {entry.name!r}; rename one")
        self.entries.append(entry)

    def find(self, name: str) -> RewardEntry:
        found = [e for e in self.entries if name in (e.name, e.address)]
        chosen = [e for e in found if e.override] or found
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            addresses = " or ".join(e.address for e in chosen)
            raise RewardError(f"several plugins offer a reward {name!r}: say which, {addresses}")
        hint = suggest(name, {e.name for e in self.entries})
        broken = f" ({'; '.join(self.problems)})" if self.problems else ""
        raise RewardError(f"unknown reward {name!r}: {hint}; a reward in a file needs --plugin FILE{broken}")


class Plugins:
    """The plugins of one process: pluggy's manager and the reward registry."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(Hooks)
        self.rewards = RewardRegistry()
        self.manager.hook.unigrpo_register_rewards.call_historic(kwargs={"registry": self.rewards})
        self.manager.hook.unigrpo_register_models.call_historic(kwargs={"registry": MODELS})
        self.manager.hook.unigrpo_register_programs.call_historic(kwargs={"registry": PROGRAMS})

    def load(self, wanted: list[str] | None = None, directory: Path | None = None) -> None:
        """Load installed plugins, then those of a directory, then `wanted` in order.

        Args:
            wanted: files, modules, or `no:name` to disable an installed plugin or distribution.
            directory: a folder whose .py files are plugins; never guessed, because loading runs them.
        """
        wanted = [*filter(None, os.environ.get(PLUGINS_ENV, "").split(",")), *(wanted or [])]
        self.load_installed({text.removeprefix("no:") for text in wanted if text.startswith("no:")})
        if directory is None and os.environ.get(PLUGINS_DIR_ENV):
            directory = Path(os.environ[PLUGINS_DIR_ENV])
        if directory is not None:
            if not directory.is_dir():
                raise UsageError(f"no plugins directory {directory}: give a folder with --plugins-dir")
            for path in sorted(directory.glob("*.py")):
                if not path.stem.startswith(("_", "test_")) and path.stem != "conftest":
                    self._load_named(str(path), may_be_empty=True)
        for text in dict.fromkeys(wanted):
            if not text.startswith("no:"):
                self._load_named(text)

    def call(self, hook: str, **arguments: Any) -> Any:
        caller = getattr(self.manager.hook, hook)
        try:
            with WorkingDirectory().entered():
                return caller.call_historic(kwargs=arguments) if caller.is_historic() else caller(**arguments)
        except UnigrpoError:
            raise
        except (Exception, SystemExit) as error:
            who = " or ".join(impl.plugin_name for impl in caller.get_hookimpls())
            raise RewardError(f"plugin {who} failed in {hook}: {message_of(error)}") from error

    def load_installed(self, blocked: Set[str] = frozenset()) -> None:
        """Load installed plugins except those blocked by name; errors are kept in `rewards.problems`."""
        only = OURS if only_ours() else None
        known = {OURS}
        for point in entry_points(group=REWARD_GROUP):
            origin, number = distribution(point)
            known |= {point.name, origin, f"{origin}/{point.name}"}
            if not blocked & {point.name, origin, f"{origin}/{point.name}"} and only in (None, origin):
                self.rewards.add_entry(RewardEntry(point.name, origin, number, load=point.load))
        for point in entry_points(group=PLUGIN_GROUP):
            origin, number = distribution(point)
            known |= {point.name, origin}
            if blocked & {point.name, origin} or only not in (None, origin):
                continue
            try:
                with WorkingDirectory().entered():
                    self._register(point.load(), point.name, origin, number)
            except (Exception, SystemExit) as error:  # an installed plugin must not break the command line
                self.rewards.problems.append(f"plugin {point.name!r} of {origin} failed: {message_of(error)}")

        for name in sorted(blocked - known):
            self.rewards.problems.append(f"--plugin no:{name} disables nothing: {suggest(name, known)}")

    def _load_named(self, text: str, may_be_empty: bool = False) -> None:
        try:
            with WorkingDirectory().entered():
                module = _from_file(Path(text)) if text.endswith(".py") else importlib.import_module(text)
        except UnigrpoError as error:
            raise RewardError(f"--plugin {text}: {error}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything at import
            raise RewardError(f"--plugin {text}: {message_of(error)}; fix it, or remove it") from error
        origin = Path(text).stem if text.endswith(".py") else text
        try:
            number = version(text.split(".")[0])
        except (PackageNotFoundError, ValueError):
            number = "-"
        before = len(self.rewards.entries)
        for value in list(vars(module).values()):
            made = getattr(value, MARK, None)
            if made is not None and getattr(value, "__module__", None) == module.__name__:
                self.rewards.add_entry(RewardEntry(made.name, origin, number, load=partial(_itself, value)))
        try:
            with WorkingDirectory().entered():
                self._register(module, f"--plugin {text}", origin, number)
        except UnigrpoError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(f"--plugin {text}: {message_of(error)}") from error
        hooks = self.manager.get_hookcallers(module)
        if len(self.rewards.entries) == before and not hooks and not may_be_empty:
            raise RewardError(
                f'--plugin {text}: it has no reward and no hook; decorate a function with @reward("name")'
            )

    def _register(self, module: Any, name: str, origin: str, number: str) -> None:
        """Register a module's hooks; rewards that it adds get its origin."""
        if self.manager.is_registered(module):
            return
        self.rewards._origin = (origin, number)
        self.manager.register(module, name)
        for impl in self.manager.get_hookcallers(module) or ():
            if not impl.has_spec():
                self.manager.unregister(module)
                known = [n for n in dir(Hooks) if n.startswith("unigrpo_")]
                raise RewardError(f"{name} implements no such hook {impl.name!r}: {suggest(impl.name, known)}")


def message_of(error: BaseException) -> str:
    """An exception of a plugin in one line: no control characters, no secrets of the environment."""
    return one_line(redacted(f"{type(error).__name__}: {error}"))


def _itself(value: Any) -> Any:
    return value


def _from_file(path: Path) -> ModuleType:
    """Import a file under its own name, so that it shadows no module and `sys.path` is unchanged."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"unigrpo_ext_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class WorkingDirectory:
    """The working directory of one plugin.

    A process has one working directory, and the paths that a user typed are relative to the one at start. A plugin
    that changes it keeps its own for its later calls; the rest of the process keeps the other. After `release` a call
    that is still in flight leaves the directory of the process as it is.
    """

    def __init__(self) -> None:
        self._own: str | None = None
        self._released = False

    def release(self) -> None:
        self._released = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run plugin code in its directory, and return to the directory of the process."""
        before = _current_directory()
        if self._own is not None:
            with suppress(OSError):
                os.chdir(self._own)
        try:
            yield
        finally:
            after = _current_directory()
            if before is not None and after != before and not self._released:
                self._own = after
                os.chdir(before)


def _current_directory() -> str | None:
    """None when the directory was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None
