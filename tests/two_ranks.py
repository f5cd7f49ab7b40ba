"""What each of two processes does in tests/test_ranks.py: a program, for a process group cannot be two in one.

    python tests/two_ranks.py OUT SCENE...

Writes what it found as OUT/<scene>.<rank>.json and tensors as .safetensors; with one process it is its own control.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unigrpo_cli import RewardContext
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.models.sharding import whole
from unigrpo_cli.ranks import Ranks, joined
from unigrpo_cli.rebuild.model import build_model
from unigrpo_cli.rewards.grammar import parse_rewards
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scoring import RewardSet
from unigrpo_cli.runtime.state import TrainState
from unigrpo_cli.train import training_step
from unigrpo_cli.tuning import make_optimizer, prepare_policy

SETTINGS = [
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=4",
    "sampling.window_within=[0, 3]",
    "sampling.window_size=2",
    "objective.image_clip=1e-3",
    "objective.penalty_weight=0.1",
    "objective.text_kl=0.01",
    "train.prompts_per_step=4",
    "train.group_size=3",
    "train.updates=2",
    "train.micro_batch=4",
    "train.lr_text=1e-3",
    "train.lr_image=1e-3",
    "train.lora_rank=2",
    "advantage.std=batch",
]
PROMPTS = [Prompt(name, text) for name, text in (("a", "a red circle"), ("b", "two blue stars"), ("c", "a heart"))]
PROMPTS.append(Prompt("d", "a green square above a red ring"))


class Bright:
    """A reward that looks at pictures and words, and says on which ranks it was asked."""

    range = (0.0, 1.0)
    setups = 0

    def __init__(self, options: Any):
        self.asked = 0

    def setup(self, context: Any) -> None:
        Bright.setups += 1

    def score(self, batch: Any) -> list[float]:
        self.asked += len(batch)
        return [float(s.pixels.mean()) / 255 / (1 + len(s.reasoning or "")) for s in batch.samples]


def rewards(**more: Any) -> RewardSet:
    plugins = Plugins()
    plugins.rewards.add("bright", Bright)
    return RewardSet(
        parse_rewards(["bright"], {}), plugins, RewardContext("cpu", 0, embedded=False, offline=True), **more
    )


def state_of(config: Config, ranks: Ranks) -> TrainState:
    model = build_model(seed=3, width=32, layers=2)
    policy = prepare_policy(model, config, ranks)
    return TrainState(policy, make_optimizer(policy, config), ranks=ranks)


def trained(ranks: Ranks, *settings: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Three steps: the weights, and each step's metrics, advantages and texts."""
    config = load_config(overrides=[*SETTINGS, *settings])
    state = state_of(config, ranks)
    on_first = config.reward.on == "first" and not ranks.alone
    steps = []
    with rewards(on_first=on_first, here=ranks.first or not on_first) as judges:
        for _ in range(3):
            done = training_step(state, PROMPTS, judges, config)
            state.step, state.between = state.step + 1, False
            steps.append(
                {
                    "metrics": done.metrics,
                    "skipped": done.skipped,
                    "prompts": [group.prompt.id for group in done.groups],
                    "texts": [e.reasoning for group in done.groups for e in group.episodes],
                    "advantages": done.advantage_B.tolist(),
                    "scores": done.scored["bright"].scores.tolist(),
                }
            )
        asked = judges.rewards[0].reward.asked
    weights = {n: whole(p).detach().clone() for n, p in state.policy.network.named_parameters()}
    return weights, {"steps": steps, "asked": asked, "setups": Bright.setups}


def lora(ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return trained(ranks, "train.tune=lora")


def replicated(ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return trained(ranks, "train.tune=full", "ranks.weights=whole", 'train.also=["embeddings"]')


def sharded(ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return trained(ranks, "train.tune=full", 'train.also=["embeddings"]')


SCENES = {f.__name__: f for f in (lora, replicated, sharded)}


def main(out: Path, scenes: list[str]) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        for name in scenes:
            began = time.perf_counter()
            tensors, found = SCENES[name](ranks)
            found["seconds"] = time.perf_counter() - began
            save_file(tensors, out / f"{name}.{ranks.world}.{ranks.rank}.safetensors")
            (out / f"{name}.{ranks.world}.{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
