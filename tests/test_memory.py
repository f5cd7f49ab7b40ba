"""Predicted memory, batch sizes and operations, against real tensors, autograd and torch's FLOP counter."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.torch_flops import count_flops
from unigrpo_cli.algo.text import token
from unigrpo_cli.config import Config, load_config, with_values
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.lora import add_adapters
from unigrpo_cli.models.mot.bagel import read_release
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.config import (
    ALSO,
    BAGEL_AUTOENCODER,
    BAGEL_NETWORK,
    LAYERS,
    LORA_TARGETS,
    AutoencoderConfig,
    MoTConfig,
    autoencoder_shapes,
    computes_wide,
    expert_of,
)
from unigrpo_cli.models.mot.family import MoTSizes
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.rollout import read_given, rollout, sample_text
from unigrpo_cli.run.memory import (
    Memory,
    Workload,
    batch_of,
    needs,
    sampling_batch_size,
    training_memory,
    training_sizes,
)
from unigrpo_cli.run.memory.flops import Pass, backward_flops, decode_bytes, forward_flops, step_seconds
from unigrpo_cli.run.memory.sizes import even_sizes
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.schedule import window_of

TINY = Path(__file__).parent / "golden" / "bagel_tiny"
SMALL = MoTConfig(96, 3, 6, 2, 320, 4000, 2, 4, 4, 8)
"""Wide enough that what the formulas leave out is little, small enough for a second."""
GIVEN, PROMPTS = 6, [Prompt("a", "a red cube"), Prompt("b", "two birds")]


def settings(*overrides: str) -> Config:
    return load_config(preset="paper", overrides=["sampling.batch_size=16", "train.micro_batch_size=8", *overrides])


def small(*overrides: str) -> Workload:
    own = ["sampling.height=64", "sampling.width=64", "sampling.batch_size=5", "train.micro_batch_size=2"]
    own += ["train.prompts_per_step=2", "train.group_size=2", "sampling.max_new_tokens=4", "train.lora_rank=4"]
    return Workload(SMALL, None, settings(*own, *overrides), cpu=True, prompt_tokens=GIVEN)


def item(found: Memory, name: str, phase: str | None = None) -> int:
    items = found.always if phase is None else found.phase(phase).items
    return sum(i.bytes for i in items if i.name == name)


# ----- parameters


def test_the_release_counted() -> None:
    """Against the network on the meta device and the totals that are known of it."""
    work = Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings("train.finetune=lora"))
    with torch.device("meta"):
        network = MoT(BAGEL_NETWORK, (1, 2))
    assert work.elements() == sum(p.numel() for p in network.parameters())
    assert round(work.elements() / 1e9, 3) == 14.607
    assert round(work.elements(lambda n: n.startswith("language_model.") and "_moe_gen" not in n) / 1e9, 3) == 7.616
    assert round(work.elements(lambda n: "_moe_gen" in n) / 1e9, 3) == 6.526
    assert sum(map(prod, autoencoder_shapes(BAGEL_AUTOENCODER).values())) == 83_819_683
    with torch.device("meta"):
        add_adapters(network, LORA_TARGETS, 64, 128.0, 0)
    adapters = dict.fromkeys(("text", "image"), 0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            adapters[expert_of(name)] += parameter.numel()
    assert {e: work.adapter_elements(e) for e in adapters} == adapters


ALL = tuple(ALSO)


@pytest.mark.parametrize(
    ("experts", "also"),
    [
        *(("both", None), ("text", None), ("both", ()), ("image", ()), ("both", ALL), ("text", ALL)),
        *(pytest.param(*own, marks=pytest.mark.long) for own in (("image", None), ("text", ()), ("image", ALL))),
    ],
)
def test_what_is_trained_is_what_tuning_trains(experts: str, also: tuple[str, ...] | None) -> None:
    """Adapters (None), all weights of the layers, and everything that can be trained beside them."""
    finetune = "lora" if also is None else "full"
    chosen = (f"train.experts={experts}", f"train.finetune={finetune}", f"train.extra_modules={list(also or ())}")
    config = settings(*chosen, "objective.grad_through_images=true")
    release = read_release(TINY)
    policy = load_model(str(TINY))
    policy.network.requires_grad_(False)
    trained = prepare_policy(policy, config).trainable()
    found = Workload(release.config, release.autoencoder, config).trained
    assert found == sum(p.numel() for own in trained.values() for p in own) > 0


# ----- bytes of tensors


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.finetune=lora", "dtype=bfloat16"),
        ("train.finetune=lora", "train.experts=image"),
        ("train.finetune=lora", "model_options.quantize=int8"),
        ("train.finetune=lora", "model_options.quantize=nf4", "dtype=bfloat16"),
        ("train.finetune=full", "dtype=bfloat16"),
        (
            "train.finetune=full",
            "dtype=bfloat16",
            "train.reference_device=host",
            "train.extra_modules=['head', 'projections']",
        ),
        ("train.finetune=full", "train.experts=text"),
    ],
)
def test_weights_reference_gradients_and_moments_are_exact(overrides: tuple[str, ...]) -> None:
    """A tiny BAGEL trained one step; what is there is what was reckoned, to the byte."""
    shape = ("sampling.height=32", "sampling.width=48", "sampling.steps=5", "sampling.max_new_tokens=4")
    config = settings(*overrides, *shape, "train.prompts_per_step=2", "train.group_size=2", "train.lora_rank=3")
    release = read_release(TINY)
    found = training_memory(Workload(release.config, release.autoencoder, config))
    kind = config.model_options.get("quantize", "none")
    policy = load_model(str(TINY), dtype=getattr(torch, config.dtype), quantize=kind)
    policy.network.requires_grad_(False)
    policy = prepare_policy(policy, config)
    optimizer = make_optimizer(policy, config)
    episodes = flatten(rollout(policy, PROMPTS, 2, train_sampling(config), window_of(config, 0), seed=0))
    scores = replay(policy, collate(episodes))
    (scores.log_prob_BL.sum() + sum(v.square().mean() for v in scores.velocities)).backward()
    trained = [p for own in policy.trainable().values() for p in own]
    for parameter in trained:  # what neither words nor images reach has no gradient; it has room for one
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    weights = size(policy.network.parameters()) + size(policy.network.buffers())
    assert sum(item(found, name) for name in ("frozen weights", "trained weights", "adapters")) == weights
    assert item(found, "gradients", "update, layers") == size(p.grad for p in trained)
    moments = [m for s in optimizer.state.values() for name, m in s.items() if name != "step"]
    assert item(found, "Adam's moments") == size(moments)
    codec = policy.codec.network.state_dict()  # type: ignore[attr-defined]
    assert item(found, "autoencoder") == size(codec.values())
    own = {id(p) for p in policy.network.parameters()}
    copied = [] if policy.frozen is None else [p for p in policy.frozen.parameters() if id(p) not in own]
    assert item(found, "reference") + sum(i.bytes for i in found.host) == size(copied)
    layers = sum(p.numel() for n, p in policy.network.named_parameters() if n.startswith(LAYERS) and p.requires_grad)
    assert bool(found.host) == ("train.reference_device=host" in overrides)
    if found.host:
        assert found.host[0].bytes < item(found, "trained weights")
        assert f"{layers:,}" in found.host[0].formula


def test_the_cache_of_a_rollout_is_a_contexts() -> None:
    shape = ("sampling.height=32", "sampling.width=48", "sampling.max_new_tokens=5", "sampling.batch_size=3")
    config = settings(*shape, "dtype=bfloat16")
    model = load_model(str(TINY), dtype=torch.bfloat16)
    given = model.preamble(PROMPTS[0], think=True)
    context = read_given(model, [given] * 3)
    work = Workload(model.network.config, None, config, prompt_tokens=context.used)
    grown, _ = sample_text(model, context, train_sampling(config), [1, 2, 3])
    held = size([*grown.keys, *grown.values])
    found = training_memory(work)
    assert item(found, "KV cache", "sampling, image") == held
    assert item(found, "KV cache", "sampling, text") == held + size([*context.keys, *context.values])


# ----- bytes of passes


class Alive(TorchDispatchMode):
    """Bytes of all storages that are alive, and their largest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def add(self, value: object) -> None:
        if not isinstance(value, Tensor) or (key := value.untyped_storage()._cdata) in self.seen:
            return
        storage = value.untyped_storage()
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            self.add(value)
        return out

    def over(self, start: int) -> int:
        """The peak since the last call, over `start`."""
        found, self.peak = self.peak - start, self.now
        return found


def network_of(work: Workload) -> MoT:
    """As tuning leaves it, in the dtypes of a loaded one."""
    torch.manual_seed(0)
    network = MoT(work.model, (1, 2))
    for name, parameter in network.named_parameters():
        trained = work.is_trained(name)
        wide = trained or computes_wide(name)
        parameter.data = parameter.data.to(torch.float32 if wide else getattr(torch, work.config.dtype))
        parameter.requires_grad_(trained)
    if work.lora:
        add_adapters(network, LORA_TARGETS, work.rank, 8.0, 0)
    network.activation_checkpointing = work.config.train.activation_checkpointing
    return network


def no_onednn() -> Any:
    """The estimate is of PyTorch's own products: a GPU has no others, and its FLOP counter knows no others."""
    return patch("unigrpo_cli.models.mot.layers.onednn_is_faster", lambda: False)


def passes(work: Workload) -> dict[str, int]:
    """Peaks of the phases of a step, the network itself left out: what `memory` reckons, seen."""
    network, alive, seen = network_of(work), Alive(), {}
    grid = work.model.grid(work.config.sampling.height, work.config.sampling.width)
    dim, micro, copies = work.model.token_dim, work.micro_batch, work.sde_steps
    for parameter in network.parameters():
        alive.add(parameter)
    empty = alive.now

    def replayed() -> Tensor:
        ids = torch.zeros(micro, work.text_tokens, dtype=torch.long)
        image = NoisyImage(torch.zeros(micro, copies, work.latent_tokens, dim), torch.ones(micro, copies), grid)
        lengths = [work.text_tokens, *[work.text_tokens - 1] * (micro - 1)]
        out = network(network.empty_context(micro), ids, lengths, image)
        seen.setdefault("replay, layers", alive.over(empty))
        hidden = out.hidden_BLC[:, GIVEN : GIVEN + work.sampled_tokens].flatten(0, 1)
        logits = network.logits(hidden).index_fill(-1, torch.tensor([0]), -torch.inf)
        scored = token(logits, temperature=1.0, id=torch.ones(len(hidden), dtype=torch.long))
        return scored.log_prob.sum() + out.velocity_BKND.sum()

    with no_onednn(), alive:
        with torch.no_grad():
            rows = work.batch_size
            ids, lengths = (
                torch.zeros(rows, work.text_tokens, dtype=torch.long),
                [work.text_tokens, *[work.text_tokens - 1] * (rows - 1)],
            )
            context = network(network.empty_context(rows), ids, lengths).context
            alive.over(empty)
            image = NoisyImage(torch.zeros(rows, 1, work.latent_tokens, dim), torch.ones(rows, 1), grid)
            network(context, image=image)
            seen["sampling, image"] = alive.over(empty)
            del context, image
            alive.over(empty)
            replayed()
            seen["replay, logits"] = alive.over(empty)
        for _ in range(2):  # in the second pass gradients are there from the start
            loss = replayed()
            seen["update, logits"] = alive.over(empty)
            loss.backward()
            seen["update, layers"] = alive.over(empty)
            del loss
    return seen


@pytest.mark.parametrize(
    ("finetune", "checkpointing", "dtype"),
    [
        pytest.param(f, c, d, marks=[pytest.mark.long] * (d == "float32" or (f == "lora") != (c == "true")))
        for f, c, d in product(("lora", "full"), ("true", "false"), ("bfloat16", "float32"))
    ],
)
def test_activations_are_those_of_the_passes(finetune: str, checkpointing: str, dtype: str) -> None:
    """Every phase within 6 %: few words, where layers decide, and many, where logits do."""
    own = (f"train.finetune={finetune}", f"dtype={dtype}", f"train.activation_checkpointing={checkpointing}")
    for words, phases in (
        (4, ("sampling, image", "replay, layers", "update, layers")),
        (300, ("replay, logits", "update, logits")),
    ):
        work = small(*own, f"sampling.max_new_tokens={words}", f"sampling.batch_size={5 if words < 5 else 1}")
        found, seen = training_memory(work), passes(work)
        for phase in phases:
            left_out = item(found, "latents", phase) + item(found, "recorded steps", phase)
            assert found.phase(phase).bytes - left_out == pytest.approx(seen[phase], rel=0.06), phase


def test_a_batch_that_gets_smaller_is_counted() -> None:
    """Eight rows of which one after the other stops: half and then a quarter are kept beside the whole."""
    config = settings("sampling.height=16", "sampling.width=16", "sampling.max_new_tokens=100", "sampling.batch_size=8")
    model, alive = load_model(str(TINY)), Alive()
    given = model.preamble(PROMPTS[0], think=False)
    drawn = 0

    class Stopping:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def logits(self, hidden: Tensor) -> Tensor:
            nonlocal drawn
            logits, drawn = model.logits(hidden), drawn + 1
            logits[:, model.stop_id] = -torch.inf
            if drawn in (90, 92, 94, 96):
                logits[: len(logits) // 2] = -torch.inf
                logits[: len(logits) // 2, model.stop_id] = 0
            return logits

    for parameter in model.network.parameters():
        alive.add(parameter)
    with torch.no_grad(), alive:
        context = read_given(model, [given] * 8)
        start = alive.now
        sample_text(Stopping(), context, train_sampling(config), range(8))  # type: ignore[arg-type]
    work = Workload(model.network.config, None, config, prompt_tokens=context.used)
    items = {i.name: i.bytes for i in training_memory(work).phase("sampling, text").items}
    assert "smaller batches" in items
    given_once = 8 * context.used * work.cached_token
    seen = alive.over(start) + given_once
    assert items["KV cache"] + items["smaller batches"] <= seen < 1.2 * sum(items.values())  # and a pass


@pytest.mark.parametrize(
    ("tile_rows", "side", "tolerance"),
    [(0, 64, 0.06), (8, 128, 0.06), pytest.param(16, 256, 0.06, marks=pytest.mark.long)],
)
def test_decoding_a_picture_takes_some_of_its_widest_maps(tile_rows: int, side: int, tolerance: float) -> None:
    model, alive = load_model(str(TINY), vae_tile_rows=tile_rows), Alive()
    sizes = (f"sampling.height={side}", f"sampling.width={side // 2}", f"sampling.vae_tile_rows={tile_rows}")
    work = Workload(model.network.config, read_release(TINY).autoencoder, settings(*sizes, "sampling.batch_size=1"))
    with alive:
        latent = torch.zeros(1, 16, side // 8, side // 16)
        start = alive.now
        model.codec.raw(latent)  # type: ignore[attr-defined]
    assert item(training_memory(work), "decoder", "sampling, pixels") == pytest.approx(alive.over(start), rel=tolerance)


# ----- sizes that are left open

OPEN = (
    "sampling.batch_size=0",
    "train.micro_batch_size=0",
    "train.finetune=lora",
    "dtype=bfloat16",
    "sampling.think=true",
)
OPEN += ("train.activation_checkpointing=true", "sampling.height=512", "sampling.width=512")
SLOTS = {"sampling.batch_size": ("sampling", 768), "train.micro_batch_size": ("replay, update", 384)}
"""For each setting the phases it decides and the episodes it shares out, in the paper's step."""


def largest(work: Workload, key: str, size: int) -> float:
    """GiB of the largest phase that a setting decides."""
    other = next(name for name in SLOTS if name != key)
    found = training_memory(replace(work, config=with_values(work.config, {key: size, other: 1})))
    names = SLOTS[key][0].split(", ")
    return max(found.gib(phase) for phase in found.phases if phase.name.split(",")[0] in names)


def test_sizes_left_open_are_the_largest_that_fit() -> None:
    """What is chosen fits; one batch less does not. More memory, no smaller sizes; never more than there are."""
    work = Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*OPEN))
    before = dict.fromkeys(SLOTS, 1)
    for gib in (20, 42, 48, 64, 80, 2000):
        sizes = training_sizes(work, gib)
        for key, (_, episodes) in SLOTS.items():
            size = sizes[key]
            batches = -(-episodes // size)
            assert before[key] <= size
            if gib == 20:
                assert size == 1, "nothing fits, and whoever refuses it says so"
                continue
            assert largest(work, key, size) <= gib
            if batches > 1:
                assert largest(work, key, -(-episodes // (batches - 1))) > gib
            assert -(-episodes // max(1, size - 1)) > batches or size == 1, "a smaller size does not do"
        before = sizes
    assert before == {key: episodes for key, (_, episodes) in SLOTS.items()}
    fixed = replace(work, config=settings(*OPEN, "train.micro_batch_size=3"))
    assert list(training_sizes(fixed, 64)) == ["sampling.batch_size"]


@given(count=st.integers(1, 2000), concurrent=st.integers(1, 8))
@hypothesis_settings(max_examples=50, deadline=None)
def test_batches_are_of_one_size_and_no_larger_than_their_turns_need(count: int, concurrent: int) -> None:
    wished = even_sizes(count, concurrent)
    sizes, fewer = wished[: wished.index(1) + 1], wished[wished.index(1) + 1 :]
    assert sizes[0] == -(-count // concurrent)
    assert sizes == sorted(set(sizes), reverse=True)
    assert fewer == sorted(set(fewer)) and all(-(-count // size) < concurrent for size in fewer)
    assert count in wished
    for size in sizes:
        turns = -(-count // (size * concurrent))
        assert size == 1 or -(-count // ((size - 1) * concurrent)) > turns, "a smaller one takes more turns"


def test_even_batches_by_hand() -> None:
    assert even_sizes(12) == [12, 6, 4, 3, 2, 1]
    assert even_sizes(97)[:3] == [97, 49, 33]
    assert even_sizes(96, concurrent=2)[:4] == [48, 24, 16, 12]
    assert even_sizes(16, concurrent=16) == [1, 2, 3, 4, 6, 8, 16]


def test_where_smaller_batches_take_more_the_larger_are_found() -> None:
    """On 16 threads sixteen episodes in one batch take less than in two. Where nothing fits, the least is named."""
    work = replace(Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*OPEN)), cpu=True, concurrent=16)
    few = with_values(work.config, {"train.prompts_per_step": 4, "train.group_size": 8})
    work = replace(work, config=few)
    needs = {
        size: training_memory(
            replace(work, config=with_values(few, {"sampling.batch_size": 1, "train.micro_batch_size": size}))
        ).need
        for size in even_sizes(16, 16)
    }
    for gib in (0.9 * min(needs.values()), max(needs.values()), *(1.001 * need for need in needs.values())):
        chosen = training_sizes(work, gib)["train.micro_batch_size"]
        assert needs[chosen] <= gib or chosen == min(needs, key=lambda size: needs[size])


def test_rows_of_an_evaluation_hold_whole_prompts() -> None:
    """Where all samples of a prompt fit together; nothing is trained, so there is more room than in a run."""
    work = Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*OPEN))
    rows = {gib: sampling_batch_size(work, gib, 50, 4, adapted=False) for gib in (20, 36, 60, 2000)}
    assert list(rows.values()) == sorted(rows.values())
    assert (rows[20], rows[2000]) == (1, 200)
    assert all(size % 4 == 0 for size in rows.values() if size > 4)
    assert rows[36] > training_sizes(work, 36)["sampling.batch_size"], "no adapters, no moments"


def test_batches_at_the_same_time_take_memory_at_the_same_time() -> None:
    """All of a rollout twice; of an update all but what episodes and weights have once, and gradients for each."""
    once = small("train.finetune=lora", "sampling.batch_size=2", "train.micro_batch_size=1")
    twice = replace(once, concurrent=2)
    one, two = training_memory(once), training_memory(twice)
    assert one.always == two.always
    for phase in one.phases:
        own = phase.bytes
        if not phase.name.startswith("sampling"):
            own -= item(one, "recorded steps", phase.name) + item(one, "gradients", phase.name)
        extra = item(one, "gradients", phase.name) * 3 if phase.name.startswith("update") else 0
        if phase.name == "optimizer step":
            own = 0
        assert two.phase(phase.name).bytes == phase.bytes + own + extra, phase.name


def test_no_more_batches_at_the_same_time_than_there_are() -> None:
    """Four episodes, of which each of two updates takes two; sharded weights are passed by all ranks together."""
    found = replace(small("sampling.batch_size=2", "train.micro_batch_size=1"), concurrent=9)
    assert (found.concurrent_batches, found.concurrent_micro_batches) == (9, 2), "evaluations have many pictures"
    assert replace(found, samples=7).concurrent_batches == 4
    assert replace(found, world=2).concurrent_micro_batches == 1
    assert replace(small("train.micro_batch_size=2"), concurrent=9).concurrent_micro_batches == 1


# ----- operations


def counted(action: Any) -> int:
    """By PyTorch's own counter, with attention as products of matrices."""
    with sdpa_kernel(SDPBackend.MATH):
        return count_flops(action)


DEEP = replace(SMALL, num_hidden_layers=8)
"""What the first and the last layer leave out is little beside eight of them."""


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("experts", ["both", *(pytest.param(e, marks=pytest.mark.long) for e in ("image", "text"))])
def test_operations_of_passes_are_those_that_torch_counts(finetune: str, experts: str) -> None:
    """Reading, denoising, replay and its backward pass. Flash attention computes its scores again, which counts."""
    work = small(f"train.finetune={finetune}", f"train.experts={experts}", "sampling.max_new_tokens=40")
    work = replace(work, model=DEEP)
    network, grid, dim, kept = network_of(work), DEEP.grid(64, 64), DEEP.token_dim, []
    rank, copies = work.rank if work.lora else 0, work.sde_steps if work.replays_images else 0
    for name, parameter in network.named_parameters():
        if work.lora:
            parameter.requires_grad_("lora_" in name and work.trains(expert_of(name)))
    ids = torch.zeros(1, work.text_tokens, dtype=torch.long)

    def noisy(count: int) -> NoisyImage:
        return NoisyImage(torch.zeros(1, count, work.latent_tokens, dim), torch.ones(1, count), grid)

    def replayed() -> None:
        out = network(network.empty_context(1), ids, None, noisy(copies) if copies else None)
        kept.append(network.logits(out.hidden_BLC[0, : work.sampled_tokens]).sum())
        kept.append(out.velocity_BKND.sum() if copies else kept[0])

    with torch.no_grad():
        context = network(network.empty_context(1), ids).context
        found = counted(lambda: network(context, image=noisy(1)))
    denoised = Pass(1, past=work.text_tokens, copies=1, image=work.latent_tokens, rank=rank)
    assert forward_flops(DEEP, denoised) == pytest.approx(found, rel=0.01)
    episode = Pass(1, work.text_tokens, copies=copies, image=work.latent_tokens, scored=work.sampled_tokens, rank=rank)
    assert forward_flops(DEEP, episode) == pytest.approx(counted(replayed), rel=0.01)
    scores_again = 0.5 * 4 * DEEP.num_hidden_layers * DEEP.hidden_size * episode.pairs(text=work.trains("text"))
    found = counted(lambda: sum(kept).backward()) + scores_again
    trained = tuple(expert for expert in ("text", "image") if work.trains(expert))
    assert backward_flops(DEEP, episode, trained) == pytest.approx(found, rel=0.03)


def test_sampling_a_token_reads_the_text_expert_and_the_cache() -> None:
    work = small("train.finetune=lora")
    network = network_of(work)
    context = network(network.empty_context(3), torch.zeros(3, 50, dtype=torch.long)).context
    read = size([*context.keys, *context.values])
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and "_moe_gen" not in name and (".layers." in name or "lm_head" in name):
            read += parameter.numel() * parameter.element_size()
    assert decode_bytes(SMALL, 3, 50, 4, work.rank) == read


@pytest.mark.parametrize("poorer", [0, 1, 2])
def test_seconds_of_a_step_are_the_sum_of_its_passes(poorer: int) -> None:
    """12 episodes, two epochs, text sampled in 3 batches; arithmetic decides everything but the sampled text.

    Guidance adds passes in poorer contexts, which replay reads first.
    """
    own = ("sampling.guidance_text=3", "sampling.guidance_image=2")[:poorer]
    own += ("train.prompts_per_step=3", "train.group_size=4", "train.minibatches=1", "train.epochs=2")
    work = small(*own, "dtype=bfloat16", "sampling.batch_size=4")
    episode = Pass(1, work.text_tokens, copies=3, image=work.latent_tokens, scored=work.sampled_tokens)
    noisy = Pass(1, past=work.text_tokens, copies=1, image=work.latent_tokens)
    passes = 24 * forward_flops(SMALL, noisy) + 3 * forward_flops(SMALL, episode) + 2 * backward_flops(SMALL, episode)
    read = Pass(1, GIVEN, copies=3, image=work.latent_tokens)
    passes += poorer * (3 * forward_flops(SMALL, read) + 2 * backward_flops(SMALL, read))
    passes += poorer * 24 * forward_flops(SMALL, replace(noisy, past=GIVEN))
    text = work.sampled_tokens * 3 * decode_bytes(SMALL, 4, GIVEN + work.sampled_tokens // 2, 2, 0)
    assert step_seconds(work) == pytest.approx(12 * passes / 4e14 + text / 2e12)


# ----- as a whole

LARGER = [
    ("sampling.batch_size=16", "sampling.batch_size=64"),
    ("sampling.height=512", "sampling.height=1024"),
    ("sampling.max_new_tokens=256", "sampling.max_new_tokens=2048"),
    ("train.micro_batch_size=1", "train.micro_batch_size=8"),
    ("sampling.window_size=2", "sampling.window_size=5"),
    ("train.lora_rank=16", "train.lora_rank=256"),
    ("train.activation_checkpointing=true", "train.activation_checkpointing=false"),
    ("dtype=bfloat16", "dtype=float32"),
    ("train.finetune=lora", "train.finetune=full"),
    ("train.experts=image", "train.experts=both"),
    ("train.prompts_per_step=4", "train.prompts_per_step=400"),
]


@pytest.mark.parametrize(("less", "more"), LARGER)
def test_more_takes_more(less: str, more: str) -> None:
    """In at least one phase, and in none less."""
    common = ["dtype=bfloat16", "train.finetune=lora", "train.micro_batch_size=2"]
    common += ["sampling.width=512", "sampling.height=512"]

    def phases(override: str) -> dict[str, float]:
        found = training_memory(Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*common, override)))
        return {phase.name: found.gib(phase) for phase in found.phases}

    small, large = phases(less), phases(more)
    assert all(large[name] >= small[name] for name in small)
    assert any(large[name] > small[name] for name in small)


def test_the_host_takes_the_reference_off_the_device() -> None:
    found = {}
    for where in ("device", "host"):
        config = settings("dtype=bfloat16", f"train.reference_device={where}")
        found[where] = training_memory(Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, config))
    assert sum(i.bytes for i in found["host"].host) == item(found["device"], "reference") > 0
    assert not item(found["host"], "reference")
    assert found["device"].need > found["host"].need


def test_needs_are_those_of_the_standard_settings() -> None:
    found = needs(MoTSizes(BAGEL_NETWORK, BAGEL_AUTOENCODER))
    assert list(found) == ["generate", "LoRA", "full fine-tuning"]
    assert 28 < found["generate"] < found["LoRA"] < 45 < 200 < found["full fine-tuning"]
    tiny = needs(MoTSizes(SMALL, AutoencoderConfig((8, 16), 1, 4)))
    assert max(tiny.values()) < 1.2


def test_counts_of_a_step() -> None:
    batch = batch_of(settings("train.epochs=3", "train.micro_batch_size=7"))
    assert (batch.episodes, batch.each, batch.optimizer_steps, batch.micro_batches) == (768, 384, 6, 55)
    assert (batch.rollouts, batch.word_calls, batch.denoise_calls) == (48, 1026, 24)
    assert (batch.replays, batch.backwards) == (1.5, 3)
    guidance = ("sampling.guidance_text=3", "sampling.guidance_image=2")
    assert [batch_of(settings(*guidance[:k])).denoise_calls for k in (1, 2)] == [48, 72]
    assert batch_of(settings("objective.penalty=none")).replays == 0.5, "the second update's old scores"


def test_what_is_not_done_takes_nothing() -> None:
    """No thinking, no text; no images in training, none recorded; no autoencoder, no pixels."""
    silent, text_only = training_memory(small("sampling.think=false")), training_memory(small("train.experts=text"))
    names = {"sampling, image", "replay, layers", "update, layers", "optimizer step"}
    assert {p.name for p in silent.phases} == names
    assert not item(text_only, "recorded steps", "update, layers")
    assert item(training_memory(small()), "recorded steps", "update, layers") > 0


def test_it_imports_no_torch() -> None:
    code = "import unigrpo_cli.run.memory, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
