"""Out-of-memory errors: recognise them, name the setting to change, or retry with half the batch."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from unigrpo_cli.errors import TooLargeError

Result = TypeVar("Result")

_MESSAGES = re.compile(
    r"out of memory|outofmemory|_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|Failed to CUDA (c|m)alloc"
    r"|DefaultCPUAllocator|not enough memory|can(no|')t allocate memory|bad_alloc",
    re.IGNORECASE,
)
"""What allocators say in a plain RuntimeError: torch's on a CPU, cuBLAS, cuDNN, cuSOLVER, NCCL, and the C++ library.
cuBLAS reports NOT_INITIALIZED when its own workspace does not fit."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


@contextmanager
def out_of_memory_hint(what: str, key: str, size: int) -> Iterator[None]:
    """Turn out-of-memory errors into one line with the setting to change.

    Args:
        what: what runs, in words.
        key, size: the setting that decides how much memory it takes, and its value.

    Raises:
        TooLargeError: when memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"give {key}={size // 2}" if size > 1 else "give a smaller sampling.height or dtype=bfloat16"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TooLargeError(f"out of memory in {what} with {key}={size}: {smaller} ({reason})") from error


def halve_until_it_fits(run: Callable[[int], Result], size: int, say: Callable[[str], None]) -> Result:
    """`run(size)`; after an out-of-memory error again with half the size, down to 1.

    Args:
        say: gets a line for each retry.

    Raises:
        TooLargeError, MemoryError, RuntimeError: of `run(1)`.
    """
    while True:
        try:
            return run(size)
        except (TooLargeError, MemoryError, RuntimeError) as error:
            if size < 2 or not (isinstance(error, TooLargeError) or is_out_of_memory(error)):
                raise
        gc.collect()  # outside `except`: the traceback held the tensors of the failed attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory with a batch of {size}: retrying with {size // 2}")
        size //= 2
