"""Text actions: inverse-CDF draws have the scored probabilities, temperature included."""

from __future__ import annotations

import pytest
import torch

from unigrpo_cli.algo.text import token

LOGITS = torch.tensor([1.0, -0.5, 2.0, -torch.inf, 0.3])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_have_the_scored_distribution(temperature: float) -> None:
    """On an even grid of uniforms, frequencies are the probabilities up to the grid: no chance involved."""
    count = 20000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = token(LOGITS.expand(count, -1), temperature=temperature, uniform=uniform)
    frequency = torch.bincount(drawn.id, minlength=5).double() / count
    expected = torch.softmax(LOGITS.double() / temperature, dim=0)
    assert (frequency - expected).abs().max() < 2 / count + 1e-6
    torch.testing.assert_close(drawn.log_prob.exp().double(), expected[drawn.id], rtol=1e-5, atol=1e-7)


def test_what_is_drawn_is_what_is_scored() -> None:
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(1))
    drawn = token(logits, temperature=0.7, uniform=uniform)
    assert torch.equal(token(logits, temperature=0.7, id=drawn.id).log_prob, drawn.log_prob)


@pytest.mark.parametrize("u", [0.0, 1.0 - 1e-16, 0.9999999999])
def test_impossible_tokens_are_never_drawn(u: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 500]] = 0.0
    drawn = token(logits, temperature=1.0, uniform=torch.tensor([u], dtype=torch.float64))
    assert drawn.id.item() in (3, 500)
    assert torch.isfinite(drawn.entropy).all()


def test_words_of_a_large_vocabulary_are_drawn_exactly() -> None:
    """150,000 equal words: the k-th part of [0, 1) is the k-th word's."""
    words = torch.tensor([0, 1, 70_000, 149_998, 149_999])
    drawn = token(torch.zeros(5, 150_000), temperature=1.0, uniform=(words.double() + 0.5) / 150_000)
    assert torch.equal(drawn.id, words)


def test_rare_words_after_a_common_one_can_be_drawn() -> None:
    """Two words of 2e-9 each after one of nearly 1: sums in fp32 end at 1 before them."""
    logits = torch.tensor([0.0, -20.0, -20.0])
    rare = torch.softmax(logits.double(), dim=0)[1].item()
    uniform = torch.tensor([0.5, 1 - 1.5 * rare, 1 - 0.5 * rare], dtype=torch.float64)
    assert token(logits.expand(3, -1), temperature=1.0, uniform=uniform).id.tolist() == [0, 1, 2]


def test_entropy() -> None:
    flat = token(torch.zeros(1, 8), temperature=1.0, id=torch.tensor([0]))
    assert flat.entropy.item() == pytest.approx(torch.log(torch.tensor(8.0)).item())


def test_greedy() -> None:
    drawn = token(LOGITS[None], temperature=0.0, uniform=torch.tensor([0.01], dtype=torch.float64))
    assert drawn.id.item() == 2


def test_needs_a_number_or_a_token() -> None:
    with pytest.raises(ValueError, match="either uniform"):
        token(LOGITS[None], temperature=1.0)
