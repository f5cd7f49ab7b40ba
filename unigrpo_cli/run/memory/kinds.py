"""Memory by the kind of model: a mixture of transformers or a pair. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unigrpo_cli.config import Config
from unigrpo_cli.models.pair.sizes import PairSizes
from unigrpo_cli.run.memory import formulas, pair
from unigrpo_cli.run.memory.formulas import Memory, Phase
from unigrpo_cli.run.memory.pair import PairWorkload
from unigrpo_cli.run.memory.workload import Workload


def workload(sizes: Any, config: Config, **how: Any) -> Workload:
    """What a run computes, by the sizes that the model's family gives."""
    if isinstance(sizes, PairSizes):
        return PairWorkload(None, None, config, pair=sizes, **how)
    return Workload(sizes.network, sizes.autoencoder, config, **how)


def training_memory(work: Workload) -> Memory:
    return pair.training_memory(work) if isinstance(work, PairWorkload) else formulas.training_memory(work)


def sampling_memory(work: Workload, adapted: bool) -> Memory:
    if isinstance(work, PairWorkload):
        return pair.sampling_memory(work, adapted)
    return formulas.sampling_memory(work, adapted)


def sampling_phases(work: Workload, adapted: bool) -> Sequence[Phase]:
    if isinstance(work, PairWorkload):
        return pair.sampling_phases(work, adapted)
    return formulas.sampling_phases(work, adapted)


def replay_phases(work: Workload) -> Sequence[Phase]:
    return pair.replay_phases(work) if isinstance(work, PairWorkload) else formulas.replay_phases(work)


def needs(sizes: Any) -> dict[str, float]:
    """GiB to generate, to train adapters, and to train all weights of the layers, at standard settings.

    These are 512 px (or the model's largest size), bf16, one image at a time, texts of up to 1024 tokens; in training
    adapters of rank 64, three stochastic steps, micro-batches of one episode, activation checkpointing, and the
    reference of full fine-tuning on the device.
    """
    side = 512
    if not isinstance(sizes, PairSizes):
        model = sizes.network
        side = min(512 // model.pixels_per_token, model.max_latent_size) * model.pixels_per_token
    lora, full = (workload(sizes, config) for config in formulas.standard_settings(side))
    return {
        "generate": sampling_memory(lora, adapted=False).need,
        "LoRA": training_memory(lora).need,
        "full fine-tuning": training_memory(full).need,
    }
