"""Guidance in closed form: what it is for, when it acts, and what each renormalisation holds constant."""

from __future__ import annotations

import pytest
import torch

from unigrpo_cli.algo.guidance import RENORMS, Guidance, guided


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64)


V, LESS_TEXT, LESS_IMAGE = _draw(2, 3, 4), _draw(2, 3, 4) + 0.5, _draw(2, 3, 4) - 0.5


def test_hand_worked_numbers() -> None:
    """One token of two numbers: v = (3, 4), without text (0, 0), without pictures (5, 0)."""
    v, zero, five = (torch.tensor([[x]], dtype=torch.float64) for x in ((3.0, 4.0), (0.0, 0.0), (5.0, 0.0)))
    plain = Guidance(text=2.0, renorm_least=1.0)
    assert guided(v, zero, None, plain).flatten().tolist() == [6.0, 8.0]
    assert guided(v, zero, None, Guidance(text=2.0)).flatten().tolist() == pytest.approx([3.0, 4.0])
    both = Guidance(text=2.0, image=3.0, renorm_least=1.0)
    assert guided(v, zero, five, both).flatten().tolist() == [8.0, 24.0], "five + 3 (twice v - five)"
    channel = Guidance(text=2.0, image=3.0, renorm="text_channel")
    assert guided(v, zero, five, channel).flatten().tolist() == pytest.approx([-1.0, 12.0]), "v first, then nothing"


@pytest.mark.parametrize("renorm", RENORMS)
def test_a_scale_of_one_changes_nothing(renorm: str) -> None:
    found = guided(V, LESS_TEXT, None, Guidance(text=1.0, renorm=renorm))
    assert torch.allclose(found, V, atol=1e-7)


def test_renormalisation_never_lengthens_and_shortens_to_the_unguided_norm() -> None:
    """Global: each row's whole norm; channel: each token's own; the direction stays."""
    raw = guided(V, LESS_TEXT, None, Guidance(text=5.0, renorm_least=1.0))
    for renorm, over in (("global", (1, 2)), ("channel", (2,)), ("text_channel", (2,))):
        found = guided(V, LESS_TEXT, None, Guidance(text=5.0, renorm=renorm))
        wanted = torch.minimum(raw.norm(dim=over), V.norm(dim=over))
        assert torch.allclose(found.norm(dim=over), wanted, rtol=1e-6)
        assert torch.allclose(found / found.norm(dim=over, keepdim=True), raw / raw.norm(dim=over, keepdim=True))
    least = guided(V, LESS_TEXT, None, Guidance(text=5.0, renorm_least=0.9))
    assert torch.allclose(least, 0.9 * raw), "five times as long is shortened by no more than this"


def test_rows_do_not_know_of_each_other() -> None:
    for renorm in RENORMS:
        guidance = Guidance(text=3.0, image=2.0, renorm=renorm)
        both = guided(V, LESS_TEXT, LESS_IMAGE, guidance)
        assert torch.equal(both[1:], guided(V[1:], LESS_TEXT[1:], LESS_IMAGE[1:], guidance))


@pytest.mark.parametrize(("t", "acts"), [(1.0, True), (0.41, True), (0.4, False), (0.39, False)])
def test_the_interval_excludes_its_lower_and_includes_its_upper_end(t: float, acts: bool) -> None:
    assert Guidance(text=4.0, above=0.4, up_to=1.0).acts(t) is acts


def test_no_text_guidance_means_none_at_all() -> None:
    assert not Guidance(text=1.0, image=4.0).acts(0.9)
    assert not Guidance(text=0.0, image=4.0).on


def test_an_unknown_renorm_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted are global, channel, text_channel"):
        Guidance(renorm="local")
