"""Secrets: how they are recognised, given to rewards, and removed from messages.

A run writes its configuration to disk, so an option of a reward never holds a secret. It names an environment variable,
`env:NAME`, which is saved and resumed like any other text.
"""

from __future__ import annotations

import os
import re

_NAME = re.compile(
    r"(?:^|_)(?:(?:api|access|secret|private|auth|account|judge|subscription)_?key|token|password|passwd|passphrase|"
    r"secret|credentials?|authorization|bearer)$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
MARK = "env:"
SHORTEST = 6
"""Shorter values of variables are not treated as secrets: removing them would damage ordinary words."""

_given: set[str] = set()
"""Variables given as `env:NAME`: secrets whatever they are called."""


def names_secret(name: str) -> bool:
    """Whether an option or variable of this name holds a secret: `api_key`, `HF_TOKEN`, not `max_tokens`."""
    return bool(_NAME.search(name.rsplit(".", 1)[-1].replace("-", "_")))


def holds_credentials(value: object) -> bool:
    """Whether a text is an address with a user or password, as in https://user:password@host."""
    return isinstance(value, str) and bool(_IN_URL.search(value))


def from_environment(value: str) -> str:
    """The secret behind `env:NAME`.

    Raises:
        ValueError: when the text has another form or the variable is not set. The message does not hold the secret.
    """
    name = value.removeprefix(MARK)
    if name == value or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"secrets are not written to files: export it in a variable and give {MARK}VARIABLE")
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set; export it, here and where the run is resumed")
    _given.add(name)
    return os.environ[name]


def redacted(text: str) -> str:
    """A text without secrets of the environment and without credentials in addresses."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and (name in _given or names_secret(name)):
            text = text.replace(value, f"[{name}]")
    return _IN_URL.sub(r"\1[credentials]@", text)
