"""How far two detectors agree as judges: verdicts and counts of the same pictures, compared.

GenEval's thresholds belong to one detector. Before another's numbers are read beside published ones, this says
per task how often both give the same verdict, and how much of that is more than luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

PASSES = 0.5  # a score from here on is a "correct"
Counts = Mapping[str, float]  # objects found, by class


def calibrate(
    a: Sequence[float | bool | None],
    b: Sequence[float | bool | None],
    metadata: Sequence[Mapping[str, Any]],
    *,
    counts_a: Sequence[Counts] | None = None,
    counts_b: Sequence[Counts] | None = None,
    passes: float = PASSES,
) -> list[dict[str, Any]]:
    """Compare two judges on the same pictures, one verdict (or score) of each per picture.

    Args:
        a, b: verdicts, or scores of which those from `passes` on are correct; None and NaN are left out.
        metadata: GenEval's, per picture; its `tag` is the task.
        counts_a, counts_b: objects that each found, by class, for the rows about counts.

    Returns:
        Rows fit for JSON: one over all pictures, one per task in order of name, one per class with counts.

    Raises:
        ValueError: when the lists are not of one length, or there is nothing in them.
    """
    lengths = {len(x) for x in (a, b, metadata, counts_a, counts_b) if x is not None}
    if len(lengths) > 1:
        raise ValueError(f"one entry per picture is needed in each list, got lengths {sorted(lengths)}")
    if not metadata:
        raise ValueError("no pictures to compare")
    tasks: dict[str, list[tuple[bool, bool] | None]] = {}
    for x, y, m in zip(a, b, metadata, strict=True):
        missing = any(v is None or math.isnan(v) for v in (x, y))
        pair = None if missing else (float(x or 0) >= passes, float(y or 0) >= passes)
        tasks.setdefault(str(m.get("tag")), []).append(pair)
    rows = [{"row": "all", "name": "all"} | agreement([pair for pairs in tasks.values() for pair in pairs])]
    rows += [{"row": "task", "name": tag} | agreement(tasks[tag]) for tag in sorted(tasks)]
    if counts_a is not None and counts_b is not None:
        rows += count_rows(counts_a, counts_b)
    return rows


def agreement(pairs: Sequence[tuple[bool, bool] | None]) -> dict[str, Any]:
    """Agreement, Cohen's kappa and the four cells of some pictures' verdicts (first judge, second judge).

    Kappa (Cohen 1960) is agreement beyond what two judges with these shares of "correct" would have by chance, over
    the most that it could be; None where chance alone would agree always, for then nothing can be said.
    """
    known = [pair for pair in pairs if pair is not None]
    n = len(known)
    cells = {
        "both": known.count((True, True)),
        "only_a": known.count((True, False)),
        "only_b": known.count((False, True)),
        "neither": known.count((False, False)),
    }
    found: dict[str, Any] = {"images": n, "left_out": len(pairs) - n, "agreement": None, "kappa": None} | cells
    if n == 0:
        return found
    observed = (cells["both"] + cells["neither"]) / n
    share_a, share_b = (cells["both"] + cells["only_a"]) / n, (cells["both"] + cells["only_b"]) / n
    chance = share_a * share_b + (1 - share_a) * (1 - share_b)
    kappa = None if chance == 1 else (observed - chance) / (1 - chance)
    return found | {"agreement": observed, "kappa": kappa, "correct_a": share_a, "correct_b": share_b}


def count_rows(counts_a: Sequence[Counts], counts_b: Sequence[Counts]) -> list[dict[str, Any]]:
    """Per class, over the pictures where either judge counted it: how many more the second found.

    A class that one judge does not list in a picture was not found there.
    """
    differences: dict[str, list[float]] = {}
    for first, second in zip(counts_a, counts_b, strict=True):
        for label in first.keys() | second.keys():
            differences.setdefault(label, []).append(second.get(label, 0) - first.get(label, 0))
    return [
        {
            "row": "class",
            "name": label,
            "images": len(values),
            "same": sum(v == 0 for v in values) / len(values),
            "mean_difference": sum(values) / len(values),
            "mean_absolute_difference": sum(map(abs, values)) / len(values),
        }
        for label, values in sorted(differences.items())
    ]
