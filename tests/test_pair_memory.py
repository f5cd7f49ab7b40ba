"""The plan of memory of pairs: released sizes as diffusers builds them, activations as autograd saves them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pair
import torch
from commands import unigrpo
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen3Config, Qwen3ForCausalLM

from unigrpo_cli.config import Config
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.pair import facts
from unigrpo_cli.models.pair.facts import KLEIN, TARGETS_LM, Z_IMAGE
from unigrpo_cli.models.pair.sizes import PUBLISHED, QWEN3_4B, NetworkSizes, PairSizes
from unigrpo_cli.run.memory import pair
from unigrpo_cli.run.memory.kinds import workload
from unigrpo_cli.run.memory.workload import IMAGE, TEXT

RELEASED: dict[str, tuple[Callable[[], nn.Module], NetworkSizes, str]] = {
    "qwen3-4b": (
        lambda: Qwen3ForCausalLM(
            Qwen3Config(vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
        ),
        QWEN3_4B,
        TARGETS_LM,
    ),
    "z-image": (ZImageTransformer2DModel, PUBLISHED["z-image"].painter, Z_IMAGE.targets),
    "klein-4b": (
        lambda: Flux2Transformer2DModel(num_layers=5, num_single_layers=20, num_attention_heads=24,
                                        joint_attention_dim=7680, guidance_embeds=False),
        PUBLISHED["klein-4b"].painter,
        KLEIN.targets,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RELEASED))
def test_released_sizes_are_those_of_the_released_configurations(name: str) -> None:
    build, sizes, targets = RELEASED[name]
    with torch.device("meta"):
        network = build()
    own = [m for n, m in network.named_modules() if re.fullmatch(targets, n)]
    assert all(isinstance(m, nn.Linear) for m in own)
    shapes = [m.weight.shape for m in own]
    assert sizes.parameters == sum(p.numel() for p in network.parameters())
    assert sizes.trained == sum(s.numel() for s in shapes)
    assert sizes.sides == sum(map(sum, shapes))
    assert sizes.largest == max(s.numel() for s in shapes)


def _saved(network: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd saves in a pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    seen: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        kept = call()
    assert kept is not None
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["reasoner", "z-image", "flux2-klein"])
def test_activations_are_counted_as_autograd_saves_them(name: str, dtype: str) -> None:
    """Within a fifth: real layers of real proportions, small."""
    kind = getattr(torch, dtype)
    x = torch.randn(1, 64, 16, dtype=kind)
    if name == "reasoner":
        lm = tiny_pair.reasoner(64, 4, 300).to(kind)
        seen = _saved(lm, lambda: lm.base_model(torch.zeros(1, 96, dtype=torch.long)).last_hidden_state) / 96 / 4
        expert, sizes = TEXT, NetworkSizes(0, 0, 0, 0, 4, 64, 128)
    elif name == "z-image":
        z = ZImageTransformer2DModel(
            in_channels=4, dim=96, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=64,
            axes_dims=[8, 8, 8], axes_lens=[258, 64, 64],
        ).to(kind)  # fmt: skip
        image, text = x.view(4, 1, 16, 16), torch.randn(32, 64, dtype=kind)
        seen = _saved(z, lambda: z([image], torch.tensor([0.5]), [text]).sample[0]) / 96 / 5
        expert, sizes = IMAGE, NetworkSizes(0, 0, 0, 0, 5, 96, 256)
    else:
        k = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=4, attention_head_dim=16, num_attention_heads=6,
            joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, timestep_guidance_channels=16,
        ).to(kind)  # fmt: skip
        how = {"timestep": torch.tensor([0.5]), "img_ids": torch.zeros(64, 4), "txt_ids": torch.zeros(32, 4)}
        states = torch.randn(1, 32, 24, dtype=kind)
        seen = _saved(k, lambda: k(hidden_states=x, encoder_hidden_states=states, **how).sample) / 96 / 5
        expert, sizes = IMAGE, NetworkSizes(0, 0, 0, 0, 5, 96, 288)
    own = KLEIN if name == "flux2-klein" else Z_IMAGE
    pairs = PairSizes(own, sizes, sizes, 300, 16, 8, 0, (4, 4), 16, 4)
    work = workload(pairs, Config(dtype=dtype))
    assert isinstance(work, pair.PairWorkload)
    assert 0.8 < pair._saved(work, expert) / seen < 1.25


def test_sizes_of_a_directory_are_those_of_its_networks(tmp_path: Path) -> None:
    for kind in tiny_pair.KINDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(facts.PAINTERS, KLEIN.pipeline, tiny_pair.SMALL)
            directory = tiny_pair.write(kind, tmp_path / kind)
            sizes = MODELS.sizes(str(directory))[1]
        built = tiny_pair.pipeline(kind)
        assert sizes.painter.parameters == sum(p.numel() for p in built.transformer.parameters())
        assert sizes.reasoner.parameters == sum(p.numel() for p in built.text_encoder.parameters())
        assert sizes.autoencoder >= sum(p.numel() for p in built.vae.parameters())
        assert (sizes.token_dim, sizes.pixels_per_token, sizes.grid(16, 24)) == (16, 4, (4, 6))


def test_another_reasoner_is_counted_instead_of_the_text_encoder(tmp_path: Path) -> None:
    model, words = tiny_pair.write("z-image", tmp_path / "model"), tiny_pair.tokenizer()
    other = tiny_pair.reasoner(16, 9, len(words), tied=False)
    other.save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [
        "train",
        "--dry-run",
        "--json",
        "--model",
        model,
        "--reward",
        "jpeg",
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    settings = ["dtype=float32", "train.finetune=full", "sampling.height=8", "sampling.width=8"]
    trained = {}
    for reasoner in ("", str(tmp_path / "lm")):
        own = [*settings, f"model_options.reasoner={reasoner}"]
        done = unigrpo(*map(str, given), *(word for setting in own for word in ("--set", setting)))
        trained[reasoner] = json.loads(done.stdout)["trained_parameters"]
    own, others = (
        sum(p.numel() for m in lm.model.layers for p in m.parameters() if p.ndim == 2)
        for lm in (tiny_pair.pipeline("z-image").text_encoder, other)
    )
    assert trained[str(tmp_path / "lm")] - trained[""] == others - own > 0


def test_a_dry_run_of_a_pair_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hub id that is not here: released sizes; a smaller device names settings that a pair has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = ["--model", "Tongyi-MAI/Z-Image-Turbo", "--reward", "jpeg", "--prompts", str(tmp_path / "prompts.txt")]
    plan = ["--dry-run", "--set", "device=cuda", "--set", "memory_gb=80", "--set", "train.finetune=lora"]
    done = unigrpo("train", *given, *plan, "--set", "train.activation_checkpointing=true", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fits"] and 40 < found["need_gib"] < 80 and found["time"]["hours"] is None
    assert found["trained_parameters"] == 64 * (QWEN3_4B.sides + PUBLISHED["z-image"].painter.sides)
    done = unigrpo("train", *given, *plan[:4], "memory_gb=40", "--set", "train.finetune=full")
    assert done.exit_code == 1 and "does not fit" in done.stderr
    assert "reference_device" not in done.stderr and "vae_tile_rows" not in done.stderr


def test_a_dry_run_of_a_quantized_base_says_what_its_time_leaves_out() -> None:
    given = ["--model", "ByteDance-Seed/BAGEL-7B-MoT", "--reward", "jpeg", "--set", "device=cuda"]
    plan = ["train", "--dry-run", *given, "--set", "memory_gb=80", "--set", "train.finetune=lora"]
    quantized = unigrpo(*plan, "--set", "model_options.quantize=nf4")
    assert "evaluations and making quantised matrices whole (" in quantized.stdout
    assert "without rewards and evaluations (" in unigrpo(*plan).stdout
