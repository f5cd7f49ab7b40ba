"""What a changed setting means for a resumed run. A key without a class here counts as learned from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from unigrpo_cli.config import Config


class Effect(Enum):
    """What a change of a key does to a resumed run; the value is how it is printed."""

    NONE = "changes no result"
    ROUNDING = "changes results by rounding alone"
    MEASURED = "evaluations before and after are not comparable"
    LEARNED = "changes what is learned from here on"
    REFUSED = "cannot change in a run"


_NONE = (
    "preset memory_gb train.steps train.checkpoint_every train.keep_checkpoints train.keep_checkpoint_every "
    "train.samples_every train.report_to train.trace_every train.trace_groups train.drift_limit eval.every eval.best "
    "reward.timeout_s reward.setup_timeout_s reward.max_abstain reward.strict reward.offload"
)
_ROUNDING = (
    "device attention threads sampling.batch_size sampling.vae_tile_rows sampling.compile train.micro_batch_size "
    "train.max_tokens_per_micro_batch "
    "train.reference_device train.activation_checkpointing reward.overlap reward.scoring_rank"
)
_MEASURED = (
    "eval.suite eval.samples eval.limit eval.temperature eval.steps eval.rewards eval.guidance_text "
    "eval.guidance_image eval.guidance_interval eval.guidance_renorm eval.guidance_renorm_min eval.seed"
)
_REFUSED = (
    "model model_options weights_file adapter train.finetune train.experts train.extra_modules train.lora_rank "
    "train.lora_alpha"
)
EFFECTS = {
    key: effect
    for effect, keys in (
        (Effect.NONE, _NONE),
        (Effect.ROUNDING, _ROUNDING),
        (Effect.MEASURED, _MEASURED),
        (Effect.REFUSED, _REFUSED),
        (Effect.LEARNED, "monitor.explosion"),
    )
    for key in keys.split()
}
GUIDANCE = ("eval.guidance_interval", "eval.guidance_renorm", "eval.guidance_renorm_min")
SECTIONS = {"doctor": Effect.NONE, "ranks": Effect.ROUNDING, "monitor": Effect.NONE}
"""Classes of whole sections; a key's own class comes first."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's."""

    key: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: {_said(self.old)} -> {_said(self.new)} ({self.effect.value})"


def effect_of(key: str) -> Effect:
    return EFFECTS.get(key) or SECTIONS.get(key.partition(".")[0], Effect.LEARNED)


def changes(old: dict[str, Any], new: Config) -> list[Change]:
    """Differences between a checkpoint's configuration and the present one, in the order of the latter.

    Keys that only one of them has belong to another version and are ignored.
    """
    before, after = flat(old), flat(new.model_dump(mode="json"))
    guided = new.sampling.guidance_text > 1  # training then takes the settings of guidance that evaluations have
    return [
        Change(key, before[key], value, Effect.LEARNED if guided and key in GUIDANCE else effect_of(key))
        for key, value in after.items()
        if before.get(key, value) != value
    ]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("options"):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _said(value: Any) -> str:
    """As --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
