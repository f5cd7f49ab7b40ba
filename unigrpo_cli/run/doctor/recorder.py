"""Records what the network actually receives and returns, row by row.

A `Recorder` takes the policy's place in rollout and replay. It records token ids, noisy images, times, logits and
velocities, so the checks can compare the network's inputs with the stored episodes, and replay with rollout.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from unigrpo_cli.models.policy import Context, Lengths, NoisyImage, PolicyOutput, TrainablePolicy

Item = int | str
Prefix = tuple[Item, ...]
"""What a row has received: token ids, and a digest of the latents or the view of each image."""
KEPT = 2**25
"""Logits that are kept, as a count of numbers (128 MiB); tokens beyond it are not checked."""


@dataclass(frozen=True)
class VelocityCall:
    """One row's noisy image in one network call: what the row had received, latent [N, D], time, velocity [N, D]."""

    row: int
    prefix: Prefix
    x_ND: Tensor
    t: float
    v_ND: Tensor


@dataclass
class Trace:
    """The network calls that start from one empty context, e.g. one replay.

    Args:
        calls: noisy images in the order of calls.
        logits: logits [V] by the prefix that they follow.
        prefixes: what each row had received after the latest text.
        reached: what any row had received after any text.
    """

    calls: list[VelocityCall] = field(default_factory=list)
    logits: dict[Prefix, Tensor] = field(default_factory=dict)
    prefixes: tuple[Prefix, ...] = ()
    reached: set[Prefix] = field(default_factory=set)

    def images(self) -> list[list[VelocityCall]]:
        """The calls of each image, in the order of its steps."""
        found: dict[tuple[int, Prefix], list[VelocityCall]] = {}
        for call in self.calls:
            found.setdefault((call.row, call.prefix), []).append(call)
        return list(found.values())


@dataclass(frozen=True)
class TracedContext:
    """A policy's context with what its rows have received, and the index of its trace."""

    own: Context
    prefixes: tuple[Prefix, ...]
    trace: int

    @property
    def rows(self) -> int:
        return self.own.rows

    def reserve(self, slots: int) -> TracedContext:
        return replace(self, own=self.own.reserve(slots))

    def select(self, index_B: Tensor) -> TracedContext:
        prefixes = tuple(self.prefixes[row] for row in index_B.tolist())
        return replace(self, own=self.own.select(index_B), prefixes=prefixes)

    def put(self, index_B: Tensor, rows: TracedContext) -> TracedContext:
        prefixes = list(self.prefixes)
        for row, prefix in zip(index_B.tolist(), rows.prefixes, strict=True):
            prefixes[row] = prefix
        return replace(self, own=self.own.put(index_B, rows.own), prefixes=tuple(prefixes))


@dataclass(frozen=True)
class _Text:
    """The latest text: its hidden states, and the prefix before and the ids of each row."""

    trace: Trace
    before: tuple[Prefix, ...]
    ids: list[list[int]]
    lengths: list[int]
    hidden_BLC: Tensor


class Recorder:
    """A policy that is recorded. Attributes that are not defined here are the policy's."""

    def __init__(self, policy: TrainablePolicy):
        self.policy = policy
        self.traces: list[Trace] = []
        self._text: _Text | None = None
        self._kept = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @property
    def as_policy(self) -> TrainablePolicy:
        """Itself, for signatures that name the class."""
        return cast(TrainablePolicy, self)

    def take(self) -> list[Trace]:
        """The traces since the last call."""
        taken = self.traces
        self.traces, self._text, self._kept = [], None, 0
        return taken

    def empty_context(self, rows: int) -> TracedContext:
        self.traces.append(Trace())
        return TracedContext(self.policy.empty_context(rows), ((),) * rows, len(self.traces) - 1)

    def forward(
        self,
        context: TracedContext,
        ids_BL: Tensor | None = None,
        length_B: Lengths = None,
        image: NoisyImage | None = None,
        *,
        detach_context: bool = False,
    ) -> PolicyOutput:
        out = self.policy.forward(context.own, ids_BL, length_B, image, detach_context=detach_context)
        trace, prefixes = self.traces[context.trace], context.prefixes
        if ids_BL is not None:
            assert out.hidden_BLC is not None
            lengths = [ids_BL.shape[1]] * len(prefixes)
            if length_B is not None:
                lengths = length_B.tolist() if isinstance(length_B, Tensor) else list(length_B)
            self._text = _Text(trace, prefixes, ids_BL.tolist(), lengths, out.hidden_BLC.detach())
            prefixes = tuple(p + tuple(ids[:n]) for p, ids, n in zip(prefixes, self._text.ids, lengths, strict=True))
            trace.prefixes = prefixes
            trace.reached.update(prefixes)
        if image is not None:
            assert out.velocity_BKND is not None
            x, t, v = (y.detach().cpu() for y in (image.x_BKND, image.t_BK, out.velocity_BKND))
            trace.calls += [
                VelocityCall(row, prefixes[row], x[row, k].clone(), float(t[row, k]), v[row, k].clone())
                for k in range(x.shape[1])
                for row in range(len(x))
            ]
        return replace(out, context=replace(context, own=out.context, prefixes=prefixes))

    def encode_image(
        self,
        context: TracedContext,
        x_BND: Tensor,
        grid: tuple[int, int],
        view_BHWC: Tensor | None = None,
        *,
        detach: bool = False,
    ) -> TracedContext:
        own = self.policy.encode_image(context.own, x_BND, grid, view_BHWC, detach=detach)
        prefixes = context.prefixes
        for image in (x_BND if x_BND.shape[1] else None, view_BHWC):
            if image is not None:
                prefixes = tuple((*p, digest_of(row)) for p, row in zip(prefixes, image, strict=True))
        return replace(context, own=own, prefixes=prefixes)

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.policy.logits(hidden)
        if self._text is not None:
            self._record_logits(self._text, hidden.detach(), out.detach())
        return out

    def _record_logits(self, text: _Text, hidden: Tensor, logits: Tensor) -> None:
        """Store logits by the prefix before them. Equal hidden states tell which position they belong to."""
        length = text.hidden_BLC.shape[1]
        at = {state: k for k, state in reversed(list(enumerate(_row_bytes(text.hidden_BLC))))}
        for state, row in zip(_row_bytes(hidden), logits.reshape(-1, logits.shape[-1]), strict=True):
            if state not in at:
                continue
            b, position = divmod(at[state], length)
            prefix = text.before[b] + tuple(text.ids[b][: position + 1])
            wanted = position < text.lengths[b] and prefix not in text.trace.logits
            if wanted and self._kept + len(row) <= KEPT:
                self._kept += len(row)
                text.trace.logits[prefix] = row.cpu().clone()


def _row_bytes(states: Tensor) -> list[bytes]:
    flat = states.reshape(-1, states.shape[-1]).contiguous().cpu()
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()]


def digest_of(picture: Tensor) -> str:
    """Of an image's latents or of its view, as a prefix has it."""
    return hashlib.sha256(picture.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
