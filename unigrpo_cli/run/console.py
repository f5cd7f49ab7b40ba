"""What commands print while they run: a live view on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from unigrpo_cli.errors import one_line
from unigrpo_cli.io.secrets import redacted

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A row of blocks for the last values, scaled between their least and largest."""
    shown = [v for v in values if v == v][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1))] for v in shown)


class PlainConsole(Console):
    """A console on which text cannot move the cursor or change colours: control characters are spelled out."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.replace("\n", "").isprintable():
                yield segment
            else:
                yield Segment("".join(map(_printable, segment.text)), segment.style)


def _printable(character: str) -> str:
    """A character that shows; control characters and marks of writing direction as an escape."""
    if character.isprintable() or character in "\n\u200c\u200d":  # joiners, as in emoji
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()


class Display:
    """Messages and progress; with `json` on stderr, because stdout is for the one object.

    Of several ranks the first prints; others print only warnings of libraries and rewards.
    """

    def __init__(self, json: bool = False, quiet: bool = False, rank: int = 0):
        self.console = PlainConsole(stderr=json, highlight=False)
        self.errors = PlainConsole(stderr=True, highlight=False)
        self.quiet, self.rank = quiet or rank > 0, rank
        warnings.showwarning = self._warning

    def say(self, text: Any, style: str | None = None) -> None:
        """Print a line, or anything rich can show. Text is printed as it is: it may be a prompt or a path."""
        if not self.quiet:
            self.console.print(text, markup=False, style=style, soft_wrap=isinstance(text, str))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int]) -> None:
        """Rows under headings: a table on a terminal, aligned and unbroken lines elsewhere.

        Args:
            numbers: columns that are aligned to the right.
        """
        if self.console.is_terminal:
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            for k, name in enumerate(columns):
                table.add_column(name, justify="right" if k in numbers else "left", header_style="dim")
            for row in rows:
                table.add_row(*map(Text, row))
            self.say(table)
            return
        widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]
        self.say(title)
        for row in (columns, *rows):
            cells = [
                c.rjust(w) if k in numbers else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.say(("  " + "  ".join(cells)).rstrip())

    def warn(self, text: str) -> None:
        if not self.rank:  # the others have the same
            self._print_warning(text)

    def _print_warning(self, text: str) -> None:
        self.errors.print("[yellow]warning:[/] ", Text(one_line(redacted(text))), sep="", soft_wrap=True)

    def _warning(self, message: Any, category: type, *_: Any, **__: Any) -> None:
        if category is UserWarning:  # not the deprecations of libraries
            self._print_warning(f"rank {self.rank}: {message}" if self.rank else str(message))

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Any]:
        """A progress bar; yields a function to call with the number of items done since."""
        if self.quiet:
            yield lambda done: None
        elif self.console.is_terminal:
            with Progress(*_columns(), console=self.console, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda done: bar.advance(task, done)
        else:
            began = time.perf_counter()
            yield lambda done: None
            self.say(f"{what}: {total} in {time.perf_counter() - began:.1f} s")

    @contextmanager
    def training(self, total: int, done: int, names: Sequence[str]) -> Iterator[TrainingView]:
        view = TrainingView(self, total, done, names)
        if view.live and not self.quiet:
            with Live(get_renderable=view.render, console=self.console, refresh_per_second=4, transient=True):
                yield view
        else:
            yield view


class TrainingView:
    """Progress, a row per reward with its first and last values and a curve, and a line per current warning."""

    def __init__(self, display: Display, total: int, done: int, names: Sequence[str]):
        self.display, self.total, self.names = display, total, list(names)
        self.live = display.console.is_terminal
        self.history: dict[str, list[float]] = {name: [] for name in names}
        self.last: dict[str, float] = {}
        self.warnings: list[str] = []
        self.bar = Progress(*_columns(), console=display.console)
        self.task = self.bar.add_task("train", total=total, completed=done)
        self.printed = 0.0

    def update(self, step: int, metrics: dict[str, float], lasting: Mapping[str, str]) -> None:
        """Show a finished step and the current warnings, by rule."""
        self.last = metrics
        self.warnings = [f"{name}: {seen}" for name, seen in lasting.items()]
        self.bar.update(self.task, completed=step)
        for name in self.names:
            self.history[name].append(metrics.get(f"reward/{name}", float("nan")))
        due = time.perf_counter() - self.printed > 5 or step == self.total
        if not self.live and not self.display.quiet and due:
            self.printed = time.perf_counter()
            self.display.say(f"step {step}/{self.total}  {self._line()}")

    def _line(self) -> str:
        m = self.last
        parts = [f"{name} {m.get(f'reward/{name}', float('nan')):.3f}" for name in self.names]
        parts += [
            f"{label} {m[key]:.3g}"
            for label, key in (
                ("text", "sft/text_loss"),
                ("image", "sft/image_loss"),
                ("entropy", "text/entropy"),
                ("clipped text", "text/clip_fraction"),
                ("image", "image/clip_fraction"),
                ("penalty", "image/velocity-mse"),
                ("zero groups", "advantage/zero_groups"),
            )
            if key in m
        ]
        seconds = sum(v for k, v in m.items() if k.startswith("seconds/"))
        return "  ".join([*parts, f"{seconds:.1f} s"])

    def render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("reward", "first 5", "last 5", "course"):
            table.add_column(column, justify="left" if column in ("reward", "course") else "right")
        for name in self.names:
            values = [v for v in self.history[name] if v == v]
            first = f"{sum(values[:5]) / len(values[:5]):.3f}" if values else "-"
            last = f"{sum(values[-5:]) / len(values[-5:]):.3f}" if values else "-"
            table.add_row(name, first, last, sparkline(values))
        line = Text(self._line() if self.last else "first rollout ...", style="dim")
        return Group(self.bar, table, line, *(Text(warning, style="yellow") for warning in self.warnings))


def _columns() -> tuple:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/]"),
        TimeRemainingColumn(),
    )
