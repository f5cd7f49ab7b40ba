"""Answers of the shapes world for `unigrpo sft`: `python -m tools.toy_answers --out DIR`, a second for 500 rows.

Each row has a prompt of the training split, a plan that answers it and the plan's picture. With `--wrong 0.5` half of
the plans have a mistake, and their pictures with them: a model that imitates those has worse reasoning.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from unigrpo_cli.io.pictures import save_png
from unigrpo_cli.toy.prompts import corrupt_plan, draw_scene, train_prompts
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import plan_text


def write_answers(out: Path, rows: int, seed: int = 0, wrong: float = 0.0) -> Path:
    """`answers.jsonl` and its pictures in a directory; returns the file.

    Args:
        wrong: share of plans with a mistake.
    """
    rng = np.random.default_rng(seed)
    prompts = train_prompts()
    lines = []
    for k in range(rows):
        metadata = prompts[rng.integers(len(prompts))]
        scene = draw_scene(metadata, rng)
        if rng.random() < wrong:
            scene = corrupt_plan(scene, metadata, rng)
        row = {"prompt": metadata["prompt"], "reasoning": plan_text(scene), "image": f"images/{k:04d}.png"}
        save_png(render(scene, rng), out / row["image"], {})
        lines.append(json.dumps(row))
    (out / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return out / "answers.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.0)
    args = parser.parse_args()
    print(write_answers(args.out, args.rows, args.seed, args.wrong))


if __name__ == "__main__":
    main()
