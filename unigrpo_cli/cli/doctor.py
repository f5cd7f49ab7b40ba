"""`unigrpo doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.doctor import Finding


@one_error_line
def doctor(
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    prompts: common.Prompts = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Examine what `unigrpo train` with the same options would do: episodes, replay, ratios, rewards, reference.

    Draws a few small groups (doctor.prompts, doctor.members), puts them through the functions that training uses,
    and says of each check whether it is ok, what it means if not, and what to do. Makes an update on trial; trains
    and writes nothing. Exits with 6 on a fault. `train` does a short form of this at its start.
    """
    from unigrpo_cli.errors import FaultError
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.doctor import FAULT, rows, show

    display = Display(json=json, quiet=quiet)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    settings = common.resolve_config(
        preset=preset,
        config=config,
        overrides=overrides,
        named={
            "model": model,
            "weights_file": weights_file,
            "adapter": adapter,
            "prompts": prompts,
            "seed": seed,
        },
        reward=reward,
        reward_opt=reward_opt,
    )
    found = _examined(settings, plugins, display)
    if json:
        common.print_json(rows(found))
    else:
        show(found, display)
    wrong = [f.name for f in found if f.verdict == FAULT]
    if wrong:
        raise FaultError(f"the doctor found {len(wrong)} fault{'s' * (len(wrong) > 1)}: {', '.join(wrong)}")


def _examined(settings: Config, plugins: Plugins, display: Display) -> list[Finding]:
    """All checks on what a training run of these settings would begin with."""
    from unigrpo_cli.run.doctor import findings, gather
    from unigrpo_cli.run.prepare import prepare, with_sizes
    from unigrpo_cli.run.setup import is_embedded, open_rewards, reward_choices
    from unigrpo_cli.suites import training_prompts

    plugins.call("unigrpo_configure", config=settings)
    choices = reward_choices(settings)
    asked = training_prompts(settings.prompts)
    settings = with_sizes(settings, None, asked, display.say)
    state, _, plan = prepare(settings, None, None, display.warn)
    with open_rewards(choices, plugins, settings, embedded=is_embedded(state.policy)) as rewards:
        rewards.check_needs([p.metadata for p in asked], has_reasoning=settings.sampling.think, split="train")
        return findings(gather(state, asked, rewards, settings, thorough=True, plan=plan))
