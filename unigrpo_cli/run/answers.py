"""Answers to imitate, as files have them: rows of .jsonl files, and episodes that `unigrpo rollout` saved."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, ImageActions, Segment, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import (
    parse_json,
    read_ends,
    read_lines,
    read_text,
    refuse_odd_prompt,
    refuse_odd_text,
    trimmed,
)
from unigrpo_cli.io.pictures import refuse_odd_picture
from unigrpo_cli.models.policy import Policy
from unigrpo_cli.run.episode_files import load_episodes
from unigrpo_cli.sft import Demonstration, painted, written

ACCEPTED = 'a .jsonl file of {"prompt": ..., "reasoning": ..., "image": FILE}, or a directory of `unigrpo rollout`'
Keep = Callable[[Sequence[float | None]], list[int]]
"""From the scores of a group, None where a reward abstained, the members that are kept."""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Args:
        place: file and line, or directory and episode, for messages.
        reasoning: None for an image without words before it.
        picture: the image's file; None with `episode`, a saved answer.
    """

    place: str
    prompt: str
    reasoning: str | None
    picture: str | None = None
    episode: Episode | None = None


def read_answers(config: Config) -> list[Answer]:
    """The answers of `sft.data`, in its order."""
    keep, found = keep_rule(config.sft.keep), list[Answer]()
    if keep and not any(os.path.isdir(source) for source in config.sft.data):
        raise UsageError(f"--keep {config.sft.keep} is about groups of `unigrpo rollout`, and no DATA is a directory")
    for source in config.sft.data:
        found += _saved(Path(source), keep) if os.path.isdir(source) else _rows(Path(source))
    return found


def keep_rule(text: str) -> Keep | None:
    """`best:N`: the N highest scores of a group, the first of equal ones; `above:X`: all above X; None for "".

    An episode without a score is not kept.
    """
    kind, _, value = text.partition(":")
    try:
        if kind == "best" and (count := int(value)) >= 1:
            return lambda scores: sorted(_known(scores), key=lambda k: -(scores[k] or 0.0))[:count]
        if kind == "above" and math.isfinite(least := float(value)):
            return lambda scores: [k for k in _known(scores) if (scores[k] or 0.0) > least]
    except ValueError:
        pass
    if text:
        raise UsageError(f"--keep {text}: give best:N or above:X, e.g. best:1 or above:0.5")
    return None


def _known(scores: Sequence[float | None]) -> list[int]:
    return [k for k, score in enumerate(scores) if score is not None]


# ----- rows


def _rows(path: Path) -> list[Answer]:
    if path.suffix != ".jsonl":
        raise UsageError(f"DATA {path}: give {ACCEPTED}")
    try:
        found = [_row(path, number, line) for number, line in read_lines(path)]
    except FileNotFoundError as error:
        raise UsageError(f"no file or directory {path}: give {ACCEPTED}") from error
    except OSError as error:
        raise UsageError(f"{path} is not readable text ({error.strerror}); give {ACCEPTED}") from error
    if not found:
        raise UsageError(f"{path} holds no row; give {ACCEPTED}")
    return found


def _row(path: Path, number: int, line: str) -> Answer:
    """A row, checked; other fields than the three are left alone."""
    try:
        row = parse_json(line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError('needs an object with a text "prompt"')
        refuse_odd_prompt(row["prompt"])
        reasoning, image = row.get("reasoning"), row.get("image")
        if reasoning is not None and (not isinstance(reasoning, str) or not trimmed(reasoning)):
            raise ValueError(f'"reasoning" is {reasoning!r}; give a text, or leave it out for an image without words')
        refuse_odd_text(reasoning)
        if not isinstance(image, str) or not os.path.isfile(path.parent / image):
            raise ValueError(f'"image" is {image!r}; give a file, relative to {path.name}')
        picture = str((path.parent / image).absolute())
        refuse_odd_picture(picture)
    except (ValueError, UsageError) as error:
        raise UsageError(f"{path}:{number}: {error}") from error
    return Answer(f"{path}:{number}", trimmed(row["prompt"]), reasoning, picture)


# ----- saved episodes


def _saved(directory: Path, keep: Keep | None) -> list[Answer]:
    groups = load_episodes(directory)
    scores = _scores(directory, len(flatten(groups))) if keep else []
    found, begin = list[Answer](), 0
    for g, group in enumerate(groups):
        count = len(group.episodes)
        for k in sorted(keep(scores[begin : begin + count])) if keep else range(count):
            own = group.episodes[k]
            place = f"{directory}, group {g}, member {own.member}"
            found.append(Answer(place, group.prompt.text, own.reasoning, episode=own))
        begin += count
    if not found:
        raise UsageError(f"{directory}: no episode is left by --keep")
    return found


def _scores(directory: Path, episodes: int) -> list[float | None]:
    path = directory / "rewards.json"
    again = "score the episodes with `unigrpo rollout --from DIR --out OTHER`"
    try:
        rows = parse_json(read_text(path))
        if not isinstance(rows, list) or len(rows) != episodes:
            raise ValueError(f"it is no list of {episodes} episodes")
        return [_score(row) for row in rows]
    except FileNotFoundError as error:
        raise UsageError(f"{directory} has no rewards.json, which --keep reads; {again}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}; {again}") from error


def _score(row: Any) -> float | None:
    score = row.get("score", "missing") if isinstance(row, dict) else "missing"
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"an episode's score is {score!r}, not a number")
    return float(score)


# ----- as the model reads and writes them


def demonstrations(policy: Policy, answers: Sequence[Answer], config: Config) -> list[Demonstration]:
    """Every answer in the model's own tokens and latents, by which resumed runs notice a change."""
    return [_demonstration(policy, answer, k, config) for k, answer in enumerate(answers)]


def _demonstration(policy: Policy, answer: Answer, number: int, config: Config) -> Demonstration:
    try:
        if answer.episode is None:
            if unknown := policy.unknown_words(answer.reasoning or ""):
                raise ValueError(f"the model has no word for {', '.join(unknown[:5])} in the reasoning")
            segments = written(policy, Demonstration("", answer.prompt), answer.reasoning)
        else:
            segments = tuple(_imitated(policy, segment) for segment in answer.episode.segments)
        for segment in segments:
            if isinstance(segment, TextActions):
                _refuse_long(policy, segment, config)
    except ValueError as error:
        raise UsageError(f"{answer.place}: {error}") from error
    metadata = {"reasoning": answer.reasoning, "picture": _digest(answer)}
    return Demonstration(str(number), answer.prompt, metadata, None, segments, answer.picture)


def _imitated(policy: Policy, segment: Segment) -> Segment:
    """A segment of a saved episode, without what only its sampling needed."""
    if isinstance(segment, TextActions):
        if policy.decode_text(segment.ids) != segment.text:
            raise ValueError("its reasoning was written by a model with other tokens; sample it again")
        return replace(segment, temperature=1.0)
    if isinstance(segment, ImageActions):
        if segment.latent.shape[1] != policy.token_dim:
            raise ValueError("its image was painted by a model with other latents; sample it again")
        return painted(segment.grid, segment.latent, segment.pixels, torch.tensor([1.0, 0.0]))
    return segment


def _refuse_long(policy: Policy, text: TextActions, config: Config) -> None:
    s, count = config.sampling, len(text.ids)
    if count > (most := max(s.round_max_new_tokens or (s.max_new_tokens,))):
        raise ValueError(
            f"its reasoning has {count} tokens with the stop token, and sampling.max_new_tokens={most}: the model "
            "could not write it; raise that setting or shorten the reasoning"
        )
    if text.finished and int((text.ids == policy.stop_id).sum()) > 1:
        raise ValueError("its reasoning holds the token that ends a text; remove it")


def _digest(answer: Answer) -> str:
    """sha256 of the image: of a file's size and both ends, or of all latents."""
    if answer.picture is not None:
        size = os.path.getsize(answer.picture)
        content = f"{size}\n".encode() + read_ends(Path(answer.picture), 0, size)
    else:
        assert answer.episode is not None
        content = b"".join(image.latent.numpy().tobytes() for image in answer.episode.images)
    return hashlib.sha256(content).hexdigest()
