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

from unigrpo_cli.models.mot.context import Context
from unigrpo_cli.models.mot.network import MoTOutput, NoisyImage
from unigrpo_cli.models.policy import TrainablePolicy

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
    """

    calls: list[VelocityCall] = field(default_factory=list)
    logits: dict[Prefix, Tensor] = field(default_factory=dict)
    prefixes: tuple[Prefix, ...] = ()

    def images(self) -> list[list[VelocityCall]]:
        """The calls of each image, in the order of its steps."""
        found: dict[tuple[int, Prefix], list[VelocityCall]] = {}
        for call in self.calls:
            found.setdefault((call.row, call.prefix), []).append(call)
        return list(found.values())


@dataclass(frozen=True)
class TracedContext(Context):
    """A context that carries what its rows have received, and the index of its trace."""

    prefixes: tuple[Prefix, ...] = ()
    trace: int = 0

    def select(self, index_B: Tensor) -> TracedContext:
        chosen = cast(TracedContext, super().select(index_B))
        return replace(chosen, prefixes=tuple(self.prefixes[row] for row in index_B.tolist()))

    def put(self, index_B: Tensor, rows: Context) -> TracedContext:
        merged, prefixes = cast(TracedContext, super().put(index_B, rows)), list(self.prefixes)
        for row, own in zip(index_B.tolist(), cast(TracedContext, rows).prefixes, strict=True):
            prefixes[row] = own
        return replace(merged, prefixes=tuple(prefixes))


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
        context = vars(self.policy.empty_context(rows))
        return TracedContext(**context, prefixes=((),) * rows, trace=len(self.traces) - 1)

    def forward(
        self,
        context: TracedContext,
        ids_BL: Tensor | None = None,
        length_B: list[int] | None = None,
        image: NoisyImage | None = None,
        *,
        seen_BNC: Tensor | None = None,
        keep_image: bool = False,
        **more: Any,
    ) -> MoTOutput:
        out = self.policy.forward(context, ids_BL, length_B, image, seen_BNC=seen_BNC, keep_image=keep_image, **more)
        trace, prefixes = self.traces[context.trace], context.prefixes
        if ids_BL is not None:
            assert out.hidden_BLC is not None
            lengths = [ids_BL.shape[1]] * len(prefixes) if length_B is None else list(length_B)
            self._text = _Text(trace, prefixes, ids_BL.tolist(), lengths, out.hidden_BLC.detach())
            prefixes = tuple(p + tuple(ids[:n]) for p, ids, n in zip(prefixes, self._text.ids, lengths, strict=True))
            trace.prefixes = prefixes
        if seen_BNC is not None:
            prefixes = tuple((*p, _digest(row)) for p, row in zip(prefixes, seen_BNC, strict=True))
        if image is not None and keep_image:
            prefixes = tuple((*p, _digest(row)) for p, row in zip(prefixes, image.x_BKND, strict=True))
        elif image is not None:
            assert out.velocity_BKND is not None
            x, t, v = (y.detach().cpu() for y in (image.x_BKND, image.t_BK, out.velocity_BKND))
            trace.calls += [
                VelocityCall(row, prefixes[row], x[row, k].clone(), float(t[row, k]), v[row, k].clone())
                for k in range(x.shape[1])
                for row in range(len(x))
            ]
        return replace(out, context=TracedContext(**vars(out.context), prefixes=prefixes, trace=context.trace))

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


def _digest(picture: Tensor) -> str:
    return hashlib.sha256(picture.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
