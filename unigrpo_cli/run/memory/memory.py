"""Memory of a training run, by phase and item. Arithmetic; imports no torch.

Weights, gradients, moments and caches are counted tensor by tensor; activations are moments.py's.
Not counted: memory that the allocator cannot use because it lies in pieces, rewards' own models, given pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from unigrpo_cli.config import Config, SamplingConfig, TrainConfig
from unigrpo_cli.models.mot.config import LAYERS, AutoencoderConfig, MoTConfig, autoencoder_shapes
from unigrpo_cli.run.memory.phases import GIB, Item, Phase, sampling, some, training
from unigrpo_cli.run.memory.workload import WIDE, Workload

RUNTIME = GIB
"""Reckoned with for an accelerator's own context and its libraries' workspaces."""


@dataclass(frozen=True)
class Memory:
    """Memory of a run: `always` is there in every phase; `host` lies in host memory beside the device."""

    always: tuple[Item, ...]
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]

    def gib(self, phase: Phase) -> float:
        """All that is there in a phase, GiB."""
        return (sum(item.bytes for item in self.always) + phase.bytes) / GIB

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def need(self) -> float:
        """GiB of the largest phase."""
        return self.gib(self.peak)


def memory(work: Workload) -> Memory:
    """Memory of a training run by phase and item."""
    return Memory(
        # On a CPU the host's memory is the device's, wherever the copy is told to live.
        always=some(
            *_weights(work),
            *_training(work),
            *_surroundings(work),
            _reference(work, on_host=True) if work.cpu else None,
        ),
        phases=training(work),
        host=() if work.cpu else some(_reference(work, on_host=True)),
    )


def generating(work: Workload, adapted: bool) -> Memory:
    """Memory where nothing is trained: of an evaluation, say, by phase and item.

    Args:
        adapted: with adapters in the network.
    """
    frozen = work.config.train.model_copy(update={"finetune": "lora", "also": ()})
    work = replace(work, config=work.config.model_copy(update={"train": frozen}))
    weights, _, adapters = _weights(work)
    always = some(weights, adapters if adapted else None, *_surroundings(work))
    return Memory(always, sampling(work, adapted), ())


def needs(model: MoTConfig, autoencoder: AutoencoderConfig | None) -> dict[str, float]:
    """GiB to generate, to train adapters, and to train all weights of the layers.

    At standard settings: 512 px (or the most that the model paints), bf16, one image at a time, texts of up to 1024
    tokens; in training rank 64, three stochastic steps, micro-batches of one episode, activation checkpointing, and
    the reference of full tuning on the device.
    """
    side = min(512 // model.pixels_per_token, model.max_latent_size) * model.pixels_per_token
    painting = SamplingConfig(height=side, width=side, batch_size=1)

    def work(finetune: str) -> Workload:
        train = TrainConfig(
            finetune=finetune, micro_batch_size=1, activation_checkpointing=True, prompts_per_step=2, group_size=2
        )
        return Workload(model, autoencoder, Config(dtype="bfloat16", sampling=painting, train=train))

    alone = generating(work("lora"), adapted=False)
    trained = {"LoRA": work("lora"), "full fine-tuning": work("full")}
    return {"generate": alone.need} | {name: memory(own).need for name, own in trained.items()}


# ----- what is always there


def _weights(work: Workload) -> tuple[Item, ...]:
    def is_still(name: str) -> bool:
        return not work.is_trained(name)

    frozen, trained = work.kept(work.stored, is_still), work.kept(work.elements, work.is_trained)
    still = work.kept(work.elements, is_still)
    return (
        Item("frozen weights", frozen, f"{still:,} x {work.narrow} B; norms, head and projections x 4 B"),
        Item("trained weights", WIDE * trained, f"{trained:,} x 4 B (fp32 masters)"),
        Item("adapters", WIDE * work.adapters, f"{work.adapters:,} x 4 B: rank {work.rank} x (rows + columns)"),
    )


def _training(work: Workload) -> tuple[Item | None, ...]:
    return (
        Item("Adam's moments", 2 * WIDE * work.trained_here, f"{work.trained_here:,} x 2 x 4 B"),
        _reference(work, on_host=False),
    )


def _reference(work: Workload, on_host: bool) -> Item | None:
    """The frozen copy of full tuning: of trained weights alone, and on the host of those in the layers."""
    if work.lora:
        return None
    moved = work.config.train.reference_device == "host"

    def here(name: str) -> bool:
        return work.is_trained(name) and (moved and name.startswith(LAYERS)) == on_host

    return Item(
        "reference",
        work.kept(work.stored, here),
        f"{work.kept(work.elements, here):,} trained weights x {work.narrow} B, frozen",
    )


def _surroundings(work: Workload) -> tuple[Item, ...]:
    shapes = {} if work.autoencoder is None else autoencoder_shapes(work.autoencoder)
    elements = sum(map(prod, shapes.values()))
    runtime = 0 if work.cpu else RUNTIME
    return (
        Item("autoencoder", WIDE * elements, f"{elements:,} x 4 B (fp32)"),
        Item("runtime", runtime, "assumed: the device's context and its libraries' workspaces"),
    )
