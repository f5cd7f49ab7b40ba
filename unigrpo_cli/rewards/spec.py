"""The `--reward` grammar: `[alias=]name[:weight](@key=value)*`, comma-separated.

    clip:0.5,geneval          two rewards, the first with half the weight
    big=clip@model=ViT-H-14   an alias, and an option
    mine:0                    weight 0: logged, not trained on

The weight follows the name, so that values such as URLs keep their colons. A value with a comma or an @ goes to
`--reward-opt alias.key=value`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.secrets import MARK, holds_credentials, names_secret

LONGEST_SCALAR = 400
LARGEST_WEIGHT = 1e30
"""Like the largest score: products and their squares stay inside fp64."""
_ONE = re.compile(
    r"^(?:(?P<alias>[A-Za-z_][\w.-]*)=)?"
    r"(?P<name>[A-Za-z_][\w.-]*(?:/[A-Za-z_][\w.-]*)?)"
    r"(?::(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?))?$"
)


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run: alias, name, weight, and its options as given.

    An `eval_only` reward scores evaluations and never training samples.
    """

    alias: str
    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    eval_only: bool = False


def parse_rewards(texts: list[str] | tuple[str, ...], extra: dict[str, Any] | None = None) -> list[RewardSpec]:
    """Rewards from `--reward` texts and `alias.key` options."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    specs: dict[str, RewardSpec] = {}
    for part in parts:
        spec = _parse_one(part)
        if spec.alias in specs:
            raise UsageError(f"reward {spec.alias!r} is given twice; use an alias, e.g. {spec.alias}2={part}")
        specs[spec.alias] = spec
    for dotted, value in _flat(extra or {}):
        alias, found, key = dotted.partition(".")
        if not found or alias not in specs:
            raise UsageError(f"--reward-opt {dotted}: write it as ALIAS.KEY=VALUE with one of {', '.join(specs)}")
        specs[alias].options[key] = value
        refuse_secret(dotted, value)
    return list(specs.values())


def _flat(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """`alias.key` pairs, also from a table per alias, as a TOML file has it."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _parse_one(text: str) -> RewardSpec:
    head, *pairs = text.split("@")
    match = _ONE.match(head)
    if not match:
        raise UsageError(
            f"cannot read reward {head!r}: write [alias=]name[:weight](@key=value)*, e.g. clip:0.5@model=embedded"
        )
    options = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key:
            raise UsageError(f"cannot read option {pair!r} of reward {head!r}: write @key=value")
        options[key] = scalar(value)
        refuse_secret(f"{match['alias'] or match['name']}.{key}", options[key])
    weight = match["weight"]
    try:
        number = 1.0 if weight is None else float(weight)
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST_WEIGHT:
        raise UsageError(
            f"weight {weight!r} of reward {match['name']!r} is not a number up to {LARGEST_WEIGHT:g}; write e.g. "
            f"{match['name']}:0.5"
        )
    return RewardSpec(match["alias"] or match["name"].rsplit("/")[-1], match["name"], number, options)


def refuse_secret(option: str, value: Any) -> None:
    """Refuse a secret as an option: it would be written to config.toml. The error does not show it."""
    if names_secret(option) and not (isinstance(value, str | None) and str(value or MARK).startswith(MARK)):
        raise UsageError(
            f"option {option} holds a secret, and options are written to config.toml: export it in a variable, "
            f"e.g. MY_KEY, and give {option}={MARK}MY_KEY"
        )
    if holds_credentials(value):
        raise UsageError(
            f"option {option} is an address with a user or password in it, and options are written to config.toml: "
            "take them out, and give the reward its key by an environment variable"
        )


def scalar(text: str) -> Any:
    """A YAML scalar: numbers, booleans, null, else the text itself."""
    if len(text) > LONGEST_SCALAR:  # not a number; and nested brackets take YAML ever longer
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a number of thousands of digits
        return text
    return text if isinstance(value, dict | list) else value
