"""Rewards that come with unigrpo. They enter by the same door as anyone's: see docs/rewards.md."""
