"""The hooks of unigrpo (pluggy). A plugin implements any of them with `unigrpo_cli.hookimpl`.

Rewards are *registered* through a hook and *called* as objects: a hook call reaches every plugin, while a reward has
its own options and device. An implementation may take fewer arguments than the hook offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_cli.episode import Group
    from unigrpo_cli.models.family import ModelRegistry
    from unigrpo_cli.programs import ProgramRegistry
    from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardResult
    from unigrpo_cli.suites import SuiteRegistry

PROJECT = "unigrpo"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """All hooks, in the order in which a run calls them."""

    @hookspec(historic=True)
    def unigrpo_register_rewards(self, registry: Any) -> None:
        """Add rewards: `registry.add(name, factory)`. A single reward needs only an entry point."""

    @hookspec(historic=True)
    def unigrpo_register_suites(self, registry: SuiteRegistry) -> None:
        """Add evaluation suites: `registry.add(name, load, summary=...)`, `load()` giving a list of prompts."""

    @hookspec(historic=True)
    def unigrpo_register_models(self, registry: ModelRegistry) -> None:
        """Add families of models: `registry.add(family)`, see `models.family.ModelFamily`."""

    @hookspec(historic=True)
    def unigrpo_register_programs(self, registry: ProgramRegistry) -> None:
        """Add programs of episodes: `registry.add(Program(...))`, see docs/interleaved.md."""

    @hookspec(historic=True)
    def unigrpo_register_commands(self, app: Any) -> None:
        """Add sub-commands to the Typer application: `app.add_typer(...)`."""

    @hookspec
    def unigrpo_configure(self, config: Any) -> None:
        """Called with the resolved, frozen configuration before anything is loaded; raise UsageError to refuse it."""

    @hookspec
    def unigrpo_reward_setup(self, name: str, reward: Any, context: RewardContext) -> None:
        """Called after a reward is ready."""

    @hookspec(firstresult=True)
    def unigrpo_before_score(self, batch: RewardBatch) -> RewardBatch | None:
        """Return a changed batch (resized, cropped) of the same samples, or None to keep it."""

    @hookspec
    def unigrpo_after_score(self, name: str, batch: RewardBatch, scored: RewardResult) -> None:
        """Called with a copy of a reward's result. An exception here is a warning and does not stop a run."""

    @hookspec(firstresult=True)
    def unigrpo_combine_rewards(
        self, rewards: dict[str, Tensor], valid: dict[str, Tensor], weights: dict[str, float]
    ) -> Tensor | None:
        """Advantages [P, G] from rewards and validity [P, G] by name, or None for the built-in combination."""

    @hookspec
    def unigrpo_after_step(self, step: int, metrics: dict[str, Any], groups: list[Group]) -> None:
        """Called after each training step with its line of metrics.jsonl and the groups of episodes that were drawn.

        With several ranks it is called on the first, with the groups of that rank. An exception here is a warning and
        does not stop a run.
        """

    @hookspec(firstresult=True)
    def unigrpo_advantage_map(
        self,
        name: str,
        options: dict[str, Any],
        batch: RewardBatch,
        grids: list[tuple[int, int]],
        context: RewardContext,
    ) -> Sequence[Any] | None:
        """Weights of the positions of each picture, for `advantage.map=name`; None when the name is another's.

        One array [rows, columns] >= 0 per sample, of that picture's token grid; it is divided by its mean.
        """

    @hookspec
    def unigrpo_reward_teardown(self, name: str, reward: Any) -> None:
        """Called before a reward is closed."""
