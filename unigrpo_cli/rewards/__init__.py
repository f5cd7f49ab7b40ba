"""Rewards: how they are found, named, called and checked. Writing one: docs/rewards.md."""
