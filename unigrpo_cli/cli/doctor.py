"""`unigrpo doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.doctor import Finding


@one_error_line
def doctor(
    context: typer.Context,
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
    """Check what `unigrpo train` with the same options would do: episodes, replay, ratios, rewards, reference.

    Samples a few small groups (doctor.prompts, doctor.members), runs them through the functions of training, records
    what the network receives, and reports each check: ok, or what a fault means and what to do. Makes one trial
    update; trains and writes nothing. Exits with 6 on a fault. `train` runs a short form of this at its start.
    """
    from unigrpo_cli.errors import FaultError
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.doctor import FAULT, rows, show

    display = Display(json=json, quiet=quiet)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    settings = common.resolve_config(context)
    found = _findings(settings, plugins, display)
    if json:
        common.print_json(rows(found))
    else:
        show(found, display)
    wrong = [f.name for f in found if f.verdict == FAULT]
    if wrong:
        raise FaultError(f"the doctor found {len(wrong)} fault{'s' * (len(wrong) > 1)}: {', '.join(wrong)}")


def _findings(settings: Config, plugins: Plugins, display: Display) -> list[Finding]:
    """All checks, on the state that training with these settings would start from."""
    from unigrpo_cli.run.doctor import examine
    from unigrpo_cli.run.inputs import read_inputs
    from unigrpo_cli.run.prepare import prepare, with_sizes
    from unigrpo_cli.run.setup import check_prompts, is_embedded, open_rewards

    inputs = read_inputs(settings, plugins, display.say)
    prompts = inputs.prompts
    settings = with_sizes(inputs.config, None, prompts, display.say)
    state, _ = prepare(settings, None, None, display.warn)
    with open_rewards(inputs.rewards, plugins, settings, embedded=is_embedded(state.policy)) as rewards:
        check_prompts(rewards, prompts, settings.sampling.think, "train")
        return examine(state, prompts, rewards, settings, thorough=True)
