"""Samples and results of several ranks, sent as tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unigrpo_cli.errors import RewardError
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.rewards.batch import RewardResult, Sample


def samples_of_all(own: Sequence[Sample], ranks: Ranks, parts: int | None) -> list[Sample]:
    """All ranks' samples on the first rank; none on the others. All ranks must call this.

    Args:
        parts: as in `results_of_all`.
    """
    rows = [
        {"prompt": s.prompt, "reasoning": s.reasoning, "metadata": s.metadata, "id": s.id, "group_id": s.group_id}
        | {"segments": [t if isinstance(t, str) else None for t in s.segments], "has_source": s.source is not None}
        | {"shapes": [picture.shape for picture in _arrays(s)]}
        for s in own
    ]
    with ranks.together():
        for sample in own:
            _check_metadata(sample)
    pixels = [np.ascontiguousarray(picture).reshape(-1) for s in own for picture in _arrays(s)]
    flat = np.concatenate(pixels) if pixels else np.zeros(0, dtype=np.uint8)
    data = ranks.to_first(torch.from_numpy(flat))
    texts = ranks.gather(rows)
    return _merge([_unpack(*share) for share in zip(texts, data, strict=False)], ranks, parts)


def _arrays(sample: Sample) -> list[NDArray[np.uint8]]:
    """The source where there is one, then every picture."""
    return [*([] if sample.source is None else [sample.source]), *sample.pictures]


def _unpack(rows: list[dict[str, Any]], data: torch.Tensor) -> list[Sample]:
    samples, at = [], 0
    for row in rows:
        arrays: list[NDArray[np.uint8]] = []
        for shape in row.pop("shapes"):
            size = int(np.prod(shape))
            arrays.append(data[at : at + size].numpy().reshape(shape))
            at += size
        source = arrays.pop(0) if row.pop("has_source") else None
        pictures = iter(arrays)
        segments = tuple(next(pictures) if text is None else text for text in row.pop("segments"))
        samples.append(Sample(pixels=arrays[-1], source=source, segments=segments, **row))
    return samples


def _check_metadata(sample: Sample) -> None:
    try:
        same = json.loads(json.dumps(sample.metadata)) == sample.metadata
    except (TypeError, ValueError):
        same = False
    if not same:
        raise RewardError(
            f"metadata of prompt {sample.prompt!r} is not plain JSON, so it cannot be sent to the first rank; "
            "let each rank score its own episodes with reward.scoring_rank=each"
        )


def results_of_first(results: dict[str, RewardResult], ranks: Ranks) -> dict[str, RewardResult]:
    """The first rank's results on every rank."""
    rows = ranks.from_first({name: own.to_json() for name, own in results.items()})
    return {name: RewardResult.from_json(row) for name, row in rows.items()}


def results_of_all(own: dict[str, RewardResult], ranks: Ranks, parts: int | None) -> dict[str, RewardResult]:
    """All ranks' results on every rank. All ranks must call this, with the same rewards.

    Args:
        parts: into which `Ranks.share` cut the samples; None puts one rank's results after the other's.
    """
    shares = ranks.gather({name: result.to_json() for name, result in own.items()})
    return {name: _joined([share[name] for share in shares], ranks, parts) for name in own}


def _joined(rows: Sequence[dict[str, Any]], ranks: Ranks, parts: int | None) -> RewardResult:
    whole = {key: _merge([row[key] for row in rows], ranks, parts) for key in ("scores", "valid", "info")}
    by_segment = [row["segments"] or [{}] * len(row["scores"]) for row in rows]
    whole["segments"] = _merge(by_segment, ranks, parts) if any(row["segments"] for row in rows) else []
    components = {}
    for name in dict.fromkeys(name for row in rows for name in row["components"]):  # a rank may lack one
        known = [row["components"].get(name, [float("nan")] * len(row["scores"])) for row in rows]
        components[name] = _merge(known, ranks, parts)
    return RewardResult.from_json(whole | {"components": components})


def _merge(shares: Sequence[Sequence[Any]], ranks: Ranks, parts: int | None) -> list[Any]:
    if parts is None or not shares:
        return [row for share in shares for row in share]
    return ranks.joined(shares, parts)
