"""What a run asks of a machine, against the machine: tensors, autograd's memory, a profiler's FLOP."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
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
from unigrpo_cli.models.mot.network import MoT, NoisyImage
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.rollout import read_given, rollout, sample_text
from unigrpo_cli.run.memory import (
    Memory,
    Workload,
    batch_of,
    memory,
    needs,
    sampling_rows,
    step_parts,
    training_sizes,
)
from unigrpo_cli.run.memory import seconds as speed
from unigrpo_cli.run.memory.batches import even_sizes
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
    return Workload(SMALL, None, settings(*own, *overrides), cpu=True, given=GIVEN)


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
    matrices = dict.fromkeys(("text", "image"), 0)
    for name, parameter in network.named_parameters():
        if name.startswith(LAYERS) and parameter.ndim == 2:
            matrices[expert_of(name)] += parameter.numel()
    assert {e: work.matrices(e) for e in matrices} == matrices
    assert sum(map(prod, autoencoder_shapes(BAGEL_AUTOENCODER).values())) == 83_819_683
    with torch.device("meta"):
        add_adapters(network, LORA_TARGETS, 64, 128.0, 0)
    adapters = dict.fromkeys(matrices, 0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            adapters[expert_of(name)] += parameter.numel()
    assert {e: work.adapter_elements(e) for e in adapters} == adapters


@pytest.mark.parametrize("experts", ["both", "text", "image"])
@pytest.mark.parametrize("also", [None, (), tuple(ALSO)])
def test_what_is_trained_is_what_tuning_trains(experts: str, also: tuple[str, ...] | None) -> None:
    """Adapters (None), all weights of the layers, and everything that can be trained beside them."""
    finetune = "lora" if also is None else "full"
    config = settings(
        f"train.experts={experts}", f"train.finetune={finetune}", f"train.extra_modules={list(also or ())}"
    )
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
def test_weights_reference_gradients_and_moments_to_the_byte(overrides: tuple[str, ...]) -> None:
    """A tiny BAGEL trained one step; what is there is what was reckoned, to the byte."""
    shape = ("sampling.height=32", "sampling.width=48", "sampling.steps=5", "sampling.max_new_tokens=4")
    config = settings(*overrides, *shape, "train.prompts_per_step=2", "train.group_size=2", "train.lora_rank=3")
    release = read_release(TINY)
    found = memory(Workload(release.config, release.autoencoder, config))
    policy = load_model(str(TINY), dtype=getattr(torch, config.dtype))
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
    weights = size(policy.network.parameters())
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
    work = Workload(model.network.config, None, config, given=context.used)
    grown, _ = sample_text(model, context, train_sampling(config), [1, 2, 3])
    held = size([*grown.keys, *grown.values])
    found = memory(work)
    assert item(found, "key-value cache", "rollout, image") == held
    assert item(found, "key-value cache", "rollout, words") == held + size([*context.keys, *context.values])


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
    network.activation_checkpointing = work.checkpoints
    return network


def no_onednn() -> Any:
    """The estimate is of PyTorch's own products: a GPU has no others, and its FLOP counter knows no others."""
    return patch("unigrpo_cli.models.mot.layers.onednn_is_faster", lambda: False)


def passes(work: Workload) -> dict[str, int]:
    """Peaks of the phases of a step, the network itself left out: what `memory` reckons, seen."""
    network, alive, seen = network_of(work), Alive(), {}
    grid = work.model.grid(work.config.sampling.height, work.config.sampling.width)
    dim, micro, copies = work.model.token_dim, work.micro, work.copies
    for parameter in network.parameters():
        alive.add(parameter)
    empty = alive.now

    def replayed() -> Tensor:
        ids = torch.zeros(micro, work.text, dtype=torch.long)
        image = NoisyImage(torch.zeros(micro, copies, work.latents, dim), torch.ones(micro, copies), grid)
        lengths = [work.text, *[work.text - 1] * (micro - 1)]
        out = network(network.empty_context(micro), ids, lengths, image)
        seen.setdefault("replays, layers", alive.over(empty))
        hidden = out.hidden_BLC[:, GIVEN : GIVEN + work.words].flatten(0, 1)
        logits = network.logits(hidden).index_fill(-1, torch.tensor([0]), -torch.inf)
        scored = token(logits, temperature=1.0, id=torch.ones(len(hidden), dtype=torch.long))
        return scored.log_prob.sum() + out.velocity_BKND.sum()

    with no_onednn(), alive:
        with torch.no_grad():
            rows = work.rows
            ids, lengths = (
                torch.zeros(rows, work.text, dtype=torch.long),
                [work.text, *[work.text - 1] * (rows - 1)],
            )
            context = network(network.empty_context(rows), ids, lengths).context
            alive.over(empty)
            image = NoisyImage(torch.zeros(rows, 1, work.latents, dim), torch.ones(rows, 1), grid)
            network(context, image=image)
            seen["rollout, image"] = alive.over(empty)
            del context, image
            alive.over(empty)
            replayed()
            seen["replays, words"] = alive.over(empty)
        for _ in range(2):  # in the second pass gradients are there from the start
            loss = replayed()
            seen["update, words"] = alive.over(empty)
            loss.backward()
            seen["update, layers"] = alive.over(empty)
            del loss
    return seen


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_activations_are_those_of_the_passes(finetune: str, dtype: str, checkpointing: str) -> None:
    """Every phase within 6 %: few words, where layers decide, and many, where logits do."""
    own = (f"train.finetune={finetune}", f"dtype={dtype}", f"train.activation_checkpointing={checkpointing}")
    for words, phases in (
        (4, ("rollout, image", "replays, layers", "update, layers")),
        (300, ("replays, words", "update, words")),
    ):
        work = small(*own, f"sampling.max_new_tokens={words}", f"sampling.batch_size={5 if words < 5 else 1}")
        found, seen = memory(work), passes(work)
        for phase in phases:
            left_out = item(found, "latents", phase) + item(found, "recorded steps", phase)
            assert found.phase(phase).bytes - left_out == pytest.approx(seen[phase], rel=0.06), phase


def test_a_batch_that_gets_smaller_is_reckoned_with() -> None:
    """Eight rows of which one after the other stops: half and then a quarter are kept beside the whole."""
    config = settings("sampling.height=16", "sampling.width=16", "sampling.max_new_tokens=200", "sampling.batch_size=8")
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
            if drawn in (180, 185, 190, 195):
                logits[: len(logits) // 2] = -torch.inf
                logits[: len(logits) // 2, model.stop_id] = 0
            return logits

    for parameter in model.network.parameters():
        alive.add(parameter)
    with torch.no_grad(), alive:
        context = read_given(model, [given] * 8)
        start = alive.now
        sample_text(Stopping(), context, train_sampling(config), range(8))  # type: ignore[arg-type]
    work = Workload(model.network.config, None, config, given=context.used)
    items = {i.name: i.bytes for i in memory(work).phase("rollout, words").items}
    assert "smaller batches" in items
    given_once = 8 * context.used * work.cached_token
    seen = alive.over(start) + given_once
    assert items["key-value cache"] + items["smaller batches"] <= seen < 1.2 * sum(items.values())  # and a pass


def test_decoding_a_picture_takes_three_of_its_widest_maps() -> None:
    model, alive = load_model(str(TINY)), Alive()
    config = settings("sampling.height=64", "sampling.width=32", "sampling.batch_size=1")
    work = Workload(model.network.config, read_release(TINY).autoencoder, config)
    with alive:
        latent = torch.zeros(1, 16, 8, 4)
        start = alive.now
        model.codec.raw(latent)  # type: ignore[attr-defined]
    assert item(memory(work), "decoder", "rollout, pixels") == pytest.approx(alive.over(start), rel=0.06)


@pytest.mark.parametrize("strip", [8, 16])
def test_decoding_in_strips_takes_two_maps(strip: int) -> None:
    model, alive = load_model(str(TINY), vae_tile_rows=strip), Alive()
    sizes = ("sampling.height=128", "sampling.width=64", "sampling.batch_size=1")
    work = Workload(model.network.config, read_release(TINY).autoencoder, settings(*sizes))
    with alive:
        latent = torch.zeros(1, 16, 16, 8)
        start = alive.now
        model.codec.raw(latent)  # type: ignore[attr-defined]
    cut = replace(work, config=settings(*sizes, f"sampling.vae_tile_rows={strip}"))
    found = item(memory(cut), "decoder", "rollout, pixels")
    assert found == pytest.approx(alive.over(start), rel=0.03)
    assert found < 0.65 * item(memory(work), "decoder", "rollout, pixels")


# ----- sizes that are left open

OPEN = (
    "sampling.batch_size=0",
    "train.micro_batch_size=0",
    "train.finetune=lora",
    "dtype=bfloat16",
    "sampling.think=true",
)
OPEN += ("train.activation_checkpointing=true", "sampling.height=512", "sampling.width=512")
SLOTS = {"sampling.batch_size": ("rollout", 768), "train.micro_batch_size": ("replays, update", 384)}
"""For each setting the phases it decides and the episodes it shares out, in the paper's step."""


def largest(work: Workload, key: str, size: int) -> float:
    """GiB of the largest phase that a setting decides."""
    other = next(name for name in SLOTS if name != key)
    found = memory(replace(work, config=with_values(work.config, {key: size, other: 1})))
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


@given(count=st.integers(1, 2000), at_once=st.integers(1, 8))
@hypothesis_settings(max_examples=100, deadline=None)
def test_batches_are_of_one_size_and_no_larger_than_their_turns_need(count: int, at_once: int) -> None:
    wished = even_sizes(count, at_once)
    sizes, fewer = wished[: wished.index(1) + 1], wished[wished.index(1) + 1 :]
    assert sizes[0] == -(-count // at_once)
    assert sizes == sorted(set(sizes), reverse=True)
    assert fewer == sorted(set(fewer)) and all(-(-count // size) < at_once for size in fewer)
    assert count in wished
    for size in sizes:
        turns = -(-count // (size * at_once))
        assert size == 1 or -(-count // ((size - 1) * at_once)) > turns, "a smaller one takes more turns"


def test_even_batches_by_hand() -> None:
    assert even_sizes(12) == [12, 6, 4, 3, 2, 1]
    assert even_sizes(97)[:3] == [97, 49, 33]
    assert even_sizes(96, at_once=2)[:4] == [48, 24, 16, 12]
    assert even_sizes(16, at_once=16) == [1, 2, 3, 4, 6, 8, 16]


def test_where_smaller_batches_take_more_the_larger_are_found() -> None:
    """On 16 threads sixteen episodes in one batch take less than in two. Where nothing fits, the least is named."""
    work = replace(Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*OPEN)), cpu=True, at_once=16)
    few = with_values(work.config, {"train.prompts_per_step": 4, "train.group_size": 8})
    work = replace(work, config=few)
    needs = {
        size: memory(
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
    rows = {gib: sampling_rows(work, gib, 50, 4, adapted=False) for gib in (20, 36, 60, 2000)}
    assert list(rows.values()) == sorted(rows.values())
    assert (rows[20], rows[2000]) == (1, 200)
    assert all(size % 4 == 0 for size in rows.values() if size > 4)
    assert rows[36] > training_sizes(work, 36)["sampling.batch_size"], "no adapters, no moments"
    assert sampling_rows(work, 60, 50, 4, adapted=False, models=2) < rows[60]


def test_batches_at_the_same_time_take_memory_at_the_same_time() -> None:
    """All of a rollout twice; of an update all but what episodes and weights have once, and gradients for each."""
    once = small("train.finetune=lora", "sampling.batch_size=2", "train.micro_batch_size=1")
    twice = replace(once, at_once=2)
    one, two = memory(once), memory(twice)
    assert one.always == two.always
    for phase in one.phases:
        own = phase.bytes
        if not phase.name.startswith("rollout"):
            own -= item(one, "recorded steps", phase.name) + item(one, "gradients", phase.name)
        extra = item(one, "gradients", phase.name) * 3 if phase.name.startswith("update") else 0
        if phase.name == "optimizer step":
            own = 0
        assert two.phase(phase.name).bytes == phase.bytes + own + extra, phase.name


def test_no_more_batches_at_the_same_time_than_there_are() -> None:
    """Four episodes, of which each of two updates takes two; sharded weights are passed by all ranks together."""
    found = replace(small("sampling.batch_size=2", "train.micro_batch_size=1"), at_once=9)
    assert (found.rows_at_once, found.micro_at_once) == (9, 2), "evaluations have many pictures"
    assert replace(found, drawn=7).rows_at_once == 4
    assert replace(found, world=2).micro_at_once == 1
    assert replace(small("train.micro_batch_size=2"), at_once=9).micro_at_once == 1


# ----- FLOP


def counted(action: Any) -> int:
    """By PyTorch's own counter, with attention as products of matrices."""
    with sdpa_kernel(SDPBackend.MATH):
        return count_flops(action)


def flops(work: speed.Work) -> float:
    return work.flops + work.wide


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_flops_of_reading_denoising_and_logits(finetune: str) -> None:
    work = small(f"train.finetune={finetune}")
    network, grid = network_of(work), work.model.grid(64, 64)
    image = NoisyImage(torch.zeros(1, 1, work.latents, work.model.token_dim), torch.ones(1, 1), grid)
    with torch.no_grad():
        ids = torch.zeros(1, 50, dtype=torch.long)
        context = network(network.empty_context(1), ids).context
        read = counted(lambda: network(network.empty_context(1), ids))
        assert flops(speed.read(work, 50, work.lora)) == pytest.approx(read, rel=1e-6)
        paint = counted(lambda: network(context, image=image))
        assert flops(speed.denoise(work, 50)) == pytest.approx(paint, rel=1e-6)
        head = counted(lambda: network.logits(torch.zeros(7, work.model.hidden_size)))
        assert flops(speed.head(work, 7)) == head


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("experts", ["both", "image", "text"])
def test_flops_of_replay_and_its_backward_pass(finetune: str, experts: str) -> None:
    """Forward exactly; backward within 2 %: the first layer is spared some, flash attention makes scores again."""
    work = small(f"train.finetune={finetune}", f"train.experts={experts}", "sampling.max_new_tokens=40")
    work = replace(work, model=replace(SMALL, num_hidden_layers=8))
    network, grid = network_of(work), work.model.grid(64, 64)
    if work.lora:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name and work.trains(expert_of(name)))
    dim, copies, kept = work.model.token_dim, work.copies, []

    def forward() -> None:
        shape = (1, copies, work.latents, dim)
        image = NoisyImage(torch.zeros(shape), torch.ones(1, copies), grid) if work.paints else None
        out = network(network.empty_context(1), torch.zeros(1, work.text, dtype=torch.long), None, image)
        kept.append(network.logits(out.hidden_BLC[0, : work.words]).sum())
        kept.append(out.velocity_BKND.sum() if work.paints else kept[0])

    assert flops(speed.replay(work, work.lora)) == pytest.approx(counted(forward), rel=1e-6)
    remade = speed.attention(work, work.image, work.text + work.image) * copies * work.paints
    remade += speed.attention(work, work.text, work.text) * work.trains("text")
    found = counted(lambda: sum(kept).backward()) + remade / 2
    assert flops(speed.backward(work)) == pytest.approx(found, rel=0.02)


def test_flops_of_decoding_a_picture() -> None:
    model, config = load_model(str(TINY)), read_release(TINY).autoencoder
    found = counted(lambda: model.codec.raw(torch.zeros(1, 16, 8, 4)))  # type: ignore[attr-defined]
    assert speed.decoder_flops(config, 64 * 32) == pytest.approx(found, rel=0.02)


def test_a_step_is_the_sum_of_its_passes() -> None:
    """Calls counted by hand: 3 prompts of 4 in batches of 5, so prompts 0 1 | 1 2 | 2 are read."""
    work = small("train.prompts_per_step=3", "train.group_size=4", "train.minibatches=1", "train.epochs=2")
    assert work.batch.reads == 5
    parts = {part.name: part.work for part in step_parts(work)}
    assert parts["read prompts"].flops == pytest.approx(5 * speed.read(work, GIVEN, False).flops)
    assert parts["denoise"].flops == pytest.approx(12 * 24 * speed.denoise(work, work.text).flops)
    assert parts["old replay"].flops == parts["reference replay"].flops == 12 * speed.replay(work, False).flops
    both = speed.replay(work, False) + speed.backward(work)
    assert parts["update"].flops == pytest.approx(2 * 12 * both.flops)
    words = sum(speed.attention(work, 1, GIVEN + k) for k in range(1, work.words + 3))
    words += (work.words + 2) * 2 * work.matrices("text")
    assert parts["write words"].flops == pytest.approx(12 * words)


def test_seconds_are_those_of_arithmetic_or_of_moving_bytes() -> None:
    rates = speed.Rates(10.0, 2.0, 5.0, 1.0, "")
    assert speed.Work(20, 6, 0).seconds(rates) == 5
    assert speed.Work(20, 6, 50).seconds(rates) == 10
    assert speed.Work(20, 6, 50, 11).seconds(rates) == 11


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
    common = [
        "dtype=bfloat16",
        "train.finetune=lora",
        "train.micro_batch_size=2",
        "sampling.width=512",
        "sampling.height=512",
    ]

    def phases(override: str) -> dict[str, float]:
        work = Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, settings(*common, override))
        found = memory(work)
        return {phase.name: found.gib(phase) for phase in found.phases}

    small, large = phases(less), phases(more)
    assert all(large[name] >= small[name] for name in small)
    assert any(large[name] > small[name] for name in small)


def test_the_host_takes_the_reference_off_the_device() -> None:
    found = {}
    for where in ("device", "host"):
        config = settings("dtype=bfloat16", f"train.reference_device={where}")
        found[where] = memory(Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, config))
    moved = sum(i.bytes for i in found["host"].host)
    assert moved == item(found["device"], "reference") > 0
    assert not item(found["host"], "reference")
    assert found["device"].need > found["host"].need


def test_needs_are_those_of_the_standard_settings() -> None:
    found = needs(BAGEL_NETWORK, BAGEL_AUTOENCODER)
    assert list(found) == ["generate", "LoRA", "full fine-tuning"]
    assert 28 < found["generate"] < found["LoRA"] < 45 < 200 < found["full fine-tuning"]
    tiny = needs(SMALL, AutoencoderConfig((8, 16), 1, 4))
    assert max(tiny.values()) < 1.2


def test_the_batch_arithmetic() -> None:
    batch = batch_of(settings("train.epochs=3", "train.micro_batch_size=7"))
    assert (batch.episodes, batch.each, batch.optimizer_steps, batch.micro_batches) == (768, 384, 6, 55)
    assert (batch.rollouts, batch.reads, batch.word_calls, batch.denoise_calls) == (48, 64, 1026, 24)
    assert (batch.replays, batch.backwards) == (2, 3)
    assert batch_of(settings("objective.penalty=none", "sampling.think=false")).replays == 0.5, "the second update's"


def test_what_is_not_done_takes_nothing() -> None:
    """No thinking, no words; no images in training, no replay of them; no autoencoder, no decoding."""
    silent, blind = small("sampling.think=false"), small("train.experts=text")
    assert not {p.name for p in memory(silent).phases} & {"rollout, words", "replays, words", "update, words"}
    assert not {p.name for p in step_parts(silent)} & {"write words", "decode pixels"}
    assert "reference replay" not in {p.name for p in step_parts(blind)}
    assert not item(memory(blind), "recorded steps", "update, layers")
    assert item(memory(small()), "recorded steps", "update, layers") > 0
    assert speed.replay(blind, False) == speed.read(blind, blind.text, False) + speed.head(blind, blind.words)


def test_it_imports_no_torch() -> None:
    code = "import unigrpo_cli.run.memory, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
