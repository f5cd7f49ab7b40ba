"""Bytes of a run at the worst moment of each phase. Arithmetic; imports no torch.

Weights, gradients, moments and caches are counted tensor by tensor. Activations are sums over the tensors that a pass
creates or that autograd saves; tests compare them with real passes. Attention makes no matrix of scores. Not counted:
fragmentation of the allocator, models of rewards, pictures that prompts bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from unigrpo_cli.config import Config, SamplingConfig, TrainConfig
from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.models.mot.config import LAYERS, AutoencoderConfig, autoencoder_shapes
from unigrpo_cli.run.memory.workload import FP32, IMAGE, TEXT, Workload

GIB = 2**30


@dataclass(frozen=True)
class Item:
    """One consumer of memory, and how its bytes are computed."""

    name: str
    bytes: int
    formula: str

    @property
    def gib(self) -> float:
        return self.bytes / GIB


def item(name: str, note: str = "", **factors: int) -> Item:
    """An item that takes the product of its factors, whose names go into the formula."""
    shown = " x ".join(f"{value:,} {what.replace('_', ' ')}" for what, value in factors.items())
    return Item(name, prod(factors.values()), f"{shown} ({note})" if note else shown)


@dataclass(frozen=True)
class Phase:
    """The worst moment of a phase; items that are always there are not repeated."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class Memory:
    """Memory of one rank. `always` is there in every phase; `host` is in host memory, not on the device."""

    always: tuple[Item, ...]
    phases: tuple[Phase, ...]
    host: tuple[Item, ...] = ()

    def gib(self, phase: Phase) -> float:
        """Everything that is there in a phase."""
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


def training_memory(work: Workload) -> Memory:
    """Memory of a training run."""
    moments = item("Adam's moments", trained_weights=work.trained_on_rank, bytes=2 * FP32)
    on_host = _reference(work, on_host=True)
    always = (*_weights(work), _reference(work, on_host=False), moments, *_surroundings(work))
    phases = (*sampling_phases(work, adapted=work.lora), *replay_phases(work), _optimizer_step(work))
    if work.cpu:  # there device memory is host memory
        return Memory(present(*always, on_host), phases)
    return Memory(present(*always), phases, present(on_host))


def sampling_memory(work: Workload, adapted: bool) -> Memory:
    """Memory where nothing is trained.

    Args:
        adapted: with adapters in the network.
    """
    frozen = work.config.train.model_copy(update={"finetune": "lora", "extra_modules": ()})
    work = replace(work, config=work.config.model_copy(update={"train": frozen}))
    weights, _, adapters = _weights(work)
    always = (weights, *([adapters] if adapted else []), *_surroundings(work))
    return Memory(present(*always), sampling_phases(work, adapted))


def standard_settings(side: int) -> tuple[Config, Config]:
    """Settings of adapters and of full fine-tuning by which models are compared; see `kinds.needs`."""
    sampling = SamplingConfig(height=side, width=side, batch_size=1)
    small = TrainConfig(micro_batch_size=1, activation_checkpointing=True, prompts_per_step=2, group_size=2)
    lora = small.model_copy(update={"finetune": "lora"})
    return Config(dtype="bfloat16", sampling=sampling, train=lora), Config(
        dtype="bfloat16", sampling=sampling, train=small
    )


def present(*items: Item | None) -> tuple[Item, ...]:
    return tuple(item for item in items if item is not None and item.bytes)


def concurrent_items(count: int, *items: Item | None) -> tuple[Item, ...]:
    """The items of one batch, for `count` batches that are computed at the same time."""
    return tuple(
        item if count == 1 else Item(item.name, count * item.bytes, f"{count} at once x {item.formula}")
        for item in present(*items)
    )


# ----- always there


def _weights(work: Workload) -> tuple[Item, Item, Item]:
    def is_frozen(name: str) -> bool:
        return not work.is_trained(name)

    frozen, count = work.on_rank(work.stored, is_frozen), work.on_rank(work.elements, is_frozen)
    masters = work.on_rank(work.elements, work.is_trained)
    return (
        Item("frozen weights", frozen, f"{count:,} x {work.dtype_bytes} bytes; {_other_widths(work)}"),
        item("trained weights", "fp32 masters", weights=masters, bytes=FP32),
        item("adapters", f"rank {work.rank} x (rows + columns)", weights=work.adapters, bytes=FP32),
    )


def _other_widths(work: Workload) -> str:
    wide = "norms, head and projections x 4"
    return wide if work.quantize == PLAIN else f"the layers' matrices in {work.quantize}; {wide}"


def _reference(work: Workload, on_host: bool) -> Item | None:
    """Full fine-tuning's frozen copy of what it trains. `reference_device = "host"` moves the layers' part."""
    if work.lora:
        return None
    moved = work.config.train.reference_device == "host"

    def is_here(name: str) -> bool:
        return work.is_trained(name) and (moved and name.startswith(LAYERS)) == on_host

    count = work.on_rank(work.elements, is_here)
    formula = f"{count:,} frozen copies of trained weights x {work.dtype_bytes} bytes"
    return Item("reference", work.on_rank(work.stored, is_here), formula)


def _surroundings(work: Workload) -> tuple[Item, Item]:
    shapes = {} if work.autoencoder is None else autoencoder_shapes(work.autoencoder)
    runtime = "assumed: the device's context and workspaces of its libraries"
    return (
        item("autoencoder", weights=sum(map(prod, shapes.values())), bytes=FP32),
        Item("runtime", 0 if work.cpu else GIB, runtime),
    )


# ----- sampling


def sampling_phases(work: Workload, adapted: bool) -> tuple[Phase, ...]:
    """Text, image and pixels of one batch.

    Args:
        adapted: with adapters in the network.
    """
    gathered = None
    if work.sharded:  # sampling uses a whole copy of the layers in the network's dtype
        layers = work.stored(lambda name: name.startswith(LAYERS))
        gathered = Item("gathered weights", layers, f"all layers x {work.dtype_bytes} bytes")
    found = {
        "sampling, text": _sampling_text(work) if work.sampled_tokens else (),
        "sampling, image": _sampling_image(work, adapted),
        "sampling, pixels": () if work.autoencoder is None else _sampling_pixels(work, work.autoencoder),
    }
    count = work.concurrent_batches
    return tuple(
        Phase(name, (*present(gathered), *concurrent_items(count, *items))) for name, items in found.items() if items
    )


def _kv_cache(work: Workload, tokens: int, note: str) -> Item:
    return item("KV cache", note, rows=work.batch_size, tokens=tokens, bytes=work.cached_token)


def _sampling_text(work: Workload) -> tuple[Item | None, ...]:
    """The cache, the prompt's cache that it grew from, and the larger of logits or of a cache with fewer rows."""
    rows = work.batch_size
    logits = item("logits", "3 in fp32, 2 in fp64", rows=rows, vocabulary=work.model.vocab_size, bytes=28)
    note = "when a half and then a quarter is unfinished"
    fewer = rows // 2 + rows // 4
    smaller = item("smaller batches", note, rows=fewer, tokens=work.last_context_tokens, bytes=work.cached_token)
    before = work.prompt_tokens if work.rounds == 1 else work.context_tokens(work.rounds - 2) + work.looked_at_tokens
    return (
        _kv_cache(work, work.last_context_tokens + before, "context, and what came before its last text"),
        max(logits, smaller, key=lambda item: item.bytes),
        _cast_matrix(work),
        _whole_matrix(work),
    )


def _sampling_image(work: Workload, adapted: bool) -> tuple[Item | None, ...]:
    guided, tokens = work.guided_calls > 1 or work.config.eval.guidance_text > 1, work.last_context_tokens
    if guided:  # the one lacks the last text alone, or in the first round the prompt too; the other has the prompt
        without = work.prompt_tokens if work.rounds == 1 else tokens
        tokens += without + work.prompt_tokens
    return (
        _kv_cache(work, tokens, "context, and two contexts of guidance" if guided else "context"),
        _one_layer(work, work.batch_size * work.image_tokens, adapted),
        item(
            "latents",
            f"3 x {work.sde_steps} recorded and 4, in fp32",
            rows=work.batch_size,
            latents=3 * work.sde_steps + 4,
            tokens=work.latent_tokens,
            bytes=FP32 * work.model.token_dim,
        ),
        _cast_matrix(work),
        _whole_matrix(work),
    )


def _one_layer(work: Workload, tokens: int, adapted: bool) -> Item:
    """A pass without gradients needs most inside an MLP: gate and up, the latter with its adapter."""
    inner = (4 if adapted else 2) * work.model.intermediate_size
    width = inner + 5 * work.model.hidden_size + 2 * work.key_width
    return item("one layer", "widths inside an MLP", tokens=tokens, numbers=width, bytes=work.dtype_bytes)


def _whole_matrix(work: Workload) -> Item:
    """A quantised matrix is made whole where it is used."""
    largest = max(prod(s) for expert in (TEXT, IMAGE) for s in work.layer_matrices(expert).values())
    return item("a whole matrix", f"the largest, from {work.quantize}", weights=largest, bytes=work.whole_number_bytes)


def _largest_trained_matrix(work: Workload) -> int:
    shapes = [s for expert in (TEXT, IMAGE) for s in work.layer_matrices(expert, work.is_trained).values()]
    return max(map(prod, shapes), default=0)


def _cast_matrix(work: Workload) -> Item | None:
    """A trained fp32 matrix is cast to the network's dtype where it is used."""
    if work.dtype_bytes == FP32:
        return None
    return item("cast weights", "largest matrix", weights=_largest_trained_matrix(work), bytes=work.dtype_bytes)


def _sampling_pixels(work: Workload, autoencoder: AutoencoderConfig) -> tuple[Item, ...]:
    """Pictures are decoded one at a time, whole or in tiles."""
    s = work.config.sampling
    pixels, rows = s.height * s.width, work.batch_size
    return (
        _kv_cache(work, work.last_context_tokens, "context"),
        decoder_item(autoencoder.widths, s.height, s.width, s.vae_tile_rows),
        item("pictures", "twice 3 channels in fp32", rows=rows, pixels=pixels, bytes=2 * 3 * FP32),
    )


def decoder_item(widths: Sequence[int], height: int, width: int, tile_rows: int) -> Item:
    """Whole: three of the widest maps. In tiles: a block's input, its output of half the width, and three tiles."""
    last = len(widths) - 1
    numbers = max(widths[min(level + 1, last)] * height * width // 4**level for level in range(last + 1))
    if not tile_rows:
        return item("decoder", "one picture at a time", maps=3, numbers=numbers, bytes=FP32)
    tile = 3 * numbers * min(tile_rows + 2, height) // height
    return item("decoder", "one and a half maps and three tiles", numbers=3 * numbers // 2 + tile, bytes=FP32)


# ----- replay and update, by micro-batches


def replay_phases(work: Workload) -> tuple[Phase, ...]:
    """Old and reference scores, then forward and backward passes: each at its logits and in its layers."""
    recorded, cache, logits = _recorded_steps(work), _text_cache(work), _logits(work)
    count, saved = work.concurrent_micro_batches, _saved_for_backward(work)
    tokens = max(work.replayed_image_tokens, work.replayed_text_tokens)
    layer = (cache, _one_layer(work, tokens, work.lora), _cast_matrix(work), _whole_matrix(work))
    gathered, learning = _gathered_layers(work, 2), (recorded, _gradients(work), _concurrent_gradients(work))
    phases = {
        "replay, layers": (recorded, *concurrent_items(count, *layer), gathered, _streamed_layer(work)),
        "replay, logits": (recorded, *concurrent_items(count, cache, logits), gathered),
        "update, logits": (*learning, *concurrent_items(count, *saved, cache, logits), gathered),
        "update, layers": (
            *learning,
            *concurrent_items(count, *saved, *_backward(work, tokens)),
            _gathered_layers(work, 3),
        ),
    }
    return tuple(Phase(name, present(*own)) for name, own in phases.items() if logits or not name.endswith("logits"))


def _recorded_steps(work: Workload) -> Item | None:
    """Recorded steps of all episodes and their fixed velocities stay on the device until the step is over."""
    if not work.replays_images:
        return None
    return item(
        "recorded steps",
        "before, after and velocities of each step; the last; in fp32",
        episodes=work.batch.episodes,
        latents=work.rounds * ((3 + work.needs_reference) * work.noisy_images + 1),
        tokens=work.latent_tokens,
        bytes=FP32 * work.model.token_dim,
    )


def _text_cache(work: Workload) -> Item:
    tokens = work.micro_batch * work.last_context_tokens
    return item("context's keys and values", tokens=tokens, bytes=work.cached_token)


def _logits(work: Workload) -> Item | None:
    if not work.sampled_tokens:
        return None
    note = "5 in fp32: logits, logarithms, probabilities, two for entropy"
    tokens = work.micro_batch * work.sampled_tokens
    return item("logits", note, tokens=tokens, vocabulary=work.model.vocab_size, bytes=5 * FP32)


def _streamed_layer(work: Workload) -> Item | None:
    """One layer at a time of a reference on the host is on the device."""
    if work.lora or work.config.train.reference_device != "host":
        return None
    layer = work.stored(lambda name: work.is_trained(name) and name.startswith(f"{LAYERS}0."))
    return Item("reference's layer", layer, f"one layer x {work.dtype_bytes} bytes, from the host")


def _gathered_layers(work: Workload, layers: int) -> Item | None:
    """With sharded weights the current layer is whole and the next is being gathered; backward adds a gradient."""
    if not work.sharded:
        return None
    weights = work.elements(lambda name: name.startswith(f"{LAYERS}0."))
    return item("gathered layers", layers=layers, weights=weights, bytes=FP32)


def _gradients(work: Workload) -> Item:
    return item("gradients", trained_weights=work.trained_on_rank, bytes=FP32)


def _concurrent_gradients(work: Workload) -> Item | None:
    """Micro-batches that are computed at the same time have gradients of their own, and so has their sum."""
    count = work.concurrent_micro_batches
    if count == 1:
        return None
    note = f"{count} at once, and their sum"
    return item("each micro-batch's gradients", note, sets=count + 1, trained_weights=work.trained_on_rank, bytes=FP32)


def saved_per_token(work: Workload, expert: str) -> int:
    """Bytes that autograd saves for one token in one layer."""
    m, b = work.model, work.dtype_bytes
    attention = 8 if work.cpu and expert == TEXT else b
    gated = 2 if work.cpu else 3  # gate and up; an accelerator saves the activation too
    inputs = 3 * m.hidden_size + m.intermediate_size + (7 * work.rank if work.lora else 0)
    norms = 3 * m.hidden_size + work.key_width + m.num_attention_heads
    attended = 2 * m.hidden_size + 2 * work.key_width
    return (inputs + gated * m.intermediate_size) * b + norms * FP32 + attended * attention


def _saved_per_layer(work: Workload) -> int:
    """Bytes that autograd saves in one layer for a micro-batch, cast weights included."""
    b, images, text = work.dtype_bytes, work.replayed_image_tokens, work.replayed_text_tokens
    saved = images * saved_per_token(work, IMAGE) + (text * saved_per_token(work, TEXT) if work.trains(TEXT) else 0)
    if images:
        saved += 2 * work.key_width * b * work.replayed_contexts  # each noisy image's copy of the context
    return saved + _saved_casts(work)


def _saved_casts(work: Workload) -> int:
    """Bytes of one layer's trained matrices, cast for each use. The text expert computes boundary tokens too."""
    if work.dtype_bytes == FP32:
        return 0
    uses = {TEXT: 1 + work.replays_images, IMAGE: int(work.replays_images)}
    total = 0
    for expert in (e for e in (TEXT, IMAGE) if work.trains(e)):
        adapters = work.adapter_elements(expert) // work.model.num_hidden_layers
        matrices = sum(map(prod, work.layer_matrices(expert, work.is_trained).values()))
        total += uses[expert] * (adapters if work.lora else matrices)
    return total * work.dtype_bytes


def _saved_for_backward(work: Workload) -> tuple[Item, ...]:
    """What a whole forward pass leaves for the backward pass."""
    layers, tokens = work.model.num_hidden_layers, work.replayed_text_tokens + work.replayed_image_tokens
    width, b = work.model.hidden_size, work.dtype_bytes
    if work.config.train.activation_checkpointing:
        return (item("layers' inputs", layers=layers + 2, tokens=tokens, numbers=width, bytes=b),)
    activations = item("activations", f"saved for {tokens:,} tokens", layers=layers, bytes=_saved_per_layer(work))
    return (activations, item("first and last states", states=2, tokens=tokens, numbers=width, bytes=b))


def _backward(work: Workload, tokens: int) -> tuple[Item, ...]:
    """What the backward pass of one layer adds."""
    b, largest, inner = work.dtype_bytes, _largest_trained_matrix(work), 2 * work.model.intermediate_size
    return present(
        item("recomputed layer", "as saved without checkpointing", bytes=_saved_per_layer(work))
        if work.config.train.activation_checkpointing
        else None,
        item("derivatives", "inside an MLP", tokens=tokens, numbers=inner, bytes=b),
        _whole_matrix(work),
        item("a matrix's gradient", "of the largest, before it is added", weights=largest, bytes=b + FP32),
    )


def _optimizer_step(work: Workload) -> Phase:
    """AdamW. On an accelerator it handles all tensors at once, with one copy of them."""
    denominators = item("denominators", trained_weights=0 if work.cpu else work.trained_on_rank, bytes=FP32)
    return Phase("optimizer step", present(_recorded_steps(work), _gradients(work), denominators))
