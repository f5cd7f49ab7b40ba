"""Write the golden training traces: `python -m tools.trace --out FILE`, ten seconds. A test compares.

Each run trains a few steps by two rewards that need nothing, and writes down every number of the algorithm. "full"
and "adapters" are the embedded architecture, small and untrained, in fp64; "embedded" is the shipped model as it is
run.

What another processor or BLAS library does to it. fp64 sums in another order differ by 1e-15, which leaves all ten
digits alone: AVX2 and AVX-512 write the same file, but for "embedded", whose fp32 sums differ (docs/log.md). Draws
are discrete: a token changes where its uniform number falls between two roundings of a sum, once in 1e7 draws in
fp32, and what was drawn is in the trace (`drawn/words`), so that such a step names itself. Pixels are rounded fp32
latents and do flip, so brightness is rewarded in whole grey levels. And torch draws normal numbers by other code
where there is no AVX2, which differs in the last bits of fp32: there only `ELSEWHERE` is promised.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tools.toy_model import build_model
from unigrpo_cli import RewardContext, reward
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import ImageActions, Prompt, TextActions, flatten
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

COMMAND = "python -m tools.trace --out tests/golden/trace.txt"
REWARDS = "vowels,light:4"
PROMPTS = [
    Prompt(t, t)
    for t in (
        "a red circle",
        "two blue stars",
        "a heart",
        "a cross above a square",
        "three green triangles",
        "a black ring left of a heart",
    )
]

Row = dict[str, float]
"""The numbers of one training step, by name."""

ELSEWHERE = 5e-3
"""Relative tolerance on processors without AVX2: ten times what torch's plain code differs by in 20 steps, 3e-4."""

KINDS = ("loss", "reward/", "advantage/", "text/", "image/")
"""The metrics of a step that are the algorithm's. Clocks and memory are not, and drift is nothing but rounding."""


@dataclass(frozen=True)
class Run:
    """One traced run.

    Args:
        settings: of the configuration, on top of the embedded preset.
        model: makes the model; it may be trained on.
        relative: how far a number may be from the golden one, as a share of the larger of the two. 1e-6 in fp64:
            a digit more than is seen to differ, and a hundred times less than any change of the algorithm makes.
            5e-3 in fp32, whose rounding (6e-8) is 6e-4 of a loss, a sum of gains of both signs.
    """

    settings: tuple[str, ...]
    model: Callable[[], MoTPolicy]
    relative: float


def small() -> MoTPolicy:
    """The embedded architecture, untrained, in fp64: 2 layers of width 32."""
    model = build_model(seed=3, width=32, layers=2)
    model.network.double()
    return model


SMALL = (
    "threads=1",
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=5",
    "sampling.window_range=[0, 4]",
    "sampling.window_size=2",
    "train.prompts_per_step=4",
    "train.group_size=6",
    "train.micro_batch_size=8",
    "train.minibatches=2",
    "train.lr_decay=0",
    "train.steps=20",
)
RUNS = {
    # Clips and the penalty are such that they bind in part: a trace where nothing is clipped does not see the clip.
    "full": Run(
        (
            *SMALL,
            "objective.text_clip=0.02",
            "objective.image_clip=3e-5",
            "objective.penalty_weight=0.1",
            "train.lr_text=1e-3",
            "train.lr_image=3e-4",
        ),
        small,
        1e-6,
    ),
    "adapters": Run(
        (
            *SMALL,
            "sampling.sde=cps",
            "sampling.window=sliding",
            "sampling.window_period=3",
            "sampling.temperature=0.8",
            "objective.trust_region=ratio",
            "objective.penalty=latent-kl",
            "objective.penalty_weight=0.1",
            "objective.grad_through_context=false",
            "objective.text_clip=0.02",
            "objective.image_clip=1e-4",
            "objective.text_kl=0.05",
            "advantage.normalize=batch",
            "advantage.combine=rank",
            "train.finetune=lora",
            "train.lora_rank=4",
            "train.lora_alpha=8",
            "train.epochs=2",
            "train.warmup=8",
            "train.betas=[0.8, 0.95]",
            "train.weight_decay=0.01",
            "train.grad_clip=0.5",
            "train.lr_text=3e-3",
            "train.lr_image=3e-3",
        ),
        small,
        1e-6,
    ),
    "embedded": Run(
        (
            "threads=1",
            "objective.penalty_weight=0.01",
            "train.prompts_per_step=4",
            "train.group_size=6",
            "train.minibatches=2",
            "train.lr_text=3e-4",
            "train.lr_image=2e-4",
            "train.lr_decay=0",
            "train.steps=3",
        ),
        lambda: load_model("embedded"),
        5e-3,
    ),
}


@reward("vowels", range=(0, 1))
def vowels(reasoning):
    """Share of vowels among the letters that were written."""
    return [sum(text.count(v) for v in "aeiou") / max(len(text), 1) for text in reasoning]


@reward("light", range=(0, 1))
def light(pixels):
    """Mean brightness of the picture in whole grey levels, over the brightest possible."""
    return [round(float(p.mean())) / 255 for p in pixels]


def trace(
    run: Run, changes: Sequence[str] = (), after_step: Callable[[StepResult], bool] = lambda step: False
) -> list[Row]:
    """The numbers of every step of a run.

    Args:
        changes: settings on top of the run's own.
        after_step: as in `train`.
    """
    config = load_config(preset="embedded", overrides=[*run.settings, *changes])
    policy = prepare_policy(run.model(), config)
    state = TrainState(policy, make_optimizer(policy, config))
    start = _weights(policy)
    rows: list[Row] = []

    def note(step: StepResult) -> bool:
        rows.append(_metrics(step) | _drawn(step) | _moved(_weights(policy), start))
        return after_step(step)

    with _rewards(config) as rewards:
        train(state, PROMPTS, rewards, config, note)
    return rows


def _rewards(config: Config) -> Scorer:
    plugins = Plugins()
    plugins.rewards.add("vowels", vowels)
    plugins.rewards.add("light", light)
    return Scorer(parse_rewards([REWARDS]), plugins, RewardContext("cpu", config.seed, True, True))


def _metrics(step: StepResult) -> Row:
    return {n: v for n, v in step.metrics.items() if n.startswith(KINDS) and "drift" not in n}


def _drawn(step: StepResult) -> Row:
    """What was drawn: a number that another token anywhere changes, and the norm of all final latents."""
    segments = [s for e in flatten(step.groups) for s in e.segments]
    ids = torch.cat([s.ids for s in segments if isinstance(s, TextActions)])
    advantage_B = step.advantage_BS[:, 0]
    latents = torch.stack([s.latent for s in segments if isinstance(s, ImageActions)])
    return {
        "drawn/words": float((ids * torch.arange(1, len(ids) + 1)).sum()),
        "drawn/latents": latents.double().norm().item(),
        "drawn/advantage": (advantage_B.double() * torch.arange(1, len(advantage_B) + 1)).sum().item(),
    }


def _weights(policy: MoTPolicy) -> dict[str, Tensor]:
    """Copies of each expert's trained weights, fp64, one after the other."""
    return {
        expert: torch.cat([p.detach().double().flatten() for p in parameters])
        for expert, parameters in policy.trainable().items()
    }


def _moved(now: dict[str, Tensor], start: dict[str, Tensor]) -> Row:
    """Of each expert: the norm of its weights, how far they went, and how far along one fixed direction.

    Norms alone would not see two weights that change places. The direction's own product is near 0 by chance at
    times, so it comes with four distances added.
    """
    row: Row = {}
    for expert, weights in now.items():
        generator = torch.Generator().manual_seed(derive(0, "direction", expert))
        direction = torch.randn(len(weights), generator=generator, dtype=torch.float64)
        change = weights - start[expert]
        row[f"weights/{expert}/norm"] = weights.norm().item()
        row[f"weights/{expert}/moved"] = change.norm().item()
        row[f"weights/{expert}/along"] = (4 * change.norm() + change @ direction).item()
    return row


def written(traces: Mapping[str, Sequence[Row]]) -> str:
    """Traces as text: the command, torch's version, then a line per number."""
    lines = [COMMAND, f"torch {torch.__version__.split('+')[0]}"]
    for name, rows in traces.items():
        for k, row in enumerate(rows):
            lines += ["", f"[{name} {k + 1}]", *(f"{key} {value:.10g}" for key, value in sorted(row.items()))]
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[str, list[Row]]:
    traces: dict[str, list[Row]] = {}
    for line in text.splitlines()[2:]:
        if line.startswith("["):
            row: Row = {}
            traces.setdefault(line[1:].split()[0], []).append(row)
        elif line:
            key, value = line.split()
            row[key] = float(value)
    return traces


def differences(found: Sequence[Row], golden: Sequence[Row], relative: float) -> list[str]:
    """The numbers of `golden` that `found` does not have to within `relative`, first step first, as lines.

    What was drawn comes first in a step, and words must be the very same: after others, no number is comparable.
    Numbers that only `found` has are not looked at: a new metric is no change of the algorithm.
    """
    lines = []
    for k, (own, wanted) in enumerate(zip(found, golden, strict=False)):
        for key in sorted(wanted, key=lambda key: (not key.startswith("drawn/"), key)):
            now, value = own.get(key, math.nan), wanted[key]
            exact = key == "drawn/words"
            if not math.isclose(now, value, rel_tol=0 if exact else relative, abs_tol=0 if exact else 1e-12):
                lines.append(f"step {k + 1}: {key} is {now:.10g}, was {value:.10g}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.write_text(written({name: trace(run) for name, run in RUNS.items()}))


if __name__ == "__main__":
    main()
