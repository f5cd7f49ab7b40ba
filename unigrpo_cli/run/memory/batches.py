"""Sizes of batches by the memory there is, where the configuration leaves them open. Arithmetic; imports no torch.

`sampling.batch_size` and `train.micro_batch_size` of 0 become the largest numbers whose predicted memory fits, among
those that make batches of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.run.memory.memory import generating, memory
from unigrpo_cli.run.memory.phases import GIB, Phase, replaying, sampling
from unigrpo_cli.run.memory.workload import Workload

ROWS, MICRO_BATCH = "sampling.batch_size", "train.micro_batch_size"


def left_open(config: Config) -> tuple[str, ...]:
    """Those of the two settings that are automatic."""
    open_ = {ROWS: not config.sampling.batch_size, MICRO_BATCH: not config.train.micro_batch_size}
    return tuple(key for key, is_open in open_.items() if is_open)


def even_sizes(count: int, at_once: int = 1) -> list[int]:
    """Sizes of batches of `count` episodes, in the order in which they are tried.

    First those of one turn of `at_once` batches, of two, and so on, which get smaller; then larger ones, of which
    fewer are computed at the same time, so that they may take less. All batches but the last are of that size, and
    no smaller one makes do with as few.
    """
    turns = sorted({-(-count // (turns * at_once)) for turns in range(1, count + 1)}, reverse=True)
    return turns + sorted({-(-count // batches) for batches in range(1, at_once)} - set(turns))


def training_sizes(work: Workload, gib: float) -> dict[str, int]:
    """The sizes that a training step leaves open, by dotted key: the largest that fit, or those that need least."""
    found = {}
    always = memory(_sized(work, {ROWS: 1, MICRO_BATCH: 1})).always
    room = GIB * gib - sum(item.bytes for item in always)
    for key, phases, count in (
        (ROWS, lambda work: sampling(work, adapted=work.lora), _episodes(work)),
        (MICRO_BATCH, replaying, _episodes(work) // work.config.train.minibatches),
    ):
        if key in left_open(work.config):
            found[key] = _first(even_sizes(count, work.at_once), _bytes_of(work, key, phases), room)
    return found


def sampling_rows(work: Workload, gib: float, prompts: int, samples: int, *, adapted: bool, models: int = 1) -> int:
    """`sampling.batch_size` for `samples` pictures of each prompt, where nothing is trained: what fits into `gib`.

    Args:
        adapted: with adapters in the network.
        models: how many of them are loaded.
    """
    always = generating(_sized(work, {ROWS: 1, MICRO_BATCH: 1}), adapted).always
    room = GIB * gib - models * sum(item.bytes for item in always)
    # An evaluation takes all samples of a prompt together, where they fit.
    sizes = [samples * size for size in even_sizes(prompts, work.at_once)]
    sizes += [size for size in even_sizes(samples, work.at_once) if size < samples]
    return _first(sizes, _bytes_of(work, ROWS, lambda work: sampling(work, adapted)), room)


def _episodes(work: Workload) -> int:
    t = work.config.train
    return t.prompts_per_step * t.group_size


def _sized(work: Workload, sizes: dict[str, int]) -> Workload:
    return replace(work, config=with_values(work.config, sizes))


def _bytes_of(work: Workload, key: str, phases: Callable[[Workload], Sequence[Phase]]) -> Callable[[int], int]:
    """The bytes of the largest phase that a setting decides, by its value."""

    def largest(size: int) -> int:
        sized = _sized(work, {ROWS: 1, MICRO_BATCH: 1} | {key: size})
        return max((phase.bytes for phase in phases(sized)), default=0)

    return largest


def _first(sizes: Sequence[int], takes: Callable[[int], int], room: float) -> int:
    """The first size that fits; where none does, the one that takes least."""
    return next((size for size in sizes if takes(size) <= room), None) or min(sizes, key=takes)
