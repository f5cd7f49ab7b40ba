"""Errors meant for people. Each says what was given, what is accepted, and what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnigrpoError(Exception):
    """One clear line for the user; the command prints it and exits with `exit_code`, without a traceback.

    `everywhere` is set where all ranks of a run have the same error (`ranks.together`).
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
    """Training that left the numbers: several bad steps in a row, or weights that are not finite."""


class RefusedUpdateError(DivergedError):
    """An update that is not made, for loss, gradient or batch have left the numbers. Nothing has moved."""


class DiskError(UnigrpoError):
    """A disk that is full, or that cannot be written for another reason."""


class TooLargeError(UnigrpoError):
    """A run that cannot fit the memory there is."""


class GateError(UnigrpoError):
    """A threshold that was asked for was not reached."""

    exit_code = 4


class WeightsError(UnigrpoError):
    """Model files that are missing, truncated or of the wrong shape."""

    exit_code = 5


class FaultError(UnigrpoError):
    """The doctor found something wrong."""

    exit_code = 6


class NotFetchedError(WeightsError):
    """A model of the hub that is not on this machine, where nothing was to be fetched."""


class RankError(UnigrpoError):
    """Another process of a run that failed or is gone."""


class EndedElsewhereError(UnigrpoError):
    """This process ends because another one did, which has told the user why: there is nothing to print."""

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


def suggest(given: str, accepted: Iterable[str]) -> str:
    """A tail for an error about a wrong name: the near misses, or else all that is accepted."""
    options = sorted(accepted)
    near = difflib.get_close_matches(given, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"accepted: {', '.join(options)}" if options else "nothing is accepted here"
