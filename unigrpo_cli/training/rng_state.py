"""The states of global random generators, as data.

Our own numbers come from keys and need none of this. A stranger's reward may draw from Python's, numpy's or torch's
global generator, and must go on in a resumed run where it would have been.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli.algo.rng import derive


@dataclass(frozen=True)
class Generators:
    """States at one moment.

    Args:
        words: of `python` [625] int64, `numpy` [624] int64, `torch` [n] uint8, and `cuda.N` [n] uint8 per device.
        rest: what is no array, by generator: Python's and numpy's leftover normal number, numpy's position.
    """

    words: dict[str, Tensor]
    rest: dict[str, Any]


def seed_generators(seed: int) -> None:
    """Begin all of them from a run's seed, so that two runs of one seed hear the same from a reward that draws."""
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))


def read_generators() -> Generators:
    """Their present states."""
    version, words, normal = random.getstate()
    theirs: Any = np.random.get_state(legacy=False)
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(theirs["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found |= {f"cuda.{k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
    rest = {
        "python": {"version": version, "normal": normal},
        "numpy": {
            "position": int(theirs["state"]["pos"]),
            "has_normal": int(theirs["has_gauss"]),
            "normal": float(theirs["gauss"]),
        },
    }
    return Generators(found, rest)


def put_generators(kept: Generators) -> None:
    """Set them to states that were read before; of CUDA devices those that are here.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: when the states are none.
    """
    python, legacy = kept.rest["python"], kept.rest["numpy"]
    random.setstate((python["version"], tuple(kept.words["python"].tolist()), python["normal"]))
    key = kept.words["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, legacy["position"], legacy["has_normal"], legacy["normal"]))
    torch.set_rng_state(kept.words["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for k in range(here):
        if f"cuda.{k}" in kept.words:
            torch.cuda.set_rng_state(kept.words[f"cuda.{k}"], k)
