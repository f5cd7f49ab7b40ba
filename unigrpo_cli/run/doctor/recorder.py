"""What the network is really fed and what it really says, row by row.

A `Witness` stands where a policy stands: rollout and replay talk to it as to the policy, and it writes down each
token, each noisy image, each time, each distribution over words and each velocity. What an episode claims can then
be compared with what was seen, and what replay feeds with what rollout fed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from unigrpo_cli.models.mot.context import Context
from unigrpo_cli.models.mot.network import MoTOutput, NoisyImage
from unigrpo_cli.models.policy import TrainablePolicy

Item = int | str
Told = tuple[Item, ...]
"""What a row was told: token ids, and for each picture that it was shown a digest of its latents or view."""
KEPT = 2**25
"""Numbers of distributions over words that are kept, 128 MiB of them; words beyond that are not looked at."""


@dataclass(frozen=True)
class Look:
    """One row's noisy image in one network call: what it was told before, latent [N, D], time, velocity [N, D]."""

    row: int
    told: Told
    x_ND: Tensor
    t: float
    v_ND: Tensor


@dataclass
class Account:
    """All that happened from one empty context on, e.g. one replay.

    Args:
        rows: of the context it began with.
        looks: noisy images in the order of calls.
        words: logits [V] by what was told before them.
        ends: what each row of the context was told, as of the latest text.
        astray: words that were predicted from padding.
    """

    rows: int
    looks: list[Look] = field(default_factory=list)
    words: dict[Told, Tensor] = field(default_factory=dict)
    ends: tuple[Told, ...] = ()
    astray: int = 0

    def paintings(self) -> list[list[Look]]:
        """Looks by row and context, each in the order of calls: the steps of one image."""
        found: dict[tuple[int, Told], list[Look]] = {}
        for look in self.looks:
            found.setdefault((look.row, look.told), []).append(look)
        return list(found.values())


@dataclass(frozen=True)
class ToldContext(Context):
    """A context that knows what its rows were told, and to which account that belongs."""

    told: tuple[Told, ...] = ()
    account: int = 0

    def select(self, index_B: Tensor) -> ToldContext:
        chosen = cast(ToldContext, super().select(index_B))
        return replace(chosen, told=tuple(self.told[row] for row in index_B.tolist()))

    def put(self, index_B: Tensor, rows: Context) -> ToldContext:
        put, told = cast(ToldContext, super().put(index_B, rows)), list(self.told)
        for row, own in zip(index_B.tolist(), cast(ToldContext, rows).told, strict=True):
            told[row] = own
        return replace(put, told=tuple(told))


@dataclass(frozen=True)
class _Read:
    """The latest text: states of its tokens, and what was fed."""

    account: Account
    before: tuple[Told, ...]
    ids: list[list[int]]
    lengths: list[int]
    hidden_BLC: Tensor


class Recorder:
    """A policy that is watched. Whatever is not defined here is the policy's own."""

    def __init__(self, policy: TrainablePolicy):
        self.policy = policy
        self.accounts: list[Account] = []
        self.of_reference: list[Account] = []
        self._read: _Read | None = None
        self._kept = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @property
    def as_policy(self) -> TrainablePolicy:
        """Itself, for signatures that name the class."""
        return cast(TrainablePolicy, self)

    def take(self) -> tuple[list[Account], list[Account]]:
        """What was seen of the policy and of its reference since the last call."""
        taken = self.accounts, self.of_reference
        self.accounts, self.of_reference, self._read, self._kept = [], [], None, 0
        return taken

    @contextmanager
    def reference(self) -> Iterator[Any]:
        with self.policy.reference() as beginning:
            watched = Recorder(beginning)
            yield watched
            self.of_reference += watched.accounts

    def empty_context(self, rows: int) -> ToldContext:
        self.accounts.append(Account(rows))
        own = vars(self.policy.empty_context(rows))
        return ToldContext(**own, told=((),) * rows, account=len(self.accounts) - 1)

    def forward(
        self,
        context: ToldContext,
        ids_BL: Tensor | None = None,
        length_B: list[int] | None = None,
        image: NoisyImage | None = None,
        *,
        seen_BNC: Tensor | None = None,
        keep_image: bool = False,
        **more: Any,
    ) -> MoTOutput:
        out = self.policy.forward(context, ids_BL, length_B, image, seen_BNC=seen_BNC, keep_image=keep_image, **more)
        account, told = self.accounts[context.account], context.told
        if ids_BL is not None:
            assert out.hidden_BLC is not None
            lengths = [ids_BL.shape[1]] * len(told) if length_B is None else list(length_B)
            self._read = _Read(account, told, ids_BL.tolist(), lengths, out.hidden_BLC.detach())
            told = tuple(t + tuple(row[:n]) for t, row, n in zip(told, self._read.ids, lengths, strict=True))
            account.ends = told
        if seen_BNC is not None:
            told = tuple((*t, _digest(row)) for t, row in zip(told, seen_BNC, strict=True))
        if image is not None and keep_image:
            told = tuple((*t, _digest(row)) for t, row in zip(told, image.x_BKND, strict=True))
        elif image is not None:
            assert out.velocity_BKND is not None
            x, t, v = (y.detach().cpu() for y in (image.x_BKND, image.t_BK, out.velocity_BKND))
            account.looks += [
                Look(row, told[row], x[row, k].clone(), float(t[row, k]), v[row, k].clone())
                for k in range(x.shape[1])
                for row in range(len(x))
            ]
        return replace(out, context=ToldContext(**vars(out.context), told=told, account=context.account))

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.policy.logits(hidden)
        if self._read is not None:
            self._note(self._read, hidden.detach(), out.detach())
        return out

    def _note(self, read: _Read, hidden: Tensor, logits: Tensor) -> None:
        """File distributions under what had been told before them: by the states they were made from."""
        length = read.hidden_BLC.shape[1]
        at = {state: k for k, state in reversed(list(enumerate(_rows(read.hidden_BLC))))}
        for state, row in zip(_rows(hidden), logits.reshape(-1, logits.shape[-1]), strict=True):
            found = at.get(state)
            if found is None:
                continue
            b, position = divmod(found, length)
            if position >= read.lengths[b]:
                read.account.astray += 1
                continue
            told = read.before[b] + tuple(read.ids[b][: position + 1])
            if told not in read.account.words and self._kept + len(row) <= KEPT:
                self._kept += len(row)
                read.account.words[told] = row.cpu().clone()


def _rows(states: Tensor) -> list[bytes]:
    """The bytes of each state, to tell them apart."""
    flat = states.reshape(-1, states.shape[-1]).contiguous().cpu()
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()]


def _digest(picture: Tensor) -> str:
    return hashlib.sha256(picture.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
