"""Bytes of a run of a pair (`models/pair`) at the worst moment of each phase. Arithmetic; imports no torch.

Weights, gradients, moments and caches are counted; activations are widths per token and layer, within some ten percent
of what autograd saves in a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.models.pair.sizes import NetworkSizes, PairSizes
from unigrpo_cli.run.memory.formulas import GIB, Item, Memory, Phase, concurrent_items, decoder_item, item, present
from unigrpo_cli.run.memory.workload import FP32, IMAGE, TEXT, Workload

LM_SAVED = (4, 4, 3)
"""As `PainterFacts.saved`; queries count six times and keys four times besides."""
BLOCK = 8
"""Widths that a layer without gradients needs besides its MLP."""


@dataclass(frozen=True, kw_only=True)
class PairWorkload(Workload):
    """What one rank computes with a pair."""

    pair: PairSizes
    timed: ClassVar[bool] = False

    @property
    def pixels_per_token(self) -> int:
        return self.pair.pixels_per_token

    def refuse_size(self) -> None:
        self.pair.grid(self.config.sampling.height, self.config.sampling.width)

    def network(self, expert: str) -> NetworkSizes:
        return self.pair.reasoner if expert == TEXT else self.pair.painter

    @property
    def trained(self) -> int:
        own = [self.network(expert) for expert in (TEXT, IMAGE) if self.trains(expert)]
        return sum(self.rank * n.sides if self.lora else n.trained for n in own)

    @property
    def trained_on_rank(self) -> int:
        return self.part(self.trained)

    def part(self, numbers: int) -> int:
        """This rank's part of numbers in the layers' matrices."""
        return -(-numbers // self.world) if self.sharded else numbers

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of both networks' layers."""
        return self.pair.reasoner.trained + self.pair.painter.trained

    @property
    def adapters(self) -> int:
        """Both networks have adapters, whichever is trained."""
        return self.rank * (self.pair.reasoner.sides + self.pair.painter.sides)

    @property
    def quantized(self) -> int:
        """Bytes of the layers' matrices where they are quantised. Rows of int8, which have scales, are counted high."""
        both = (self.pair.reasoner, self.pair.painter)
        if self.quantize == "int8":
            return sum(n.trained + n.sides * self.dtype_bytes for n in both)
        return sum(self.quantized_bytes((1, n.trained)) for n in both) if self.quantize == "nf4" else 0

    @property
    def largest_matrix(self) -> int:
        return max(self.pair.reasoner.largest, self.pair.painter.largest)

    @property
    def whole_matrix(self) -> Item:
        return item("a whole matrix", "the largest", weights=self.largest_matrix, bytes=self.whole_number_bytes)

    def gathered(self, count: int) -> Item | None:
        """With sharded weights the current matrix is whole and the next is being gathered; backward adds a gradient."""
        if not self.sharded:
            return None
        return item("gathered matrices", "the largest", matrices=count, weights=self.largest_matrix, bytes=FP32)

    @property
    def latent_tokens(self) -> int:
        rows, columns = self.pair.grid(self.config.sampling.height, self.config.sampling.width)
        return rows * columns

    @property
    def condition_tokens(self) -> int:
        """Text tokens that condition an image, filled up as the painter needs them."""
        unit = self.pair.facts.padded_to or 32
        return -(-self.text_tokens // unit) * unit

    @property
    def image_tokens(self) -> int:
        """Tokens of a pass over one noisy image, text included."""
        return self.latent_tokens + self.condition_tokens

    @property
    def looked_at_tokens(self) -> int:
        return 0

    @property
    def cached_token(self) -> int:
        return 2 * self.pair.reasoner.layers * self.pair.keys * self.dtype_bytes


def training_memory(work: PairWorkload) -> Memory:
    """Memory of a training run."""
    moments = item("Adam's moments", trained_weights=work.trained_on_rank, bytes=2 * FP32)
    reference = None
    if not work.lora:
        frozen = work.part(work.matrices) if work.sharded else work.trained  # a rank's part is its own, trained or not
        reference = item("reference", "frozen copies", weights=frozen, bytes=work.dtype_bytes)
    always = (*_weights(work, adapted=work.lora), reference, moments)
    phases = (*sampling_phases(work, adapted=work.lora), *replay_phases(work), _optimizer_step(work))
    return Memory(present(*always), phases)


def sampling_memory(work: PairWorkload, adapted: bool) -> Memory:
    """Memory where nothing is trained."""
    frozen = work.config.train.model_copy(update={"finetune": "lora"})
    work = replace(work, config=work.config.model_copy(update={"train": frozen}))
    return Memory(present(*_weights(work, adapted)), sampling_phases(work, adapted))


def _weights(work: PairWorkload, adapted: bool) -> tuple[Item | None, ...]:
    full = 0 if work.lora else work.trained
    outside = work.pair.reasoner.parameters + work.pair.painter.parameters - work.matrices
    frozen = outside + (work.part(work.matrices - full) if work.quantize == PLAIN else 0)
    return (
        item("frozen weights", "both networks", weights=frozen, bytes=work.dtype_bytes),
        Item("quantized weights", work.quantized, f"{work.matrices:,} numbers in {work.quantize}, and their scales"),
        item("trained weights", "fp32 masters", weights=work.part(full), bytes=FP32),
        item("adapters", f"rank {work.rank} x (rows + columns)", weights=work.adapters, bytes=FP32)
        if adapted
        else None,
        item("autoencoder", weights=work.pair.autoencoder, bytes=FP32),
        Item("runtime", 0 if work.cpu else GIB, "assumed: the device's context and workspaces of its libraries"),
    )


def sampling_phases(work: PairWorkload, adapted: bool) -> tuple[Phase, ...]:
    """Text, image and pixels of one batch."""
    rows, s, b = work.batch_size, work.config.sampling, work.dtype_bytes
    guided = 2 if work.guided_calls > 1 or work.config.eval.guidance_text > 1 else 1
    cache = item("KV cache", "twice while it grows", rows=2 * rows, tokens=work.text_tokens, bytes=work.cached_token)
    logits = item("logits", "3 in fp32, 2 in fp64", rows=rows, vocabulary=work.pair.vocab_size, bytes=28)
    states = item("conditions", rows=rows * guided, tokens=work.condition_tokens, numbers=work.pair.states, bytes=b)
    numbers = 3 * work.sde_steps + 4
    latents = item("latents", "in fp32", rows=rows, latents=numbers, tokens=work.latent_tokens,
                   bytes=FP32 * work.pair.token_dim)  # fmt: skip
    layer = _one_layer(work, IMAGE, rows * work.image_tokens, adapted)
    pictures = item("pictures", "twice 3 channels in fp32", rows=rows, pixels=s.height * s.width, bytes=6 * FP32)
    decoder = decoder_item(work.pair.widths, s.height, s.width, 0)
    gathered = None
    if work.sharded:  # sampling uses a whole copy of the matrices in the networks' dtype
        gathered = item("gathered weights", "all matrices", weights=work.matrices, bytes=b)
    found: dict[str, tuple[Item | None, ...]] = {
        "sampling, text": (cache, logits, states, work.whole_matrix) if work.sampled_tokens else (),
        "sampling, image": (cache, states, layer, latents, work.whole_matrix),
        "sampling, pixels": (cache, decoder, pictures),
    }
    count = work.concurrent_batches
    return tuple(
        Phase(name, (*present(gathered), *concurrent_items(count, *items))) for name, items in found.items() if items
    )


def _one_layer(work: PairWorkload, expert: str, tokens: int, adapted: bool) -> Item:
    n = work.network(expert)
    width = (4 if adapted else 3) * n.inner + BLOCK * n.width
    return item("one layer", "widths inside an MLP", tokens=tokens, numbers=width, bytes=work.dtype_bytes)


def _saved(work: PairWorkload, expert: str) -> int:
    """Bytes that autograd saves for one token in one layer."""
    n, pair = work.network(expert), work.pair
    widths, inner, wide = LM_SAVED if expert == TEXT else pair.facts.saved
    attention = 6 * pair.queries + 4 * pair.keys if expert == TEXT else 0
    return work.dtype_bytes * (widths * n.width + inner * n.inner + attention) + FP32 * wide * n.width


def replay_phases(work: PairWorkload) -> tuple[Phase, ...]:
    """Old and reference scores, then forward and backward passes."""
    text = work.micro_batch * work.text_tokens
    images = work.micro_batch * work.noisy_images * work.guided_calls * work.image_tokens if work.replays_images else 0
    layer = max(
        _one_layer(work, TEXT, text, work.lora), _one_layer(work, IMAGE, images, work.lora), key=lambda i: i.bytes
    )
    tokens, note = (
        work.micro_batch * work.sampled_tokens,
        "5 in fp32: logits, logarithms, probabilities, two for entropy",
    )
    logits = item("logits", note, tokens=tokens, vocabulary=work.pair.vocab_size, bytes=5 * FP32) if tokens else None
    recorded = _recorded_steps(work)
    gradients = item("gradients", trained_weights=work.trained_on_rank, bytes=FP32)
    count = work.concurrent_micro_batches
    more = None
    if count > 1:
        more = item("each micro-batch's gradients", sets=count + 1, trained_weights=work.trained_on_rank, bytes=FP32)
    derivatives = item("derivatives", "inside an MLP", tokens=images or text,
                       numbers=2 * work.network(IMAGE if images else TEXT).inner, bytes=work.dtype_bytes)  # fmt: skip
    saved = (*_saved_items(work, text, images), logits, derivatives, work.whole_matrix)
    return (
        Phase(
            "replay", present(recorded, *concurrent_items(count, layer, logits, work.whole_matrix), work.gathered(2))
        ),
        Phase("update", present(recorded, gradients, more, *concurrent_items(count, *saved), work.gathered(3))),
    )


def _saved_items(work: PairWorkload, text: int, images: int) -> tuple[Item | None, ...]:
    """What a forward pass leaves for the backward pass, by network."""
    found: list[Item | None] = []
    checkpointed = work.config.train.activation_checkpointing
    through = work.replays_images and work.config.objective.grad_through_context
    if work.trains(TEXT):
        each = _saved(work, TEXT)
        if checkpointed:  # its MLPs alone are computed again
            each -= work.dtype_bytes * (LM_SAVED[1] - 1) * work.pair.reasoner.inner
        found.append(item("reasoner's activations", tokens=text, layers=work.pair.reasoner.layers, bytes=each))
    if images and (work.trains(IMAGE) or (through and work.trains(TEXT))):
        n, each = work.pair.painter, _saved(work, IMAGE)
        if checkpointed:
            inputs = work.dtype_bytes * n.width
            found.append(item("painter's layer inputs", tokens=images, layers=n.layers, bytes=inputs))
            found.append(item("recomputed layer", tokens=images, bytes=each))
        else:
            found.append(item("painter's activations", tokens=images, layers=n.layers, bytes=each))
    return tuple(found)


def _recorded_steps(work: PairWorkload) -> Item | None:
    if not work.replays_images:
        return None
    count = (3 + work.needs_reference) * work.noisy_images + 1
    return item("recorded steps", "in fp32", episodes=work.batch.episodes, latents=count, tokens=work.latent_tokens,
                bytes=FP32 * work.pair.token_dim)  # fmt: skip


def _optimizer_step(work: PairWorkload) -> Phase:
    denominators = item("denominators", trained_weights=0 if work.cpu else work.trained_on_rank, bytes=FP32)
    gradients = item("gradients", trained_weights=work.trained_on_rank, bytes=FP32)
    return Phase("optimizer step", present(_recorded_steps(work), gradients, denominators))
