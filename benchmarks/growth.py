"""Seconds and memory against group size, thinking, image and K: each point in a process of its own.

`compare.py` starts this file once for every point; it prints what it measured as JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this file, whatever is installed

from benchmarks import parts
from benchmarks.cases import CASES, Comparison
from benchmarks.clock import Clock
from benchmarks.report import Report
from benchmarks.shapes import Size, random_policy
from unigrpo_cli.training.optimizer import prepare_policy

MICRO_BATCH = 8


def title(curve: str) -> str:
    return f"Growth with {curve}"


def with_value(size: Size, curve: str, value: int) -> dict[str, Any]:
    """What the small network is asked for, with more or less of one thing."""
    changed = {
        "group size": {"groups": (value,)},
        "thinking, tokens": {"thinking": value},
        "image, tokens": {"pixels": math.isqrt(value) * size.network.pixels_per_token},
        "K": {"copies": value},
    }[curve]
    task = {"groups": size.groups, "thinking": size.thinking, "pixels": size.pixels, "copies": size.copies}
    return task | changed


def measure_growth(bench: Comparison, curve: str) -> None:
    """A table of one curve. Everything but its variable is as in the small case."""
    name = next(name for name, cases in CASES.items() if cases == bench.cases)
    for value in bench.cases.curves[curve]:
        bench.clock.need(0)
        asked = json.dumps({"size": name} | with_value(bench.cases.small, curve, value))
        bench.report.add_line(title(curve), {curve: value} | elsewhere(asked, torch.get_num_threads()))


@cache
def elsewhere(asked: str, threads: int) -> dict[str, float]:
    """A point measured in a process of its own; where curves cross, once."""
    given = [sys.executable, __file__, "--threads", str(threads), asked]
    done = subprocess.run(given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{asked}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def point(size: Size) -> dict[str, float]:
    """One rollout of a group and one update on it, after a small rollout; memory is the process's resident set."""
    device = torch.device("cpu")
    group = size.groups[0]
    policy = prepare_policy(random_policy(size, device, torch.float32), parts.configuration(size, "float32", 1))
    clock = Clock(device, math.inf, processor=torch.get_num_threads() == 1)
    bench = parts.Benchmark(size, policy, "float32", clock, Report({}, [], None), 0.0)
    config, at_rest = bench.config(), clock.held_gib()
    short = {"sampling": config.sampling.model_copy(update={"max_new_tokens": 3, "steps": max(5, size.copies)})}
    parts.watched_rollout(bench, group, config.model_copy(update=short))
    clock.forget_peak()
    rolled = parts.watched_rollout(bench, group, config)
    rollout_gib = max(rolled.peaks.values())
    clock.forget_peak()
    fixed_s, steps = parts.updates(bench, min(MICRO_BATCH, group), rolled.episodes)
    update_s = fixed_s + steps[-1][0]
    return {
        "rollout, s": rolled.total_s,
        "rollout, s/sample": rolled.total_s / group,
        "update, s": update_s,
        "update, s/sample": update_s / group,
        "peak of rollout, GiB": rollout_gib,
        "peak of update, GiB": clock.peak_gib(),
        "before both, GiB": at_rest,
    }


def main(given: Sequence[str]) -> None:
    _, threads, asked = given
    torch.set_num_threads(int(threads))
    task = json.loads(asked)
    size = CASES[task.pop("size")].small
    print(json.dumps(point(replace(size, **task))))


if __name__ == "__main__":
    main(sys.argv[1:])
