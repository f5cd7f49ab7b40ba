"""Operations of a pass through the network, and the hours of a run at assumed rates. Imports no torch.

A multiplication and an addition are two operations. A matrix takes 2 per weight and token; attention takes 4 x width
per query, key and layer, masked or not. Norms, rotations, activations, and what the first and the last layer may leave
out are not counted. A test compares the counts with torch's own counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unigrpo_cli.models.mot.config import LAYERS, TIME_WAVES, MoTConfig
from unigrpo_cli.run.memory.workload import FP32, IMAGE, TEXT, Workload, budgets_of, old_share

BOUNDARY = 2  # boundary tokens around an image; the text expert computes them
ATTENTION_BACKWARD = 2.5  # of the forward pass: four products, and the scores once more
FLOPS, FLOPS_FP32, MEMORY, FROM_HOST = 4e14, 5e13, 2e12, 2.5e10
"""Assumed of one large accelerator, not measured: operations in bf16 and in fp32, bytes from its memory, from the
host; per second."""


@dataclass(frozen=True)
class Pass:
    """One call of the network, and of the head on some of its states.

    Args:
        rows: episodes.
        text: tokens that each row reads.
        past: tokens of context before those.
        copies, image: noisy images per row, and latent tokens of each.
        scored: states of all rows together that the head over the vocabulary is applied to.
        rank: of the adapters on attention and MLP; 0 for none.
    """

    rows: int
    text: int = 0
    past: int = 0
    copies: int = 0
    image: int = 0
    scored: int = 0
    rank: int = 0

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by the expert that computes them."""
        images = self.rows * self.copies
        return {TEXT: self.rows * self.text + images * BOUNDARY, IMAGE: images * self.image}

    def pairs(self, text: bool = True) -> int:
        """Queries x keys in one layer; those of images alone without `text`."""
        keys, images = self.past + self.text, self.rows * self.copies * (self.image + BOUNDARY)
        return (self.rows * self.text * keys if text else 0) + images * (keys + self.image + BOUNDARY)


def matrices(config: MoTConfig) -> dict[str, tuple[int, int]]:
    """One expert's matrices in one layer: (numbers in, numbers out)."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    attention = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
    return attention | {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}


def expert_weights(config: MoTConfig) -> int:
    """Weights of one expert's matrices in one layer."""
    return sum(into * out for into, out in matrices(config).values())


def adapter_weights(config: MoTConfig, rank: int) -> int:
    """Weights of one expert's adapters in one layer."""
    return rank * sum(into + out for into, out in matrices(config).values())


def layers_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of all layers, forward."""
    layer = expert_weights(config) + adapter_weights(config, p.rank)
    return config.num_hidden_layers * (2 * sum(p.tokens.values()) * layer + 4 * config.hidden_size * p.pairs())


def ends_flops(config: MoTConfig, p: Pass) -> tuple[int, int]:
    """Operations of the head over the vocabulary, and of projections from and to latents with their times."""
    images, width = p.rows * p.copies, config.hidden_size
    projections = 4 * images * p.image * config.token_dim * width + 2 * images * width * (TIME_WAVES + width)
    return 2 * p.scored * width * config.vocab_size, projections


def forward_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of a forward pass."""
    return layers_flops(config, p) + sum(ends_flops(config, p))


def backward_flops(config: MoTConfig, p: Pass, trained: tuple[str, ...] = (TEXT, IMAGE)) -> int:
    """Operations of the backward pass, for adapters or, with rank 0, for all weights of the layers.

    A frozen matrix passes one gradient on, a trained one computes two. Where the text expert is not trained, nothing
    depends on the text.
    """
    learns_text = TEXT in trained
    tokens = p.tokens if learns_text else replace(p, text=0).tokens
    total = ATTENTION_BACKWARD * 4 * config.hidden_size * p.pairs(text=learns_text)
    for expert, count in tokens.items():
        gradients = 1 + (expert in trained)
        frozen, adapters = expert_weights(config), adapter_weights(config, p.rank)
        total += 2 * count * (frozen + gradients * adapters if p.rank else gradients * frozen)
    head, projections = ends_flops(config, p)
    return int(config.num_hidden_layers * total) + (head if learns_text else 0) + projections // 2


def decode_bytes(config: MoTConfig, rows: int, past: int, dtype_bytes: int, rank: int) -> int:
    """Bytes that sampling one token in every row must read: the text expert, its fp32 adapters, the head, the cache."""
    weights = config.num_hidden_layers * expert_weights(config) + config.vocab_size * config.hidden_size
    cache = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * rows * past
    return dtype_bytes * (weights + cache) + FP32 * config.num_hidden_layers * adapter_weights(config, rank)


def step_seconds(work: Workload) -> float:
    """Seconds of a training step at the assumed rates: part by part the larger of arithmetic and of moving bytes.

    A lower bound. Every text has its full length; decoding pixels, rewards, evaluations, communication, the disk and
    the launch of kernels cost nothing.
    """
    model, batch = work.model, work.batch
    rate = FLOPS if work.config.dtype == "bfloat16" else FLOPS_FP32
    rank = work.rank if work.lora else 0
    episode, noisy, looks = _passes(work, rank)
    forward = sum(forward_flops(model, p) for p in (*episode, *looks))
    trained = tuple(expert for expert in (TEXT, IMAGE) if work.trains(expert))
    update = forward + sum(backward_flops(model, p, trained) for p in episode)
    if work.config.train.activation_checkpointing:
        update += sum(layers_flops(model, p) for p in episode)
    painting = work.config.sampling.steps * sum(forward_flops(model, p) for p in noisy)
    each = painting + old_share(work.config) * forward + batch.backwards * update
    seconds = batch.episodes * each / rate
    for k, budget in enumerate(budgets_of(work.config)):
        past = work.context_tokens(k) - 2 - budget + budget // 2
        token = forward_flops(model, Pass(1, text=1, past=past, scored=1, rank=rank))
        read = decode_bytes(model, work.batch_size, past, work.dtype_bytes, rank)
        seconds += budget * max(batch.episodes * token / rate, batch.rollouts * read / MEMORY)
    if work.needs_reference:
        plain = sum(forward_flops(model, replace(p, rank=0)) for p in (*episode, *looks))
        arithmetic = batch.episodes * plain / rate
        seconds += max(arithmetic, _reference_from_host(work) / FROM_HOST)
    return seconds


def _passes(work: Workload, rank: int) -> tuple[list[Pass], list[Pass], list[Pass]]:
    """By round: an episode's packed pass in replay, one noisy image in sampling; and the looks between rounds.

    A look is counted as a pass of the image expert; the vision tower is not counted.
    """
    copies, latents = work.noisy_images if work.replays_images else 0, work.latent_tokens
    budgets = budgets_of(work.config) or [0] * work.rounds
    episode, noisy, looks = [], [], []
    for k, budget in enumerate(budgets):
        spoken = budget + 2 if budget else 0
        own = spoken + (0 if k else work.prompt_tokens)
        context = work.context_tokens(k)
        episode.append(Pass(1, text=own, past=context - own, copies=copies, image=latents, scored=budget, rank=rank))
        noisy.append(Pass(1, past=context, copies=1, image=latents, rank=rank))
        looks.append(noisy[-1])
        for past in (context - spoken, work.prompt_tokens)[: work.guided_calls - 1]:  # poorer contexts, at most
            read = 0 if k else past
            episode.append(Pass(1, text=read, past=past - read, copies=copies, image=latents, rank=rank))
            noisy.append(replace(noisy[-1], past=past))
    return episode, noisy, looks[:-1]


def _reference_from_host(work: Workload) -> int:
    """Bytes of a reference on the host, whose layers are sent once per micro-batch."""
    if work.lora or work.config.train.reference_device != "host":
        return 0
    layers = work.stored(lambda name: work.is_trained(name) and name.startswith(LAYERS))
    return layers * work.batch.micro_batches * work.config.train.minibatches
