"""The contracts of a reward and of a model, for the tests of their authors.

from unigrpo_cli.testing import assert_reward_contract

def test_contract():
    assert_reward_contract("mine", plugin="mine.py")    # by name, as in `--reward` and `--plugin`
    assert_reward_contract(Mine, options={"gain": 2})   # by class
    assert_reward_contract(redness)                     # by function

def test_policy():
    assert_policy_contract(lambda: MyFamily().load(...))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unigrpo_cli.rewards.conformance import Check, check_reward, contrasting_samples, example_samples

__all__ = [
    "Check",
    "assert_policy_contract",
    "assert_reward_contract",
    "check_reward",
    "contrasting_samples",
    "example_samples",
]


def assert_reward_contract(reward: Any, **how: Any) -> list[Check]:
    """Run `check_reward` with the same arguments and return its checks.

    Raises:
        AssertionError: naming every broken promise and what was seen.
        RewardError: when the reward cannot be found or set up.
    """
    checks = check_reward(reward, **how)
    broken = [f"{check.name}: {check.seen}" for check in checks if not check.ok]
    if broken:
        raise AssertionError("the reward does not keep its contract: " + "; ".join(broken))
    return checks


def assert_policy_contract(load: Callable[[], Any], **how: Any) -> list[Check]:
    """Run `testing.policy.check_policy` with the same arguments and return its checks.

    Raises:
        AssertionError: naming every broken promise and what was seen.
    """
    from unigrpo_cli.testing.policy import check_policy  # imports torch

    checks = check_policy(load, **how)
    broken = [f"{check.name}: {check.seen}" for check in checks if not check.ok]
    if broken:
        raise AssertionError("the model does not keep its contract: " + "; ".join(broken))
    return checks
