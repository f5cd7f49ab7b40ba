"""Secrets: which names and values are some, where they may stand, and how they are kept out of what is written.

A run writes its configuration down, so an option of a reward never holds a secret itself. It holds the name of the
environment variable that does, `env:NAME`, which is written and resumed from like any other text.
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
"""Values of variables below this length are no secrets, and to cut them out would spoil ordinary words."""


def names_secret(name: str) -> bool:
    """Whether an option or variable of that name holds a secret: `api_key`, `HF_TOKEN`, not `max_tokens`."""
    return bool(_NAME.search(name.rsplit(".", 1)[-1].replace("-", "_")))


def holds_credentials(value: object) -> bool:
    """Whether a text has a user or password inside an address, as in https://user:password@host."""
    return isinstance(value, str) and bool(_IN_URL.search(value))


def from_environment(value: str) -> str:
    """The secret behind `env:NAME`.

    Raises:
        ValueError: without the secret, when the text is of another form or the variable is not set.
    """
    name = value.removeprefix(MARK)
    if name == value or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"a secret is not written down here: export it in a variable and give {MARK}VARIABLE")
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set; export it, here and where the run is resumed")
    return os.environ[name]


def redacted(text: str) -> str:
    """A text without the secrets of the environment, and without users and passwords in addresses."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and names_secret(name):
            text = text.replace(value, f"[{name}]")
    return _IN_URL.sub(r"\1[credentials]@", text)
