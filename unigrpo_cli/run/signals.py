"""What Ctrl-C, SIGTERM and SIGHUP do to a run, depending on what it is doing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unigrpo_cli.parallel.ranks import Ranks

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class DroppedError(KeyboardInterrupt):
    """An evaluation or a sheet of samples was cut short by an interrupt; it can be made again, so nothing is lost.

    Not an `Exception`, so that it is not taken for an error of a reward.
    """


class Interrupts:
    """Signals of one run.

    While it loads, the first one stops it. While it trains, the first one asks to stop after the current step and drops
    an evaluation or sampling at once; the second one drops the step, unless its weights are moving or a file is being
    written: those are finished first.

    With several ranks a signal may reach one of them at any moment, and all have to stop at the same step. So the first
    one counts from the next `agree` and drops nothing; the second one ends the run where it is.

    Args:
        ranks: the processes that stop together; None for one alone.
        tell: shows a line to the user.
        moving: whether the current step can no longer be dropped.
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
        """Whether an interrupt came; with several ranks, whether all know."""
        return self.count > 0 if self.ranks is None else self.agreed

    def agree(self) -> None:
        """Agree whether an interrupt came to any rank. All ranks call this at the same places."""
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
            self.tell("the weights of this step are moving already: it is finished and saved")
        else:
            raise KeyboardInterrupt

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Around work that must not be cut short, such as writing files."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Around work that can be repeated without loss.

        Raises:
            DroppedError: when an interrupt comes, or came before.
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
    """Listen to the signals until left; SIGHUP stays ignored under nohup."""
    listener = Interrupts()
    old = {number: signal.getsignal(number) for number in NUMBERS}
    hangup = getattr(signal, "SIGHUP", None)
    for number, handler in old.items():
        if not (number == hangup and handler is signal.SIG_IGN):
            signal.signal(number, listener)
    try:
        yield listener
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
