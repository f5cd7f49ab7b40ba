"""Text actions: one function draws and scores a token.

The temperature is part of the distribution that is scored. There is no top-k and no top-p: cutting the
sampler but not the scorer makes "on policy" only nearly true.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """Sampled or given ids, their log-probabilities and the distribution's entropy (nats), each [...]."""

    id: Tensor
    log_prob: Tensor
    entropy: Tensor


def token(logits: Tensor, *, temperature: float, uniform: Tensor | None = None, id: Tensor | None = None) -> Token:
    """Draw a token with `uniform` in [0, 1), or score the given `id`.

    Drawing inverts the cumulative distribution: one random number per token, whatever the vocabulary, so a
    sample's stream of numbers does not depend on its neighbours. With temperature 0 the draw is the argmax
    and the score is that of temperature 1 (for evaluation; a greedy action has no density to train on).

    Args:
        logits: [..., V], fp32; impossible tokens at -inf.
        uniform: [...], float64.
        id: [...], long.

    Raises:
        ValueError: unless exactly one of `uniform` and `id` is given.
    """
    if (uniform is None) == (id is None):
        raise ValueError("give token() either uniform, to draw a token, or id, to score one")
    log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    probs = log_probs.exp()
    if id is None:
        assert uniform is not None
        if temperature == 0:
            id = logits.argmax(dim=-1)
        else:
            # float64: in fp32 the cumulative sum of a 150,000-word vocabulary ends visibly short of 1.
            cumulative = probs.double().cumsum(dim=-1)
            target = uniform.unsqueeze(-1) * cumulative[..., -1:]
            id = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
            id = id.clamp_max(logits.shape[-1] - 1)
    log_prob = log_probs.gather(-1, id.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # to be looked at, not trained on: a [tokens, V] graph less
        entropy = -(probs * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return Token(id, log_prob, entropy)
