"""What each of two processes does in tests/test_ranks.py, and one alone as their control."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from tests import small
from tests.tiny_pair import SMALL
from tools.toy_model import build_model
from unigrpo_cli import RewardContext, train
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.models.mot.config import computes_wide
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.pair.facts import PAINTERS
from unigrpo_cli.models.pair.family import PairFamily
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.models.sharding import whole
from unigrpo_cli.parallel.join import join_ranks
from unigrpo_cli.parallel.ranks import Ranks, local
from unigrpo_cli.programs import PROGRAMS, Program
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.answers import demonstrations, read_answers
from unigrpo_cli.run.checkpoint import read_state, restore_checkpoint, save_checkpoint
from unigrpo_cli.sft import sft_step
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.rng_state import read_generators
from unigrpo_cli.training.state import (
    Origin,
    Reference,
    TrainState,
    prompt_list,
)

SETTINGS = [
    *small.SETTINGS,
    "objective.image_clip=1e-3",
    "objective.penalty_weight=0.1",
    "objective.text_kl=0.01",
    "train.prompts_per_step=4",
    "train.minibatches=2",
    "train.group_size=2",
    "train.minibatches=2",
    "train.micro_batch_size=4",
    "train.lr_text=1e-3",
    "train.lr_image=1e-3",
    "train.lora_rank=2",
    "advantage.normalize=batch",
]
STEPS = 2
PROMPTS = [Prompt(name, text) for name, text in (("a", "a red circle"), ("b", "two blue stars"), ("c", "a heart"))]
PROMPTS.append(Prompt("d", "a green square above a red ring"))


Found = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Weights by name, and what else there is to tell."""


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


def rewards(**more: Any) -> Scorer:
    plugins = Plugins()
    plugins.rewards.add("bright", Bright)
    return Scorer(parse_rewards(["bright"], {}), plugins, RewardContext("cpu", 0, embedded=False, offline=True), **more)


def state_of(config: Config, ranks: Ranks, model: TrainablePolicy | None = None) -> TrainState:
    model = model or build_model(seed=3, width=32, layers=1)
    if config.dtype == "bfloat16":
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if computes_wide(name) else torch.bfloat16)
    policy = prepare_policy(model, config, ranks)
    return TrainState(policy, make_optimizer(policy, config), ranks=ranks)


def step(state: TrainState, judges: Scorer, config: Config) -> train.StepResult:
    done = train.training_step(state, PROMPTS, judges, config, rescore=True)
    state.step, state.between = state.step + 1, False
    return done


def weights_of(state: TrainState) -> dict[str, torch.Tensor]:
    return {n: whole(p).detach().clone() for n, p in state.policy.named_parameters()}


def trained(
    ranks: Ranks,
    *settings: str,
    steps: int = 1,
    model: TrainablePolicy | None = None,
    saved: Path | None = None,
) -> Found:
    """Steps of two updates: the weights, and each step's metrics, advantages and texts.

    Args:
        saved: a checkpoint of all but the last step.
    """
    config = load_config(overrides=[*SETTINGS, *settings])
    state = state_of(config, ranks, model)
    state.origin = Origin(config, Reference("none", ""), prompt_list(PROMPTS), ())
    state.generators = read_generators()
    on_first = config.reward.scoring_rank == "first" and not ranks.alone
    found = []
    with rewards(first_rank_only=on_first, local=ranks.first or not on_first) as judges:
        for k in range(steps):
            if saved is not None and k == steps - 1:  # others than the first leave an empty directory
                save_checkpoint(state, saved if ranks.first else saved.parent / "scratch" / saved.name)
            done = step(state, judges, config)
            found.append(
                {
                    "metrics": done.metrics,
                    "skipped": done.skipped,
                    "prompts": [group.prompt.id for group in done.groups],
                    "texts": [e.reasoning for group in done.groups for e in group.episodes],
                    "advantages": done.advantage_BS.flatten().tolist(),
                    "scores": done.scored["bright"].scores.tolist(),
                }
            )
        asked, abstained = judges.rewards[0].reward.asked, judges.abstentions()["bright"]
    kept = {"sharded": state.policy.is_sharded, "held": _held(state.policy)}
    asked = {"asked": asked, "setups": Bright.setups, "abstained": abstained}
    return weights_of(state), {"steps": found, **asked, **kept}


def _held(policy: TrainablePolicy) -> int:
    """Bytes of weights on this rank, the reference included."""
    with policy.reference() as reference:
        both = [p for one in (policy, reference) for _, p in one.named_parameters()]
    return sum(local(p).nbytes for p in {id(p): p for p in both}.values())


TRAINED = {
    "lora": ("train.finetune=lora",),
    "sharded": ("train.finetune=full", 'train.extra_modules=["embeddings"]'),
    "pair_full": (
        *("train.finetune=full", "train.activation_checkpointing=true", "train.minibatches=1"),
        *("sampling.max_new_tokens=3", "sampling.steps=2", "sampling.window_range=[0, 1]", "sampling.window_size=1"),
    ),
}
PADDED = replace(SMALL, padded_to=48)
"""With which one rank's texts have two lengths, the other's one: the painter passes each length by itself."""


def load_pair(directory: Path) -> TrainablePolicy:
    """A language model and a painter, written beforehand: of several ranks only the first can."""
    return PairFamily().load(directory, None, device=torch.device("cpu"), dtype=torch.float32, vae_tile_rows=0)


def _model(out: Path, what: str) -> TrainablePolicy:
    return load_pair(out / "flux2-klein") if what == "pair_full" else build_model(seed=3, width=32, layers=2)


@patch.dict(PAINTERS, {PADDED.pipeline: PADDED})
def _saved(ranks: Ranks, out: Path, what: str) -> Found:
    return trained(ranks, *TRAINED[what], steps=STEPS, model=_model(out, what), saved=out / f"{what}.{ranks.world}")


@patch.dict(PAINTERS, {PADDED.pipeline: PADDED})
def _restored(ranks: Ranks, out: Path, what: str) -> Found:
    """The last step from the checkpoint that the other number of ranks wrote."""
    checkpoint = out / f"{what}.{3 - ranks.world}"
    until = time.monotonic() + 120
    while not checkpoint.is_dir() and time.monotonic() < until:
        time.sleep(0.2)
    config = load_config(overrides=[*SETTINGS, *TRAINED[what]])
    model = _model(out, what)
    if what == "lora":
        model.load_adapter(checkpoint)
    policy = prepare_policy(model, config, ranks)
    if what != "lora":
        policy.restore(checkpoint)
    state = TrainState(policy, make_optimizer(policy, config), ranks=ranks)
    restore_checkpoint(state, checkpoint, read_state(checkpoint))
    with rewards() as judges:
        step(state, judges, config)
    return weights_of(state), {"step": state.step}


def replicated(ranks: Ranks, _out: Path) -> Found:
    """Two rounds: a look at the first picture, and every segment's own returns."""
    rounds = ("sampling.program=reflect", "sampling.rounds=2", "sampling.show_images=latents")
    return trained(ranks, *TRAINED["sharded"], "ranks.weights=whole", *rounds, "advantage.credit=reward-to-go")


def pair(ranks: Ranks, out: Path) -> Found:
    return trained(ranks, "train.finetune=lora", model=load_pair(out / "z-image"))


def judged_on_first(ranks: Ranks, out: Path) -> Found:
    settings = ("train.finetune=lora", "reward.scoring_rank=first")
    return trained(ranks, *settings, steps=STEPS, model=_model(out, "lora"))


BF16 = ("train.activation_checkpointing=true", "train.experts=image", "dtype=bfloat16")


def checkpointed(ranks: Ranks, _out: Path) -> Found:
    """Layers kept in parts: activation checkpointing, one expert, bf16 computation."""
    return trained(ranks, *BF16, model=build_model(seed=3, width=32, layers=2))


def whole_control(ranks: Ranks, _out: Path) -> Found:
    """The same with whole weights."""
    return trained(ranks, *BF16, "ranks.weights=whole", model=build_model(seed=3, width=32, layers=2))


def refused(ranks: Ranks, _out: Path) -> Found:
    """A loss that is not a number on the last rank alone, in the first step's second update."""
    original, calls = train.unigrpo_loss, []

    def sometimes(*given: Any, **more: Any) -> Any:
        loss = original(*given, **more)
        calls.append(None)
        if ranks.rank == ranks.world - 1 and len(calls) == 2:
            return replace(loss, total=loss.total * math.nan)
        return loss

    train.unigrpo_loss = sometimes
    try:
        return trained(ranks, "train.finetune=full", "train.micro_batch_size=8", steps=STEPS)
    finally:
        train.unigrpo_loss = original


def failing_judge(ranks: Ranks, _out: Path) -> Found:
    """A reward that fails on the last rank alone."""
    original = Bright.score

    def score(self: Any, batch: Any) -> list[float]:
        if ranks.rank == ranks.world - 1:
            raise OSError("judge is down")
        return original(self, batch)

    Bright.score = score
    try:
        trained(ranks, "train.finetune=full")
    except RewardError as error:
        ranks.wait()  # all are here: nobody waits elsewhere
        return {}, {"error": str(error), "everywhere": error.everywhere}
    finally:
        Bright.score = original
    raise AssertionError("the judge's failure passed unseen")


def uneven_program(ranks: Ranks, _out: Path) -> Found:
    """A plugin's program that looks at its picture on the last rank alone, with sharded weights."""

    def run(rows: Any) -> None:
        texts = rows.sample_text()
        rows.sample_image()
        rows.stop([ranks.first for _ in texts])
        rows.read_image()
        rows.sample_text()

    PROGRAMS.add(Program("uneven", run, ""))
    try:
        trained(ranks, "sampling.program=uneven", "sampling.show_images=latents")
    except UsageError as error:
        ranks.wait()
        return {}, {"error": str(error)}
    raise AssertionError("ranks made different numbers of passes")


def abstaining_judge(ranks: Ranks, _out: Path) -> Found:
    """A reward that abstains on one prompt of four: no more than it may of all, more than it may of one rank's."""
    original = Bright.score

    def score(self: Any, batch: Any) -> list[float]:
        found = original(self, batch)
        return [math.nan if s.prompt == PROMPTS[0].text else x for s, x in zip(batch.samples, found, strict=True)]

    Bright.score = score
    try:
        weights, told = trained(ranks, "train.finetune=lora")
    finally:
        Bright.score = original
    return weights, told


def uneven_texts(ranks: Ranks, _out: Path) -> Found:
    """Rank 1's prompts make it write to the end of a long budget, rank 0's stop it at the first word."""
    original = MoTPolicy.logits

    def logits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        found = original(self, hidden)
        if torch.is_grad_enabled() or not sampling:
            return found
        push = 100.0 if ranks.rank == 0 else -100.0
        return found.index_add(-1, torch.tensor([self.stop_id]), torch.full((*found.shape[:-1], 1), push))

    sampling: list[None] = []

    whole_weights = MoTPolicy.gathered

    @contextmanager
    def watched(policy: Any) -> Any:
        with whole_weights(policy) as sampler:
            sampling.append(None)
            yield sampler
            sampling.clear()

    MoTPolicy.logits, MoTPolicy.gathered = logits, watched
    try:
        return trained(ranks, "sampling.max_new_tokens=12")
    finally:
        MoTPolicy.logits, MoTPolicy.gathered = original, whole_weights


def imitated(ranks: Ranks, out: Path) -> Found:
    """Two steps on given answers, some of which are dropped."""
    answers = out / "answers" / "answers.jsonl"
    more = ("train.finetune=full", "ranks.weights=whole", "sft.drop=0.3", "sampling.max_new_tokens=20", "sft.times=2")
    config = load_config(overrides=[*SETTINGS, *more], named={"sft.data": (str(answers),)})
    state = state_of(config, ranks)
    rows = demonstrations(state.policy, read_answers(config), config)
    found: list[dict] = []
    with rewards() as judges:
        train.train(
            state,
            rows,
            judges,
            config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}),
            lambda done: bool(found.append({"metrics": done.metrics, "own": [g.prompt.id for g in done.groups]})),
            sft_step,
        )
    return weights_of(state), {"steps": found}


SCENES = {
    f.__name__: f
    for f in (
        replicated,
        pair,
        checkpointed,
        whole_control,
        judged_on_first,
        refused,
        failing_judge,
        uneven_program,
        abstaining_judge,
        uneven_texts,
        imitated,
    )
}


SCENES |= {what: partial(_saved, what=what) for what in TRAINED}
SCENES |= {f"restored_{what}": partial(_restored, what=what) for what in TRAINED}


def main(out: Path, scenes: Sequence[str]) -> None:
    """Write what each scene finds as OUT/<scene>.<world>.<rank>.json and its tensors as .safetensors."""
    with join_ranks() as ranks:
        for name in scenes:
            tensors, found = SCENES[name](ranks, out)
            save_file(tensors, out / f"{name}.{ranks.world}.{ranks.rank}.safetensors")
            (out / f"{name}.{ranks.world}.{ranks.rank}.json").write_text(json.dumps(found))
