"""Kill a training run at random moments, resume it, and compare the result with an undisturbed run, byte for byte.

    python tests/chaos.py --kills 20 --seed 0
    python tests/chaos.py --kills 5 --set train.finetune=lora --set dtype=bfloat16 --fresh

Each kill is a SIGKILL. Every other one waits until a checkpoint is being written and hits a moment after. A run that
ends before all kills are done is compared, and another one is started. Its reward draws from Python's, numpy's and
torch's global generators, so a state that is not restored shows. Processes are forked from one that has imported
everything; with `--fresh`, and on a machine with a GPU, each is a new interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process with threads cannot be forked
os.environ["UNIGRPO_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script

from tests.commands import Process, command_line

REWARD = """
import random

import numpy as np
import torch

from unigrpo_cli import reward


@reward("moody", range=(0, 2))
def moody(pixels):
    mood = random.random() + random.gauss(0, 1) + np.random.rand() + np.random.randn() + float(torch.rand(()))
    return [picture.mean() / 255 + 0.01 * mood * (k % 2) for k, picture in enumerate(pixels)]
"""
PROMPTS = "a red circle\ntwo blue squares\na green heart\na red star above a blue circle\n"
SETTINGS = (
    *("train.steps=9", "train.prompts_per_step=2", "train.minibatches=2", "train.group_size=2"),
    *(
        "train.checkpoint_every=2",
        "train.keep_checkpoints=2",
        "train.samples_every=2",
        "eval.every=3",
        "eval.best=moody",
        "eval.limit=1",
    ),
    *("eval.steps=2", "eval.rewards=[]", "sampling.steps=4", "sampling.window_range=[0,3]", "sampling.height=16"),
    *("sampling.width=16", "sampling.max_new_tokens=6", "threads=1", "device=cpu", "train.trace_every=2"),
)
MOMENT = 0.0005  # seconds between looks


def write_inputs(place: Path, reward: str = REWARD) -> Path:
    """The reward's file, which is given back, and prompts beside it."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "prompts.txt").write_text(PROMPTS)
    (place / "moody.py").write_text(reward)
    return place / "moody.py"


def command(run: Path, plugin: Path, settings: Sequence[str]) -> list[str]:
    """One line for every life, as a cluster's queue would have it."""
    prompts = plugin.with_name("prompts.txt")
    inputs = (f"prompts={prompts}", f"eval.suite={prompts}")
    words = [word for setting in (*SETTINGS, *inputs, *settings) for word in ("--set", setting)]
    return ["train", "--plugin", str(plugin), "--reward", "moody", "--resume", "auto", "--out", str(run), *words]


def import_everything() -> None:
    """What a life would spend seconds on."""
    import peft  # noqa: F401
    import torch._dynamo  # by an optimizer

    import unigrpo_cli.run.start  # noqa: F401
    from unigrpo_cli.models import lora  # noqa: F401

    torch.set_num_threads(1)


def writing(run: Path) -> list[Path]:
    """Checkpoints that are being written now."""
    return list((run / "checkpoints").glob("step_*.partial"))


def wait_and_kill(life: Process, run: Path, dice: random.Random, longest: float, aimed: bool) -> bool:
    """Let a life go on for a random time, or until a checkpoint is being written; whether it had to be killed."""
    began, skip = time.monotonic(), dice.randrange(2) if aimed else 0
    until = began + dice.uniform(0.0, longest)
    seen: set[str] = set()
    while life.code is None:
        if aimed:
            seen |= {path.name for path in writing(run)}
            if len(seen) > skip:
                time.sleep(dice.uniform(0.0, 0.04))
                if writing(run):  # else it was quicker, and the next one is taken
                    break
        elif time.monotonic() > until:
            break
        time.sleep(MOMENT)
    else:
        return False
    life.send(signal.SIGKILL)
    life.ended()
    return True


def where(run: Path) -> str:
    """What a killed life was at, by what it left."""
    if not (run / "config.toml").is_file():
        return "loading"
    left = sorted(str(p.relative_to(run)) for p in run.rglob("*.partial")) + sorted(
        str(p.relative_to(run)) for p in run.rglob("replaced_*")
    )
    if left:
        return f"inside the writing of {left[0].removesuffix('.partial')}"
    steps = _rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    if not steps:
        return "before the first step was done"
    return f"after step {steps[-1]['step']} was logged"


def _rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [_not_timed(row) for row in rows]


def _not_timed(row: dict) -> dict:
    """A row of metrics without what the machine decides: time, memory, and warnings about them."""
    return {k: v for k, v in row.items() if not k.startswith(("time", "seconds/", "memory/", "warnings"))}


def _content(path: Path) -> bytes | str:
    """What must be the same of a file: every byte, but those that say how long something took."""
    if path.name in ("summary.json", "metrics.jsonl", ".lock"):
        return ""
    if path.name == "state.json":
        state = json.loads(path.read_text())
        monitor = state["record"]["monitor"]
        for name in ("first", "last"):
            monitor[name] = [_not_timed(row) for row in monitor[name]]
        for name in ("sightings", "lasting"):
            monitor.pop(name)
        return json.dumps(state)
    if path.name == "doctor.json":
        return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"})
    if path.name == "SHA256SUMS":
        return "".join(line for line in path.read_text().splitlines(True) if "state.json" not in line)
    return path.read_bytes()


def differences(run: Path, other: Path) -> list[str]:
    """Everything in two runs' directories that is not the same to the bit, but seconds and their own names."""
    found = []
    names = {str(p.relative_to(r)) for r in (run, other) for p in r.rglob("*") if p.is_file() or p.is_symlink()}
    for name in sorted(names):
        a, b = run / name, other / name
        if a.is_symlink() or b.is_symlink():
            same = a.is_symlink() and b.is_symlink() and os.readlink(a) == os.readlink(b)
        elif not (a.is_file() and b.is_file()):
            found.append(f"{name} is in one alone")
            continue
        else:
            same = _content(a) == _content(b)
        if not same:
            found.append(name)
    if _rows(run / "metrics.jsonl") != _rows(other / "metrics.jsonl"):
        found.append("metrics.jsonl")
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, other)]
    for key in summaries[0]:
        if key not in ("run", "checkpoint", "seconds", "train_seconds") and summaries[0][key] != summaries[1][key]:
            found.append(f"summary.json {key}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    parser.add_argument("--set", action="append", default=[], help="another setting of the run")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every life")
    parser.add_argument("--keep", type=Path, help="a directory for the runs, kept; default a temporary one")
    given = parser.parse_args()
    if not given.fresh:
        import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        return chaos(given.keep or Path(temporary), given.kills, given.seed, given.set, given.fresh)


def chaos(place: Path, wanted: int, seed: int, settings: Sequence[str], fresh: bool = False) -> int:
    """All lives; 0 when every run is what the one left alone is."""
    dice, plugin, log = random.Random(seed), write_inputs(place), place / "log.txt"
    alone = place / "alone"

    def live(run: Path) -> Process:
        return Process(command_line, *command(run, plugin, settings), stdout=log, stderr=log, fresh=fresh)

    began = time.monotonic()
    if live(alone).ended(3600)[0] != 0:
        print(f"the run that was left alone failed:\n{log.read_text()[-2000:]}")
        return 1
    longest = time.monotonic() - began
    print(f"left alone: {longest:.1f} s", flush=True)
    kills = inside = runs = equal = 0
    while kills < wanted or not runs:
        runs += 1
        run = place / f"run{runs}"
        while True:
            life = live(run)
            if kills < wanted and wait_and_kill(life, run, dice, longest, aimed=kills % 2 == 0):
                kills += 1
                hit = where(run)
                inside += "checkpoints/step_" in hit
                print(f"kill {kills:3d}  run {runs}  {hit}", flush=True)
                continue
            code = life.ended(3600)[0]
            break
        if code != 0:
            print(f"run {runs} ended with {code}:\n{log.read_text()[-2000:]}")
            continue
        found = differences(alone, run)
        equal += not found
        print(f"run {runs}: " + (f"differs in {', '.join(found)}" if found else "equal to the bit"), flush=True)
    print(f"{kills} kills, {inside} inside a checkpoint's writing; {equal}/{runs} runs equal to the bit")
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
