"""Credit in closed form: returns, discount, early stops, abstaining members, groups with one member."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unigrpo_cli.algo.advantage import group_advantage
from unigrpo_cli.algo.credit import (
    IMAGE,
    NONE,
    TEXT,
    reward_to_go,
    same_segment,
    segment_advantages,
    shuffled,
    terminal,
)

TWO = [TEXT, IMAGE, TEXT, IMAGE]
STOPPED = [TEXT, IMAGE, TEXT, NONE]
NAN = float("nan")


def _returns(rewards: list, kinds: list[int], **more) -> list[float]:
    """Returns of one episode; None where the reward does not speak of a segment."""
    reward = torch.tensor([[NAN if r is None else r for r in rewards]])
    given = torch.tensor([[r is not None for r in rewards]])
    found, known = reward_to_go(reward, given, torch.tensor([kinds]), **({"discount": 1.0, "rounds": 2} | more))
    return [g if k else None for g, k in zip(found[0].tolist(), known[0].tolist(), strict=True)]


@pytest.mark.parametrize(
    ("rewards", "kinds", "discount", "expected"),
    [
        ([None, 3.0, None, 5.0], TWO, 1.0, [8.0, 8.0, 5.0, 5.0]),  # plan and picture 1 answer for both pictures
        ([None, 3.0, None, 5.0], TWO, 0.5, [5.5, 5.5, 5.0, 5.0]),  # one picture lies between
        ([None, 3.0, None, 5.0], TWO, 0.0, [3.0, 3.0, 5.0, 5.0]),
        ([None, 3.0, 2.0, 5.0], TWO, 1.0, [10.0, 10.0, 7.0, 5.0]),  # a true reflection is not the last picture's
        ([None, 3.0, 2.0, 5.0], TWO, 0.5, [6.5, 6.5, 7.0, 5.0]),
        ([1.0, 3.0, None, None], [TEXT, IMAGE, NONE, NONE], 1.0, [7.0, 6.0, 3.0, 3.0]),
        ([None, 3.0, None, None], STOPPED, 1.0, [6.0, 6.0, 3.0, 3.0]),  # the kept picture stands in round 2
        ([None, 3.0, None, None], STOPPED, 0.5, [4.5, 4.5, 3.0, 3.0]),
        ([None, NAN, None, 5.0], TWO, 1.0, [None, None, 5.0, 5.0]),  # an abstention spoils what answers for it
        ([None, 3.0, None, NAN], TWO, 1.0, [None, None, None, None]),
        ([None, None, 2.0, None], TWO, 1.0, [2.0, 2.0, 2.0, 0.0]),  # nothing is said of picture 2
    ],
)
def test_returns_by_hand(rewards: list, kinds: list[int], discount: float, expected: list) -> None:
    assert _returns(rewards, kinds, discount=discount) == pytest.approx(expected)


def test_a_stop_in_the_first_of_four_rounds() -> None:
    """r (1 + d + d^2) for the words that stop, and r + d times that for what came before."""
    r, d = 2.0, 0.9
    stands = r * (1 + d + d**2)
    found = _returns([None, r, None], [TEXT, IMAGE, TEXT], discount=d, rounds=4)
    assert found == pytest.approx([r + d * stands, r + d * stands, stands], rel=1e-12)


def test_returns_are_the_sum_they_are_said_to_be() -> None:
    """Against the double sum over s' >= s, for random rewards of three rounds."""
    kinds = [TEXT, IMAGE] * 3
    reward = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kind_BS, given = torch.tensor([kinds] * 5), torch.ones(5, 6, dtype=torch.bool)
    found, _ = reward_to_go(reward, given, kind_BS, discount=0.7, rounds=3)
    before = [sum(kind == IMAGE for kind in kinds[:s]) for s in range(6)]
    for s in range(6):
        expected = sum(0.7 ** (before[t] - before[s]) * reward[:, t] for t in range(s, 6))
        torch.testing.assert_close(found[:, s], expected, rtol=1e-12, atol=1e-14)


def _advantages(reward_BS: Tensor, kind_BS: Tensor, prompts: int, rounds: int = 2) -> Tensor:
    given_BS = kind_BS == IMAGE
    found, known = reward_to_go(reward_BS, given_BS, kind_BS, discount=1.0, rounds=rounds)

    def of_groups(rewards: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        return group_advantage(rewards["r"], valid["r"])

    return segment_advantages({"r": found}, {"r": known}, kind_BS, of_groups, prompts=prompts)


def test_one_round_is_terminal_credit_to_the_bit() -> None:
    score_B = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kind_BS = torch.tensor([[TEXT, IMAGE]] * 8)
    reward_BS = torch.stack([torch.full((8,), NAN, dtype=torch.float64), score_B], dim=1)
    own = _advantages(reward_BS, kind_BS, prompts=2, rounds=1)
    whole = terminal(group_advantage(score_B.view(2, 4)).flatten(), kind_BS)
    assert torch.equal(own, whole)


def test_segments_are_compared_with_the_same_segment_of_their_group() -> None:
    """Four members, two of which stopped: each column has mean 0 and deviation 1 over those that have the segment."""
    kind_BS = torch.tensor([TWO, STOPPED, TWO, STOPPED])
    reward_BS = torch.tensor([[NAN, 0.0, NAN, 1.0], [NAN, 1.0, NAN, NAN], [NAN, 0.5, NAN, 0.2], [NAN, 0.0, NAN, NAN]])
    found = _advantages(reward_BS, kind_BS, prompts=1)
    plan = group_advantage(torch.tensor([[1.0, 2.0, 0.7, 0.0]], dtype=torch.float64))[0]
    torch.testing.assert_close(found[:, 0], plan)
    torch.testing.assert_close(found[:, 1], plan)
    words = group_advantage(torch.tensor([[1.0, 1.0, 0.2, 0.0]], dtype=torch.float64))[0]
    torch.testing.assert_close(found[:, 2], words)
    assert found[0, 2] == found[1, 2], "to stop on a right picture is worth as much as to paint one"
    torch.testing.assert_close(found[[0, 2], 3], torch.tensor([1.0, -1.0], dtype=torch.float64), atol=1e-4, rtol=0)
    assert found[1, 3] == found[3, 3] == 0, "a segment that is not there has no advantage"


def test_a_group_with_one_member_that_has_a_segment_teaches_it_nothing() -> None:
    kind_BS = torch.tensor([TWO, STOPPED, STOPPED])
    reward_BS = torch.tensor([[NAN, 0.0, NAN, 1.0], [NAN, 1.0, NAN, NAN], [NAN, 0.0, NAN, NAN]])
    found = _advantages(reward_BS, kind_BS, prompts=1)
    assert found[0, 3] == 0
    assert (found[:, :3].abs().sum(dim=0) > 0).all()


def test_an_abstaining_member_counts_in_no_statistic() -> None:
    kind_BS = torch.tensor([TWO] * 4)
    reward_BS = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    spoilt = reward_BS.clone()
    spoilt[3, 1] = NAN
    found, three = _advantages(spoilt, kind_BS, prompts=1), _advantages(reward_BS[:3], kind_BS[:3], prompts=1)
    torch.testing.assert_close(found[:3, :2], three[:, :2])
    assert (found[3, :2] == 0).all()
    torch.testing.assert_close(found[:, 2:], _advantages(reward_BS, kind_BS, prompts=1)[:, 2:])


def test_segments_are_numbered_by_kind() -> None:
    masks = same_segment(torch.tensor([TWO, STOPPED, [IMAGE, TEXT, TEXT, IMAGE]]))
    assert list(masks) == ["text_1", "text_2", "image_1", "image_2"]
    assert masks["text_2"].nonzero().tolist() == [[0, 2], [1, 2], [2, 2]]
    assert masks["image_2"].nonzero().tolist() == [[0, 3], [2, 3]]


def test_shuffling_permutes_each_segment_over_the_episodes_that_have_it() -> None:
    kind_BS = torch.tensor([TWO, STOPPED] * 6)
    advantage_BS = torch.where(kind_BS != NONE, torch.arange(48.0).view(12, 4), 0.0)
    found = shuffled(advantage_BS, kind_BS, seed=0)
    for at_BS in same_segment(kind_BS).values():
        assert sorted(found[at_BS].tolist()) == sorted(advantage_BS[at_BS].tolist())
        assert (found[at_BS] != advantage_BS[at_BS]).any()
    assert (found[kind_BS == NONE] == 0).all()
