"""Configuration: precedence, types, near misses, and that it survives being written down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from unigrpo_cli.cli import app
from unigrpo_cli.config import PRESETS, Config, config_keys, elsewhere, load_config, to_toml
from unigrpo_cli.config.loading import REMOVED, RENAMED
from unigrpo_cli.errors import UsageError
from unigrpo_cli.rewards.batch import COLUMNS


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[train]\nsteps = 7\nlr_text = 0.5\n")
    config = load_config(file=file, overrides=["train.steps=8"], named={"seed": 9, "train.lr_image": None})
    assert (config.train.steps, config.train.lr_text, config.seed) == (8, 0.5, 9)
    assert config.preset == "embedded"
    assert load_config(file=file).train.steps == 7


def test_the_papers_values_are_the_paper_presets() -> None:
    """Table 3 and the equations, one by one."""
    c = load_config(preset="paper")
    s, o, t = c.sampling, c.objective, c.train
    assert (s.steps + 1, s.shift, s.noise_level, s.sde, s.temperature) == (25, 3.0, 0.8, "flow", 1.0)
    assert (s.window, s.window_range, s.window_size) == ("random", (0, 5), 3)
    assert (s.height, s.width) == (1024, 1024)
    assert (o.image_clip, o.penalty, o.penalty_weight) == (1e-6, "velocity-mse", 1.5e-5)
    assert (o.image_weight, o.text_kl, o.trust_region) == (1.0, 0.0, "ratio-norm")
    assert (t.group_size, t.prompts_per_step, t.lr_text, t.lr_image) == (24, 32, 1e-6, 3e-5)
    assert c.eval.steps + 1 == 50
    assert c.advantage.normalize == "group"


@pytest.mark.parametrize("preset", PRESETS)
def test_written_down_and_read_again_it_is_the_same(tmp_path: Path, preset: str) -> None:
    config = load_config(preset=preset, overrides=["reward.options={clip.model = 'a,b'}", "advantage.clamp=2.5"])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(file=file) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=3", "unknown configuration key 'train.stpes': did you mean train.steps"),
        ("steps=3", "did you mean"),
        ("train.sde=cps", "did you mean sampling.sde"),
        ("train.learning_rate=1e-5", "use train.lr_text and train.lr_image"),
        ("num_generations=8", "use train.group_size"),
        ("nonsense.key=1", "unknown configuration key 'nonsense'"),
        ("train=3", "is a section"),
        ("train.steps", "section.key=value"),
        ("train.steps=many", "train.steps = 'many'"),
        ("train.steps=-1", "greater than or equal to 0"),
        ("train.group_size=1", "greater than or equal to 2"),
        ("train.lr_text=nan", "finite"),
        ("objective.image_clip=0", "greater than 0"),
        ("sampling.sde=euler", "'flow', 'dance' or 'cps'"),
        ("sampling.window_size=9", "does not fit"),
        (["objective.image=fpo", "objective.trust_region=ratio"], "is about denoising steps"),
        (["objective.image=nft", "objective.penalty=latent-kl"], "set velocity-mse"),
        (["objective.image=fpo", "advantage.map=features"], "is about denoising steps"),
        (["objective.image=nft", "sampling.guidance_text=3"], "leave out sampling.guidance_text"),
        ("sampling.guidance_image=1e30", "less than or equal to 100"),
        (["objective.image=nft", "advantage.clamp=0"], "divides by advantage.clamp"),
        ("train.minibatches=3", "must divide train.prompts_per_step"),
        ("sampling.shift=inf", "finite"),
        ("train.betas=[2, 3]", "less than 1"),
        ("sampling.shift=1e9", "less than 1e-6 apart; set a shift nearer to 1 or fewer steps"),
        ("sampling.shift=1e-7", "less than 1e-6 apart"),
        ("eval.steps=1000000", r"eval.steps=1000000 puts times"),
        ("sampling.noise_level=1e-5", "greater than or equal to 0.001"),
        ("sampling.noise_level=30", "less than or equal to 10"),
        ("sampling.temperature=1e-3", "sampling.temperature=0.001: set 0.01 or more, or 0 for greedy"),
        ("eval.temperature=1000", "less than or equal to 100"),
        ("eval.guidance_text=1e30", "less than or equal to 100"),
        ("reward.names=geneval", r'e.g. \["geneval"\]'),
        ("preset=paper", "--preset paper"),
    ],
)
def test_what_is_refused(override: str | list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(overrides=[override] if isinstance(override, str) else override)


def test_old_keys_say_what_became_of_them(tmp_path: Path) -> None:
    """Each by itself, and all of a file in one message; every new name is a key or a section."""
    for old, new in RENAMED.items():
        key = old if "." in old else f"{old}.kl_text"
        with pytest.raises(UsageError, match=re.escape(f"{old} is now {new}")):
            load_config(overrides=[f"{key}=1"])
        assert new.split(" ")[0] in {*config_keys(), *Config.model_fields}
    for old, why in REMOVED.items():
        assert old not in config_keys()
        with pytest.raises(UsageError, match=re.escape(f"{old} is removed: {why}")):
            load_config(overrides=[f"{old}=1"])
    (tmp_path / "c.toml").write_text('[train]\ntune = "lora"\nsteps = 3\nupdates = 2\n[watch]\nkl_text = 1.0\n')
    with pytest.raises(
        UsageError, match=r"train\.minibatches; train\.tune is now train\.finetune; watch is now monitor"
    ):
        load_config(file=tmp_path / "c.toml")


def test_words_of_other_tools_lead_to_settings_and_options_that_exist() -> None:
    options = {name for command in _commands().values() for option in command.params for name in option.opts}
    for word, here in elsewhere.SETTINGS.items():
        assert word not in config_keys()
        named = re.findall(r"--[a-z-]+|\b[a-z]+\.[a-z_]+\b", here)
        assert {n for n in named if n.startswith("--")} <= options
        keys = {n for n in named if not n.startswith("--")} - {"metrics.jsonl", "scaling.md"}
        assert keys <= set(config_keys()), word
    for here in elsewhere.COMMANDS.values():
        assert here.removeprefix("unigrpo ").split(" -")[0] in _commands() or "--install-completion" in here
    assert set(elsewhere.PARAMETERS).isdisjoint(COLUMNS)


def _commands() -> dict[str, Any]:
    def below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for key, inner in getattr(command, "commands", {}).items():
            yield f"{name} {key}".strip(), inner
            yield from below(inner, f"{name} {key}".strip())

    return dict(below(typer.main.get_command(app), ""))


def test_a_runs_own_file_without_a_newer_setting_is_of_a_run_that_did_not_have_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(re.sub(r"lr_decay = .*\n", "", to_toml(load_config(preset="embedded"))))
    assert (load_config(file=file).train.lr_decay, load_config(file=file, whole=True).train.lr_decay) == (40, 0)


def test_unknown_presets() -> None:
    with pytest.raises(UsageError, match="unknown preset 'papre': did you mean paper"):
        load_config(preset="papre")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no configuration file"):
        load_config(file=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(UsageError, match="not readable TOML"):
        load_config(file=tmp_path / "bad.toml")
    (tmp_path / "typo.toml").write_text("[trian]\nsteps = 1\n")
    with pytest.raises(UsageError, match="did you mean train"):
        load_config(file=tmp_path / "typo.toml")


def test_it_is_frozen_and_every_key_is_described() -> None:
    config = Config()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    keys = config_keys()
    assert {"train.steps", "train.checkpoint_every", "sampling.window"} <= set(keys)
    assert all(len(what) > 8 for what, _ in keys.values())


def test_a_window_of_all_steps_needs_two() -> None:
    with pytest.raises(UsageError, match=r"set sampling\.steps=2 or more"):
        load_config(overrides=["sampling.window=all", "sampling.steps=1"])


def test_cps_noise_turns_back_at_1() -> None:
    with pytest.raises(UsageError, match="up to 1"):
        load_config(overrides=["sampling.sde=cps", "sampling.noise_level=1.5"])


def test_odd_values_survive_the_file(tmp_path: Path) -> None:
    """What TOML cannot say (null, lone escapes) must not make a run's own configuration unreadable."""
    options = {"clip.model": None, "clip.tag": "x", "näme": 'quo"te\\'}
    config = load_config(overrides=["prompts=p/😀.txt"], named={"reward.options": options})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    again = load_config(file=path)
    assert again.prompts == "p/😀.txt"
    assert again.reward.options == {"clip.tag": "x", "näme": 'quo"te\\'}
