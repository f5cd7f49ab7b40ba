"""What BAGEL's shape costs here: `python benchmarks/bagel.py`. docs/performance.md says what each row means.

The weights are random, the code is the package's own. Parts that do not fit into memory or time are reported as
such. Rows come as they are measured; `--json` is written after each.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this file, whatever is installed

from benchmarks import parts
from benchmarks.clock import Clock
from benchmarks.report import Report, environment, put_into
from benchmarks.shapes import SIZES, Size, random_policy
from unigrpo_cli.models.mot.config import network_shapes
from unigrpo_cli.training.optimizer import prepare_policy

SHARES = 40
"""A repeated measurement may take this part of the budget: there are about so many."""


def measurements(bench: parts.Benchmark) -> Iterator[tuple[str, Callable[[], None]]]:
    """Parts of the report and how they are filled: first what goals are about, for time may end."""
    *smaller, largest = sorted(bench.size.groups)
    first, *others = bench.size.micro_batches

    def denoising(group: int) -> Iterator[tuple[str, Callable[[], None]]]:
        for part in parts.denoise_variants(group):
            yield part, partial(parts.measure_denoise, bench, group, part)

    def updating(micro_batch_size: int) -> Iterator[tuple[str, Callable[[], None]]]:
        for part in parts.update_variants(micro_batch_size):
            yield part, partial(parts.measure_update, bench, micro_batch_size, part)

    yield parts.NETWORK, partial(parts.measure_network, bench)
    yield parts.CEILINGS, partial(parts.measure_ceilings, bench)
    yield from denoising(largest)
    for group in (*smaller, largest):
        yield parts.rollout_part(group), partial(parts.measure_rollout, bench, group)
    yield from updating(first)
    yield parts.IN_ALL, partial(parts.measure_all, bench)
    for group in smaller:
        yield from denoising(group)
    for micro_batch_size in others:
        yield from updating(micro_batch_size)


# ----- the command


def settings(arguments: argparse.Namespace, size: Size, device: torch.device) -> dict[str, Any]:
    """What the numbers depend on. No name of a machine."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    weights = sum(math.prod(shape) for shape in network_shapes(size.network).values())
    return {
        "size": arguments.size,
        "parameters": f"{weights / 1e9:.3g} B",
        "device": device.type,
        "card": card,
        "dtype": arguments.dtype,
        "cudnn_attention": not arguments.no_cudnn_attention,
        "image": f"{size.pixels} px of {size.image_tokens} tokens in {size.calls} calls",
        "thinking": f"{size.thinking} tokens after {size.given + 4} given ones",
        **environment(),
    }


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What BAGEL's shape costs on this machine, with random weights.")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a card, else float32")
    parser.add_argument("--json", type=Path, help="write the report there, after every row")
    parser.add_argument("--markdown", type=Path, help="put the table into that document, e.g. docs/performance.md")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for everything")
    parser.add_argument("--no-cudnn-attention", action="store_true", help="to compare: it plans every new length anew")
    arguments = parser.parse_args(given)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    return arguments


def main(given: Sequence[str] | None = None) -> Report:
    arguments = parse(given)
    size, device = SIZES[arguments.size], torch.device(arguments.device)
    if arguments.no_cudnn_attention:
        torch.backends.cuda.enable_cudnn_sdp(False)
    clock = Clock(device, arguments.budget_s)
    setting = settings(arguments, size, device)
    aimed = arguments.size == "7b" and device.type == "cuda"  # the goals are one card's, at full size
    rows = parts.rows_of(size, goals=aimed)
    report = Report(setting, rows, arguments.json)
    with report.attempt(list(dict.fromkeys(row.part for row in rows))):
        policy = random_policy(size, device, getattr(torch, arguments.dtype))
        policy = prepare_policy(policy, parts.configuration(size, arguments.dtype, 1))
        bench = parts.Benchmark(size, policy, arguments.dtype, clock, report, arguments.budget_s / SHARES)
        for part, measure in measurements(bench):
            with report.attempt([part]):
                measure()
            if device.type == "cuda":
                gc.collect()  # what an attempt leaves behind its traceback holds as long as it lasts
                torch.cuda.empty_cache()
    report.write()
    if arguments.markdown:
        put_into(arguments.markdown, f"{arguments.size} on {device.type}", report.markdown())
    return report


if __name__ == "__main__":
    main()
