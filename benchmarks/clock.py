"""Time, memory and the ceilings of a device."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


class NotMeasuredError(Exception):
    """A measurement that is left out, and why: no time is left, or what it needs was not made."""


class Clock:
    """Seconds of finished work on one device, within a budget, and the largest memory it took.

    On a device of its own memory is what torch has allocated there; on a CPU it is the resident set.
    """

    def __init__(self, device: torch.device, budget_s: float):
        self.device, self.ends = device, time.perf_counter() + budget_s

    @property
    def left_s(self) -> float:
        return self.ends - time.perf_counter()

    def now(self) -> float:
        """Seconds on the clock, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def need(self, seconds: float) -> None:
        """Refuse what would take longer than what is left.

        Raises:
            NotMeasuredError: saying both.
        """
        if seconds > self.left_s:
            raise NotMeasuredError(f"no time: needs about {seconds:.0f} s of the {max(0, self.left_s):.0f} s left")

    def once(self, run: Callable[[], object]) -> float:
        began = self.now()
        run()
        return self.now() - began

    def median(self, run: Callable[[], object], share_s: float) -> float:
        """Median seconds of a call, after one to warm up."""
        return statistics.median(self.repeated(run, share_s))

    def repeated(self, run: Callable[[], object], share_s: float, most: int = 5) -> list[float]:
        """Seconds of each call, after one to warm up: as many as fit into `share_s`, at least one."""
        self.need(0)
        warm = self.once(run)
        self.need(warm)
        times = [self.once(run)]
        while len(times) < most and sum(times) + times[-1] < min(share_s, self.left_s):
            times.append(self.once(run))
        return times

    def forget_peak(self) -> None:
        """Begin to look for the largest memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak_gib(self) -> float:
        """Largest memory since `forget_peak`, GiB (on a CPU that cannot forget, since the start)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        return _resident_gib("VmHWM")

    def held_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / GIB
        return _resident_gib("VmRSS")

    @contextmanager
    def watching(
        self, owner: Any, name: str, seconds: dict[str, float], peaks: dict[str, float] | None = None
    ) -> Iterator[None]:
        """Add the seconds of every call of `owner.name` to `seconds[name]`, keep its largest memory in `peaks`.

        So the project's own functions are measured where they stand, with nothing of them repeated here. A call
        inside a watched one takes no `peaks`: there is one record of the largest memory.
        """
        own = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            if peaks is not None:
                self.forget_peak()
            began = self.now()
            result = own(*given, **named)
            seconds[name] = seconds.get(name, 0.0) + self.now() - began
            if peaks is not None:
                peaks[name] = max(peaks.get(name, 0.0), self.peak_gib())
            return result

        setattr(owner, name, call)
        try:
            yield
        finally:
            setattr(owner, name, own)


def _resident_gib(entry: str) -> float:
    """An entry of the kernel's account of this process, GiB; elsewhere the largest resident set so far."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(entry))
        return int(line.split()[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def matmul_tflops(clock: Clock, side: int, dtype: torch.dtype, share_s: float) -> float:
    """Best rate of dense products of two square matrices, TFLOP/s."""
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    weights, repeats = b.t(), 4  # transposed, as a linear layer has its weights

    def run() -> None:
        for _ in range(repeats):
            torch.mm(a, weights)

    return repeats * 2 * side**3 / min(clock.repeated(run, share_s)) / 1e12


def copy_gbs(clock: Clock, size: int, share_s: float) -> float:
    """Best bandwidth of a copy of `size` bytes, read and written bytes, GB/s."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=clock.device)
    goal = torch.empty_like(source)
    return 2 * size / min(clock.repeated(lambda: goal.copy_(source), share_s)) / 1e9
