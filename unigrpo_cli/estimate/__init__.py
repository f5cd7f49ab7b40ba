"""What a run asks of a machine, before anything is loaded: batches, bytes, FLOP and seconds. Imports no torch."""

from unigrpo_cli.estimate.memory import Memory, memory, needs
from unigrpo_cli.estimate.moments import Item, Phase
from unigrpo_cli.estimate.seconds import ACCELERATOR, Part, Rates, step_parts
from unigrpo_cli.estimate.traffic import Sent, traffic
from unigrpo_cli.estimate.workload import Batch, Workload, batch_of, of_each_rank

__all__ = [
    "ACCELERATOR",
    "Batch",
    "Item",
    "Memory",
    "Part",
    "Phase",
    "Rates",
    "Sent",
    "Workload",
    "batch_of",
    "memory",
    "needs",
    "of_each_rank",
    "step_parts",
    "traffic",
]
