"""The plan of a run: does it fit, with which batch sizes, and what to change if it does not. Reads no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.errors import TooLargeError, UsageError
from unigrpo_cli.models.base_options import refuse_full_tuning
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.parallel.launch import launched
from unigrpo_cli.run.memory.formulas import GIB, Memory
from unigrpo_cli.run.memory.kinds import training_memory, workload
from unigrpo_cli.run.memory.pair import PairWorkload
from unigrpo_cli.run.memory.sizes import BATCH_SIZE, sampling_batch_size, training_sizes
from unigrpo_cli.run.memory.workload import Workload, config_of_rank
from unigrpo_cli.run.setup import device_of, find_adapter, find_checkpoint, model_of

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.episode import Prompt

TIGHT = 0.9
"""Share of memory above which fragmentation may decide. Sizes that are left open stay below it."""
BOUNDARY = 4
"""Boundary tokens around the two encodings of a given picture."""


@dataclass(frozen=True)
class Plan:
    """What a run needs, on each rank.

    Args:
        base: the model.
        available: GiB that the run may use: `memory_gb`, or what is free.
        device: where, in words.
        free: GiB that are free on the device; None for a plan that asks no device.
        published: the model is not on this machine, so its published sizes are taken.
        sizes: the settings that were left open, by dotted key, as `work` has them.
    """

    base: str
    work: Workload
    memory: Memory
    available: float
    device: str
    free: float | None
    published: bool
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return Path(self.base).name

    @property
    def fits(self) -> bool:
        return self.memory.need <= self.available


def plan_of(config: Config, base: str, adapter: str | None, *, elsewhere: bool = False, pictures: int = 0) -> Plan:
    """The plan of a training configuration, with several ranks of each. Reads the model's configurations and headers.

    Args:
        base, adapter: as `find_checkpoint` returns them, or the configuration has them.
        elsewhere: only plan: nothing is fetched, and with `memory_gb` set no device is asked.
        pictures: how many a prompt brings at most; open sizes are found for the largest ones.
    """
    sizes, published = _model_sizes(base, config, fetch=not elsewhere)
    if elsewhere and config.memory_gb:
        cpu, free, device = config.device == "cpu", None, "a CPU" if config.device == "cpu" else "an accelerator"
        concurrent = (config.threads or 1) if cpu else 1
    else:
        found = device_of(config, planned=elsewhere)
        cpu, free, device = found.type == "cpu", free_gib(found), str(found)
        concurrent = _concurrent_batches(config, found)
    available = config.memory_gb or free
    assert available is not None
    world = launched()[1]
    work = workload(
        sizes,
        config_of_rank(config, world),
        cpu=cpu,
        adapter_rank=_adapter_rank(adapter),
        world=world,
        concurrent=concurrent,
    )
    _refuse_image_size(work)
    refuse_full_tuning(work.quantize, full=not work.lora)
    chosen = training_sizes(_with_pictures(work, pictures) if pictures else work, TIGHT * available)
    work = changed(work, chosen)
    where = f"{device} with {available:.1f} GiB ({'memory_gb' if config.memory_gb else 'free now'})"
    return Plan(base, work, training_memory(work), available, where, free, published, chosen)


def with_batch_size(config: Config, prompts: Sequence[Prompt], samples: int, say: Callable[[str], None]) -> Config:
    """The configuration with `sampling.batch_size` where it is left open, for a command that does not train.

    Args:
        samples: pictures per prompt.
        say: told the number.
    """
    if config.sampling.batch_size:
        return config
    base, own_adapter = find_checkpoint(model_of(config))
    adapter = find_adapter(config.adapter) if config.adapter else own_adapter
    sizes, _ = _model_sizes(base, config, fetch=True)
    device = device_of(config)
    available = config.memory_gb or free_gib(device)
    work = workload(
        sizes,
        config,
        cpu=device.type == "cpu",
        adapter_rank=_adapter_rank(adapter),
        concurrent=_concurrent_batches(config, device),
        samples=len(prompts) * samples,
    )
    _refuse_image_size(work)
    if pictures := most_pictures(prompts):
        work = _with_pictures(work, pictures)
    adapted = adapter is not None
    found = sampling_batch_size(work, TIGHT * available, len(prompts), samples, adapted=adapted)
    say(describe_sizes({BATCH_SIZE: found}, available))
    return with_values(config, {BATCH_SIZE: found})


def describe_sizes(sizes: dict[str, int], available: float) -> str:
    """Sizes that were left open, as they can be typed, and the memory they were chosen for."""
    return f"{', '.join(f'{key}={size}' for key, size in sizes.items())}: chosen for {available:.1f} GiB of memory"


def free_gib(device: torch.device) -> float:
    """GiB that this process can still allocate on a device; of a machine's memory, this rank's share.

    Blocks that torch's allocator caches are free: it reuses or returns them.
    """
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / GIB
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", launched()[1]))
    return psutil.virtual_memory().available / ranks / GIB


def _concurrent_batches(config: Config, device: torch.device) -> int:
    """Batches or micro-batches that a process computes at the same time: one per CPU thread."""
    import torch

    return (config.threads or torch.get_num_threads()) if device.type == "cpu" else 1


def _refuse_image_size(work: Workload) -> None:
    try:
        work.refuse_size()
    except ValueError as error:
        raise UsageError(f"sampling.height, sampling.width: {error}") from error


def most_pictures(prompts: Sequence[Prompt]) -> int:
    """How many pictures a prompt brings at most."""
    return max((len(prompt.pictures) for prompt in prompts), default=0)


def _with_pictures(work: Workload, pictures: int) -> Workload:
    """The same work on prompts that bring so many pictures of the largest size, which edits then have too."""
    if isinstance(work, PairWorkload):
        raise UsageError("a pair of a language model and a painter cannot be given pictures; give prompts without them")
    side, vision = work.model.largest_side, work.model.vision
    encoded = work.model.max_latent_size**2 + (0 if vision is None else vision.side**2) + BOUNDARY
    work = changed(work, {"sampling.height": side, "sampling.width": side})
    return replace(work, prompt_tokens=work.prompt_tokens + pictures * encoded)


def _model_sizes(base: str, config: Config, fetch: bool) -> tuple[Any, bool]:
    """The family's sizes of a model, and whether these are only the published sizes of a model that is not here."""
    family, sizes, published = MODELS.sizes(base, fetch=fetch, given=config.model_options)
    if sizes is None:
        raise UsageError(
            f"the memory of models of family {family.name} is not estimated; give sampling.batch_size and "
            "train.micro_batch_size, and leave out --dry-run"
        )
    return sizes, published


def _adapter_rank(adapter: str | None) -> int | None:
    """Rank of adapters on disk, or None where their files cannot be read, which loading them reports."""
    try:
        return int(json.loads(_adapter_config(Path(adapter)).read_text())["r"]) if adapter else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adapter_config(adapter: Path) -> Path:
    """Of adapters of several networks, the first one's."""
    return next(iter(sorted(adapter.glob("*/adapter_config.json"))), adapter / "adapter_config.json")


# ----- what does not fit

Change = dict[str, Any]
"""Settings by dotted key."""
SHOWN = 3


def refuse_too_large(plan: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        TooLargeError: naming the largest phase, and the settings that save most there.
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
        remaining = training_memory(together).need
        text += f", {'together they leave' if len(found) > 1 else 'which leaves'} {remaining:.1f}"
    else:
        more = " or more ranks" if plan.work.sharded else ""
        text += f"; no setting saves memory there, so it takes a device with more memory{more}"
    raise TooLargeError(f"{text} (set memory_gb to skip this check)")


def relief(plan: Plan) -> list[tuple[Change, float]]:
    """Settings that reduce the largest phase and by how many GiB, the most helpful first."""
    name, before = plan.memory.peak.name, plan.memory.need
    found = []
    for change in _changes(plan.work):
        after = training_memory(changed(plan.work, change))
        saved = before - max((after.gib(phase) for phase in after.phases if phase.name == name), default=0.0)
        if saved > 0.01 * before:
            found.append((change, saved))
    return sorted(found, key=lambda pair: -pair[1])


def changed(work: Workload, change: Change) -> Workload:
    """The same work under other settings."""
    return replace(work, config=with_values(work.config, change))


def _changes(work: Workload) -> Iterator[Change]:
    """Settings that may save memory; those that change no result come first."""
    t, s = work.config.train, work.config.sampling
    if not t.activation_checkpointing:
        yield {"train.activation_checkpointing": True}
    if t.micro_batch_size > 1:
        yield {"train.micro_batch_size": 1}
    if s.batch_size > 1:
        yield {"sampling.batch_size": max(1, s.batch_size // 4)}
    if work.autoencoder is not None and not s.vae_tile_rows:
        yield {"sampling.vae_tile_rows": 64}
    if work.world > 1 and not work.lora and not work.sharded:
        yield {"ranks.weights": "shard"}
    if t.finetune == "full" and t.reference_device == "device" and not work.cpu and not isinstance(work, PairWorkload):
        yield {"train.reference_device": "host"}
    if work.lora and work.quantize != "nf4":
        yield {"model_options": {**work.config.model_options, "quantize": "nf4"}}
    if work.config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if t.finetune == "full":
        yield {"train.finetune": "lora", "train.extra_modules": ()}
    if s.height == s.width and s.height > 512 and 512 % work.pixels_per_token == 0:
        yield {"sampling.height": 512, "sampling.width": 512}
    if s.think and s.max_new_tokens > 256:
        yield {"sampling.max_new_tokens": 256}


def _typed(change: Change) -> str:
    """As it is typed after --set."""
    flat = {f"{key}.{name}": v for key, value in change.items() if isinstance(value, dict) for name, v in value.items()}
    flat |= {key: value for key, value in change.items() if not isinstance(value, dict)}
    return " ".join(f"{key}={str(value).lower()}" for key, value in flat.items() if value != ())
