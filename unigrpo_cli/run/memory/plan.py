"""The dry run: what a run would take, and a refusal of what cannot fit, before a weight is read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.errors import TooLargeError, UsageError
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.mot.config import AutoencoderConfig, MoTConfig
from unigrpo_cli.parallel.heartbeat import launched
from unigrpo_cli.run.memory import (
    ACCELERATOR,
    ROWS,
    Item,
    Memory,
    Part,
    Rates,
    Workload,
    memory,
    of_each_rank,
    sampling_rows,
    step_parts,
    traffic,
    training_sizes,
)
from unigrpo_cli.run.setup import DTYPES, device_of, find_checkpoint, model_of

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.episode import Prompt
    from unigrpo_cli.run.console import Display

GIB = 2**30
LEGEND = (
    "C hidden width, I width inside the MLP, Q width of keys, V vocabulary, W elements of an expert's matrices; "
    "a token's keys and values are 2 x layers x Q"
)
TIGHT = 0.9
"""Share of the memory above which the allocator's pieces may decide; sizes that are left open stay below."""
BOUNDARY = 4
"""Tokens around the two forms of a given picture."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        base: the model.
        available: GiB that it may fill.
        device: where that is, in words.
        present: GiB that the device has, when it was asked; None for a plan without it.
        published: the model is not here, and its published sizes are taken.
        sizes: the settings that were left open, by dotted key, as `work` has them: found for `free` GiB.
    """

    base: str
    work: Workload
    memory: Memory
    available: float
    device: str
    present: float | None
    published: bool
    sizes: dict[str, int] = field(default_factory=dict)
    free: float = 0.0

    @property
    def name(self) -> str:
        return Path(self.base).name

    @property
    def fits(self) -> bool:
        return self.memory.need <= self.available


def batches_at_once(config: Config, *, cpu: bool, here: bool = True) -> int:
    """The most batches of a rollout, or micro-batches, that a process computes at the same time (see lanes.py).

    Args:
        here: on this machine; of another one only the configuration tells the threads.
    """
    if not cpu:
        return 1
    if config.threads or not here:
        return config.threads or 1
    import torch

    return torch.get_num_threads()


def plan_of(config: Config, base: str, adapter: str | None, *, elsewhere: bool = False, pictures: bool = False) -> Plan:
    """The plan of a configuration, with several ranks of each. Of the model it reads configurations and headers.

    Sizes of batches that the configuration leaves open are as large as fits well.

    Args:
        base, adapter: as `session.find_checkpoint` gives them, or the configuration.
        elsewhere: only plan: nothing is fetched, and with `memory_gb` set no device is asked.
        pictures: prompts bring pictures, so sizes that are left open are found for the largest ones.

    Raises:
        WeightsError: when the model cannot be loaded.
        UsageError: when it cannot paint that size, or the device is not there.
    """
    network, autoencoder, published = _sizes(base, fetch=not elsewhere)
    _refuse_size(network, config)
    here = not (elsewhere and config.memory_gb)
    if not here:
        cpu, present, free = config.device == "cpu", None, config.memory_gb
        device = "a CPU" if cpu else "an accelerator"
    else:
        found = device_of(config, planned=elsewhere)
        cpu, present, device = found.type == "cpu", _memory_of(found), str(found)
        free = _free_on(found)
    world = launched()[1]
    available, free = config.memory_gb or present, config.memory_gb or free
    assert available is not None
    work = Workload(
        network,
        autoencoder,
        of_each_rank(config, world),
        cpu=cpu,
        adapter_rank=_rank(adapter),
        world=world,
        at_once=batches_at_once(config, cpu=cpu, here=here),
    )
    sizes = training_sizes(_with_pictures(work) if pictures else work, TIGHT * free)
    work = changed(work, sizes)
    source = "memory_gb" if config.memory_gb else "all it has now" if cpu else "all it has"
    where = f"{device} of {available:.1f} GiB ({source})"
    return Plan(base, work, memory(work), available, where, present, published, sizes, free)


def with_rows(
    config: Config, prompts: Sequence[Prompt], samples: int, say: Callable[[str], None], *, models: int = 1
) -> Config:
    """The configuration with `sampling.batch_size` where it is left open, for a command that does not train.

    Args:
        prompts, samples: what is to be painted, and how often.
        say: told the number.
        models: of this size that are loaded.

    Raises:
        WeightsError: when the model cannot be loaded.
        UsageError: when it cannot paint that size, or the device is not there.
    """
    if config.sampling.batch_size:
        return config
    base, own_adapter = find_checkpoint(model_of(config))
    adapter = config.adapter or own_adapter
    network, autoencoder, _ = _sizes(base, fetch=True)
    _refuse_size(network, config)
    device = device_of(config)
    free, cpu = config.memory_gb or _free_on(device), device.type == "cpu"
    work = Workload(
        network,
        autoencoder,
        config,
        cpu=cpu,
        adapter_rank=_rank(adapter),
        at_once=batches_at_once(config, cpu=cpu),
        drawn=len(prompts) * samples,
    )
    if any(prompt.image for prompt in prompts):
        work = _with_pictures(work)
    found = sampling_rows(work, TIGHT * free, len(prompts), samples, adapted=adapter is not None, models=models)
    say(said_of_sizes({ROWS: found}, free))
    return with_values(config, {ROWS: found})


def said_of_sizes(sizes: dict[str, int], free: float) -> str:
    """Sizes that were left open, as they could be typed, and why they are so."""
    return f"{', '.join(f'{key}={size}' for key, size in sizes.items())}: found for {free:.1f} GiB of memory"


def _refuse_size(network: MoTConfig, config: Config) -> None:
    try:
        network.grid(config.sampling.height, config.sampling.width)
    except ValueError as error:
        raise UsageError(f"sampling.height, sampling.width: {error}") from error


def _with_pictures(work: Workload) -> Workload:
    """The same work on prompts that bring pictures, each as large as the model takes, which edits are then, too."""
    side, vision = work.model.largest_side, work.model.vision
    seen = 0 if vision is None else vision.side**2
    largest = work.config.sampling.model_copy(update={"height": side, "width": side})
    config = work.config.model_copy(update={"sampling": largest})
    return replace(work, config=config, given=work.given + work.model.max_latent_size**2 + seen + BOUNDARY)


def _sizes(base: str, fetch: bool) -> tuple[MoTConfig, AutoencoderConfig | None, bool]:
    """Network and autoencoder of a model, and whether they are only the published release's, which is not here."""
    family, sizes, published = MODELS.sizes(base, fetch=fetch)
    if sizes is None:
        raise UsageError(
            f"the memory of models of family {family.name} is not estimated; give sampling.batch_size and leave out "
            "--dry-run"
        )
    return sizes.network, sizes.autoencoder, published


def _memory_of(device: torch.device) -> float:
    """GiB of a device: all of an accelerator's, what is free of a machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    import psutil

    return psutil.virtual_memory().available / GIB


def _free_on(device: torch.device) -> float:
    """GiB of a device that nobody uses now; of a machine's memory, this rank's part."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    return _memory_of(device) / int(os.environ.get("LOCAL_WORLD_SIZE", launched()[1]))


def _rank(adapter: str | None) -> int | None:
    """Rank of adapters on disk; whoever loads them says what is wrong with their files."""
    try:
        return int(json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]) if adapter else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ----- what does not fit

Change = dict[str, Any]
"""Settings by dotted key."""
SHOWN = 3


def refuse_too_large(plan: Plan) -> None:
    """Nothing, for a plan that fits.

    Raises:
        TooLargeError: naming the largest phase, and the settings that would take most off it.
    """
    if plan.fits:
        return
    text = (
        f"{plan.name} does not fit: {plan.memory.peak.name!r} needs {plan.memory.need:.1f} GiB, available are "
        f"{plan.available:.1f}"
    )
    found = relief(plan)[:SHOWN]
    if found:
        text += "; " + ", ".join(f"{_typed(change)} saves {saved:.1f} GiB" for change, saved in found)
        together = plan.work
        for change, _ in found:
            together = changed(together, change)
        text += f", {'together they leave' if len(found) > 1 else 'which leaves'} {memory(together).need:.1f}"
    raise TooLargeError(f"{text} (set memory_gb to go past this check)")


def relief(plan: Plan) -> list[tuple[Change, float]]:
    """Settings that take something off the largest phase, and how many GiB, the most helpful first."""
    name, before = plan.memory.peak.name, plan.memory.need
    found = []
    for change in _changes(plan.work):
        after = memory(changed(plan.work, change))
        saved = before - max((after.gib(phase) for phase in after.phases if phase.name == name), default=0.0)
        if saved > 0.01 * before:
            found.append((change, saved))
    return sorted(found, key=lambda pair: -pair[1])


def changed(work: Workload, change: Change) -> Workload:
    """The same work under other settings."""
    return replace(work, config=with_values(work.config, change))


def _changes(work: Workload) -> Iterator[Change]:
    """What can be set otherwise and may save memory; what changes no result comes first."""
    t, s = work.config.train, work.config.sampling
    if not t.activation_checkpointing:
        yield {"train.activation_checkpointing": True}
    if t.micro_batch_size > 1:
        yield {"train.micro_batch_size": 1}
    if s.batch_size > 1:
        yield {"sampling.batch_size": max(1, s.batch_size // 4)}
    if work.autoencoder is not None and not s.vae_tile_rows:
        yield {"sampling.vae_tile_rows": 64}
    if t.finetune == "full" and t.reference_device == "device" and not work.cpu:
        yield {"train.reference_device": "host"}
    if work.config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if t.finetune == "full":
        yield {"train.finetune": "lora", "train.extra_modules": ()}
    if s.height == s.width and s.height > 512 and 512 % work.model.pixels_per_token == 0:
        yield {"sampling.height": 512, "sampling.width": 512}
    if s.think and s.max_new_tokens > 256:
        yield {"sampling.max_new_tokens": 256}


def _typed(change: Change) -> str:
    """As it is typed after --set."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in change.items() if value != ())


# ----- what the dry run says


def rates_of(plan: Plan) -> Rates:
    """What the device sustains: assumed for an accelerator, for a CPU a moment's measurement."""
    dtype = plan.work.config.dtype
    if plan.work.cpu:
        return _measured(DTYPES[dtype])
    return ACCELERATOR if dtype == "bfloat16" else replace(ACCELERATOR, flops=ACCELERATOR.wide_flops)


def _measured(dtype: torch.dtype) -> Rates:
    """Of this CPU: a product of matrices of 512 rows and columns, and a copy of 64 MiB."""
    import torch

    def per_second(amount: float, action: Any) -> float:
        action()
        began = time.perf_counter()
        action()
        return float(amount / (time.perf_counter() - began))

    def product(kind: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=kind)
        return per_second(2 * 512**3, lambda: a @ a)

    block = torch.zeros(2**24)
    copied = per_second(2 * block.numel() * block.element_size(), block.clone)
    return Rates(product(dtype), product(torch.float32), copied, copied, "measured on this CPU in a moment")


def report(plan: Plan, rates: Rates) -> dict[str, Any]:
    """The plan as JSON: GiB, FLOP, bytes, seconds."""
    parts = step_parts(plan.work)
    return {
        "model": plan.base,
        "fits": plan.fits,
        "need_gib": plan.memory.need,
        "available_gib": plan.available,
        "sizes": plan.sizes,
        "device": plan.device,
        "peak": plan.memory.peak.name,
        "trained_parameters": plan.work.trained,
        "ranks": plan.work.world,
        "sharded": plan.work.sharded,
        "batch": asdict(plan.work.batch),
        "memory": {
            "always": [_as_row(item) for item in plan.memory.always],
            "phases": [
                {"phase": p.name, "gib": plan.memory.gib(p), "items": [_as_row(item) for item in p.items]}
                for p in plan.memory.phases
            ],
            "host": [_as_row(item) for item in plan.memory.host],
        },
        "time": {
            "seconds_per_step": sum(part.work.seconds(rates) for part in parts),
            "parts": [_as_part(part, rates) for part in parts],
            "rates": asdict(rates),
        },
        "traffic": [asdict(sent) for sent in traffic(plan.work)],
        "assumed": assumptions(plan, rates),
    }


def _as_row(item: Item) -> dict[str, Any]:
    return {"item": item.name, "gib": item.gib, "formula": item.formula}


def _as_part(part: Part, rates: Rates) -> dict[str, Any]:
    work = asdict(part.work)
    return {"part": part.name, "seconds": part.work.seconds(rates), "formula": part.formula} | work


def assumptions(plan: Plan, rates: Rates) -> list[str]:
    """What the numbers stand on."""
    work = plan.work
    sizes = "those of the published release, which is not here" if plan.published else "by the files' headers"
    return [
        f"sizes: {sizes}",
        f"{work.given} tokens of prompt and system prompt; every text as long as its budget, {work.words} words"
        if work.words
        else f"{work.given} tokens of prompt",
        "not counted in memory: rewards' own models, pictures that are given, what the allocator leaves in pieces",
        "not counted in time: rewards, evaluations, the disk, and starting kernels: most of a small model"
        + (", what travels between ranks, and waiting for the slowest" if work.world > 1 else ""),
        f"{rates.flops / 1e12:.3g} TFLOP/s in {work.config.dtype}, {rates.wide_flops / 1e12:.3g} in float32, "
        f"{rates.bytes / 1e9:.4g} GB/s of memory, {rates.host_bytes / 1e9:.3g} from the host: {rates.source}",
    ]


def show(plan: Plan, rates: Rates, display: Display) -> None:
    """The plan for people."""
    plain, work = plan.memory, plan.work
    display.say(f"{plan.name}, {work.config.train.finetune} tuning: {work.trained / 1e6:,.1f} M trained parameters")
    if work.world > 1:
        kept = "the layers sharded over them" if work.sharded else "each with whole weights"
        display.say(f"  {work.world} ranks, {kept}; all that follows is of each")
    for line in work.batch.lines():
        display.say(f"  {line}")
    if plan.sizes:
        display.say(f"  {said_of_sizes(plan.sizes, plan.free)}")
    rows = [("always", item.name, f"{item.gib:.2f}", item.formula) for item in plain.always]
    for phase in plain.phases:
        rows += [(phase.name, item.name, f"{item.gib:.2f}", item.formula) for item in phase.items]
        rows.append((phase.name, "in all", f"{plain.gib(phase):.2f}", ""))
    rows += [("in host memory", item.name, f"{item.gib:.2f}", item.formula) for item in plain.host]
    display.table("memory", ("phase", "item", "GiB", "because"), _once(rows), {2})
    parts = step_parts(work)
    timed = [
        (
            part.name,
            _short((part.work.flops + part.work.wide) / 1e12),
            _short((part.work.bytes + part.work.host) / 1e9),
            _short(part.work.seconds(rates)),
            part.formula,
        )
        for part in parts
    ]
    total = sum(part.work.seconds(rates) for part in parts)
    timed.append(("a training step", "", "", _short(total), ""))
    display.table("time of a training step", ("part", "TFLOP", "GB moved", "seconds", "because"), timed, {1, 2, 3})
    sent = [(s.name, _short(s.bytes / 1e9), s.formula) for s in traffic(work)]
    if sent:
        display.table("received from other ranks in a training step", ("purpose", "GB", "because"), sent, {1})
    display.say(f"  {LEGEND}")
    display.say("assumed")
    for line in assumptions(plan, rates):
        display.say(f"  {line}")
    verdict = "fits" if plan.fits else "does not fit"
    if plan.fits and plan.memory.need > TIGHT * plan.available:
        verdict = "fits, but barely"
    display.say(f"{verdict}: {plan.memory.need:.1f} GiB in {plan.memory.peak.name!r}, on {plan.device}", style="bold")


def _short(number: float) -> str:
    """Three digits or, of larger numbers, all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _once(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows with a first cell that repeats left empty."""
    return [(("" if k and rows[k - 1][0] == row[0] else row[0]), *row[1:]) for k, row in enumerate(rows)]
