"""A frozen base in 8 or 4 bits: numbers, gradients, the contract of a policy, commands, memory."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny_pair
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tests.chaos import SETTINGS, write_inputs
from tests.commands import unigrpo
from unigrpo_cli.config import load_config
from unigrpo_cli.models.base_options import BaseOptions, quantized_bytes
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.hub import embedded_directory
from unigrpo_cli.models.mot.family import MoTFamily
from unigrpo_cli.models.pair.family import PairFamily
from unigrpo_cli.models.pair.options import PairOptions
from unigrpo_cli.models.quantized import LEVELS, QuantizedLinear, kind_of, quantized
from unigrpo_cli.run.memory.kinds import training_memory, workload
from unigrpo_cli.run.setup import load_policy
from unigrpo_cli.testing import assert_policy_contract

BAGEL = Path(__file__).parent / "golden" / "bagel_tiny"
CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("kind", ["int8", "nf4"])


def _layer(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    """A layer whose matrix is no multiple of a block."""
    torch.manual_seed(0)
    plain = nn.Linear(30, 7).to(dtype).requires_grad_(False)
    return plain, QuantizedLinear(plain, kind)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_becomes_the_nearest_that_there_is(kind: str, dtype: torch.dtype) -> None:
    """By hand from the scales: 255 multiples of a row's, or 16 levels times a block's; and bytes as counted."""
    plain, layer = _layer(kind, dtype)
    weight = plain.weight.float().flatten()
    if kind == "int8":
        scale, levels = layer.scales.expand(7, 30).flatten(), torch.arange(-127, 128.0)
        assert torch.equal(layer.scales[:, 0], plain.weight.abs().amax(1) / 127)
    else:
        scale, levels = layer.scales.repeat_interleave(64)[: len(weight)], torch.tensor(LEVELS)
        assert layer.scales[0, 0] == plain.weight.flatten()[:64].abs().max()
    nearest = levels[(weight[:, None] - scale.float()[:, None] * levels).abs().argmin(1)]
    assert torch.equal(layer.weight.flatten(), (nearest.to(dtype) * scale).to(dtype))
    again = quantized(layer.weight, kind)
    assert torch.equal(again["codes"], layer.codes)
    assert sum(b.nbytes for b in layer.buffers()) == quantized_bytes((7, 30), kind, dtype.itemsize)


@each_kind
def test_the_product_is_that_of_the_whole_matrix_and_autograd_keeps_none(kind: str) -> None:
    plain, layer = _layer(kind)
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    x, y = (torch.randn(5, 30, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    kept: list[torch.Size] = []
    with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x)
    assert kept == []
    torch.testing.assert_close(out, plain(y))
    out.square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        assert torch.equal(layer(x), out)  # the ratio of the first update is exactly 1


def test_a_quantized_mixture_keeps_the_contract(kind: str = "nf4") -> None:
    load = partial(MoTFamily().load, embedded_directory(), None, device=CPU, dtype=torch.float32, vae_tile_rows=0)
    policy = load(options=BaseOptions(quantize=kind))
    fresh = copy.deepcopy(policy)
    matrices = [m for m in policy.network.modules() if isinstance(m, QuantizedLinear)]
    assert len(matrices) == 14 * policy.network.config.num_hidden_layers  # seven of each expert
    assert_policy_contract(lambda: copy.deepcopy(fresh), max_new_tokens=3)


def test_a_quantized_pair_keeps_the_contract(tmp_path: Path, kind: str = "int8") -> None:
    model = tiny_pair.write("z-image", tmp_path / "model")
    load = partial(PairFamily().load, model, None, device=CPU, dtype=torch.float32, vae_tile_rows=0)
    policy = load(options=PairOptions(quantize=kind))
    assert_policy_contract(lambda: copy.deepcopy(policy), height=8, width=8, steps=2, max_new_tokens=3, trained=False)
    config = load_config(overrides=["train.finetune=lora", f"model_options.quantize={kind}", "dtype=float32"])
    found = {i.name: i.bytes for i in training_memory(workload(MODELS.sizes(str(model))[1], config)).always}
    networks = policy.networks
    kept = sum(b.nbytes for m in networks.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())
    assert kept <= found["quantized weights"] <= 1.2 * kept  # narrow matrices have many scales
    assert found["frozen weights"] == sum(p.nbytes for p in networks.parameters())


def test_a_quantized_base_is_trained_resumed_and_merged_by_the_commands(tmp_path: Path) -> None:
    """What is merged computes what was trained; all weights cannot be trained."""
    plugin, base = write_inputs(tmp_path), tmp_path / "BAGEL"
    shutil.copytree(BAGEL, base, ignore=shutil.ignore_patterns("golden*", "rounds*", "README.md"))
    sizes = ("sampling.steps=3", "sampling.window_range=[0,2]", "sampling.window_size=1", "train.lora_rank=2")
    quiet = ("train.steps=1", "train.samples_every=0", "eval.every=0", "eval.best=", "doctor.at_start=off")
    own = ("dtype=bfloat16", "train.finetune=lora", "model_options.quantize=nf4", "train.lr_text=1e-2")
    files = (f"model={base}", f"prompts={tmp_path / 'prompts.txt'}")
    words = [word for setting in (*SETTINGS, *sizes, *quiet, *own, *files) for word in ("--set", setting)]
    given = ("--plugin", plugin, "--reward", "moody", "--out", tmp_path / "run")
    done = unigrpo("train", *given, *words, "--set", "train.finetune=full")
    assert done.exit_code == 2
    assert "give train.finetune=lora, or leave out model_options.quantize" in done.stderr
    assert unigrpo("train", *given, *words).exit_code == 0
    done = unigrpo("train", "--resume", tmp_path / "run", "--steps", "2", "--plugin", plugin, "--json")
    assert json.loads(done.stdout)["steps"] == 2
    assert unigrpo("export", tmp_path / "run", "--merge", "--out", tmp_path / "merged").exit_code == 0
    config = load_config(file=tmp_path / "run" / "config.toml")
    trained = load_policy(str(tmp_path / "run"), None, config)
    plain = config.model_copy(update={"model_options": {}})
    merged, untrained = (load_policy(str(m), None, plain) for m in (tmp_path / "merged", base))
    assert (kind_of(trained.network), kind_of(merged.network)) == ("nf4", "none")
    ids = trained.given("prompt", "a red cube").ids[None]
    with torch.no_grad():
        states = [p.forward(p.empty_context(1), ids).hidden_BLC.float() for p in (trained, merged, untrained)]
    near, far = ((states[0] - other).abs().max() for other in states[1:])
    assert near < 0.2 * far
