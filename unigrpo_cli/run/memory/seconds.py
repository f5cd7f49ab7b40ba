"""FLOP, bytes moved and seconds of a training step. Arithmetic; imports no torch.

A multiplication and an addition are two FLOP. Attention counts every pair of a query and a key, causal ones too, as
profilers do. Seconds of a part are those of its arithmetic or those of moving its weights and caches, whichever are
more; starting kernels, rewards, evaluations and the disk cost nothing here. So they are a lower bound, and small
models and small batches are far above it.

Letters in formulas: W elements of an expert's matrices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from unigrpo_cli.models.mot.config import LAYERS, TIME_WAVES, AutoencoderConfig, autoencoder_shapes
from unigrpo_cli.run.memory.workload import WIDE, Workload, old_share

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class Rates:
    """What a device sustains: FLOP/s in the network's dtype and in fp32, bytes/s of its memory, from its host."""

    flops: float
    wide_flops: float
    bytes: float
    host_bytes: float
    source: str


ACCELERATOR = Rates(4e14, 5e13, 2e12, 2.5e10, "assumed for one large accelerator, not measured")


@dataclass(frozen=True)
class Work:
    """FLOP in the network's dtype, FLOP in fp32, bytes of device memory read and written, bytes from the host."""

    flops: float = 0.0
    wide: float = 0.0
    bytes: float = 0.0
    host: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.wide + other.wide, self.bytes + other.bytes, self.host + other.host)

    def times(self, count: float) -> Work:
        return Work(self.flops * count, self.wide * count, self.bytes * count, self.host * count)

    def seconds(self, rates: Rates) -> float:
        arithmetic = self.flops / rates.flops + self.wide / rates.wide_flops
        return max(arithmetic, self.bytes / rates.bytes, self.host / rates.host_bytes)


@dataclass(frozen=True)
class Part:
    """A part of a training step."""

    name: str
    work: Work
    formula: str


def step_parts(load: Workload) -> tuple[Part, ...]:
    """The parts of a training step, in order; those that are not done are left out."""
    batch, old = load.batch, old_share(load.config)
    words = load.words + 2
    parts = [
        Part("read prompts", _prefill(load), f"{batch.reads} prompts x {load.given} tokens x 2 W"),
        Part(
            "write words",
            _decode(load),
            f"{batch.rollouts} batches x {words} tokens, each reads all of the text expert, the head and the cache",
        )
        if load.words
        else None,
        Part(
            "denoise",
            denoise(load, load.text).times(batch.episodes * batch.denoise_calls)
            + _reads(load, TEXT, IMAGE).times(batch.rollouts * batch.denoise_calls),
            f"{batch.episodes} episodes x {batch.denoise_calls} calls x {load.latents} latents x 2 W + attention",
        ),
        Part("decode pixels", _pixels(load), f"{batch.episodes} pictures through the autoencoder, in fp32"),
        Part("old replay", _replays(load, load.lora).times(old), f"{old * batch.episodes:g} episodes, {_shown(load)}"),
        Part(
            "reference replay",
            _replays(load, False) + _from_host(load),
            f"the same under the starting weights{', which come from the host' if _from_host(load).host else ''}",
        )
        if load.needs_reference
        else None,
        Part("update", update(load), f"{batch.backwards} x {batch.episodes} replays x ({_factors(load)})"),
        Part("optimizer", Work(bytes=28 * load.trained_here * batch.optimizer_steps), "weights, gradients, moments"),
    ]
    return tuple(part for part in parts if part is not None and part.work != Work())


def _shown(load: Workload) -> str:
    images = f" + {load.copies} x {load.latents} latents" if load.paints else ""
    return f"{load.text} text tokens{images}, x 2 W + attention"


def _matrices(load: Workload, expert: str, tokens: float, adapted: bool) -> float:
    elements = load.matrices(expert) + (load.adapter_elements(expert) if adapted else 0)
    return 2 * elements * tokens


def attention(load: Workload, queries: float, keys: float) -> float:
    """FLOP of all layers' attention for one row: scores and their sums of values."""
    m = load.model
    return 4 * m.num_hidden_layers * m.num_attention_heads * m.head_dim * queries * keys


def read(load: Workload, tokens: float, adapted: bool) -> Work:
    """One row's text, read at once."""
    return Work(_matrices(load, TEXT, tokens, adapted) + attention(load, tokens, tokens))


def head(load: Workload, tokens: float) -> Work:
    """Logits over the vocabulary, in fp32."""
    return Work(wide=2 * load.model.vocab_size * load.model.hidden_size * tokens)


def _unread(load: Workload, tokens: float, keys: float, adapted: bool) -> float:
    """FLOP that the last layer leaves out: of boundary tokens it needs what comes before attention, and no more."""
    shapes = [s for name, s in load.in_one_layer(TEXT).items() if ".o_proj" in name or ".mlp." in name]
    elements = sum(map(prod, shapes)) + (load.rank * sum(map(sum, shapes)) if adapted and load.lora else 0)
    return 2 * elements * tokens + attention(load, tokens, keys) / load.model.num_hidden_layers


def denoise(load: Workload, seen: float, adapted: bool | None = None) -> Work:
    """One noisy image after a context of `seen` tokens: latents, two edges, and in fp32 projections and time."""
    m = load.model
    adapted = load.lora if adapted is None else adapted
    narrow = _matrices(load, IMAGE, load.latents, adapted) + _matrices(load, TEXT, 2, adapted)
    narrow -= _unread(load, 2, seen + load.image, adapted)
    time = 2 * (TIME_WAVES + m.hidden_size) * m.hidden_size
    projections = 4 * load.latents * m.token_dim * m.hidden_size
    return Work(narrow + attention(load, load.image, seen + load.image), time + projections)


def replay(load: Workload, adapted: bool) -> Work:
    """One episode's replay: its text once, the noisy copies of its image, logits of its words."""
    total = read(load, load.text, adapted) + head(load, load.words)
    return total + denoise(load, load.text, adapted).times(load.copies if load.paints else 0)


def _reads(load: Workload, *experts: str) -> Work:
    """Reading experts' matrices once. Trained ones in a narrower network are cast: read, written, read."""
    total = 0
    for expert in experts:
        layer = load.in_one_layer(expert)
        trained = sum(prod(shape) for name, shape in layer.items() if load.is_trained(name))
        still = sum(map(prod, layer.values())) - trained
        cast = WIDE + 2 * load.narrow if load.narrow < WIDE else WIDE
        total += still * load.narrow + trained * cast
    return Work(bytes=load.model.num_hidden_layers * total)


def _prefill(load: Workload) -> Work:
    batch = load.batch
    return read(load, load.given, load.lora).times(batch.reads) + _reads(load, TEXT).times(batch.rollouts)


def _decode(load: Workload) -> Work:
    """Words one by one, all rows of a batch at once, each as if it spent its whole budget."""
    batch, m, calls = load.batch, load.model, load.words + 2
    seen = load.given + (calls + 1) / 2
    token = Work(_matrices(load, TEXT, 1, load.lora) + attention(load, 1, seen), bytes=seen * load.cached_token)
    per_row = token.times(calls) + head(load, load.words)
    table = Work(bytes=WIDE * m.vocab_size * m.hidden_size).times(load.words)
    return per_row.times(batch.episodes) + (_reads(load, TEXT).times(calls) + table).times(batch.rollouts)


def _pixels(load: Workload) -> Work:
    if load.autoencoder is None:
        return Work()
    s = load.config.sampling
    return Work(wide=decoder_flops(load.autoencoder, s.height * s.width) * load.batch.episodes)


def decoder_flops(config: AutoencoderConfig, pixels: int) -> float:
    """FLOP of decoding one picture: its convolutions, and the attention in its middle."""
    top = len(config.widths) - 1
    total = 0.0
    for name, shape in autoencoder_shapes(config).items():
        if not name.startswith("decoder.") or len(shape) != 4:
            continue
        level = re.match(r"decoder\.up\.(\d+)\.(upsample)?", name)
        coarse = top if level is None else int(level[1]) - bool(level[2])
        coarse = 0 if name == "decoder.conv_out.weight" else coarse
        total += 2 * prod(shape) * pixels / 4**coarse
    tokens = pixels / 4**top
    return total + 4 * config.widths[-1] * tokens**2


def _replays(load: Workload, adapted: bool) -> Work:
    batch = load.batch
    passes = batch.micro_batches * load.config.train.minibatches
    return replay(load, adapted).times(batch.episodes) + _reads(load, TEXT, IMAGE).times(passes)


def _from_host(load: Workload) -> Work:
    """The layers of a reference on the host, sent once per micro-batch."""
    if load.lora or load.config.train.reference_device != "host":
        return Work()
    layers = load.stored(lambda name: load.is_trained(name) and name.startswith(LAYERS))
    return Work(host=layers * load.batch.micro_batches * load.config.train.minibatches)


def _factors(load: Workload) -> str:
    recompute = " + 1 again" if load.checkpoints else ""
    return f"1 forward{recompute} + {'1' if load.lora else '2'} backward, attention 2.5"


def update(load: Workload) -> Work:
    """Forward, recomputation and backward of all episodes, in every epoch."""
    forward = replay(load, load.lora)
    again = Work(forward.flops) if load.checkpoints else Work()
    once = forward + again + backward(load)
    passes = load.batch.micro_batches * load.config.train.minibatches
    moved = _reads(load, TEXT, IMAGE).times(passes * (2 + load.checkpoints))
    return (once.times(load.batch.episodes) + moved).times(load.batch.backwards)


def backward(load: Workload) -> Work:
    """One episode's backward pass: derivatives of inputs, and of the weights that are trained.

    The text's share of it is left out where only the image expert is trained, for then nothing depends on it. Flash
    attention makes its scores again: five products where the forward pass has two.
    """
    images = load.copies if load.paints else 0
    tokens = {TEXT: (load.text if load.trains(TEXT) else 0) + 2 * images, IMAGE: load.latents * images}
    flops = 0.0
    for expert, own in tokens.items():
        weights = 2 if load.trains(expert) else 1
        flops += _matrices(load, expert, own, False) * (1 if load.lora else weights)
        if load.lora:
            flops += 2 * load.adapter_elements(expert) * own * weights
    if load.trains(TEXT):
        flops += 2.5 * attention(load, load.text, load.text)
    flops += 2.5 * attention(load, load.image, load.text + load.image) * images
    projections = 2 * load.latents * load.model.token_dim * load.model.hidden_size * images
    wide = head(load, load.words if load.trains(TEXT) else 0).wide + projections
    return Work(flops, wide)
