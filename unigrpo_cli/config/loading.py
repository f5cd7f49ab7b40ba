"""Configuration from a preset, a file, `--set` and named options; later wins. Unknown keys name the near misses."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from unigrpo_cli.config.elsewhere import setting_here
from unigrpo_cli.config.schema import PRESETS, Config
from unigrpo_cli.errors import UsageError, suggest
from unigrpo_cli.io.limits import read_text, refuse_depth, refuse_odd_text

LARGEST_FILE = 2**20

RENAMED = {
    "sampling.rows": "sampling.batch_size",
    "sampling.decode_strip": "sampling.vae_tile_rows",
    "sampling.window_within": "sampling.window_range",
    "sampling.window_every": "sampling.window_period",
    "sampling.kernel": "sampling.sde",
    "objective.coupling": "objective.grad_through_context (full: true, detach: false)",
    "advantage.std": "advantage.normalize",
    "train.updates": "train.minibatches",
    "train.tune": "train.finetune",
    "train.also": "train.extra_modules",
    "train.reference_on": "train.reference_device",
    "train.micro_batch": "train.micro_batch_size",
    "train.micro_tokens": "train.max_tokens_per_micro_batch",
    "train.keep_every": "train.keep_checkpoint_every",
    "reward.use": "reward.names",
    "reward.on": "reward.scoring_rank",
    "watch": "monitor",
}
"""Keys of version 0.1 and what they are called now. A key of a renamed section keeps its own name."""
REMOVED = {
    "train.old_scores": "the first update after a rollout uses its own scores",
    "watch.slower": "the rule is gone; seconds of each phase are in metrics.jsonl",
    "monitor.slower": "the rule is gone; seconds of each phase are in metrics.jsonl",
}
"""Keys of version 0.1 that no longer exist, and why."""


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: list[str] | None = None,
    named: dict[str, Any] | None = None,
    model_defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
    whole: bool = False,
) -> Config:
    """The resolved configuration.

    Args:
        preset: name of a preset; None takes the file's, or else the model's, or else "embedded".
        file: TOML file.
        overrides: `a.b=c` strings; c is a TOML value, or else plain text.
        named: values by dotted key; None means "not given".
        model_defaults: gives the model's own defaults, a preset and values on top of it. Given values take precedence;
            another preset drops them.
        whole: `file` was written by a run or a sweep, with every setting of its version. Newer settings get their
            own defaults, not the preset's: the run did not have them.
    """
    from_file = _read_toml(file) if file else {}
    given: dict[str, Any] = {}
    _merge(given, from_file)
    for text in overrides or []:
        key, found, value = text.partition("=")
        if not found or not key.strip():
            raise UsageError(f"--set {text}: write it as section.key=value, e.g. --set train.steps=50")
        if key.strip() == "preset":
            raise UsageError(f"choose a preset with --preset {value.strip()}, not with --set")
        _merge(given, _nest(key.strip(), _toml_value(value.strip())))
    for key, value in (named or {}).items():
        if value is not None:
            _merge(given, _nest(key, value))
    _refuse_old_keys(given)
    own = model_defaults(given) if {"model", "adapter"} & given.keys() else {}
    chosen = preset or from_file.get("preset") or own.get("preset") or "embedded"
    if chosen not in PRESETS:
        raise UsageError(f"unknown preset {chosen!r}: {suggest(str(chosen), PRESETS)}")
    text = (files("unigrpo_cli") / "config" / "presets" / f"{chosen}.toml").read_text("utf-8")
    values = {} if whole else tomllib.loads(text)
    own = own if own.get("preset") == chosen else {}
    _merge(values, _of_program(values.pop("program", {}), own.get("sampling", {}), given.get("sampling")))
    _merge(values, own)
    _merge(values, given)
    values["preset"] = chosen
    _check_keys(values, Config, "")
    for key, value in values.items():
        try:
            refuse_odd_text(value)
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from error


def _of_program(programs: dict[str, dict], own: dict, given: Any) -> dict:
    """What a preset sets for the chosen program; several rounds without a program are those of `reflect`.

    A text budget that is typed replaces the preset's budgets by round.

    Args:
        own, given: the model's own sampling, and what is typed.
    """
    typed = given if isinstance(given, dict) else {}
    chosen = own | typed
    rounds = chosen.get("rounds", 1)
    several = isinstance(rounds, int) and rounds > 1
    program = chosen.get("program", "reflect" if several else "think-paint")
    found: dict[str, Any] = {"sampling": {"program": program}}
    _merge(found, programs.get(program, {}) if isinstance(program, str) else {})
    if "max_new_tokens" in typed:
        found["sampling"].pop("round_max_new_tokens", None)
    return found


def _refuse_old_keys(given: dict[str, Any]) -> None:
    """Say for every key of version 0.1 what became of it."""
    what = {old: f"{old} is now {new}" for old, new in RENAMED.items()}
    what |= {old: f"{old} is removed: {why}" for old, why in REMOVED.items()}
    found = []
    for old, became in what.items():
        section, _, key = old.rpartition(".")
        table = given.get(section) if section else given
        if isinstance(table, dict) and key in table:
            found.append(became)
    if found:
        raise UsageError(f"keys of version 0.1: {'; '.join(found)}")


def _read_toml(path: Path) -> dict:
    try:
        found = tomllib.loads(read_text(path, LARGEST_FILE))
        refuse_depth(found)
        return found
    except FileNotFoundError as error:
        raise UsageError(f"no configuration file {path}: give a TOML file with --config") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not readable TOML: nested too deep") from error
    except OSError as error:
        raise UsageError(f"{path} is not readable TOML: {error.strerror}; give a TOML file with --config") from error
    except ValueError as error:  # TOMLDecodeError among them, and numbers with thousands of digits
        raise UsageError(f"{path} is not readable TOML: {error}") from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _nest(dotted: str, value: Any) -> dict:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(into: dict, new: dict) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _check_keys(values: dict, section: type[BaseModel], prefix: str) -> None:
    """Refuse an unknown key and name its near misses, which pydantic does not do."""
    for key, value in values.items():
        if key not in section.model_fields:
            known = [prefix + name for name in section.model_fields]
            same_name = [path for path in config_keys() if path.rsplit(".", 1)[-1] == key]
            if foreign := setting_here(key):
                hint = f"use {foreign}"
            else:
                hint = f"did you mean {' or '.join(same_name)}?" if same_name else suggest(prefix + key, known)
            raise UsageError(f"unknown configuration key {prefix + key!r}: {hint}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, dict):
                raise UsageError(f"{prefix + key} is a section: set its keys, e.g. {prefix + key}.KEY=VALUE")
            _check_keys(value, inner, f"{prefix}{key}.")


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[str, Any]]:
    keys: dict[str, tuple[str, Any]] = {}
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= config_keys(inner, f"{prefix}{name}.")
        else:
            keys[prefix + name] = (info.description or "", info.default)
    return keys


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "tuple_type" and isinstance(first["input"], str):
        return f'{where} = {first["input"]!r}: a list is needed, e.g. ["{first["input"]}"]'
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values, by dotted key, which are not validated."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            section, name, value = "", section, getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={name: value})
    return config


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `--config` reads."""
    lines: list[str] = []
    sections: list[tuple[str, dict]] = []
    for key, value in config.model_dump().items():
        if isinstance(value, dict) and not key.endswith("options"):
            sections.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml(value)}")
    for name, section in sections:
        lines.append(f"\n[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        pairs = (f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None)  # TOML has no null
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
