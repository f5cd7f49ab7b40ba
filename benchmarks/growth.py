"""Seconds and memory against group size, thinking, image and K: each point in a process of its own.

`python benchmarks/growth.py '{"group size": 16}'` measures one point of the small network and prints it as JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this file, whatever is installed

from benchmarks import parts
from benchmarks.cases import CASES, Comparison
from benchmarks.clock import Clock
from benchmarks.report import Report
from benchmarks.shapes import Size, random_policy
from unigrpo_cli.tuning import prepare_policy

MICRO_BATCH = 8


def title(curve: str) -> str:
    return f"Growth with {curve}"


def with_value(size: Size, curve: str, value: int) -> Size:
    """The small network asked for more or less of one thing."""
    if curve == "group size":
        return replace(size, groups=(value,))
    if curve == "thinking, tokens":
        return replace(size, thinking=value)
    if curve == "image, tokens":
        return replace(size, pixels=math.isqrt(value) * size.network.pixels_per_token)
    assert curve == "K"
    return replace(size, copies=value, calls=max(size.calls, value + 2))


def measure_growth(bench: Comparison, curve: str) -> None:
    """A table of one curve. Everything but its variable is as in the small case."""
    for value in bench.cases.curves[curve]:
        bench.clock.need(0)
        point = json.dumps({"size": size_name(bench), "curve": curve, "value": value})
        given = ["--threads", str(torch.get_num_threads()), point]
        done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{title(curve)}, {value}: {done.stderr}")
        bench.report.add_line(title(curve), {curve: value} | json.loads(done.stdout.splitlines()[-1]))


def size_name(bench: Comparison) -> str:
    return next(name for name, cases in CASES.items() if cases == bench.cases)


def point(size: Size) -> dict[str, float]:
    """One rollout of a group and one update on it, after a small rollout; memory is the process's resident set."""
    device = torch.device("cpu")
    group = size.groups[0]
    policy = prepare_policy(random_policy(size, device, torch.float32), parts.configuration(size, "float32", 1))
    clock = Clock(device, math.inf)
    bench = parts.Benchmark(size, policy, "float32", clock, Report({}, [], None), 0.0)
    config, at_rest = bench.config(), clock.held_gib()
    short = {"sampling": config.sampling.model_copy(update={"max_new_tokens": 3, "steps": size.copies + 2})}
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


def main(given: list[str]) -> None:
    _, threads, asked = given
    torch.set_num_threads(int(threads))
    wanted = json.loads(asked)
    print(json.dumps(point(with_value(CASES[wanted["size"]].small, wanted["curve"], wanted["value"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
