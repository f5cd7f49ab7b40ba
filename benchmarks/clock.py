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

from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.run.memory.flops import matrices

GIB = 2**30
CARDS = (("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0))
"""Nominal dense bf16 peaks by a part of the card's name, TFLOP/s, from the makers' data sheets."""


class NotMeasuredError(Exception):
    """A measurement that is left out, and why: no time is left, or what it needs was not made."""


class Clock:
    """Seconds of finished work on one device, within a budget, and the largest memory it took.

    On a device of its own memory is what torch has allocated there; on a CPU it is the resident set.

    With `processor` they are the processor's, all threads of this process together: with one thread, those of
    an idle machine, however busy this one is.
    """

    def __init__(self, device: torch.device, budget_s: float, *, processor: bool = False):
        self.device, self.ends, self.processor = device, time.perf_counter() + budget_s, processor

    @property
    def left_s(self) -> float:
        return self.ends - time.perf_counter()

    def now(self) -> float:
        """Seconds on the clock, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.processor else time.perf_counter()

    def need(self, seconds: float) -> None:
        """Refuse what would take longer than what is left.

        Raises:
            NotMeasuredError: saying both.
        """
        if seconds > self.left_s:
            raise NotMeasuredError(f"no time: needs about {seconds:.0f} s of the {max(0, self.left_s):.0f} s left")

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
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

    def in_turn(
        self, runs: dict[str, Callable[[], object]], share_s: float, most: int = 5, *, warm: bool = False
    ) -> dict[str, list[float]]:
        """Seconds of every call, the variants in turn: what disturbs the machine then disturbs all alike.

        As many rounds as fit into `share_s`, at least one, after one call of each unless they are `warm`.
        """
        self.need(0)
        if not warm:
            self.need(sum(self.once(run) for run in runs.values()))
        times: dict[str, list[float]] = {name: [] for name in runs}
        began = self.now()
        while True:
            for name, run in runs.items():
                times[name].append(self.once(run))
            spent, rounds = self.now() - began, len(times[next(iter(runs))])
            if rounds == most or spent / rounds > min(share_s - spent, self.left_s):
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
        """Memory in use now, GiB."""
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


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of the seconds of one variant over another's."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def _resident_gib(entry: str) -> float:
    """An entry of the kernel's account of this process, GiB; elsewhere the largest resident set so far."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(entry))
        return int(line.split()[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def nominal_tflops(name: str) -> float | None:
    """The maker's bf16 peak of a card, TFLOP/s, or None where the name says nothing."""
    return next((peak for part, peak in CARDS if part in name), None)


def matmul_tflops(clock: Clock, shapes: list[tuple[int, int, int]], dtype: torch.dtype, share_s: float) -> float:
    """Best rate of dense products [m, k] x [k, n] one after the other, TFLOP/s."""
    pairs = [
        (
            torch.randn(m, k, device=clock.device, dtype=dtype),
            torch.randn(n, k, device=clock.device, dtype=dtype).t(),  # as a linear layer has its weights
        )
        for m, k, n in shapes
    ]
    repeats = 4

    def run() -> None:
        for _ in range(repeats):
            for a, b in pairs:
                torch.mm(a, b)

    work = repeats * sum(2 * m * k * n for m, k, n in shapes)
    return work / min(clock.repeated(run, share_s)) / 1e12


def layer_shapes(config: MoTConfig, tokens: int) -> list[tuple[int, int, int]]:
    """The products of one layer over that many tokens."""
    return [(tokens, into, out) for into, out in matrices(config).values()]


def copy_gbs(clock: Clock, size: int, share_s: float) -> float:
    """Best bandwidth of a copy of `size` bytes, read and written bytes, GB/s."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=clock.device)
    goal = torch.empty_like(source)
    return 2 * size / min(clock.repeated(lambda: goal.copy_(source), share_s)) / 1e9


def stream_gbs(clock: Clock, size: int, share_s: float) -> float:
    """Best bandwidth of a sum of two tensors of `size` bytes into a third, read and written bytes, GB/s."""
    a = torch.randn(size // 4, device=clock.device)
    b, goal = a.flip(0), torch.empty_like(a)
    return 3 * size / min(clock.repeated(lambda: torch.add(a, b, out=goal), share_s)) / 1e9
