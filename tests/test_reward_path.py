"""docs/rewards.md names the files that a sample passes on its way to a score; a traced call passes exactly these."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from unigrpo_cli import RewardContext
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards

ROOT = Path(__file__).parents[1]
MOST = 8


def _listed() -> list[str]:
    text = (ROOT / "docs" / "rewards.md").read_text()
    section = text.partition("## The path of a sample\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/.]+)`", section, flags=re.MULTILINE)


@contextmanager
def _traced(files: list[str]) -> Iterator[list[bool]]:
    """Collect the project's files that are called, in all threads, while the yielded flag is set."""
    recording = [False]

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if recording[0] and event == "call" and path.is_relative_to(ROOT):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(("unigrpo_cli/", "plugins/")) and name not in files:
                files.append(name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield recording
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("waits", [False, True])
def test_a_sample_passes_the_files_that_the_docs_name(waits: bool) -> None:
    """From `--reward clip` to its number, scored now or while others are sampled."""
    plugins, samples, passed = Plugins(), example_samples(2), []
    plugins.load()
    with _traced(passed) as recording:
        recording[0] = True
        specs = parse_rewards(["clip"])
        plugins.rewards.find(specs[0].name)
        recording[0] = False  # loading weights is not the path of a sample
        with Scorer(specs, plugins, RewardContext("cpu", 0, True, True)) as scorer:
            recording[0] = True
            if waits:
                pending = scorer.start(overlap="all")
                for sample in samples:
                    pending.add([sample])
                pending.submit([s.id for s in reversed(samples)])
                results = pending.finish()
            else:
                results = scorer.score(samples)
            recording[0] = False
    assert len(results["clip"].scores) == 2
    assert len(_listed()) <= MOST
    assert set(passed) == set(_listed()), "docs/rewards.md, The path of a sample"
