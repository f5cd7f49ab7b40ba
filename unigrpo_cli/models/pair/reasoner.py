"""The language model of a pair: it reads with a cache, writes, and its states condition the painter.

Shape letters: B rows, L new tokens, S slots read so far, C numbers of a state, T states that condition a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from unigrpo_cli.models.policy import Lengths


@dataclass(frozen=True)
class Words:
    """Token ids of the reasoner's turns.

    Args:
        open_id, stop_id: begin and end of the text that the reasoner writes.
        pad_id: fills a text up to `padded_to`; 0 for `padded_to` leaves rows ragged.
        before, after: ids around a user's words in the painter's own template.
        marks: the opening token occurs nowhere else, so the written text can be found by it.
    """

    open_id: int
    stop_id: int
    pad_id: int
    padded_to: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    marks: bool


@dataclass(frozen=True)
class PairContext:
    """What B rows have read: ids, keys and values of every layer, and the states that condition the painter.

    Slots are filled left to right for all rows at once; a row with fewer tokens has invalid slots, which are masked.

    Args:
        cache: per layer keys and values [B, H, S, E]; empty before the first token.
    """

    reader: Reasoner
    ids_BS: Tensor
    valid_BS: Tensor
    states_BSC: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...]

    @property
    def rows(self) -> int:
        return len(self.ids_BS)

    @property
    def used(self) -> int:
        return self.ids_BS.shape[1]

    def reserve(self, slots: int) -> PairContext:
        return self

    def select(self, index_B: Tensor) -> PairContext:
        return self._each(lambda x: x[index_B])

    def put(self, index_B: Tensor, rows: PairContext) -> PairContext:
        """This context with `rows`, selected from it and extended since; other rows have no valid new slots."""
        more = rows.used - self.used

        def placed(own: Tensor, new: Tensor, dim: int) -> Tensor:
            pad = [0, 0] * (own.ndim - 1 - dim) + [0, more]
            return F.pad(own, pad).index_copy(0, index_B, new)

        own = self.cache or [[x.new_zeros(self.rows, x.shape[1], 0, x.shape[3]) for x in layer] for layer in rows.cache]
        return replace(
            self,
            ids_BS=placed(self.ids_BS, rows.ids_BS, 1),
            valid_BS=placed(self.valid_BS, rows.valid_BS, 1),
            states_BSC=placed(self.states_BSC, rows.states_BSC, 1),
            cache=tuple((placed(k, rk, 2), placed(v, rv, 2)) for (k, v), (rk, rv) in zip(own, rows.cache, strict=True)),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairContext:
        return replace(
            self,
            ids_BS=change(self.ids_BS),
            valid_BS=change(self.valid_BS),
            states_BSC=change(self.states_BSC),
            cache=tuple((change(k), change(v)) for k, v in self.cache),
        )

    @cached_property
    def condition(self) -> tuple[Tensor, ...]:
        """States [T, C] of each row that condition the painter; made once, for all steps of an image."""
        return self.reader.condition(self)

    @cached_property
    def detached_condition(self) -> tuple[Tensor, ...]:
        """The same without a gradient."""
        with torch.no_grad():
            return tuple(row.detach() for row in self.reader.condition(self))


@dataclass(frozen=True)
class Reasoner:
    """A transformers causal LM.

    Args:
        layers: hidden states that condition the painter, side by side.
        re_encodes: the painter is conditioned on the written text read anew as a user's words, instead of on the
            states of the pass that wrote it.
    """

    network: nn.Module
    words: Words
    layers: tuple[int, ...]
    re_encodes: bool = False

    @property
    def body(self) -> Any:
        return self.network.base_model

    @cached_property
    def _cache_argument(self) -> str:
        """Newer versions of transformers call it `cache`."""
        return "cache" if "cache" in inspect.signature(self.body.forward).parameters else "past_key_values"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def empty_context(self, rows: int) -> PairContext:
        device, head = self.device, self.network.get_input_embeddings().weight  # type: ignore[operator]
        return PairContext(
            self,
            torch.zeros(rows, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, dtype=torch.bool, device=device),
            torch.zeros(rows, 0, head.shape[1] * len(self.layers), dtype=head.dtype, device=device),
            (),
        )

    def read(self, context: PairContext, ids_BL: Tensor, length_B: Lengths) -> tuple[PairContext, Tensor]:
        """The context after right-padded text, and the last layer's states of it."""
        valid_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        if length_B is not None:
            length = torch.as_tensor(length_B, device=ids_BL.device)
            valid_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < length[:, None]
        found, cache = self._pass(context, ids_BL, valid_BL)
        return PairContext(
            self,
            torch.cat([context.ids_BS, ids_BL], 1),
            torch.cat([context.valid_BS, valid_BL], 1),
            torch.cat([context.states_BSC, self._chosen(found.hidden_states)], 1),
            cache,
        ), found.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.network.get_output_embeddings()(hidden).float()  # type: ignore[operator]

    def condition(self, context: PairContext) -> tuple[Tensor, ...]:
        """The states [T, C] of each row: of all that it has read, or of its written text as a user's words."""
        if self.re_encodes or not context.used:
            context = self._own_turns(context)
        rows = [states[valid] for states, valid in zip(context.states_BSC, context.valid_BS, strict=True)]
        return self._padded(context, rows) if self.words.padded_to else tuple(rows)

    def _own_turns(self, context: PairContext) -> PairContext:
        """Each row's written text in the painter's template; a row that wrote none keeps what it has read.

        Token ids are used again: text is never tokenised a second time. A row that has read nothing is a turn without
        words, as guidance compares with.
        """
        w, turns = self.words, []
        for ids, valid in zip(context.ids_BS, context.valid_BS, strict=True):
            own = ids[valid].tolist()
            if own and (w.open_id not in own or own[-len(w.after) :] == [*w.after]):  # its end may have empty thoughts
                turns.append(own)
                continue
            written = own[len(own) - own[::-1].index(w.open_id) :] if own else []
            turns.append([*w.before, *(k for k in written if k != w.stop_id), *w.after])
        ids = pad_sequence([torch.tensor(turn) for turn in turns], batch_first=True, padding_value=w.pad_id)
        lengths = [len(turn) for turn in turns]
        return self.read(self.empty_context(len(turns)), ids.to(self.device), lengths)[0]

    def _padded(self, context: PairContext, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rows filled up with the states of padding tokens, to the next multiple of `padded_to`."""
        unit, lengths = self.words.padded_to, [len(row) for row in rows]
        lacking = [-n % unit for n in lengths]
        pads = torch.full((len(rows), max(1, *lacking)), self.words.pad_id, device=self.device)  # ranks pass alike
        found, _ = self._pass(context, pads, torch.zeros_like(pads, dtype=torch.bool))
        states = self._chosen(found.hidden_states)
        return tuple(torch.cat([row, more[:n]]) for row, more, n in zip(rows, states, lacking, strict=True))

    def _chosen(self, hidden_states: Sequence[Tensor]) -> Tensor:
        return torch.cat([hidden_states[k] for k in self.layers], dim=-1)

    def _pass(
        self, context: PairContext, ids_BL: Tensor, valid_BL: Tensor
    ) -> tuple[Any, tuple[tuple[Tensor, Tensor], ...]]:
        """A pass of the network over new tokens, in their places behind the valid ones; and the cache after it.

        Tokens that do not count are placed one after another too, and see only valid ones: so padding gets the states
        that it has in the pipeline.
        """
        cache = DynamicCache()
        for k, (keys, values) in enumerate(context.cache):
            cache.update(keys, values, k)
        position_BL = context.valid_BS.sum(1, keepdim=True) + torch.arange(ids_BL.shape[1], device=ids_BL.device)
        found = self.body(
            input_ids=ids_BL,
            attention_mask=torch.cat([context.valid_BS, valid_BL], 1).long(),
            position_ids=position_BL,
            use_cache=True,
            output_hidden_states=True,
            **{self._cache_argument: cache},
        )
        return found, tuple((layer.keys, layer.values) for layer in cache.layers)
