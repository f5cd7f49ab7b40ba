"""Batch sizes that the configuration leaves open: the largest whose predicted memory fits. Imports no torch.

`sampling.batch_size` and `train.micro_batch_size` of 0 are left open. Chosen are only sizes that make equal batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.run.memory.formulas import GIB, Phase
from unigrpo_cli.run.memory.kinds import replay_phases, sampling_memory, sampling_phases, training_memory
from unigrpo_cli.run.memory.workload import Workload

BATCH_SIZE, MICRO_BATCH_SIZE = "sampling.batch_size", "train.micro_batch_size"


def left_open(config: Config) -> tuple[str, ...]:
    """Which of the two settings are automatic."""
    open_ = {BATCH_SIZE: not config.sampling.batch_size, MICRO_BATCH_SIZE: not config.train.micro_batch_size}
    return tuple(key for key, is_open in open_.items() if is_open)


def even_sizes(count: int, concurrent: int = 1) -> list[int]:
    """Candidate sizes for batches of `count` episodes, in the order of trial.

    First the sizes that need one round of `concurrent` batches, then two rounds, and so on. Then larger sizes: fewer
    of them are computed at the same time, so they may need less memory. No smaller size needs as few rounds.
    """
    rounds = sorted({-(-count // (rounds * concurrent)) for rounds in range(1, count + 1)}, reverse=True)
    return rounds + sorted({-(-count // batches) for batches in range(1, concurrent)} - set(rounds))


def training_sizes(work: Workload, gib: float) -> dict[str, int]:
    """The sizes that a training step leaves open, by dotted key: the largest that fit, else the least demanding."""
    always = training_memory(_with_sizes(work, {})).always
    room = GIB * gib - sum(item.bytes for item in always)
    episodes = work.config.train.prompts_per_step * work.config.train.group_size
    candidates: tuple[tuple[str, Callable[[Workload], Sequence[Phase]], int], ...] = (
        (BATCH_SIZE, lambda work: sampling_phases(work, adapted=work.lora), episodes),
        (MICRO_BATCH_SIZE, replay_phases, episodes // work.config.train.minibatches),
    )
    return {
        key: _first_that_fits(even_sizes(count, work.concurrent), _bytes_of(work, key, phases), room)
        for key, phases, count in candidates
        if key in left_open(work.config)
    }


def sampling_batch_size(work: Workload, gib: float, prompts: int, samples: int, *, adapted: bool) -> int:
    """`sampling.batch_size` where nothing is trained: the largest that fits into `gib`.

    Args:
        samples: pictures per prompt. A batch takes all samples of a prompt where they fit.
        adapted: with adapters in the network.
    """
    always = sampling_memory(_with_sizes(work, {}), adapted).always
    room = GIB * gib - sum(item.bytes for item in always)
    sizes = [samples * size for size in even_sizes(prompts, work.concurrent)]
    sizes += [size for size in even_sizes(samples, work.concurrent) if size < samples]
    return _first_that_fits(sizes, _bytes_of(work, BATCH_SIZE, lambda work: sampling_phases(work, adapted)), room)


def _with_sizes(work: Workload, sizes: dict[str, int]) -> Workload:
    """The workload with those sizes, and 1 for those that are not given."""
    return replace(work, config=with_values(work.config, {BATCH_SIZE: 1, MICRO_BATCH_SIZE: 1} | sizes))


def _bytes_of(work: Workload, key: str, phases: Callable[[Workload], Sequence[Phase]]) -> Callable[[int], int]:
    """Bytes of the largest phase by the value of one setting."""
    return lambda size: max((phase.bytes for phase in phases(_with_sizes(work, {key: size}))), default=0)


def _first_that_fits(sizes: Sequence[int], needed: Callable[[int], int], room: float) -> int:
    """The first size that fits; where none does, the one that needs least."""
    return next((size for size in sizes if needed(size) <= room), None) or min(sizes, key=needed)
