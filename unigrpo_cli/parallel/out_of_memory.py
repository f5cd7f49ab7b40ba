"""A device that runs out of memory in the middle of something, as one line that names what to type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unigrpo_cli.errors import TooLargeError


@contextmanager
def out_of_memory_hint(what: str, key: str, size: int) -> Iterator[None]:
    """Around what takes memory by the number that a setting gives. Results repeat, so no smaller one is tried here.

    Args:
        what: that runs, in words.
        key, size: the setting, and how many there are at the same time.

    Raises:
        TooLargeError: where memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        smaller = (
            f"give {key}={size // 2}" if size > 1 else "give a smaller sampling.height, or dtype=bfloat16 if it is not"
        )
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TooLargeError(f"out of memory in {what} with {key}={size}: {smaller} ({reason})") from error


def _lacks_memory(error: Exception) -> bool:
    """An accelerator's own error has a class; a CPU's is a RuntimeError by its allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
