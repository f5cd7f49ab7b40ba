"""The parts of the report and how each is measured: with the package's own functions, their stages watched.

`rollout`, `velocity`, `replay`, `score_old_and_reference` and `update` are called as training calls them; nothing of
them is written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

import unigrpo_cli.rollout as stages
from benchmarks import clock as clocks
from benchmarks.clock import Clock, NotMeasuredError
from benchmarks.report import Goal, Report, Row
from benchmarks.shapes import Size, prompt_text
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Episode, Prompt, TextActions, flatten
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.mot.context import MoTContext
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.run.memory.flops import Pass, backward_flops, decode_bytes, forward_flops, layers_flops
from unigrpo_cli.train import score_old_and_reference, update, with_advantages
from unigrpo_cli.training.optimizer import make_optimizer
from unigrpo_cli.training.schedule import objective_of, window_of
from unigrpo_cli.training.state import TrainState

NETWORK, CEILINGS, IN_ALL = "network", "ceilings", "in all"
DIFFERING = ", texts of differing length"


def configuration(size: Size, dtype: str, micro_batch_size: int) -> Config:
    """The paper's settings at this size, with adapters."""
    settings = {
        "dtype": dtype,
        "sampling.max_new_tokens": size.thinking,
        "sampling.height": size.pixels,
        "sampling.width": size.pixels,
        "sampling.steps": size.calls,
        "sampling.window_size": size.copies,
        "sampling.window_range": (0, max(5, size.copies)),
        "sampling.batch_size": max(size.groups),
        "train.finetune": "lora",
        "train.lora_rank": size.rank,
        "train.lora_alpha": float(2 * size.rank),
        "train.activation_checkpointing": True,
        "train.minibatches": 1,
        "train.micro_batch_size": micro_batch_size,
    }
    return load_config(preset="paper", named=settings)


@dataclass
class Benchmark:
    """What measurements share: the policy with its adapters, the clock, the report, and the episodes so far."""

    size: Size
    policy: MoTPolicy
    dtype: str
    clock: Clock
    report: Report
    share_s: float
    episodes: list[Episode] = field(default_factory=list)
    state: TrainState | None = None

    def config(self, micro_batch_size: int = 1) -> Config:
        return configuration(self.size, self.dtype, micro_batch_size)

    @property
    def grid(self) -> tuple[int, int]:
        return self.policy.grid(self.size.pixels, self.size.pixels)

    def ceiling(self, unit: str) -> float:
        """The best that the card did with products or with bytes, in that unit.

        Raises:
            NotMeasuredError: when it was not measured.
        """
        found = next((r.value for r in self.report.rows.values() if r.part == CEILINGS and r.unit == unit), None)
        if found is None:
            raise NotMeasuredError(f"no ceiling in {unit} was measured")
        return found

    def add_rate(self, part: str, prefix: str, flops: float, seconds: float) -> None:
        """Rate of some work: as it is, and as a share of the ceiling."""
        rate = flops / seconds / 1e12
        self.report.add(part, f"{prefix}achieved", rate)
        self.report.add(part, f"{prefix}utilisation", 100 * rate / self.ceiling("TFLOP/s"), "of the matmul ceiling")


# ----- what is measured


def rows_of(size: Size, *, goals: bool) -> list[Row]:
    largest = max(size.groups)
    found: list[Row] = []

    def part(title: str, rows: Sequence[tuple[str, str]], aims: dict[str, Goal] | None = None) -> None:
        found.extend(Row(title, name, unit, (aims or {}).get(name) if goals else None) for name, unit in rows)

    def rate(prefix: str = "") -> list[tuple[str, str]]:
        return [(f"{prefix}achieved", "TFLOP/s"), (f"{prefix}utilisation", "%")]

    part(NETWORK, [("weights", "GiB")])
    part(CEILINGS, [("square product", "TFLOP/s"), ("copy", "GB/s")])
    for group in size.groups:
        aims = {"utilisation": Goal(45, at_most=False)} if group == largest else {}
        for variant in denoise_variants(group):
            part(variant, [("call", "s"), *rate()], aims if "adapters off" not in variant else {})
    for group in size.groups:
        stage_rows = [(name, "s/sample") for name in ("prefill", "thinking", "denoising", "decode", "rollout")]
        writing = [("thinking length", "tokens"), ("tokens in all", "1/s"), ("tokens per row", "1/s")]
        memory = [("peak memory thinking", "GiB"), ("peak memory painting", "GiB")]
        rows = [*stage_rows, *writing, ("share of bandwidth", "%"), *memory]
        part(rollout_part(group), rows, {"rollout": Goal(3)} if group == largest else {})
    for micro_batch_size in size.micro_batches:
        for variant in update_variants(micro_batch_size):
            replays = [("old replay", "s/sample"), *rate("old replay: "), ("reference replay", "s/sample")]
            learning = [("old and reference", "s/sample"), ("forward and backward", "s/sample")]
            learning += [*rate("forward and backward: "), ("optimizer step", "s"), ("update", "s/sample")]
            memory = [("peak memory replay", "GiB"), ("peak memory update", "GiB")]
            aims = {"peak memory update": Goal(round(60e9 / clocks.GIB, 1))}
            part(variant, [*replays, *learning, *memory], aims)
    part(IN_ALL, [("rollout and update", "s/sample")], {"rollout and update": Goal(4)})
    return found


def denoise_variants(group: int) -> list[str]:
    """As sampled with adapters, the same with masked padding in the context, and without adapters."""
    part = f"denoise call, {group} rows"
    return [part, part + DIFFERING, part + ", adapters off"]


def rollout_part(group: int) -> str:
    return f"rollout, group of {group}"


def update_variants(micro_batch_size: int) -> list[str]:
    part = f"update, micro-batch {micro_batch_size}"
    return [part, part + DIFFERING]


def measure_network(bench: Benchmark) -> None:
    """What the weights hold: both experts, the autoencoder, the adapters."""
    note = "" if bench.clock.device.type == "cuda" else "resident set of the process, here and below"
    bench.report.add(NETWORK, "weights", bench.clock.held_gib(), note)


def measure_ceilings(bench: Benchmark) -> None:
    """The best rates of the card at dense products and at moving bytes."""
    clock, network = bench.clock, bench.size.network
    large = clock.device.type == "cuda" and network.hidden_size > 256  # the smallest shape is for tests
    dtype, side, size = bench.policy.network.dtype, 8192 if large else 1024, (4 if large else 1 / 32) * clocks.GIB
    squares = clocks.matmul_tflops(clock, side, dtype, bench.share_s)
    bench.report.add(CEILINGS, "square product", squares, f"side {side}")
    bench.report.add(CEILINGS, "copy", clocks.copy_gbs(clock, int(size), bench.share_s), "read and written")


def reading(bench: Benchmark, group: int, differing: bool) -> MoTContext:
    """Random words as long as what an image is painted in; with `differing`, their thinking half to full length."""
    policy, length = bench.policy, bench.size.reading()
    ids = torch.randint(bench.size.network.vocab_size // 2, (group, length), device=policy.device)
    shortest = length - bench.size.thinking // 2 if differing else length
    lengths = [length - (length - shortest) * k // max(1, group - 1) for k in range(group)]
    return policy.forward(policy.empty_context(group), ids, lengths).context


@torch.no_grad()
def measure_denoise(bench: Benchmark, group: int, part: str) -> None:
    """One call of the network for noisy images in a cached context, as `sample_image` makes them."""
    run, context = denoise_call(bench, group, differing=part.endswith(DIFFERING))
    with ExitStack() as stack:
        rank = bench.size.rank
        if part.endswith("adapters off"):
            stack.enter_context(bench.policy.reference())
            rank = 0
        seconds = bench.clock.median(run, bench.share_s)
    bench.report.add(part, "call", seconds)
    work = Pass(group, past=context.used, copies=1, image=bench.size.image_tokens, rank=rank)
    bench.add_rate(part, "", forward_flops(bench.size.network, work), seconds)


def denoise_call(bench: Benchmark, group: int, *, differing: bool) -> tuple[Callable[[], object], MoTContext]:
    """A call to be timed, and its context."""
    context = reading(bench, group, differing)
    x = torch.randn(group, bench.size.image_tokens, bench.policy.token_dim, device=bench.policy.device)
    t = torch.tensor(0.7, device=bench.policy.device)
    return lambda: stages.velocity(bench.policy, context, x, t, bench.grid), context


@dataclass(frozen=True)
class Rolled:
    """One watched rollout: its episodes, its seconds in all and by stage, the largest memory of its stages."""

    episodes: list[Episode]
    total_s: float
    seconds: dict[str, float]
    peaks: dict[str, float]


def watched_rollout(bench: Benchmark, group: int, config: Config) -> Rolled:
    """The package's `rollout` for one prompt, its stages timed where it calls them."""
    clock, sampling = bench.clock, train_sampling(config)
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    prompt = Prompt("benchmark", prompt_text(bench.size))
    with ExitStack() as stack:
        for name in ("read_given", "sample_text", "sample_image"):
            stack.enter_context(clock.watching(stages, name, seconds, peaks))
        stack.enter_context(clock.watching(MoTPolicy, "decode_pixels", seconds))
        began = clock.now()
        groups = stages.rollout(bench.policy, [prompt], group, sampling, window_of(config, 0), seed=0)
        total = clock.now() - began
    return Rolled(flatten(groups), total, seconds, peaks)


def measure_rollout(bench: Benchmark, group: int) -> None:
    """A whole group from prompt to pixels, by the clock of its stages."""
    size, clock, report, part, config = bench.size, bench.clock, bench.report, rollout_part(group), bench.config()
    known = [(g, report.value(rollout_part(g), "rollout")) for g in size.groups if g < group]
    clock.need(max((group * per_sample for _, per_sample in known if per_sample), default=0))
    short = {"sampling": config.sampling.model_copy(update={"max_new_tokens": 3, "steps": 5})}
    watched_rollout(bench, group, config.model_copy(update=short))  # to warm up
    runs = [watched_rollout(bench, group, config)]
    while len(runs) < 3 and 2 * sum(run.total_s for run in runs) < min(bench.share_s, clock.left_s):
        runs.append(watched_rollout(bench, group, config))
    run = sorted(runs, key=lambda r: r.total_s)[len(runs) // 2]
    bench.episodes = run.episodes if len(run.episodes) >= len(bench.episodes) else bench.episodes

    seconds = run.seconds
    for name, value in (
        ("prefill", seconds["read_given"]),
        ("thinking", seconds["sample_text"]),
        ("denoising", seconds["sample_image"] - seconds["decode_pixels"]),
        ("decode", seconds["decode_pixels"]),
        ("rollout", run.total_s),
    ):
        report.add(part, name, value / group)
    lengths = [len(s.ids) for e in run.episodes for s in e.segments if isinstance(s, TextActions)]
    # Random weights say the stop word once in a vocabulary; where they say it often, nothing here means anything.
    assert sum(lengths) > 0.9 * group * size.thinking, f"texts ended early: {lengths}"
    report.add(part, "thinking length", sum(lengths) / group, f"{min(lengths)} to {max(lengths)}")
    report.add(part, "tokens in all", sum(lengths) / seconds["sample_text"])
    report.add(part, "tokens per row", sum(lengths) / group / seconds["sample_text"])
    each = bench.policy.network.dtype.itemsize
    middle = size.reading() - size.thinking // 2
    moved = max(lengths) * decode_bytes(size.network, group, middle, each, size.rank)
    rate = moved / seconds["sample_text"] / 1e9
    report.add(part, "share of bandwidth", 100 * rate / bench.ceiling("GB/s"), f"{rate:.0f} GB/s of weights and cache")
    report.add(part, "peak memory thinking", run.peaks["sample_text"])
    report.add(part, "peak memory painting", run.peaks["sample_image"])


def shortened(episodes: Sequence[Episode]) -> list[Episode]:
    """The same episodes with texts of half to full length, as real ones differ."""

    def cut(k: int, text: TextActions) -> TextActions:
        kept = len(text.ids) - len(text.ids) // 2 * k // max(1, len(episodes) - 1)
        return replace(text, ids=text.ids[:kept], log_prob=text.log_prob[:kept])

    return [
        replace(e, segments=tuple(cut(k, s) if isinstance(s, TextActions) else s for s in e.segments))
        for k, e in enumerate(episodes)
    ]


def episodes_of(bench: Benchmark, micro_batch_size: int, part: str) -> list[Episode]:
    """Episodes of an update: two micro-batches where there are so many.

    Raises:
        NotMeasuredError: when no rollout left enough.
    """
    count = min(2, len(bench.episodes) // micro_batch_size) * micro_batch_size
    if not count:
        raise NotMeasuredError(f"needs {micro_batch_size} episodes, and rollouts left {len(bench.episodes)}")
    own = bench.episodes[:count]
    return shortened(own) if part.endswith(DIFFERING) else own


def measure_update(bench: Benchmark, micro_batch_size: int, part: str) -> None:
    """Replays under the old and the reference policy, and the update of the adapters, per episode."""
    clock, report, policy, size = bench.clock, bench.report, bench.policy, bench.size
    episodes = episodes_of(bench, micro_batch_size, part)
    batch = collate(episodes[:micro_batch_size], policy.device)
    scored = int(batch.actions.mask_BL.sum())
    length = max(batch.chunks[0].length_B)
    work = Pass(
        micro_batch_size, text=length, copies=size.copies, image=size.image_tokens, scored=scored, rank=size.rank
    )
    clock.forget_peak()
    with torch.no_grad():
        old_s = clock.median(lambda: replay(policy, batch), bench.share_s)
        report.add(part, "old replay", old_s / micro_batch_size)
        bench.add_rate(part, "old replay: ", forward_flops(size.network, work), old_s)
        with policy.reference() as beginning:
            reference_s = clock.median(lambda: replay(beginning, batch), bench.share_s)
        report.add(part, "reference replay", reference_s / micro_batch_size)
    report.add(part, "peak memory replay", clock.peak_gib())
    clock.need(7 * old_s * len(episodes) / micro_batch_size)

    clock.forget_peak()
    fixed_s, steps = updates(bench, micro_batch_size, episodes)
    total_s, optimizer_s = steps[-1]
    learning_s = (total_s - optimizer_s) / len(episodes)
    note = "" if len(steps) > 1 else "the first, not warmed up"
    report.add(part, "old and reference", fixed_s / len(episodes))
    report.add(part, "forward and backward", learning_s, note)
    flops = update_flops(size, work) / micro_batch_size
    bench.add_rate(part, "forward and backward: ", flops, learning_s)
    report.add(part, "optimizer step", optimizer_s, note)
    report.add(part, "update", (fixed_s + total_s) / len(episodes), f"{len(episodes)} episodes")
    report.add(part, "peak memory update", clock.peak_gib())


def update_flops(size: Size, work: Pass) -> int:
    """Operations of an update of adapters: forward, the layers once more, backward."""
    config = size.network
    return forward_flops(config, work) + layers_flops(config, work) + backward_flops(config, work)


def updates(
    bench: Benchmark, micro_batch_size: int, episodes: list[Episode]
) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of `score_old_and_reference`; then of each `update`, in all and of the optimizer's own part."""
    clock, config = bench.clock, bench.config(micro_batch_size)
    if bench.state is None:
        bench.state = TrainState(bench.policy, make_optimizer(bench.policy, config))
    state, objective = bench.state, objective_of(config)
    advantage_BS = torch.ones(len(episodes), 2)  # of the text and the image
    advantage_BS[::2] = -1.0
    began = clock.now()
    fixed = score_old_and_reference(bench.policy, episodes, config, objective)
    fixed_s = clock.now() - began
    shares = with_advantages(fixed, advantage_BS)
    steps: list[tuple[float, float]] = []
    try:
        while len(steps) < 2 and (not steps or steps[-1][0] < clock.left_s):
            own: dict[str, float] = {}
            with clock.watching(state.optimizer, "step", own):
                total_s = clock.once(lambda: update(state, shares[0], objective, config))
            steps.append((total_s, own["step"]))
    finally:
        state.optimizer.zero_grad()  # of an update that did not fit
    return fixed_s, steps


def measure_all(bench: Benchmark) -> None:
    """A sample's whole cost in training: the largest group's rollout and the first micro-batch's update."""
    rolled = bench.report.value(rollout_part(max(bench.size.groups)), "rollout")
    updated = bench.report.value(update_variants(bench.size.micro_batches[0])[0], "update")
    if rolled is None or updated is None:
        raise NotMeasuredError("needs the largest group's rollout and the first micro-batch's update")
    bench.report.add(IN_ALL, "rollout and update", rolled + updated)
