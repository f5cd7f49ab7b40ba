"""Standard JSON: numpy and torch scalars as numbers, non-finite numbers as null."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text of a report.

    Raises:
        TypeError: on a value that is not data, e.g. an object.
    """
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict) or (hasattr(value, "items") and hasattr(value, "keys")):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
