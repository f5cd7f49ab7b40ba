"""What Ctrl-C and SIGTERM do to a run, by what it is at."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unigrpo_cli.parallel.ranks import Ranks

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class DroppedError(KeyboardInterrupt):
    """An evaluation or a sheet of samples that an interrupt has cut short: nothing is lost, it can be made again.

    No `Exception`, so that nobody takes it for a reward's fault.
    """


class Interrupts:
    """Signals of one run.

    While it loads, the first stops it. While it trains, the first asks to stop after the step at hand and drops an
    evaluation or sampling at once; the next one drops the step, unless its weights are moving already or a file is
    being written: then that is finished first.

    With several ranks a signal may come to one of them, at any moment, and all have to stop at the same step. So it
    counts from when they next `agree`, and drops nothing; the next one ends the run where it is.

    Args:
        ranks: the processes that stop together; None for one alone.
        tell: shows a line to the user; set when there is a screen.
        moving: whether the step at hand can no longer be dropped; set when training begins.
    """

    def __init__(self) -> None:
        self.count = 0
        self.training = False
        self.ranks: Ranks | None = None
        self.agreed = False
        self.tell: Callable[[str], None] = lambda line: None
        self.moving: Callable[[], bool] = lambda: False
        self._droppable = False
        self._shields = 0

    def __bool__(self) -> bool:
        """Whether one has come, and with several ranks all know."""
        return self.count > 0 if self.ranks is None else self.agreed

    def agree(self) -> None:
        """Agree whether one has come to any rank; all of them call this at the same places."""
        self.agreed = self.count > 0 if self.ranks is None else self.ranks.any(self.count > 0)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if not self.training:
            raise KeyboardInterrupt
        if self._shields:
            return
        if self._droppable and self.ranks is None:
            raise DroppedError
        if self.count == 1:
            self.tell("stopping after this step and saving a checkpoint; interrupt again to stop at once")
        elif self.moving():
            self.tell("this step's weights are moving already: it is finished and saved")
        else:
            raise KeyboardInterrupt

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Around what must not be cut short: the writing of files."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Around what can be done again at no loss.

        Raises:
            DroppedError: when an interrupt comes, or has come.
        """
        self._droppable = True
        try:
            self.agree()
            if self:
                raise DroppedError
            yield
        finally:
            self._droppable = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Listen to both signals until left."""
    listener = Interrupts()
    old = {number: signal.signal(number, listener) for number in NUMBERS}
    try:
        yield listener
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
