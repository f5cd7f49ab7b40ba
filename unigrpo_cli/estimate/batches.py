"""Sizes of batches by the memory there is, where the configuration leaves them open. Arithmetic; imports no torch.

`sampling.rows` and `train.micro_batch` of 0 become the largest numbers whose predicted memory fits, and no larger
than there are episodes; then as small as the same number of batches allows, so that the batches are of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.estimate.memory import generating, memory
from unigrpo_cli.estimate.moments import GIB, Phase, replaying, sampling
from unigrpo_cli.estimate.workload import Workload

ROWS, MICRO_BATCH = "sampling.rows", "train.micro_batch"


def left_open(config: Config) -> tuple[str, ...]:
    """Those of the two settings that are automatic."""
    open_ = {ROWS: not config.sampling.rows, MICRO_BATCH: not config.train.micro_batch}
    return tuple(key for key, is_open in open_.items() if is_open)


def evenly(count: int, most: int, at_once: int = 1) -> int:
    """The size of batches of `count` episodes: at most `most`, in as few turns of `at_once` batches as that allows.

    All batches but the last are of that size, and no smaller one makes do with as few.
    """
    turns = -(-count // (most * at_once))
    return -(-count // (turns * at_once))


def training_sizes(work: Workload, gib: float) -> dict[str, int]:
    """The sizes that a training step leaves open, by dotted key: what fits into `gib`, or else 1."""
    found = {}
    always = memory(_sized(work, {ROWS: 1, MICRO_BATCH: 1})).always
    room = GIB * gib - sum(item.bytes for item in always)
    for key, phases, count in (
        (ROWS, lambda work: sampling(work, adapted=work.lora), _episodes(work)),
        (MICRO_BATCH, replaying, _episodes(work) // work.config.train.updates),
    ):
        if key in left_open(work.config):
            most = _most(_fitting(work, key, phases, room), count)
            found[key] = evenly(count, most, work.at_once)
    return found


def sampling_rows(work: Workload, gib: float, prompts: int, samples: int, *, adapted: bool, models: int = 1) -> int:
    """`sampling.rows` for `samples` pictures of each prompt, where nothing is trained: what fits into `gib`, or 1.

    Args:
        adapted: with adapters in the network.
        models: how many of them are loaded.
    """
    always = generating(_sized(work, {ROWS: 1, MICRO_BATCH: 1}), adapted).always
    room = GIB * gib - models * sum(item.bytes for item in always)
    fits = _fitting(work, ROWS, lambda work: sampling(work, adapted), room)
    most = _most(fits, prompts * samples)
    if most < samples:
        return evenly(samples, most, work.at_once)
    # An evaluation takes all samples of a prompt together.
    return samples * evenly(prompts, most // samples, work.at_once)


def _episodes(work: Workload) -> int:
    t = work.config.train
    return t.prompts_per_step * t.group_size


def _sized(work: Workload, sizes: dict[str, int]) -> Workload:
    return replace(work, config=with_values(work.config, sizes))


def _fitting(
    work: Workload, key: str, phases: Callable[[Workload], Sequence[Phase]], room: float
) -> Callable[[int], bool]:
    """Whether the phases that a setting decides fit into `room` bytes with a value of it."""

    def fits(size: int) -> bool:
        sized = _sized(work, {ROWS: 1, MICRO_BATCH: 1} | {key: size})
        return all(phase.bytes <= room for phase in phases(sized))

    return fits


def _most(fits: Callable[[int], bool], upper: int) -> int:
    """The largest of 1 to `upper` that fits, by halves, where what fits leaves room for less; 1 where none does."""
    least, beyond = 1, upper + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if fits(middle) else (least, middle)
    return least
