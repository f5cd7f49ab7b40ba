"""States of the global random generators, as data.

Our own numbers come from keys and need none of this. A plugin's reward may draw from Python's, numpy's or torch's
global generator; after a resume it must continue the same sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli.algo.rng import derive
from unigrpo_cli.errors import WeightsError


@dataclass(frozen=True)
class PythonRest:
    """What Python's generator has besides its words."""

    version: int
    normal: float | None


@dataclass(frozen=True)
class NumpyRest:
    """What numpy's generator has besides its words."""

    position: int
    has_normal: int
    normal: float


@dataclass(frozen=True)
class GeneratorsRest:
    """The parts that are no arrays: positions and left-over normal numbers."""

    python: PythonRest
    numpy: NumpyRest


@dataclass(frozen=True)
class Generators:
    """States at one moment.

    Args:
        words: of `python` [625] int64, `numpy` [624] int64, `torch` [n] uint8, and `cuda.N` [n] uint8 per device.
        rest: what is no array.
    """

    words: dict[str, Tensor]
    rest: GeneratorsRest


def seed_generators(seed: int) -> None:
    """Seed all of them, so that two runs with one seed give a reward that draws the same numbers."""
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))


def read_generators() -> Generators:
    """Their present states."""
    version, words, normal = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found |= {f"cuda.{k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy = NumpyRest(int(legacy["state"]["pos"]), int(legacy["has_gauss"]), float(legacy["gauss"]))
    return Generators(found, GeneratorsRest(PythonRest(version, normal), numpy))


def put_generators(kept: Generators) -> None:
    """Set them to states read before; of CUDA devices those present."""
    python, numpy, words = kept.rest.python, kept.rest.numpy, kept.words
    try:
        random.setstate((python.version, tuple(words["python"].tolist()), python.normal))
        key = words["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy.position, numpy.has_normal, numpy.normal))
        torch.set_rng_state(words["torch"])
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for k in range(here):
            if f"cuda.{k}" in words:
                torch.cuda.set_rng_state(words[f"cuda.{k}"], k)
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise WeightsError(
            f"the checkpoint's random generator states are damaged ({error}); resume from another checkpoint"
        ) from error
