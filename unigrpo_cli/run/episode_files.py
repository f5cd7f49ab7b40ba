"""Episodes on disk: `episodes.json` and `episodes.safetensors`, checked when they are read.."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigrpo_cli.algo.flow import SDES, Window
from unigrpo_cli.algo.guidance import NO_GUIDANCE, Guidance
from unigrpo_cli.episode import Episode, GivenImage, GivenText, Group, ImageActions, Prompt, Segment, TextActions
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import read_text, refuse_odd_text

FORMAT = 1
LARGEST_MEMBER = 10**6
TENSORS = ("ids", "log_prob", "latent", "pixels", "view", "times", "before", "after")
BAD_STEP = "bad_step.json"
"""Beside the episodes of a skipped training step, whose numbers need not be finite."""
SAVE_AGAIN = "save them again with `unigrpo rollout --out DIR`"
_KINDS: dict[str, type] = {
    "given_text": GivenText,
    "given_image": GivenImage,
    "text": TextActions,
    "image": ImageActions,
}


def packed(groups: Sequence[Group]) -> tuple[str, dict[str, Tensor]]:
    """Groups as JSON and the tensors that it names; `unpacked` is the inverse."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for g, group in enumerate(groups):
        members = []
        for m, episode in enumerate(group.episodes):
            segments = []
            for s, segment in enumerate(episode.segments):
                plain, own = _pack(segment)
                segments.append(plain)
                tensors |= {
                    f"{g}.{m}.{s}.{name}": value.clone(memory_format=torch.contiguous_format)
                    for name, value in own.items()
                }
            members.append({"member": episode.member, "seed": episode.seed, "segments": segments})
        prompt = group.prompt
        image = None if isinstance(prompt.image, np.ndarray) else prompt.image
        if isinstance(prompt.image, np.ndarray):
            tensors[f"{g}.image"] = torch.from_numpy(prompt.image).contiguous()
        asked = {"id": prompt.id, "text": prompt.text, "metadata": prompt.metadata, "image": image}
        rows.append(asked | {"episodes": members})
    return json.dumps({"format": FORMAT, "groups": rows}, indent=1), tensors


def unpacked(text: str, tensors: dict[str, Tensor]) -> list[Group]:
    return list(_groups(json.loads(text)["groups"], tensors, finite=False))


def save_episodes(groups: Sequence[Group], directory: Path) -> None:
    """Write `episodes.json` and `episodes.safetensors` into a directory; the inverse of `load_episodes`."""
    text, tensors = packed(groups)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "episodes.safetensors")
    (directory / "episodes.json").write_text(text + "\n")


def load_episodes(directory: Path) -> list[Group]:
    """The groups of a directory that `unigrpo rollout` wrote.

    Raises:
        UsageError: when the directory holds no episodes, or damaged ones.
    """
    try:
        data = json.loads(read_text(directory / "episodes.json"))
        refuse_odd_text(data)
        if data.get("format") != FORMAT:
            raise UsageError(f"{directory}: episodes of format {data.get('format')}, this version reads {FORMAT}")
        tensors = load_file(directory / "episodes.safetensors")
        groups = list(_groups(data["groups"], tensors, finite=not (directory / BAD_STEP).is_file()))
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = [n for n in ("episodes.json", "episodes.safetensors") if not os.path.isfile(directory / n)]
        raise UsageError(
            f"{directory} holds no episodes ({' and '.join(missing)} missing); "
            "give a directory written by `unigrpo rollout --out DIR`"
        ) from error
    except RecursionError as error:
        raise UsageError(f"{directory}: damaged episodes (nested too deep); {SAVE_AGAIN}") from error
    except KeyError as error:
        raise UsageError(f"{directory}: damaged episodes ({error} is missing or unknown); {SAVE_AGAIN}") from error
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{directory}: damaged episodes ({error}); {SAVE_AGAIN}") from error
    if not groups or not all(group.episodes for group in groups):
        raise UsageError(f"{directory}: damaged episodes (a group, or all of them, is empty); {SAVE_AGAIN}")
    return groups


def _groups(rows: list[dict], tensors: dict[str, Tensor], finite: bool) -> Iterator[Group]:
    for g, row in enumerate(rows):
        pixels = tensors.get(f"{g}.image")
        files = row.get("image")
        image = pixels.numpy() if pixels is not None else tuple(files) if isinstance(files, list) else files
        prompt = Prompt(row["id"], row["text"], row["metadata"], image)
        _kinds(prompt, id=str, text=str, metadata=dict, image=str | tuple | np.ndarray | None)
        if isinstance(files, list) and not (files and len(prompt.files) == len(files)):
            raise ValueError(f"image = {files!r}")
        if pixels is not None:
            _tensor_of("pixels", pixels, finite)
            _same("image", (pixels.ndim, pixels.shape[-1]), (3, 3))
        episodes = []
        for m, member in enumerate(row["episodes"]):
            segments = []
            for s, plain in enumerate(member["segments"]):
                prefix = f"{g}.{m}.{s}."
                own = {name: tensors[prefix + name] for name in plain["tensors"]}
                segments.append(_unpack(plain, own, finite))
            episode = Episode(prompt, member["member"], member["seed"], tuple(segments))
            _kinds(episode, member=int, seed=int)
            if not 0 <= episode.member < LARGEST_MEMBER:  # part of file names
                raise ValueError(f"member = {episode.member}")
            if not episode.images:
                raise ValueError(f"episode {m} of group {g} has no image")
            episodes.append(episode)
        yield Group(prompt, tuple(episodes))


def _pack(segment: Segment) -> tuple[dict, dict[str, Tensor]]:
    kind = next(name for name, cls in _KINDS.items() if type(segment) is cls)
    plain: dict[str, Any] = {"kind": kind}
    tensors = {}
    for name, value in vars(segment).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value != NO_GUIDANCE:
            plain[name] = vars(value) if isinstance(value, Window | Guidance) else value
    return plain | {"tensors": sorted(tensors)}, tensors


def _unpack(plain: dict, tensors: dict[str, Tensor], finite: bool) -> Segment:
    values = {k: v for k, v in plain.items() if k not in ("kind", "tensors")} | tensors
    if "window" in values:
        values["window"] = Window(**values["window"])
    if "guidance" in values:
        values["guidance"] = Guidance(**values["guidance"])
    for name in ("grid", "opening", "closing"):
        if name in values:
            values[name] = tuple(values[name])
    grid = values.get("grid", (1, 1))
    if len(grid) != 2 or not all(type(n) is int and 0 < n < 2**15 for n in grid):
        raise ValueError(f"grid = {list(grid)}")
    segment = _KINDS[plain["kind"]](**values)
    for name, value in vars(segment).items():
        _tensor_of(name, value, finite)
    if isinstance(segment, TextActions):
        _kinds(segment, finished=bool, temperature=float | int, text=str)
        _same("log_prob", segment.log_prob.shape, segment.ids.shape)
        if finite and bool((segment.log_prob > 1e-3).any()):  # a probability, not a density; 1e-3 is rounding
            raise ValueError("log_prob of text is above 0")
    if isinstance(segment, ImageActions) or (isinstance(segment, GivenImage) and len(segment.latent)):
        _same("latent", segment.latent.shape[:1], (segment.grid[0] * segment.grid[1],))
    if isinstance(segment, ImageActions):
        _sampled(segment)
        steps, latent = (segment.window.size,), segment.latent.shape
        _same("before", segment.before.shape, steps + latent)
        _same("after", segment.after.shape, steps + latent)
        _same("log_prob", segment.log_prob.shape, steps)
        _same("pixels", (segment.pixels.ndim, segment.pixels.shape[-1]), (3, 3))
        if not segment.pixels.numel():
            raise ValueError("pixels is empty")
    return segment


def _sampled(image: ImageActions) -> None:
    """Refuse a schedule or transition that no rollout writes."""
    _kinds(image, sde=str, noise_level=float | int)
    _kinds(image.window, start=int, size=int)
    scales = dict.fromkeys(("text", "image", "above", "up_to", "renorm_least"), float | int)
    _kinds(image.guidance, renorm=str, **scales)
    if not all(math.isfinite(getattr(image.guidance, name)) for name in scales):
        raise ValueError(f"guidance = {image.guidance}")
    steps = len(image.times) - 1
    if image.times.ndim != 1 or steps < 1 or not (image.times.diff() < 0).all():
        raise ValueError("times must fall, from noise to data")
    if image.window.start < 0 or not 0 <= image.window.size <= steps - image.window.start:
        raise ValueError(f"window {image.window.start} + {image.window.size} is outside the {steps} steps")
    if image.sde not in SDES:
        raise ValueError(f"sde = {image.sde!r}")
    if not 0 <= image.noise_level < math.inf:
        raise ValueError(f"noise_level = {image.noise_level}")


def _tensor_of(name: str, value: Any, finite: bool) -> None:
    """Refuse a tensor of the wrong dtype, and with `finite` also NaN and infinity."""
    wanted = {"ids": torch.int64, "pixels": torch.uint8, "view": torch.uint8}.get(name)
    if name in TENSORS and not (name == "view" and value is None):
        if not isinstance(value, Tensor) or (value.dtype != wanted if wanted else not value.is_floating_point()):
            raise ValueError(f"{name} must be a tensor of {wanted or 'floating-point numbers'}")
        if finite and not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite everywhere")
        if name == "ids" and bool((value < 0).any()):
            raise ValueError("ids are below 0")


def _kinds(owner: Any, **kinds: Any) -> None:
    for name, kind in kinds.items():
        value = getattr(owner, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} = {value!r}")


def _same(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise ValueError(f"{name} has shape {list(found)}, not {list(wanted)}")
