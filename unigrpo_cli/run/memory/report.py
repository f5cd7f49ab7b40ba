"""What `unigrpo train --dry-run` reports of a plan: a table of memory, one line of hours, the verdict; or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.run.memory.flops import FLOPS, FLOPS_FP32, FROM_HOST, MEMORY, step_seconds
from unigrpo_cli.run.memory.formulas import Item, Phase
from unigrpo_cli.run.memory.plan import TIGHT, Plan, describe_sizes

if TYPE_CHECKING:
    from unigrpo_cli.run.console import Display

RATES = {"flops": FLOPS, "flops_float32": FLOPS_FP32, "memory_bytes": MEMORY, "host_bytes": FROM_HOST}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in GiB, seconds and hours."""
    untimed = plan.work.cpu or not plan.work.timed or plan.work.config.sft.data
    seconds = None if untimed else step_seconds(plan.work)
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
            "always": [_item_json(item) for item in plan.memory.always],
            "phases": [
                {"phase": p.name, "gib": plan.memory.gib(p), "items": [_item_json(item) for item in p.items]}
                for p in plan.memory.phases
            ],
            "host": [_item_json(item) for item in plan.memory.host],
        },
        "time": {
            "seconds_per_step": seconds,
            "hours": None if seconds is None else seconds * plan.work.config.train.steps / 3600,
            "rates": RATES,
        },
        "assumed": assumptions(plan),
    }


def _item_json(item: Item) -> dict[str, Any]:
    return {"item": item.name, "gib": item.gib, "formula": item.formula}


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on."""
    work = plan.work
    sizes = "published ones; the model is not on this machine" if plan.published else "from the headers of its files"
    tokens = f"{work.prompt_tokens} tokens of prompt and system prompt"
    if work.sampled_tokens:
        tokens += f"; every text has its full length, {work.sampled_tokens} tokens"
    if work.rounds > 1:
        tokens += f" in {work.rounds} rounds; none stops early; a look takes {work.looked_at_tokens} tokens"
    return [
        f"sizes: {sizes}",
        tokens,
        "not counted in memory: models of rewards, pictures that prompts bring, fragmentation of the allocator",
    ]


def hours(plan: Plan) -> str:
    """The time of all steps in one line."""
    if not plan.work.timed:
        return "time: not estimated for pairs"
    if plan.work.config.sft.data:
        return "time: not estimated for sft"
    if plan.work.cpu:
        planned = "--set device=cuda --set memory_gb=80"
        return f"time: not estimated on a CPU; to plan for an accelerator of 80 GiB, add {planned}"
    steps = plan.work.config.train.steps
    total = step_seconds(plan.work) * steps / 3600
    rate = FLOPS if plan.work.config.dtype == "bfloat16" else FLOPS_FP32
    left_out = "rewards and evaluations"
    if plan.work.quantize != PLAIN:
        left_out = "rewards, evaluations and making quantised matrices whole"
    return (
        f"time: at least {_short(total)} hours for {steps} steps, without {left_out} (assumed, not "
        f"measured: {rate / 1e12:g} TFLOP/s, {MEMORY / 1e12:g} TB/s of memory)"
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, in one line."""
    word = "fits" if plan.fits else "does not fit"
    if plan.fits and plan.memory.need > TIGHT * plan.available:
        word = "fits, but barely"
    config = plan.work.config
    missing = "" if config.reward.names or config.sft.data else "; no reward is chosen: training needs --reward"
    return f"{word}: {plan.memory.need:.1f} GiB in {plan.memory.peak.name!r}, on {plan.device}{missing}"


def show(plan: Plan, display: Display) -> None:
    """The plan for people, without its verdict."""
    work = plan.work
    kind = "adapters" if work.lora else "full fine-tuning"
    display.say(f"{plan.name}, {kind}: {work.trained / 1e6:,.1f} M trained parameters")
    if work.world > 1:
        weights = "layers sharded" if work.sharded else "whole weights on each"
        display.say(f"  {work.world} ranks, {weights}; figures below are per rank")
    for line in work.batch.lines():
        display.say(f"  {line}")
    if plan.sizes:
        display.say(f"  {describe_sizes(plan.sizes, plan.available)}")
    display.table("memory", ("phase", "item", "GiB", "formula"), _rows(plan), {2})
    for line in assumptions(plan):
        display.say(f"  {line}")
    display.say(hours(plan))


def _rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Items that are always there, then the largest moment of sampling, replay, update and optimizer."""
    found = plan.memory
    worst: dict[str, Phase] = {}
    for phase in found.phases:
        kind = phase.name.split(",")[0]
        if kind not in worst or phase.bytes > worst[kind].bytes:
            worst[kind] = phase
    rows = _item_rows("always", found.always)
    rows.append(("", "models of rewards", "?", "not counted: set memory_gb to what they leave"))
    for phase in worst.values():
        rows += _item_rows(phase.name, phase.items)
        rows.append(("", "total", f"{found.gib(phase):.2f}", ""))
    return rows + _item_rows("host memory", found.host)


def _item_rows(name: str, items: Sequence[Item]) -> list[tuple[str, str, str, str]]:
    return [("" if k else name, item.name, f"{item.gib:.2f}", item.formula) for k, item in enumerate(items)]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
