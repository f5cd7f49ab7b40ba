"""Model cards: the README.md of every checkpoint and export, for people and for the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from unigrpo_cli.config import Config, to_toml, with_values
from unigrpo_cli.errors import UnigrpoError
from unigrpo_cli.evaluate import Evaluation, compare, load_report, paired
from unigrpo_cli.io.secrets import redacted
from unigrpo_cli.models.hub import EMBEDDED, is_hub_id
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.run.directory import Run

CURVES, PICTURES = "curves.png", "samples.png"
"""Pictures that a card shows where they lie beside it."""
LICENCES = {EMBEDDED: "apache-2.0", "ByteDance-Seed/BAGEL-7B-MoT": "apache-2.0"}
"""Licences of base models, by the models' own cards."""
CURVE_ROWS = 8
METHOD = """\
[UniGRPO](https://arxiv.org/abs/2603.23500): each prompt is answered by a group of episodes, which reason in words and
then paint. Rewards score the pictures, and one advantage per episode trains both kinds of its actions: the tokens of
the reasoning by GRPO, and the stochastic denoising steps of the picture by FlowGRPO."""
SFT_METHOD = """\
Supervised fine-tuning by unigrpo, a cold start for reinforcement learning: on {data}, the cross-entropy of the
reasoning's tokens (weight {text:g}) and the flow-matching loss of the picture's latents (weight {image:g})."""
USE_ADAPTER = """\
## Use

With unigrpo (`pip install unigrpo-cli`):

```
unigrpo generate --adapter DIR --model {base} "a red circle above a blue square"
```

With PEFT, on the model that the base's own code builds (BAGEL: https://github.com/ByteDance-Seed/Bagel), whose names
the adapter has; where there is a folder per network, give PEFT that folder:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "DIR")
```

As whole weights for the base's own code, from the run: `unigrpo export RUN --merge --out DIR`."""
USE_WEIGHTS = """\
## Use

This directory has the file names and tensor names of the base's release. With unigrpo (`pip install unigrpo-cli`):

```
unigrpo generate --model DIR "a red circle above a blue square"
```

With the base's own code (BAGEL: https://github.com/ByteDance-Seed/Bagel): give this directory as its model path."""


@dataclass(frozen=True)
class Trained:
    """Weights that a run trained, as far as a card describes them.

    Args:
        base: the model that the run started from.
        kind: "adapter", "weights", or "merged" for an adapter that was added to its base.
        metrics: lines of metrics.jsonl up to this step.
        before, after: held-out evaluations; `after` is of these weights.
    """

    config: Config
    base: str
    kind: str
    step: int
    rewards: Sequence[RewardIdentity]
    metrics: Sequence[dict[str, Any]] = ()
    before: Evaluation | None = None
    after: Evaluation | None = None


def evaluation_of(files: Run, when: str) -> Evaluation | None:
    """`eval_before.json` or `eval_after.json`, where it can be read."""
    with suppress(UnigrpoError):
        return load_report(files.directory / f"eval_{when}.json")
    return None


def metrics_until(files: Run, step: int) -> list[dict[str, Any]]:
    """The lines of training steps in metrics.jsonl up to a step."""
    rows = []
    with suppress(OSError):
        for line in files.metrics.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("step", step + 1) <= step and "loss" in row:
                    rows.append(row)
    return rows


def card_of(trained: Trained, directory: Path | None = None) -> str:
    """The card's text.

    Args:
        directory: where the card will lie; pictures there are shown.
    """
    sft = trained.config.sft
    name = f"{_short(trained.base)}-{'SFT' if sft.data else 'UniGRPO'}"
    data = ", ".join(f"`{_short(source)}`" for source in sft.data)
    method = SFT_METHOD.format(data=data, text=sft.text_weight, image=sft.image_weight) if data else METHOD
    parts = [
        f"# {name}\n\n{_first_sentence(trained)}",
        *(f"![{what}]({file})" for file, what in _pictures(directory)),
        _scores(trained),
        f"## Method\n\n{method}",
        _rewards(trained),
        _curve(trained),
        _settings(trained),
        _loading(trained),
    ]
    metadata = _metadata(trained, name)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"))


def _metadata(trained: Trained, name: str) -> ModelCardData:
    found = trained.after.scores if trained.after is not None else {}
    suite = _short(trained.config.eval.suite)
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=suite,
            dataset_name=f"{suite}, held-out prompts",
            metric_type=reward,
            metric_value=round(estimate.mean, 4),
        )
        for reward, estimate in found.items()
    ]
    hub = trained.base if is_hub_id(trained.base) else None
    return ModelCardData(
        model_name=name,
        license=LICENCES.get(trained.base),
        base_model=hub,
        base_model_relation=None if hub is None else "adapter" if trained.kind == "adapter" else "finetune",
        library_name="peft" if trained.kind == "adapter" else None,
        pipeline_tag="text-to-image",
        tags=["unigrpo", *(["sft"] if trained.config.sft.data else ["grpo", "flow-grpo", "reinforcement-learning"])],
        eval_results=results or None,
    )


def _first_sentence(trained: Trained) -> str:
    base = trained.base if is_hub_id(trained.base) or trained.base == EMBEDDED else _short(trained.base)
    what = {"adapter": "A LoRA adapter of", "weights": "All weights of", "merged": "A LoRA adapter merged into"}
    licence, method = LICENCES.get(trained.base), "supervised fine-tuning" if trained.config.sft.data else "UniGRPO"
    terms = f"Licence of the base model: {licence}." if licence else "The licence of the base model applies."
    return f"{what[trained.kind]} `{base}` after {trained.step} steps of {method}. {terms}"


def _pictures(directory: Path | None) -> list[tuple[str, str]]:
    kinds = ((CURVES, "curves of training"), (PICTURES, "the same held-out prompts on the same noise over training"))
    return [(file, what) for file, what in kinds if directory is not None and (directory / file).is_file()]


def _scores(trained: Trained) -> str:
    """Held-out scores with intervals, before and after, and their paired difference."""
    before, after = trained.before, trained.after
    if before is None and after is None:
        return ""
    shown = after or before
    assert shown is not None
    both = before is not None and after is not None and paired(before, after)
    differences = compare(before, after, trained.config.eval.seed) if both and before and after else {}
    rows = [
        f"| {name} | {_interval(before, name)} | {_interval(after, name)} | {_difference(differences.get(name))} |"
        for name in shown.scores
    ]
    head = "| reward | before | after | difference, paired |\n|---|---|---|---|"
    return (
        f"## Held-out scores\n\nMean of {shown.n} pictures of {_short(trained.config.eval.suite)}, with 95 % bootstrap "
        f"intervals over prompts.\n\n{head}\n" + "\n".join(rows)
    )


def _interval(found: Evaluation | None, name: str) -> str:
    if found is None or name not in found.scores:
        return "-"
    estimate = found.scores[name]
    return f"{estimate.mean:.3f} ({estimate.ci95[0]:.3f} to {estimate.ci95[1]:.3f})"


def _difference(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def _rewards(trained: Trained) -> str:
    rows = [
        f"| {r.alias} | `{r.address}` {r.version} | {r.weight:g} | {_options(r.options)} |" for r in trained.rewards
    ]
    head = "| reward | from | weight | options |\n|---|---|---|---|"
    return f"## Rewards\n\nWeight 0: reported, not trained on.\n\n{head}\n" + "\n".join(rows) if rows else ""


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={redacted(str(value))}`" for key, value in options.items()) or "-"


def _curve(trained: Trained) -> str:
    """Means over stretches of equally many steps."""
    rows = trained.metrics
    names = [r.alias for r in trained.rewards if any(f"reward/{r.alias}" in row for row in rows)]
    if not rows or not names:
        return ""
    columns = [*(f"reward/{name}" for name in names), "text/entropy", "image/velocity-mse"]
    columns = [key for key in columns if any(key in row for row in rows)]
    lines = []
    for part in np.array_split(np.arange(len(rows)), min(CURVE_ROWS, len(rows))):
        values = [[row[key] for k in part if (row := rows[k]).get(key) is not None] for key in columns]
        means = " | ".join(f"{np.mean(own):.4g}" if own else "-" for own in values)
        first, last = rows[part[0]]["step"], rows[part[-1]]["step"]
        lines.append(f"| {first if first == last else f'{first} to {last}'} | {means} |")
    head = f"| steps | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
    return f"## Curve\n\nMeans over training episodes.\n\n{head}\n" + "\n".join(lines)


def _settings(trained: Trained) -> str:
    """The whole configuration; of paths on the machine only the last part."""
    config = trained.config
    given = {
        "model": config.model,
        "prompts": config.prompts,
        "adapter": config.adapter,
        "eval.suite": config.eval.suite,
    }
    short: dict[str, Any] = {key: value and _short(value, hub=True) for key, value in given.items()}
    text = redacted(to_toml(with_values(config, short | {"sft.data": tuple(map(_short, config.sft.data))})))
    return f"## Settings\n\n<details><summary>config.toml</summary>\n\n```toml\n{text}```\n\n</details>"


def _loading(trained: Trained) -> str:
    base = trained.base if is_hub_id(trained.base) or trained.base == EMBEDDED else "BASE"
    return USE_ADAPTER.format(base=base) if trained.kind == "adapter" else USE_WEIGHTS


def _short(name: str, hub: bool = False) -> str:
    """The last part of a path or an id; with `hub` an id is kept."""
    path = name.rpartition(":")[2]  # a suite may be KIND:PATH
    return name if hub and not os.path.isabs(path) else Path(path).name
