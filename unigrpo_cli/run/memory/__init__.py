"""What a run needs before anything is loaded: memory by formula, batch sizes that fit, hours. Imports no torch."""

from unigrpo_cli.run.memory.formulas import Item, Memory, Phase
from unigrpo_cli.run.memory.kinds import needs, sampling_memory, training_memory
from unigrpo_cli.run.memory.sizes import BATCH_SIZE, left_open, sampling_batch_size, training_sizes
from unigrpo_cli.run.memory.workload import BatchCounts, Workload, batch_of, config_of_rank

__all__ = [
    "BATCH_SIZE",
    "BatchCounts",
    "Item",
    "Memory",
    "Phase",
    "Workload",
    "batch_of",
    "config_of_rank",
    "left_open",
    "needs",
    "sampling_batch_size",
    "sampling_memory",
    "training_memory",
    "training_sizes",
]
