"""A pair from a directory. Configurations and headers are checked before weights are read; no file can run code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.models.mot.tokenizer import load_tokenizer, token_id
from unigrpo_cli.models.pair.facts import ASSISTANT, END, PAINTER, REASONER, THINK, THOUGHT, TURN, USER, PainterFacts
from unigrpo_cli.models.pair.painters import Autoencoder, Painter
from unigrpo_cli.models.pair.pipeline import read_pipeline
from unigrpo_cli.models.pair.policy import PairPolicy
from unigrpo_cli.models.pair.reasoner import Reasoner, Words
from unigrpo_cli.models.pair.weights import load_networks, options_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from unigrpo_cli.models.pair.options import PairOptions

PAD = "<|endoftext|>"
"""What Qwen's tokenizers pad with; another tokenizer pads with its end of turn."""


def load_pair(
    directory: Path, options: PairOptions, device: torch.device, dtype: torch.dtype, vae_tile_rows: int = 0
) -> PairPolicy:
    """The policy of a diffusers pipeline's directory, its weights frozen.

    Raises:
        WeightsError: when files are missing, damaged, not finite, or do not fit.
        UsageError: for options that this pair cannot have.
    """
    if vae_tile_rows:
        raise UsageError("sampling.vae_tile_rows is for models of family mot; leave it out")
    pipeline = read_pipeline(directory, options.reasoner).refuse_problems()
    saved = options_of(directory)
    conditioning = options.conditioning or saved.get("conditioning", "same-pass")
    instruction = saved.get("instruction", "") if options.instruction is None else options.instruction
    tokenizer = load_tokenizer(pipeline.tokenizer)
    words = words_of(tokenizer, pipeline.facts)
    re_encodes = conditioning == "re-encoded"
    if re_encodes and not words.marks:
        raise UsageError(
            f"model_options.conditioning=re-encoded takes a reasoner whose tokenizer has {THINK} and {THOUGHT}; give "
            "same-pass"
        )
    lm, painter, autoencoder = load_networks(pipeline, device, dtype, options.quantize)
    width = lm.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= width:
        raise WeightsError(f"{pipeline.tokenizer}: token id {largest} is beyond the reasoner's vocabulary of {width}")
    return PairPolicy(
        networks=nn.ModuleDict({REASONER: lm, PAINTER: painter}),
        tokenizer=tokenizer,
        reasoner=Reasoner(lm, words, pipeline.facts.layers, re_encodes),
        painter=Painter(painter, pipeline.facts),
        autoencoder=Autoencoder(autoencoder, pipeline.facts),
        pipeline=pipeline,
        instruction=str(instruction),
    )


def words_of(tokenizer: Tokenizer, facts: PainterFacts) -> Words:
    """Ids of the reasoner's turns. Thoughts are between their own tokens where the tokenizer has them."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    end, pad = token_id(tokenizer, TURN[1]), tokenizer.token_to_id(PAD)
    think, thought = tokenizer.token_to_id(THINK), tokenizer.token_to_id(THOUGHT)
    marks = think is not None and thought is not None
    return Words(
        open_id=ids(ASSISTANT)[-1] if think is None or thought is None else think,
        stop_id=end if think is None or thought is None else thought,
        pad_id=end if pad is None else pad,
        padded_to=facts.padded_to,
        before=ids(USER),
        after=ids(END + ASSISTANT + facts.answer),
        marks=marks,
    )
