"""Errors for the user. Each says what was given, what is accepted, and what to type instead."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable


class UnigrpoError(Exception):
    """One line for the user; the command prints it and exits with `exit_code`, without a traceback.

    `everywhere` is set when all ranks of a run have the same error (`ranks.together`).
    """

    exit_code = 1
    everywhere = False


class UsageError(UnigrpoError):
    """A wrong option, configuration key or input file."""

    exit_code = 2


class RewardError(UnigrpoError):
    """A reward or plugin that failed, broke its contract or cannot be found."""

    exit_code = 3


class DivergedError(UnigrpoError):
    """Training that diverged: several skipped updates in a row, or weights that are not finite."""


class RefusedUpdateError(DivergedError):
    """Skipped update: non-finite loss, gradient or batch. No weight has changed."""


class DiskError(UnigrpoError):
    """A disk that is full or cannot be written."""


class TooLargeError(UnigrpoError):
    """A run that does not fit in memory."""


class GateError(UnigrpoError):
    """A score below the threshold of `--fail-under`."""

    exit_code = 4


class WeightsError(UnigrpoError):
    """Model files that are missing, truncated or of the wrong shape."""

    exit_code = 5


class FaultError(UnigrpoError):
    """The doctor found something wrong."""

    exit_code = 6


class NotFetchedError(WeightsError):
    """A model of the hub that is not in the cache, when fetching was not allowed."""


class RankError(UnigrpoError):
    """Another process of the run failed or is gone."""


class EndedElsewhereError(UnigrpoError):
    """This process ends because another one did, which printed the reason."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


LONGEST_LINE = 1_500


def one_line(text: str) -> str:
    """A text as one line of a terminal: control characters spelt out, and the middle left out of a very long one.

    What was given comes first in an error and the remedy last, so both ends stay.
    """
    plain = " ".join(text.split())
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
    if len(plain) <= LONGEST_LINE:
        return plain
    return f"{plain[: LONGEST_LINE // 2]} ... {plain[-LONGEST_LINE // 2 :]}"


def quoted(path: object) -> str:
    """A path as it is typed in a shell, for commands in messages."""
    return shlex.quote(str(path))


def suggest(given: str, accepted: Iterable[str]) -> str:
    """The end of an error about a wrong name: near misses, or all accepted names."""
    options = sorted(accepted)
    near = difflib.get_close_matches(given, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"accepted: {', '.join(options)}" if options else "nothing is accepted here"
