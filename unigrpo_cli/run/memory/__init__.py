"""What a run asks of a machine, before anything is loaded: batches, bytes, FLOP and seconds. Imports no torch."""

from unigrpo_cli.run.memory.batches import ROWS, left_open, sampling_rows, training_sizes
from unigrpo_cli.run.memory.memory import Memory, memory, needs
from unigrpo_cli.run.memory.phases import Item, Phase
from unigrpo_cli.run.memory.seconds import ACCELERATOR, Part, Rates, step_parts
from unigrpo_cli.run.memory.traffic import Sent, traffic
from unigrpo_cli.run.memory.workload import Batch, Workload, batch_of, of_each_rank

__all__ = [
    "ACCELERATOR",
    "ROWS",
    "Batch",
    "Item",
    "Memory",
    "Part",
    "Phase",
    "Rates",
    "Sent",
    "Workload",
    "batch_of",
    "left_open",
    "memory",
    "needs",
    "of_each_rank",
    "sampling_rows",
    "step_parts",
    "traffic",
    "training_sizes",
]
