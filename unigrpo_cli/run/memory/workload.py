"""A model and a configuration as the counts that memory and work depend on. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, ClassVar

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.models.base_options import PLAIN, quantized_bytes
from unigrpo_cli.models.mot.config import (
    ALSO,
    LAYERS,
    LORA_TARGETS,
    AutoencoderConfig,
    MoTConfig,
    Shapes,
    computes_wide,
    expert_of,
    network_shapes,
)

TEXT, IMAGE = "text", "image"
PROMPT_TOKENS = 128
"""Assumed tokens of a prompt with its system prompt; a hundred more take some megabytes."""
FP32 = 4
"""Bytes of a number that is fp32 in any network: masters, gradients, moments, logits, latents."""


@dataclass(frozen=True)
class BatchCounts:
    """Counts of one training step.

    Args:
        each: episodes per optimizer step.
        micro_batches: backward passes per optimizer step; `at_least` so many where tokens are limited too.
        rollouts: batches in which the episodes are sampled.
        word_calls, denoise_calls: passes through the network per batch, to sample text and images.
        replays: passes without gradients per episode, on average.
        backwards: passes with gradients per episode.
    """

    prompts: int
    group: int
    episodes: int
    optimizer_steps: int
    each: int
    micro_batches: int
    at_least: bool
    rollouts: int
    word_calls: int
    denoise_calls: int
    replays: float
    backwards: int

    def lines(self) -> tuple[str, ...]:
        """For people."""
        micro = f"{'at least ' if self.at_least else ''}{self.micro_batches} micro-batches each"
        episodes = f"{self.prompts} prompts x {self.group} episodes = {self.episodes} episodes"
        return (
            f"step = {episodes if self.group > 1 else f'{self.prompts} answers'}, "
            f"{self.optimizer_steps} optimizer steps on {self.each}, {micro}",
            f"sampling: {self.rollouts} batches, up to {self.word_calls} network calls for text and "
            f"{self.denoise_calls} for images; replay: {self.replays:g} passes without gradients, "
            f"{self.backwards} with",
        )


def replays_images(config: Config) -> bool:
    """Whether images are replayed."""
    return config.objective.image_weight > 0 and config.train.experts != TEXT


def needs_reference(config: Config) -> bool:
    """Whether episodes are replayed under the reference weights."""
    o = config.objective
    return o.text_kl > 0 or (replays_images(config) and o.penalty != "none" and o.penalty_weight > 0)


def old_share(config: Config) -> float:
    """The share of a step's episodes whose old scores take a separate pass: all but the first minibatch's."""
    return 1 - 1 / config.train.minibatches


def batch_of(config: Config) -> BatchCounts:
    """The counts of a configuration."""
    config = as_counted(config)
    t, s = config.train, config.sampling
    episodes = t.prompts_per_step * t.group_size
    each = episodes // t.minibatches
    return BatchCounts(
        prompts=t.prompts_per_step,
        group=t.group_size,
        episodes=episodes,
        optimizer_steps=t.minibatches * t.epochs,
        each=each,
        micro_batches=-(-each // t.micro_batch_size),
        at_least=t.max_tokens_per_micro_batch > 0,
        rollouts=-(-episodes // s.batch_size),
        word_calls=sum(budget + 2 for budget in budgets_of(config)),
        denoise_calls=s.steps * s.rounds * guided_calls(config),
        replays=0 if config.sft.data else old_share(config) + needs_reference(config),
        backwards=t.epochs,
    )


def guided_calls(config: Config) -> int:
    """Network calls for one velocity in training: more than one with guidance."""
    s = config.sampling
    guided = s.guidance_text > 1
    return 1 + guided + (guided and s.guidance_image > 1)


def budgets_of(config: Config) -> list[int]:
    """Most tokens of the text of each round; none without thinking."""
    s = config.sampling
    budgets = s.round_max_new_tokens or (s.max_new_tokens,)
    return [budgets[min(k, len(budgets) - 1)] for k in range(s.rounds)] if s.think else []


def as_counted(config: Config) -> Config:
    """On given answers, the configuration by which episodes, noisy images and passes are counted; else itself."""
    if not config.sft.data:
        return config
    values: dict[str, Any] = {"train.group_size": 1, "objective.penalty": "none", "objective.text_kl": 0.0}
    values |= {
        "sampling.guidance_text": 1.0,
        "objective.image": "transition",
        "sampling.window": "fixed",
        "sampling.window_size": config.sft.times,
    }
    return with_values(config, values | {"objective.image_weight": config.sft.image_weight})


def config_of_rank(config: Config, world: int) -> Config:
    """The configuration of one of several ranks: its share of the prompts."""
    config = as_counted(config)
    own = config.train.model_copy(update={"prompts_per_step": config.train.prompts_per_step // world})
    return config.model_copy(update={"train": own})


@cache
def _shapes(model: MoTConfig) -> Shapes:
    return network_shapes(model)


@cache
def _numbers(model: MoTConfig) -> dict[str, int]:
    """Of each tensor."""
    return {name: prod(shape) for name, shape in _shapes(model).items()}


@cache
def _in_full(model: MoTConfig, experts: str, extra_modules: tuple[str, ...]) -> frozenset[str]:
    """Names of the tensors that full fine-tuning trains."""
    wanted = (LAYERS, *(prefix for key in extra_modules for prefix in ALSO[key]))
    return frozenset(n for n in _shapes(model) if n.startswith(wanted) and experts in ("both", expert_of(n)))


@cache
def _first_layer(model: MoTConfig) -> Shapes:
    """Its matrices. Sizes are searched for with hundreds of looks at them."""
    return {name: s for name, s in _shapes(model).items() if name.startswith(f"{LAYERS}0.") and len(s) == 2}


@cache
def _layer_matrices(model: MoTConfig) -> Shapes:
    pattern = re.compile(rf"({LORA_TARGETS})\.weight")
    return {name: shape for name, shape in _shapes(model).items() if pattern.fullmatch(name)}


@dataclass(frozen=True)
class Workload:
    """What one rank computes.

    Args:
        model: the network's sizes, a `MoTConfig`; None for other kinds, which have sizes of their own.
        config: of this rank's share; see `config_of_rank`.
        cpu: the device is a CPU. There text attention is fp64, the MLP saves less, and the optimizer goes tensor by
            tensor.
        prompt_tokens: of a prompt with its system prompt.
        adapter_rank: of adapters that are loaded; None takes the configuration's.
        world: ranks that train together.
        concurrent: most batches or micro-batches that are computed at the same time.
        samples: pictures to sample where nothing is trained; None in training, which also evaluates.
    """

    model: Any
    autoencoder: AutoencoderConfig | None
    config: Config
    cpu: bool = False
    prompt_tokens: int = PROMPT_TOKENS
    adapter_rank: int | None = None
    world: int = 1
    concurrent: int = 1
    samples: int | None = None

    timed: ClassVar[bool] = True
    """Whether operations are counted (`flops.py`)."""

    @property
    def pixels_per_token(self) -> int:
        """Pixels along a token's side."""
        return self.model.pixels_per_token

    def refuse_size(self) -> None:
        """
        Raises:
            ValueError: when the model cannot paint the configured size.
        """
        self.model.grid(self.config.sampling.height, self.config.sampling.width)

    # ----- weights

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the network's dtype."""
        return 2 if self.config.dtype == "bfloat16" else FP32

    @property
    def quantize(self) -> str:
        """How frozen matrices of the layers are kept: none, int8 or nf4."""
        return str(self.config.model_options.get("quantize", PLAIN))

    def quantized_bytes(self, shape: tuple[int, ...]) -> int:
        return quantized_bytes(shape, self.quantize, self.dtype_bytes)

    @property
    def whole_number_bytes(self) -> int:
        """Bytes of each number of a matrix while it is whole; nf4 reads indices of 4 bytes for two numbers."""
        return {PLAIN: 0, "int8": self.dtype_bytes, "nf4": self.dtype_bytes + 2}[self.quantize]

    def elements(self, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Numbers in the network's tensors of the chosen names."""
        return sum(count for name, count in _numbers(self.model).items() if chosen(name))

    def stored(self, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Bytes of those tensors in a network that is not trained."""
        fp32 = self.elements(lambda name: chosen(name) and computes_wide(name))
        saved = 0
        if self.quantize != PLAIN:
            shapes = [shape for name, shape in _layer_matrices(self.model).items() if chosen(name)]
            saved = sum(prod(s) * self.dtype_bytes - self.quantized_bytes(s) for s in shapes)
        return FP32 * fp32 + self.dtype_bytes * (self.elements(chosen) - fp32) - saved

    def layer_matrices(self, expert: str, chosen: Callable[[str], bool] = lambda name: True) -> Shapes:
        """An expert's matrices in one layer."""
        own = _first_layer(self.model).items()
        return {name: shape for name, shape in own if expert_of(name) == expert and chosen(name)}

    # ----- ranks

    @property
    def sharded(self) -> bool:
        """Whether the layers' weights are sharded over ranks."""
        return self.world > 1 and not self.lora and self.config.ranks.weights != "whole"

    def on_rank(self, count: Callable[[Callable[[str], bool]], int], chosen: Callable[[str], bool]) -> int:
        """This rank's part of the chosen tensors, counted by `elements` or `stored`."""
        if not self.sharded:
            return count(chosen)
        layers = count(lambda name: chosen(name) and name.startswith(LAYERS))
        return -(-layers // self.world) + count(lambda name: chosen(name) and not name.startswith(LAYERS))

    @property
    def trained_on_rank(self) -> int:
        """Numbers with a gradient on this rank."""
        return self.trained if self.lora else self.on_rank(self.elements, self.is_trained)

    # ----- what is trained

    @property
    def lora(self) -> bool:
        return self.config.train.finetune == "lora"

    @property
    def rank(self) -> int:
        """Rank of the adapters."""
        return self.adapter_rank or self.config.train.lora_rank

    def trains(self, expert: str) -> bool:
        return self.config.train.experts in ("both", expert)

    @cached_property
    def trained_names(self) -> frozenset[str]:
        t = self.config.train
        return frozenset() if self.lora else _in_full(self.model, t.experts, tuple(t.extra_modules))

    def is_trained(self, name: str) -> bool:
        """Whether full fine-tuning trains the tensor of that name."""
        return name in self.trained_names

    def adapter_elements(self, expert: str) -> int:
        """Numbers in an expert's adapters: rank x (rows + columns) of each matrix."""
        sides = sum(sum(shape) for shape in self.layer_matrices(expert).values())
        return self.rank * sides * self.model.num_hidden_layers if self.lora else 0

    @property
    def adapters(self) -> int:
        return self.adapter_elements(TEXT) + self.adapter_elements(IMAGE)

    @property
    def trained(self) -> int:
        """Numbers with a gradient."""
        if self.lora:
            return sum(self.adapter_elements(expert) for expert in (TEXT, IMAGE) if self.trains(expert))
        return self.elements(self.is_trained)

    # ----- tokens

    @property
    def rounds(self) -> int:
        return self.config.sampling.rounds

    @property
    def sampled_tokens(self) -> int:
        """Most tokens that an episode samples."""
        return sum(budgets_of(self.config))

    @property
    def text_tokens(self) -> int:
        """An episode's text: prompt, and for each text an opening token, the sampled ones and a forced stop."""
        return self.prompt_tokens + sum(budget + 2 for budget in budgets_of(self.config))

    @property
    def looked_at_tokens(self) -> int:
        """Tokens of an image that is looked at: its latents, the tower's view of it, or both, with boundary tokens."""
        how, vision = self.config.sampling.show_images, self.model.vision
        count = 0 if how == "tower" else self.image_tokens
        if "tower" in how and vision is not None:
            s = self.config.sampling
            sides = (min(vision.side, round(side / vision.patch_size)) for side in (s.height, s.width))
            count += prod(sides) + 2
        return count

    def context_tokens(self, k: int) -> int:
        """Most tokens in the context when the image of round k is painted."""
        texts = budgets_of(self.config)[: k + 1]
        return self.prompt_tokens + sum(budget + 2 for budget in texts) + k * self.looked_at_tokens

    @property
    def last_context_tokens(self) -> int:
        return self.context_tokens(self.rounds - 1)

    @property
    def latent_tokens(self) -> int:
        rows, columns = self.model.grid(self.config.sampling.height, self.config.sampling.width)
        return rows * columns

    @property
    def image_tokens(self) -> int:
        """Latent tokens and two boundary tokens."""
        return self.latent_tokens + 2

    @property
    def sde_steps(self) -> int:
        """Stochastic steps of an image."""
        s = self.config.sampling
        if self.config.objective.image != "transition":
            return 0
        return s.steps if s.window == "all" else s.window_size

    @property
    def noisy_images(self) -> int:
        """Noisy images of an image in replay: its stochastic steps, or noisings of its final latent."""
        return self.sde_steps or self.config.objective.draws

    @property
    def guided_calls(self) -> int:
        return guided_calls(self.config)

    @property
    def replays_images(self) -> bool:
        return replays_images(self.config)

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.config)

    @property
    def cached_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.model.num_hidden_layers * self.key_width * self.dtype_bytes

    @property
    def key_width(self) -> int:
        return self.model.num_key_value_heads * self.model.head_dim

    # ----- batches

    @cached_property
    def batch(self) -> BatchCounts:
        return batch_of(self.config)

    @property
    def batch_size(self) -> int:
        """Episodes sampled in one batch."""
        return self.config.sampling.batch_size

    @property
    def concurrent_batches(self) -> int:
        """Sampling batches that are computed at the same time; an evaluation may have any number."""
        if self.samples is None:
            return self.concurrent
        return max(1, min(self.concurrent, -(-self.samples // self.batch_size)))

    @property
    def micro_batch(self) -> int:
        """Episodes of one micro-batch, all of the largest length."""
        most = min(self.config.train.micro_batch_size, self.batch.each)
        if not self.config.train.max_tokens_per_micro_batch:
            return most
        images = self.rounds * self.noisy_images * self.guided_calls * self.image_tokens if self.replays_images else 0
        longest = self.last_context_tokens + images
        return max(1, min(most, self.config.train.max_tokens_per_micro_batch // longest))

    @property
    def concurrent_micro_batches(self) -> int:
        """Micro-batches that are computed at the same time; one where ranks pass sharded layers together."""
        return 1 if self.sharded else max(1, min(self.concurrent, -(-self.batch.each // self.micro_batch)))

    @property
    def replayed_image_tokens(self) -> int:
        """Image tokens of a micro-batch that a gradient passes; those of looks only where it is asked for."""
        looks = (self.rounds - 1) * self.looked_at_tokens if self.config.objective.grad_through_images else 0
        noisy = self.rounds * self.noisy_images * self.guided_calls * self.image_tokens if self.replays_images else 0
        return self.micro_batch * (noisy + looks)

    @property
    def replayed_text_tokens(self) -> int:
        """Text tokens of a micro-batch."""
        return self.micro_batch * self.text_tokens

    @property
    def replayed_contexts(self) -> int:
        """Tokens of the contexts that all noisy images of a micro-batch see, each its own copy."""
        return self.micro_batch * self.noisy_images * sum(self.context_tokens(k) for k in range(self.rounds))
