"""A model and a configuration as the numbers that bytes and FLOP depend on. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from unigrpo_cli.config import Config
from unigrpo_cli.models.mot.config import (
    ALSO,
    LAYERS,
    AutoencoderConfig,
    MoTConfig,
    Shapes,
    computes_wide,
    expert_of,
    network_shapes,
)

GIVEN = 128
"""Tokens of a prompt with its system prompt that are reckoned with; a hundred more are some megabytes."""
WIDE = 4
"""Bytes of what is fp32 in any network: masters, gradients, moments, logits, latents."""


@dataclass(frozen=True)
class Batch:
    """The batch arithmetic of a training step.

    `each` is episodes per optimizer step, `micro_batches` backward passes per optimizer step (`at_least`, where a
    budget of tokens may ask for more), `rollouts` batches of sampling, `reads` how often a prompt is read for them.
    The calls are passes through the network per episode, `replays` those without gradients on average.
    """

    prompts: int
    group: int
    episodes: int
    optimizer_steps: int
    each: int
    micro_batches: int
    at_least: bool
    rollouts: int
    reads: int
    word_calls: int
    denoise_calls: int
    replays: float
    backwards: int

    def lines(self) -> tuple[str, ...]:
        """In words."""
        micro = f"{'at least ' if self.at_least else ''}{self.micro_batches} micro-batches each"
        return (
            f"step = {self.prompts} prompts x {self.group} episodes = {self.episodes} episodes, "
            f"{self.optimizer_steps} optimizer steps on {self.each}, {micro}",
            f"sampled in {self.rollouts} batches: up to {self.word_calls} calls of the network for the words of "
            f"each, {self.denoise_calls} for its images; then {self.replays:g} replays without gradients, "
            f"{self.backwards} with",
        )


def paints(config: Config) -> bool:
    """Whether replay looks at images."""
    return config.objective.image_weight > 0 and config.train.experts != "text"


def needs_reference(config: Config) -> bool:
    """Whether replay asks the reference."""
    o = config.objective
    return o.text_kl > 0 or (paints(config) and o.penalty != "none" and o.penalty_weight > 0)


def old_share(config: Config) -> float:
    """The share of a step's episodes whose old scores take a separate pass: all but the first minibatch's."""
    return 1 - 1 / config.train.minibatches


def batch_of(config: Config) -> Batch:
    """The batch arithmetic of a configuration."""
    t, s = config.train, config.sampling
    episodes = t.prompts_per_step * t.group_size
    each = episodes // t.minibatches
    starts = range(0, episodes, s.batch_size)
    reads = sum((min(at + s.batch_size, episodes) - 1) // t.group_size - at // t.group_size + 1 for at in starts)
    return Batch(
        prompts=t.prompts_per_step,
        group=t.group_size,
        episodes=episodes,
        optimizer_steps=t.minibatches * t.epochs,
        each=each,
        micro_batches=-(-each // t.micro_batch_size),
        at_least=t.max_tokens_per_micro_batch > 0,
        rollouts=len(starts),
        reads=reads,
        word_calls=s.max_new_tokens + 2 if s.think else 0,
        denoise_calls=s.steps,
        replays=old_share(config) + needs_reference(config),
        backwards=t.epochs,
    )


def of_each_rank(config: Config, world: int) -> Config:
    """What one of several ranks does of a step: its share of the prompts."""
    own = config.train.model_copy(update={"prompts_per_step": config.train.prompts_per_step // world})
    return config.model_copy(update={"train": own})


@cache
def _shapes(model: MoTConfig) -> Shapes:
    """Made once: sizes of batches are found by planning the same model many times."""
    return network_shapes(model)


@dataclass(frozen=True)
class Workload:
    """What is trained on what, by one rank.

    Args:
        config: of this rank's share; see `of_each_rank`.
        cpu: the device is a CPU: attention over words is in fp64 there, gates keep less, and the optimizer
            goes tensor by tensor.
        given: tokens of a prompt with its system prompt.
        adapter_rank: of adapters that are there already; None takes the configuration's.
        world: ranks that train together.
        at_once: most batches of a rollout, or micro-batches, that are computed at the same time.
        drawn: episodes of a rollout where nothing is trained; None in training, which has evaluations too.
    """

    model: MoTConfig
    autoencoder: AutoencoderConfig | None
    config: Config
    cpu: bool = False
    given: int = GIVEN
    adapter_rank: int | None = None
    world: int = 1
    at_once: int = 1
    drawn: int | None = None

    # ----- ranks

    @property
    def sharded(self) -> bool:
        """Whether the layers' weights are shared out over ranks, as `tuning.shards` decides."""
        return self.world > 1 and not self.lora and self.config.ranks.weights != "whole"

    def kept(self, count: Callable[[Callable[[str], bool]], int], chosen: Callable[[str], bool]) -> int:
        """What this rank keeps of tensors with such names, counted by `elements` or `stored`."""
        if not self.sharded:
            return count(chosen)
        layers = count(lambda name: chosen(name) and name.startswith(LAYERS))
        return -(-layers // self.world) + count(lambda name: chosen(name) and not name.startswith(LAYERS))

    @property
    def trained_here(self) -> int:
        """Elements with a gradient that this rank keeps."""
        return self.trained if self.lora else self.kept(self.elements, self.is_trained)

    # ----- weights

    @property
    def shapes(self) -> Shapes:
        return _shapes(self.model)

    @property
    def narrow(self) -> int:
        """Bytes of a number in the network's dtype."""
        return 2 if self.config.dtype == "bfloat16" else WIDE

    def elements(self, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Of the network's tensors with such names."""
        return sum(prod(shape) for name, shape in self.shapes.items() if chosen(name))

    def stored(self, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Bytes of those tensors as a network that is not trained keeps them."""
        wide = self.elements(lambda name: chosen(name) and computes_wide(name))
        return WIDE * wide + self.narrow * (self.elements(chosen) - wide)

    def in_one_layer(self, expert: str, chosen: Callable[[str], bool] = lambda name: True) -> Shapes:
        """Matrices of an expert in one layer."""
        return {
            name: shape
            for name, shape in self.shapes.items()
            if name.startswith(f"{LAYERS}0.") and len(shape) == 2 and expert_of(name) == expert and chosen(name)
        }

    def matrices(self, expert: str) -> int:
        """Elements of the matrices that a token of an expert meets in all layers."""
        return self.model.num_hidden_layers * sum(map(prod, self.in_one_layer(expert).values()))

    # ----- what is trained

    @property
    def lora(self) -> bool:
        return self.config.train.finetune == "lora"

    @property
    def rank(self) -> int:
        return self.adapter_rank or self.config.train.lora_rank

    def trains(self, expert: str) -> bool:
        return self.config.train.experts in ("both", expert)

    def is_trained(self, name: str) -> bool:
        """Whether full tuning trains that tensor."""
        wanted = (LAYERS, *(prefix for key in self.config.train.extra_modules for prefix in ALSO[key]))
        return not self.lora and name.startswith(wanted) and self.trains(expert_of(name))

    def adapter_elements(self, expert: str) -> int:
        """Elements of an expert's adapters: rank x (rows + columns) of each of its matrices."""
        sides = sum(sum(shape) for shape in self.in_one_layer(expert).values())
        return self.rank * sides * self.model.num_hidden_layers if self.lora else 0

    @property
    def adapters(self) -> int:
        return self.adapter_elements("text") + self.adapter_elements("image")

    @property
    def trained(self) -> int:
        """Elements that have a gradient."""
        if self.lora:
            return sum(self.adapter_elements(expert) for expert in ("text", "image") if self.trains(expert))
        return self.elements(self.is_trained)

    # ----- tokens

    @property
    def words(self) -> int:
        """Tokens that an episode may write."""
        return self.config.sampling.max_new_tokens if self.config.sampling.think else 0

    @property
    def text(self) -> int:
        """Text tokens of an episode: given ones, and with thinking an opening, the words and a forced stop."""
        return self.given + (self.words + 2 if self.words else 0)

    @property
    def latents(self) -> int:
        """Tokens of an image."""
        rows, columns = self.model.grid(self.config.sampling.height, self.config.sampling.width)
        return rows * columns

    @property
    def image(self) -> int:
        """Tokens of an image with its two boundary tokens."""
        return self.latents + 2

    @property
    def copies(self) -> int:
        """Stochastic steps of an image, which replay looks at side by side."""
        s = self.config.sampling
        return s.steps if s.window == "all" else s.window_size

    @property
    def paints(self) -> bool:
        return paints(self.config)

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.config)

    @property
    def checkpoints(self) -> bool:
        return self.config.train.activation_checkpointing

    @cached_property
    def batch(self) -> Batch:
        return batch_of(self.config)

    @property
    def rows(self) -> int:
        """Episodes sampled together, in training or in an evaluation."""
        return self.config.sampling.batch_size

    @property
    def rows_at_once(self) -> int:
        """Batches of a rollout that are computed at the same time; evaluations of a run have as many as may be."""
        return self.at_once if self.drawn is None else max(1, min(self.at_once, -(-self.drawn // self.rows)))

    @property
    def micro_at_once(self) -> int:
        """Micro-batches of an update that are computed at the same time: one where ranks make passes together."""
        return 1 if self.sharded else max(1, min(self.at_once, -(-self.batch.each // self.micro)))

    @property
    def micro(self) -> int:
        """Episodes replayed together, each as long as it may be."""
        most = min(self.config.train.micro_batch_size, self.batch.each)
        if not self.config.train.max_tokens_per_micro_batch:
            return most
        longest = self.text + (self.copies * self.image if self.paints else 0)
        return max(1, min(most, self.config.train.max_tokens_per_micro_batch // longest))

    @property
    def keys(self) -> int:
        """Width of a token's keys."""
        return self.model.head_dim * self.model.num_key_value_heads

    @property
    def cached_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        m = self.model
        return 2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * self.narrow
