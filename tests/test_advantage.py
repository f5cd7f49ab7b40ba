"""Group advantages: invariants, exact zeros, abstentions, combinations."""

from __future__ import annotations

import pytest
import torch

from unigrpo_cli.algo.advantage import combined_advantage, group_advantage, group_rank

REWARD = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.5], [5.0, 4.0, 4.0, 3.0]], dtype=torch.float64)


def test_by_hand() -> None:
    """Group (1, 2, 3, 6): mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    advantage = group_advantage(REWARD[:1], eps=0.0)
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]], dtype=torch.float64) / 3.5**0.5
    torch.testing.assert_close(advantage, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_sums_to_zero_in_every_group(std: str) -> None:
    assert group_advantage(REWARD, normalize=std).sum(dim=1).abs().max() < 1e-12


def test_invariant_to_scale_and_shift_only_with_group_std() -> None:
    scaled = 7.0 * REWARD - 3.0
    torch.testing.assert_close(group_advantage(scaled), group_advantage(REWARD), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(group_advantage(scaled, normalize="none"), group_advantage(REWARD, normalize="none"))


def test_batch_std_divides_all_groups_alike() -> None:
    centred = REWARD - REWARD.mean(dim=1, keepdim=True)
    expected = centred / centred.square().mean().sqrt()
    torch.testing.assert_close(group_advantage(REWARD, normalize="batch", eps=0.0), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 / 3])
@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_constant_group_is_exactly_zero(value: float, std: str) -> None:
    """0.1 three times is 0.30000000000000004: the mean alone leaves a residue, here for some group size."""
    residues = 0
    for size in range(2, 25):
        reward = torch.full((2, size), value, dtype=torch.float64)
        residues += int(reward[0].mean() != value)
        reward[1] = torch.arange(size)
        assert (group_advantage(reward, normalize=std)[0] == 0).all()
    assert residues or value == 0


def test_permuting_members_permutes_advantages() -> None:
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(group_advantage(REWARD[:, order]), group_advantage(REWARD)[:, order])


def test_clamp() -> None:
    reward = torch.zeros(1, 101)
    reward[0, 0] = 1.0
    assert group_advantage(reward).max() > 9.9
    assert group_advantage(reward, clamp=5.0).max() == 5.0


def test_abstentions_count_in_no_statistic() -> None:
    reward = REWARD.clone()
    reward[0, 3] = float("nan")
    valid = torch.isfinite(reward)
    advantage = group_advantage(reward, valid)
    assert advantage[0, 3] == 0
    torch.testing.assert_close(advantage[0, :3], group_advantage(REWARD[:1, :3])[0])


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_opinions_teach_nothing(left: int) -> None:
    valid = torch.zeros(1, 4, dtype=torch.bool)
    valid[0, :left] = True
    assert (group_advantage(REWARD[:1], valid) == 0).all()


def _combine(how: str, scale: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    other = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    known = torch.ones(3, 4, dtype=torch.bool)
    return combined_advantage(
        {"a": REWARD, "b": scale * other},
        {"a": 1.0, "b": 0.5},
        {"a": known, "b": known if valid is None else valid},
        how=how,
    )


@pytest.mark.parametrize("how", ["gdpo", "rank"])
def test_gdpo_and_rank_ignore_a_rewards_scale(how: str) -> None:
    torch.testing.assert_close(_combine(how, 1.0), _combine(how, 1000.0), rtol=1e-4, atol=1e-4)


def test_sum_does_not_ignore_it() -> None:
    assert not torch.allclose(_combine("sum", 1.0), _combine("sum", 1000.0), atol=1e-2)


def test_gdpo_keeps_a_member_that_abstains_in_one_reward() -> None:
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0, 3] = False
    assert _combine("gdpo", 1.0, valid)[0, 3] != 0
    assert _combine("sum", 1.0, valid)[0, 3] == 0


def test_weight_zero_is_only_watched() -> None:
    known = torch.ones(3, 4, dtype=torch.bool)
    alone = combined_advantage({"a": REWARD}, {"a": 1.0}, {"a": known}, how="sum")
    watched = combined_advantage(
        {"a": REWARD, "b": REWARD.flip(1)}, {"a": 1.0, "b": 0.0}, {"a": known, "b": known}, how="sum"
    )
    torch.testing.assert_close(alone, watched)
    with pytest.raises(ValueError, match="weight 0"):
        combined_advantage({"a": REWARD}, {"a": 0.0}, {"a": known}, how="sum")


def test_mid_ranks() -> None:
    reward = torch.tensor([[1.0, 5.0, 5.0, 100.0]])
    ranks = group_rank(reward, torch.ones(1, 4, dtype=torch.bool))
    assert ranks.tolist() == [[0.5, 2.0, 2.0, 3.5]]  # ties, oneself included, count one half


@pytest.mark.parametrize("how", ["gdpo", "rank"])
@pytest.mark.parametrize("left", [2, 4, 8])
def test_members_that_nothing_counts_do_not_inflate_the_others(how: str, left: int) -> None:
    """As in later rounds, which only some episodes reach: those have deviation 1, however few they are."""
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.rand(4, 8, generator=generator) for name in ("a", "b")}
    valid = {name: (torch.arange(8) < left).expand(4, 8) for name in rewards}
    found = combined_advantage(rewards, dict.fromkeys(rewards, 1.0), valid, how=how)
    assert found[valid["a"]].square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-4)
    assert not found[~valid["a"]].any()
    nobody = {name: torch.zeros(4, 8, dtype=torch.bool) for name in rewards}
    assert not combined_advantage(rewards, dict.fromkeys(rewards, 1.0), nobody, how=how).any()
