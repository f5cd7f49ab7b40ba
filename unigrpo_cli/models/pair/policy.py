"""The policy of a pair: a language model writes, a painter paints from its states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigrpo_cli.episode import GivenImage, GivenText, ImageActions, Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models import lora
from unigrpo_cli.models.base_options import refuse_full_tuning
from unigrpo_cli.models.pair import weights
from unigrpo_cli.models.pair.facts import ASSISTANT, END, PAINTER, REASONER, SYSTEM, TARGETS_LM, THINK, THOUGHT, USER
from unigrpo_cli.models.pair.painters import Autoencoder, Painter
from unigrpo_cli.models.pair.pipeline import Pipeline
from unigrpo_cli.models.pair.reasoner import PairContext, Reasoner
from unigrpo_cli.models.policy import Adapter, Finetune, Lengths, NoisyImage, PolicyOutput
from unigrpo_cli.models.quantized import kind_of, make_plain
from unigrpo_cli.models.sharding import fp32_masters, shard, whole
from unigrpo_cli.parallel.ranks import is_shared

EXPERTS = {REASONER: "text", PAINTER: "image"}


@dataclass(frozen=True)
class PairPolicy:
    """A language model and a painter that its states condition; implements `TrainablePolicy`.

    Args:
        networks: both, by the folders of a diffusers pipeline.
        instruction: a system turn before the prompt when the model thinks; "" for none.
        frozen: a copy of the starting weights when all weights are trained. With adapters it is None.
        hollow: the networks without their sharded matrices, to be filled for sampling and saving; None when all
            weights are whole.
    """

    networks: nn.ModuleDict
    tokenizer: Tokenizer
    reasoner: Reasoner
    painter: Painter
    autoencoder: Autoencoder
    pipeline: Pipeline
    instruction: str = ""
    frozen: nn.ModuleDict | None = None
    hollow: nn.ModuleDict | None = None

    # ----- words

    @property
    def open_id(self) -> int:
        return self.reasoner.words.open_id

    @property
    def stop_id(self) -> int:
        return self.reasoner.words.stop_id

    def preamble(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """The prompt as a user's turn: with reasoning up to its opening token, else in the painter's own template.

        One segment, so guidance compares with a turn without words, as the pipeline does.

        Raises:
            UsageError: when the prompt brings a picture, or holds the token that opens the reasoning.
        """
        if prompt.image is not None:
            self.require_vision()
        turn = USER + prompt.text + END + ASSISTANT
        if not think:
            return (self._given(turn + self.pipeline.facts.answer, prompt.text),)
        words = self.reasoner.words
        given = self._given((SYSTEM + self.instruction + END if self.instruction else "") + turn, prompt.text)
        if not words.marks:  # the turn's last token opens the text
            return (replace(given, ids=given.ids[:-1]),)
        if words.open_id in given.ids.tolist():
            raise UsageError(f"the prompt {prompt.text[:40]!r} holds {THINK}, which opens the reasoning; leave it out")
        return (given,)

    def _given(self, turn: str, text: str) -> GivenText:
        return GivenText("prompt", text, torch.tensor(self.tokenizer.encode(turn, add_special_tokens=False).ids))

    def question(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """As with reasoning before a picture: the answer is the text that the model writes."""
        return self.preamble(prompt, True)

    def require_vision(self) -> object:
        raise UsageError("a pair of a language model and a painter cannot look at pictures; leave them out")

    def decode_text(self, ids: Tensor) -> str:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return THINK + text if self.reasoner.words.marks else text

    def encode_text(self, text: str) -> Tensor:
        written = text.removeprefix(THINK).removesuffix(THOUGHT) if self.reasoner.words.marks else text
        return torch.tensor(self.tokenizer.encode(written, add_special_tokens=False).ids, dtype=torch.long)

    def has_token(self, text: str) -> bool:
        return self.tokenizer.token_to_id(text) is not None

    def unknown_words(self, text: str) -> list[str]:
        return []  # byte-level vocabularies read any text

    # ----- the networks

    @property
    def device(self) -> torch.device:
        return self.reasoner.device

    def empty_context(self, rows: int) -> PairContext:
        return self.reasoner.empty_context(rows)

    def forward(
        self,
        context: PairContext,
        ids_BL: Tensor | None = None,
        length_B: Lengths = None,
        image: NoisyImage | None = None,
        *,
        detach_context: bool = False,
    ) -> PolicyOutput:
        """Read text into the context, then give velocities of noisy images in it."""
        hidden = velocity = None
        if ids_BL is not None:
            context, hidden = self.reasoner.read(context, ids_BL, length_B)
        if image is not None:
            condition = context.detached_condition if detach_context else context.condition
            velocity = self.painter.velocity(image.x_BKND, image.t_BK, image.grid, condition)
        return PolicyOutput(context, hidden, velocity)

    def show(self, images: Sequence[ImageActions], how: str) -> list[GivenImage]:
        self.require_vision()
        return []

    def encode_image(
        self,
        context: PairContext,
        x_BND: Tensor,
        grid: tuple[int, int],
        view_BHWC: Tensor | None = None,
        *,
        detach: bool = False,
    ) -> PairContext:
        self.require_vision()
        return context

    def compiled(self) -> PairPolicy:
        raise UsageError("sampling.compile is for models of family mot; leave it out")

    def copies_at_once(self, image: NoisyImage) -> int:
        return image.x_BKND.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits; the opening token is impossible, and so are ids that the tokenizer does not have."""
        return self.reasoner.logits(hidden).index_fill(-1, self._impossible, -torch.inf)

    @cached_property
    def _impossible(self) -> Tensor:
        width = self.reasoner.network.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = set(range(width)) - set(self.tokenizer.get_vocab().values())
        if self.reasoner.words.marks:
            ids.add(self.open_id)
        return torch.tensor(sorted(ids), dtype=torch.long, device=self.device)

    # ----- pixels

    @property
    def token_dim(self) -> int:
        return self.painter.token_dim

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image.

        Raises:
            ValueError: when the size is no multiple of a token.
        """
        unit = self.autoencoder.pixels_per_latent * self.pipeline.facts.patch
        if height % unit or width % unit:
            raise ValueError(f"this painter's images have sides that are multiples of {unit}, not {height} x {width}")
        return height // unit, width // unit

    def shift(self, grid: tuple[int, int], steps: int) -> float:
        """The time shift of the pipeline's own scheduler."""
        schedule = self.pipeline.schedule
        mu = schedule.log_shift(grid[0] * grid[1], steps)
        return schedule.shift if mu is None else float(torch.tensor(mu, dtype=torch.float64).exp())

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.autoencoder.decode(x_BND, grid)

    def encode_pixels(self, pixels_BHWC: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels_BHWC)

    # ----- training

    @property
    def dtype(self) -> torch.dtype:
        return self.reasoner.network.get_input_embeddings().weight.dtype  # type: ignore[operator]

    @property
    def is_sharded(self) -> bool:
        return self.hollow is not None

    @property
    def adapter(self) -> Adapter | None:
        found = [lora.adapter_of(network) for network in self.networks.values()]
        own = [adapter for adapter in found if adapter is not None]
        return replace(own[0], idle=all(adapter.idle for adapter in own)) if own else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.networks.named_parameters()

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with gradients by expert."""
        return {
            expert: [p for p in self.networks[part].parameters() if p.requires_grad] for part, expert in EXPERTS.items()
        }

    def finetune(self, wanted: Finetune) -> PairPolicy:
        """Choose what is trained and keep the reference: adapters, or a frozen copy of the present weights.

        All weights are the matrices of both networks' layers; norms, embeddings and projections stay.

        Raises:
            UsageError: for what only other families can do, and for all weights where they are quantised.
        """
        if wanted.extra_modules:
            raise UsageError("train.extra_modules is for models of family mot; leave it out")
        if wanted.reference_on_host:
            raise UsageError("train.reference_device=host is for models of family mot; leave it out")
        refuse_full_tuning(kind_of(self.networks), wanted.full)
        targets = {REASONER: TARGETS_LM, PAINTER: self.pipeline.facts.targets}
        policy = self
        if wanted.full:
            self.networks.requires_grad_(False)
            for part, pattern in targets.items():
                if EXPERTS[part] in wanted.experts:
                    weights.make_trainable(self.networks[part], pattern)
            policy = self._with_frozen_copy()
            if wanted.shard_over > 1:
                policy = policy._sharded(targets, wanted.shard_over)
            fp32_masters(self.networks)
        else:
            for k, (part, pattern) in enumerate(targets.items()):
                if lora.adapter_of(self.networks[part]) is None:
                    rank, alpha = wanted.lora_rank, wanted.lora_alpha
                    lora.add_adapters(self.networks[part], pattern, rank, alpha, wanted.seed + k)
                for name, parameter in self.networks[part].named_parameters():
                    parameter.requires_grad_("lora_" in name and EXPERTS[part] in wanted.experts)
        if wanted.activation_checkpointing:
            self._checkpoint_activations()
        return policy

    def _checkpoint_activations(self) -> None:
        """Compute the painter's layers and the reasoner's MLPs again in the backward pass; keys and values are kept."""
        painter: Any = self.painter.network
        painter.enable_gradient_checkpointing()
        for layer in self.reasoner.body.layers:
            layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)

    def _with_frozen_copy(self) -> PairPolicy:
        """The same policy with its present weights kept as the reference; untrained weights are shared."""
        kept = {id(p): p for p in self.networks.parameters() if not p.requires_grad}
        frozen = copy.deepcopy(self.networks, memo=kept).requires_grad_(False)
        return replace(self, frozen=frozen)

    def _sharded(self, targets: Mapping[str, str], world: int) -> PairPolicy:
        """The same policy with the matrices of both networks and of the reference shared out over ranks, one by one.

        Not layer by layer: keys and values leave a layer through the cache, where FSDP does not see their gradients.
        """
        assert self.frozen is not None
        memo = {id(p): p for p in self.networks.parameters()}
        for part, pattern in targets.items():
            for matrix in weights.matrices(self.networks[part], pattern).values():
                memo |= {id(p): nn.Parameter(p.detach().to("meta")) for p in matrix.parameters()}
        hollow = copy.deepcopy(self.networks, memo=memo)
        for networks in (self.frozen, self.networks):
            for part, pattern in targets.items():
                called: Any = networks[part].base_model if part == REASONER else networks[part]
                shard(called, [*weights.matrices(networks[part], pattern).values()], world)
        return replace(self, hollow=hollow)

    def _filled(self, change: Callable[[Tensor], Tensor]) -> PairPolicy:
        """The policy with whole weights, the sharded ones changed; its other weights are shared."""
        assert self.hollow is not None
        memo = {}
        for (_, own), (_, place) in zip(self.named_parameters(), self.hollow.named_parameters(), strict=True):
            full = nn.Parameter(change(whole(own.detach())), own.requires_grad) if is_shared(own) else place
            memo[id(place)] = full
        return self._with(copy.deepcopy(self.hollow, memo=memo))

    def _with(self, networks: nn.ModuleDict) -> PairPolicy:
        """This policy with other networks and no reference."""
        return replace(
            self,
            networks=networks,
            reasoner=replace(self.reasoner, network=networks[REASONER]),
            painter=replace(self.painter, network=networks[PAINTER]),
            frozen=None,
            hollow=None,
        )

    @contextmanager
    def reference(self) -> Iterator[PairPolicy]:
        """The policy as it was before training: the frozen copy, or these networks with their adapters off."""
        if self.frozen is not None:
            yield self._with(self.frozen)
            return
        with lora.adapters_off(self.networks):
            yield self

    @contextmanager
    def gathered(self) -> Iterator[PairPolicy]:
        """The policy with whole weights in the dtype that the networks compute in, gone afterwards."""
        yield self._filled(lambda full: full.to(self.dtype)) if self.is_sharded else self

    def gathered_on_host(self, keep: bool) -> PairPolicy:
        """The policy with whole weights in host memory, to be saved; without `keep` they come to nothing."""
        if not self.is_sharded:
            return self
        return self._filled(lambda full: full.to("cpu" if keep else "meta"))

    # ----- files

    @property
    def options(self) -> dict[str, str]:
        """The options that go with the weights."""
        conditioning = "re-encoded" if self.reasoner.re_encodes else "same-pass"
        return {"conditioning": conditioning, "instruction": self.instruction}

    def save(self, directory: Path, base: str) -> None:
        """Write both adapters in PEFT's format, or a pipeline that diffusers loads."""
        weights.save(self.networks, self.pipeline, self.options, directory, base)

    def merged(self) -> PairPolicy:
        """The policy with its adapters added to the weights, which are this policy's own."""
        for network in self.networks.values():
            make_plain(network)
            if lora.adapter_of(network) is not None:
                lora.merge_adapters(network)
        return self

    def load_adapter(self, directory: Path) -> None:
        weights.load_adapters(self.networks, self.options, directory)

    def restore(self, directory: Path) -> None:
        weights.restore(self.networks, directory)
