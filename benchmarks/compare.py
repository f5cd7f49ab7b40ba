"""What a CPU's time goes into, beside the plainest way to do the same: `python benchmarks/compare.py`.

docs/performance.md says what each row means. Variants are measured in turn in one run, and the medians of their
ratios count. With one thread seconds are the processor's, so that other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this file, whatever is installed

from benchmarks import sampling, words
from benchmarks.cases import CASES, Cases, Comparison
from benchmarks.clock import Clock
from benchmarks.report import Report, Row, environment, put_into


def rows_of(cases: Cases) -> list[Row]:
    """Every row of the report, in order."""
    return [row for part in (sampling, words) for row in part.rows(cases)]


def measurements(bench: Comparison) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """Parts of the report and how they are filled, in order."""
    yield [words.WORDS, words.AGAINST], partial(words.measure_words, bench)
    for model in sampling.MODELS:
        yield [sampling.sampling_part(model, bench.cases)], partial(sampling.measure_sampling, bench, model)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our speed on this machine's CPU beside that of plainer ways.")
    parser.add_argument("--size", choices=list(CASES), default="full")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with one, seconds are those of the processor")
    parser.add_argument("--json", type=Path, help="write the report there, after every row")
    parser.add_argument("--markdown", type=Path, help="put the tables into that document, e.g. docs/performance.md")
    parser.add_argument("--only", default="", help="only parts whose name has this in it")
    parser.add_argument("--budget-s", type=float, help="seconds for everything; default: 10 minutes")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> Report:
    arguments = parse(given)
    cases = CASES[arguments.size]
    torch.set_num_threads(arguments.threads)
    alone = arguments.threads == 1
    budget_s = arguments.budget_s if arguments.budget_s is not None else cases.budget_s
    seconds = "of the processor" if alone else "of the wall"
    setting = {"size": arguments.size, "seconds": seconds, **environment()}
    report = Report(setting, rows_of(cases), arguments.json)
    clock = Clock(torch.device("cpu"), budget_s, processor=alone)
    bench = Comparison(cases, clock, report)
    for parts, measure in measurements(bench):
        if any(arguments.only in part for part in parts):
            with report.attempt(parts):
                measure()
            gc.collect()
    report.write()
    if arguments.markdown:
        threads = "" if alone else f", {arguments.threads} threads"
        put_into(arguments.markdown, f"{arguments.size} on cpu{threads}", report.markdown())
    return report


if __name__ == "__main__":
    main()
