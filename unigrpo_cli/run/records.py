"""Batches of episodes with their scores on disk: those of `unigrpo rollout`, and of skipped steps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from unigrpo_cli.episode import Group
from unigrpo_cli.io.atomic import new_directory
from unigrpo_cli.io.json import to_json
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.rewards.batch import RewardResult, segments_row
from unigrpo_cli.run.episode_files import BAD_STEP, packed, save_episodes, unpacked

WORDS = "json"
"""The name, among the tensors that are sent, of the JSON text."""
KEPT = 3  # bad steps on disk: those of one stop


def reward_rows(
    groups: Sequence[Group], scored: dict[str, RewardResult], weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One JSON row per episode: prompt, reasoning and scores; with `weights` their sum, None where one abstained."""
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups):
        for episode in group.episodes:
            k = len(rows)
            rows.append(
                {
                    "prompt": group.prompt.text,
                    "prompt_id": group.prompt.id,
                    "member": episode.member,
                    "seed": episode.seed,
                    "reasoning": episode.reasoning,
                    "image": f"{g:04d}_{episode.member:03d}.png",
                    "rewards": {n: float(s.scores[k]) if s.valid[k] else None for n, s in scored.items()},
                    "components": {
                        n: {part: float(v[k]) for part, v in s.components.items() if v[k] == v[k]}
                        for n, s in scored.items()
                    },
                    "info": {n: s.info[k] for n, s in scored.items() if s.info[k]},
                }
                | segments_row(k, scored)
            )
            if weights is not None:
                trained = {n: scored[n] for n, weight in weights.items() if weight}
                known = all(s.valid[k] for s in trained.values())
                rows[-1]["score"] = sum(weights[n] * float(s.scores[k]) for n, s in trained.items()) if known else None
    return rows


def groups_of_all(own: Sequence[Group], ranks: Ranks) -> list[Group]:
    """On the first rank the groups of all, in the order of ranks; an empty list on the others. All must call this."""
    if ranks.alone:
        return list(own)
    found: list[list[Group]] = [[] for _ in range(ranks.world)]
    for k in range(ranks.most(len(own))):  # one of each at a time, so that no message is large
        with ranks.together():
            text, tensors = packed(own[k : k + 1])
            words = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            sent = torch.frombuffer(bytearray(save(tensors | {WORDS: words})), dtype=torch.uint8)
        held = ranks.to_first(sent)
        with ranks.together():
            for share, data in zip(found, held, strict=False):
                tensors = load(data.numpy().tobytes())
                share += unpacked(tensors.pop(WORDS).numpy().tobytes().decode(), tensors)
    return [group for share in found for group in share]


def save_bad_step(
    folder: Path,
    step: int,
    reason: str,
    groups: Sequence[Group],
    scored: dict[str, RewardResult],
    advantage_BS: Tensor,
    metrics: dict[str, float],
) -> Path:
    """The whole batch of a skipped step, for study: `unigrpo rollout --from` opens it. Keeps the newest KEPT."""
    path = folder / f"step_{step:06d}"
    why = {"step": step, "reason": reason, "advantages": advantage_BS, "metrics": metrics}
    with new_directory(path, sums=False) as partial:
        save_episodes(groups, partial)
        for name, content in (("rewards.json", reward_rows(groups, scored)), (BAD_STEP, why)):
            (partial / name).write_text(to_json(content, indent=1) + "\n")
    for old in sorted(folder.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)
    return path
