"""The worst moment of each phase of a training run, in bytes. Arithmetic; imports no torch.

What a pass keeps for its backward pass, and what is alive at its worst moment, are sums over the tensors that these
passes make; a test holds them against autograd's own. Attention makes no matrix of scores, on a CPU neither.

Letters in formulas: C hidden width, I width inside the MLP, Q width of keys, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from unigrpo_cli.models.mot.config import LAYERS
from unigrpo_cli.run.memory.workload import WIDE, Workload

GIB = 2**30
TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class Item:
    """Something that takes memory, in bytes, and why so much."""

    name: str
    bytes: int
    formula: str

    @property
    def gib(self) -> float:
        return self.bytes / GIB


@dataclass(frozen=True)
class Phase:
    """The worst moment of a phase: what is there besides what always is."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def some(*items: Item | None) -> tuple[Item, ...]:
    """Those that are there."""
    return tuple(item for item in items if item is not None and item.bytes)


def _each(at_once: int, *items: Item | None) -> tuple[Item, ...]:
    """What every batch has of its own, times the batches that are computed at the same time."""
    own = some(*items)
    if at_once == 1:
        return own
    return tuple(
        replace(item, bytes=at_once * item.bytes, formula=f"{at_once} at once x ({item.formula})") for item in own
    )


def training(work: Workload) -> tuple[Phase, ...]:
    """All phases of a training step."""
    return (*sampling(work, adapted=work.lora), *replaying(work), *some_phases(_step(work)))


def replaying(work: Workload) -> tuple[Phase, ...]:
    """Phases of old and reference scores and of the updates, all of which go by micro-batches."""
    return some_phases(
        _scoring(work, IMAGE),
        _scoring(work, TEXT),
        _update(work, TEXT),
        _update(work, IMAGE),
    )


def some_phases(*phases: Phase) -> tuple[Phase, ...]:
    """Those in which there is anything."""
    return tuple(phase for phase in phases if phase.items)


# ----- rollout


def sampling(work: Workload, adapted: bool) -> tuple[Phase, ...]:
    """Phases of a rollout, also where nothing is trained.

    Args:
        adapted: with adapters in the network.
    """
    return some_phases(_writing(work), _painting(work, adapted), _decoding(work))


def _cache(work: Workload, tokens: int, what: str) -> Item:
    return Item(
        "key-value cache",
        work.rows * tokens * work.cached_token,
        f"{work.rows} rows x {tokens} tokens ({what}) x {work.cached_token:,} B",
    )


def _gathered(work: Workload) -> Item | None:
    """Sampling with sharded weights is done with a whole copy of the layers, in the network's dtype."""
    if not work.sharded:
        return None
    layers = work.stored(lambda name: name.startswith(LAYERS))
    return Item("gathered weights", layers, f"all layers, x {work.narrow} B, while episodes are drawn")


def _layer_at_hand(work: Workload, gradients: bool) -> Item | None:
    """With sharded weights the layer that is passed is whole, and the next one is on its way."""
    if not work.sharded:
        return None
    elements = work.elements(lambda name: name.startswith(f"{LAYERS}0."))
    count = 3 if gradients else 2
    what = "two layers' fp32 weights" + (" and one's gradient" if gradients else "")
    return Item("layers at hand", count * elements * WIDE, f"{elements:,} x 4 B x {count}: {what}")


def _writing(work: Workload) -> Phase:
    """Drawing a word: the cache, the prompt's cache that it grew from, and probabilities in fp32 and fp64.

    Or, where a cache is larger than those, making the batch smaller.
    """
    if not work.words:
        return Phase("rollout, words", ())
    logits = Item(
        "logits",
        28 * work.rows * work.model.vocab_size,
        f"{work.rows} rows x V x 28 B (three in fp32, two in fp64)",
    )
    fewer = work.rows // 2 + work.rows // 4
    halves = Item(
        "smaller batches",
        fewer * work.text * work.cached_token,
        f"{fewer} rows x {work.text} tokens x {work.cached_token:,} B, when half and then a quarter write on",
    )
    return Phase(
        "rollout, words",
        some(
            _gathered(work),
            *_each(
                work.rows_at_once,
                _cache(work, work.text + work.given, "text, and once more what is given"),
                max(logits, halves, key=lambda item: item.bytes),  # batches get smaller between words
                _cast(work),
            ),
        ),
    )


def _painting(work: Workload, adapted: bool) -> Phase:
    unconditional = 2 * work.given if work.config.eval.guidance_text > 1 else 0
    s, tokens = work.config.sampling, work.rows * work.image
    latents = work.rows * work.latents * work.model.token_dim
    return Phase(
        "rollout, image",
        some(
            _gathered(work),
            *_each(
                work.rows_at_once,
                _cache(
                    work,
                    work.text + unconditional,
                    "text" + (", and the two contexts of guidance" if unconditional else ""),
                ),
                _pass(work, tokens, adapted),
                Item(
                    "latents",
                    latents * WIDE * (3 * work.copies + 4),
                    f"{work.rows} images of {s.height} x {s.width} px x (3 x {work.copies} recorded + 4) in fp32",
                ),
                _cast(work),
            ),
        ),
    )


def _pass(work: Workload, tokens: int, adapted: bool) -> Item:
    """The worst moment of a layer without gradients, inside the MLP: gate and up, the second with its adapter."""
    m, inner = work.model, 4 if adapted else 2
    keys = m.num_key_value_heads * m.head_dim
    per_token = (inner * m.intermediate_size + 5 * m.hidden_size + 2 * keys) * work.narrow
    return Item(
        "one layer",
        tokens * per_token,
        f"{tokens} tokens x ({inner} I + 5 C + 2 Q) x {work.narrow} B",
    )


def _largest(work: Workload) -> int:
    """Elements of the largest matrix in the layers that full tuning trains."""
    return max((prod(s) for e in (TEXT, IMAGE) for s in work.in_one_layer(e, work.is_trained).values()), default=0)


def _cast(work: Workload) -> Item | None:
    """A trained matrix is cast to the network's dtype when it is used."""
    if work.narrow == WIDE:
        return None
    largest = _largest(work)
    return Item("cast weights", largest * work.narrow, f"the largest trained matrix, {largest:,} x {work.narrow} B")


def _decoding(work: Workload) -> Phase:
    """One picture at a time through the decoder, as a whole or in strips."""
    if work.autoencoder is None:
        return Phase("rollout, pixels", ())
    s = work.config.sampling
    pixels = s.height * s.width
    return Phase(
        "rollout, pixels",
        some(
            _gathered(work),
            *_each(
                work.rows_at_once,
                _cache(work, work.text, "text"),
                _strips(work) if s.vae_tile_rows else _whole_maps(work),
                Item(
                    "pictures",
                    2 * work.rows * 3 * pixels * WIDE,
                    f"{work.rows} x {s.height} x {s.width} x 3 x 2 in fp32",
                ),
            ),
        ),
    )


def _whole_maps(work: Workload) -> Item:
    """The worst moment of a whole picture is a norm of the widest level there is."""
    assert work.autoencoder is not None
    s, widths = work.config.sampling, work.autoencoder.widths
    pixels, last = s.height * s.width, len(widths) - 1
    numbers = max(widths[min(level + 1, last)] * pixels // 4**level for level in range(last + 1))
    return Item("decoder", 3 * WIDE * numbers, f"3 maps x {numbers:,} x 4 B, one picture at a time")


def _strips(work: Workload) -> Item:
    """In strips a block's input and output are whole; of a strip its input, its output and the one before."""
    assert work.autoencoder is not None
    s, widths = work.config.sampling, work.autoencoder.widths
    pixels, last = s.height * s.width, len(widths) - 1
    worst = (0, 0)
    for level, width in enumerate(widths):
        share = min(max(1, s.vae_tile_rows // 2**level) + 2, s.height // 2**level) / s.height * 2**level
        larger = 4 ** (level > 0)  # a level but the last is made twice as large at its end
        for into, times in ((widths[min(level + 1, last)], 1), (width, larger)):
            maps = (into + width * times) * pixels // 4**level
            worst = max(worst, (maps, int((into + 2 * width) * times * share * pixels) // 4**level))
    numbers = sum(worst)
    return Item("decoder", WIDE * numbers, f"{worst[0]:,} of two maps + {worst[1]:,} of strips, x 4 B")


# ----- old and reference scores


def _recorded(work: Workload) -> Item | None:
    """Recorded steps of all episodes with the velocities that stay fixed, on the device until the step is over."""
    if not work.paints:
        return None
    arrays = (3 + work.needs_reference) * work.copies + 1
    numbers = work.batch.episodes * arrays * work.latents * work.model.token_dim
    return Item(
        "recorded steps",
        numbers * WIDE,
        f"{work.batch.episodes} episodes x {arrays} latents (before, after and fixed velocities of {work.copies} "
        "steps, and the last) in fp32",
    )


def _image_tokens(work: Workload) -> int:
    """Of a micro-batch: every noisy copy with its boundary tokens."""
    return work.micro * work.copies * work.image if work.paints else 0


def _text_cache(work: Workload) -> Item:
    tokens = work.micro * work.text
    return Item("text's keys and values", tokens * work.cached_token, f"{tokens} tokens x {work.cached_token:,} B")


def _logits(work: Workload) -> Item | None:
    if not work.words:
        return None
    numbers = work.micro * work.words * work.model.vocab_size
    return Item(
        "logits",
        5 * WIDE * numbers,
        f"{work.micro} x {work.words} words x V x 5 x 4 B (logits, logarithms, probabilities, two for entropy)",
    )


def _streamed(work: Workload) -> Item | None:
    """The layer of a reference on the host that is on the device now."""
    if work.lora or work.config.train.reference_device != "host":
        return None
    layer = work.stored(lambda name: work.is_trained(name) and name.startswith(f"{LAYERS}0."))
    return Item("reference's layer", layer, f"one layer of it, from the host, x {work.narrow} B")


def _scoring(work: Workload, kind: str) -> Phase:
    """Old and reference replays, at their worst layer or at their logits."""
    if kind == TEXT:
        logits = _logits(work)
        at_hand = _layer_at_hand(work, gradients=False)
        if logits is None:
            return Phase("replays, words", ())
        own = _each(work.micro_at_once, _text_cache(work), logits)
        return Phase("replays, words", some(_recorded(work), *own, at_hand))
    tokens = _image_tokens(work)
    return Phase(
        "replays, layers",
        some(
            _recorded(work),
            *_each(
                work.micro_at_once,
                _text_cache(work),
                _pass(work, max(tokens, work.micro * work.text), work.lora),
                _cast(work),
            ),
            _layer_at_hand(work, gradients=False),
            _streamed(work),
        ),
    )


# ----- update


def _gradients(work: Workload) -> Item:
    return Item("gradients", WIDE * work.trained_here, f"{work.trained_here:,} x 4 B")


def _own_gradients(work: Workload) -> Item | None:
    """Micro-batches that are computed at the same time have gradients of their own, and so has the one added up."""
    if work.micro_at_once == 1:
        return None
    sets = work.micro_at_once + 1
    return Item(
        "each micro-batch's gradients",
        sets * WIDE * work.trained_here,
        f"({work.micro_at_once} at once + 1) x {work.trained_here:,} x 4 B",
    )


def saved_per_token(work: Workload, stream: str) -> int:
    """Bytes that one layer keeps for the backward pass of one token of a stream."""
    m, b = work.model, work.narrow
    width, inner, keys = m.hidden_size, m.intermediate_size, m.num_key_value_heads * m.head_dim
    given = work.keys
    attention = 8 if work.cpu and stream == TEXT else b
    gated = 2 if work.cpu else 3  # gate and up; elsewhere the activation too
    inputs = (3 * width + inner) * b + (7 * work.rank * b if work.lora else 0)
    return (
        inputs
        + (3 * width + keys) * WIDE
        + (2 * width + 2 * given) * attention
        + WIDE * m.num_attention_heads
        + gated * inner * b
    )


def _saved(work: Workload) -> int:
    """Bytes that one layer keeps for the backward pass of a micro-batch, weights aside."""
    tokens = {TEXT: work.micro * work.text if work.trains(TEXT) else 0, IMAGE: _image_tokens(work)}
    per_stream = sum(count * saved_per_token(work, stream) for stream, count in tokens.items())
    seen = 2 * work.keys * work.narrow * work.text
    return per_stream + (work.micro * work.copies * seen if tokens[IMAGE] else 0)


def _saved_casts(work: Workload) -> int:
    """Bytes of one layer's trained matrices, cast for the pass; the text expert's twice, for images' edges too."""
    if work.narrow == WIDE:
        return 0
    per_layer = {
        expert: work.adapter_elements(expert) // work.model.num_hidden_layers
        if work.lora
        else sum(map(prod, work.in_one_layer(expert, work.is_trained).values()))
        for expert in (TEXT, IMAGE)
        if work.trains(expert)
    }
    uses = {TEXT: 1 + work.paints, IMAGE: int(work.paints)}
    return sum(uses[expert] * count for expert, count in per_layer.items()) * work.narrow


def _kept(work: Workload) -> tuple[Item, ...]:
    """What a whole forward pass leaves for the backward pass."""
    m = work.model
    tokens = work.micro * work.text + _image_tokens(work)
    inputs = (m.num_hidden_layers + 2) * tokens * m.hidden_size * work.narrow
    shown = f"{tokens} tokens x {m.hidden_size} x {work.narrow} B"
    if work.checkpoints:
        return (Item("layers' inputs", inputs, f"({m.num_hidden_layers} layers + 2) x {shown}"),)
    per_image, per_text = saved_per_token(work, IMAGE), saved_per_token(work, TEXT)
    return (
        Item(
            "activations",
            m.num_hidden_layers * _saved(work) + 2 * tokens * m.hidden_size * work.narrow,
            f"{m.num_hidden_layers} layers x ({_image_tokens(work)} image tokens x {per_image:,} B + "
            f"{work.micro * work.text} of text x {per_text:,} B)",
        ),
        Item(
            "cast weights",
            m.num_hidden_layers * _saved_casts(work),
            f"what is trained, x {work.narrow} B for each use, of all layers",
        ),
    )


def _update(work: Workload, kind: str) -> Phase:
    """Forward and backward of a micro-batch: at the logits, or in the backward pass of a layer."""
    if kind == TEXT:
        logits = _logits(work)
        if logits is None:
            return Phase("update, words", ())
        own = _each(work.micro_at_once, *_kept(work), _text_cache(work), logits)
        at_hand = _layer_at_hand(work, gradients=False)
        return Phase("update, words", some(_recorded(work), _gradients(work), _own_gradients(work), *own, at_hand))
    m = work.model
    tokens = max(_image_tokens(work), work.micro * work.text)
    again: tuple[Item, ...] = ()
    if work.checkpoints:
        again = (
            Item(
                "one layer again",
                _saved(work) + _saved_casts(work),
                f"recomputed: {_image_tokens(work)} image tokens x {saved_per_token(work, IMAGE):,} B + "
                f"{work.micro * work.text} of text x {saved_per_token(work, TEXT):,} B + its cast weights",
            ),
        )
    inner = 2 * m.intermediate_size * work.narrow * tokens
    return Phase(
        "update, layers",
        some(
            _recorded(work),
            _gradients(work),
            _own_gradients(work),
            *_each(
                work.micro_at_once,
                *_kept(work),
                *again,
                Item("derivatives", inner, f"{tokens} tokens x 2 I x {work.narrow} B"),
                Item(
                    "a matrix's gradient",
                    (work.narrow + WIDE) * _largest(work),
                    "of the largest, before it is added",
                ),
            ),
            _layer_at_hand(work, gradients=True),
        ),
    )


def _step(work: Workload) -> Phase:
    """AdamW's own step. On an accelerator it goes over all tensors at once, with a copy of them."""
    copied = 0 if work.cpu else work.trained_here
    return Phase(
        "optimizer step",
        some(
            _recorded(work),
            _gradients(work),
            Item("denominators", WIDE * copied, f"{copied:,} x 4 B"),
        ),
    )
