"""BAGEL as a policy: rollout, replay, training and saving on the tiny release, in fp32 and in bf16."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import unigrpo_cli.rollout as rollout_module
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance
from unigrpo_cli.algo.objective import Objective, unigrpo_loss
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import GivenImage, GivenText, Prompt, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.files import read_header
from unigrpo_cli.models.lora import load_adapters, save_adapters
from unigrpo_cli.models.mot import layers
from unigrpo_cli.models.mot.bagel import read_release
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.config import (
    AutoencoderConfig,
    MoTConfig,
    VisionConfig,
    autoencoder_shapes,
    computes_wide,
    network_shapes,
)
from unigrpo_cli.models.mot.layers import Linear
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import PLAN_FIRST, MoTPolicy
from unigrpo_cli.models.mot.weights import read_tensors
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import collate, micro_batches, replay
from unigrpo_cli.rollout import Sampling, read_given, rollout
from unigrpo_cli.run.episode_files import load_episodes, save_episodes
from unigrpo_cli.train import score_old_and_reference, with_advantages
from unigrpo_cli.training.metrics import drift
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy

TINY = Path(__file__).parent / "golden" / "bagel_tiny"
RELEASE = MoTConfig(3584, 28, 28, 4, 18944, 152064, 2, 16, 8, 64, vision=VisionConfig(1152, 26, 16, 4304, 14, 70))
SAMPLING = Sampling(
    think=True,
    max_new_tokens=6,
    temperature=1.0,
    height=32,
    width=48,
    steps=5,
    shift=3.0,
    sde="flow",
    noise_level=0.8,
    batch_size=4,
)
WINDOW = flow.Window(1, 3)
PROMPTS = [Prompt("a", "a red cube"), Prompt("b", "two birds on a large blue sphere")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph of nothing, of an awkward size."""
    path = tmp_path_factory.mktemp("picture") / "source.png"
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(6, 9, 3, generator=generator).mul(255).to(torch.uint8).numpy()
    Image.fromarray(small).resize((90, 61)).save(path)
    return path


# ----- names


def test_every_tensor_of_the_release_is_there_once_and_nothing_else() -> None:
    """The network on the meta device against the table of names, at the release's size; 14.607 B parameters."""
    with torch.device("meta"):
        network = MoT(RELEASE, (151652, 151653))
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == network_shapes(RELEASE)
    assert len(found) == 1223
    assert round(sum(p.numel() for p in network.parameters()) / 1e9, 3) == 14.607
    assert len(autoencoder_shapes(AutoencoderConfig((128, 256, 512, 512), 2, 16))) == 244


@pytest.mark.parametrize("vision", [None, VisionConfig(24, 3, 2, 40, 4, 5)])
def test_the_table_of_names_is_the_networks_own_at_any_size(vision: VisionConfig | None) -> None:
    config = MoTConfig(48, 3, 6, 3, 72, 91, 1, 5, 4, 7, vision=vision)
    found = {name: tuple(value.shape) for name, value in MoT(config, (1, 2)).state_dict().items()}
    assert found == network_shapes(config)


def test_autoencoder_names_are_those_of_the_files() -> None:
    release = read_release(TINY)
    assert release.autoencoder is not None
    assert {n: t.shape for n, t in release.autoencoder_tensors.items()} == autoencoder_shapes(release.autoencoder)


# ----- files


def _state(directory: Path) -> dict[str, torch.Tensor]:
    state = load_file(directory / "ema.safetensors")
    return {name: value.clone() for name, value in state.items()}  # what is mapped would change with the file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_save_load_is_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights, tables, autoencoder, configurations, tokenizer; in bf16 also the tensors as they were stored."""
    model = load_model(str(TINY), dtype=dtype)
    model.save(tmp_path / "saved", "")
    again = load_model(str(tmp_path / "saved"), dtype=dtype)
    first, second = model.network.state_dict(), again.network.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype == (torch.float32 if computes_wide(name) else dtype)
        assert torch.equal(value, second[name]), name
    if dtype == torch.bfloat16:
        stored, saved = _state(TINY), _state(tmp_path / "saved")
        assert stored.keys() == saved.keys()
        assert all(torch.equal(stored[n], saved[n]) and stored[n].dtype == saved[n].dtype for n in stored)
    for name in (
        "ae.safetensors",
        "llm_config.json",
        "vit_config.json",
        "config.json",
        "tokenizer.json",
        "merges.txt",
    ):
        assert (TINY / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((TINY / "model.safetensors.index.json").read_text())["weight_map"]


def test_tables_come_from_the_file_and_from_their_formula_where_it_has_none(tmp_path: Path) -> None:
    """The stored tables are rounded; the formula in fp32 is within that rounding, not equal to it."""
    model = load_model(str(TINY))
    model.save(tmp_path, "")
    state = _state(tmp_path)
    for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
        state.pop(name)
    save_file(state, tmp_path / "ema.safetensors")
    again = load_model(str(tmp_path))
    for table in ("latent_pos_embed", "vit_pos_embed"):
        stored, made = (getattr(m.network, table).pos_embed for m in (model, again))
        assert 0 < (stored - made).abs().max() < 0.004
        assert torch.equal(made.bfloat16().float(), stored)


def test_loading_reads_tensor_by_tensor(tmp_path: Path) -> None:
    """Memory of the process grows by about one tensor while a file of 16 is read and given away."""
    path, process = tmp_path / "x.safetensors", psutil.Process()
    save_file({f"t{k}": torch.full((2**21,), k, dtype=torch.float32) for k in range(16)}, path)
    gc.collect()
    before, most = process.memory_info().rss, 0
    for name, x in read_tensors(read_header(path).items()):
        assert (x == int(name[1:])).all()
        most = max(most, process.memory_info().rss - before)
    assert most < 48 * 2**20, "of a file of 128 MiB"


def test_another_weights_file(tmp_path: Path) -> None:
    """Models grown from BAGEL name their file otherwise; the index then counts for nothing."""
    load_model(str(TINY)).save(tmp_path, "")
    (tmp_path / "ema.safetensors").rename(tmp_path / "grown.safetensors")
    assert load_model(str(tmp_path / "grown.safetensors")).release.directory == tmp_path


def test_a_tokenizer_from_vocab_and_merges_alone(tmp_path: Path) -> None:
    model = load_model(str(TINY))
    model.save(tmp_path, "")
    (tmp_path / "tokenizer.json").unlink()
    again, text = load_model(str(tmp_path)), "A small red cube, 2 birds: <think>it's</think>"
    assert again.given("prompt", text).ids.tolist() == model.given("prompt", text).ids.tolist()
    assert again.network.boundary_ids == model.network.boundary_ids


def test_a_painter_without_the_vision_tower(tmp_path: Path) -> None:
    """The three prefixes that painting does not need may be absent; half of them may not."""
    load_model(str(TINY)).save(tmp_path, "")
    state = _state(tmp_path)
    painter = {n: v for n, v in state.items() if not n.startswith(("vit_model.", "connector.", "vit_pos_embed."))}
    save_file(painter, tmp_path / "ema.safetensors")
    assert load_model(str(tmp_path)).network.config.vision is None
    save_file({n: v for n, v in state.items() if not n.startswith("connector.")}, tmp_path / "ema.safetensors")
    assert "4 tensors missing (e.g. connector.fc1.bias)" in read_release(tmp_path).problems[0]


# ----- what is said and shown


def test_thinking_begins_with_the_releases_own_words() -> None:
    model = load_model(str(TINY))
    system, asked = model.preamble(PROMPTS[0], think=True)
    assert (system.text, asked.text) == (PLAN_FIRST, "a red cube")
    assert len(model.preamble(PROMPTS[0], think=False)) == 1


def test_ids_that_the_tokenizer_lacks_are_never_sampled() -> None:
    """The head has more rows than there are tokens; with their logits raised they still never come."""
    model = load_model(str(TINY))
    words = model.tokenizer.get_vocab_size()
    assert words < model.network.config.vocab_size
    with torch.no_grad():
        model.network.language_model.lm_head.weight[words:] = 50.0
    groups = rollout(model, PROMPTS, 8, replace(SAMPLING, temperature=5.0), flow.Window(0, 0), seed=0)
    ids = torch.cat([e.segments[2].ids for e in flatten(groups)])
    assert len(ids) > 50
    assert ids.max() < words


def test_an_edit_is_shown_latents_then_the_towers_view(picture: Path) -> None:
    """System prompt, source, instruction; the painted image has the size of the resized source."""
    model = load_model(str(TINY))
    given = model.preamble(replace(PROMPTS[0], image=str(picture)), think=True)
    assert [type(s) for s in given] == [GivenText, GivenImage, GivenText]
    source = given[1]
    assert len(source.latent) == source.grid[0] * source.grid[1] > 0
    assert source.pixels.shape[0] // 16 == source.grid[0]
    assert source.view.shape[0] % 14 == source.view.shape[1] % 14 == 0
    asked = model.question(replace(PROMPTS[0], image=str(picture)), think=False)
    assert len(asked[0].latent) == 0, "a question needs no latents"
    groups = rollout(
        model, [replace(PROMPTS[0], image=str(picture)), PROMPTS[1]], 2, SAMPLING, flow.Window(0, 0), seed=0
    )
    sizes = [tuple(e.pixels.shape[:2]) for e in flatten(groups)]
    assert sizes == [tuple(source.pixels.shape[:2])] * 2 + [(32, 48)] * 2


def test_a_posterior_draw_moves_the_source_and_its_mean_does_not_vary(picture: Path) -> None:
    model = load_model(str(TINY))
    pixels = torch.zeros(48, 64, 3, dtype=torch.uint8)
    mean, again = (model.given_image("source", pixels).latent for _ in range(2))
    grid = model.resize_to_paint(pixels).shape
    noise = torch.randn(16, grid[0] // 8, grid[1] // 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean, again)
    assert not torch.allclose(mean, model.given_image("source", pixels, noise_Chw=noise).latent)
    assert torch.allclose(mean, model.given_image("source", pixels, noise_Chw=0 * noise).latent)


@torch.no_grad()
def test_a_picture_after_texts_of_unequal_length(picture: Path) -> None:
    """Rows padded to the longest text see their own picture, and no padding, as each does alone."""
    model = load_model(str(TINY))
    texts = [model.given("prompt", text).ids for text in ("a red cube", "two birds on a large blue sphere")]
    view = model.given_image("source", torch.full((64, 90, 3), 200, dtype=torch.uint8)).view[None]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    x = torch.randn(2, 1, 6, 64, generator=torch.Generator().manual_seed(0))

    def velocity(ids: torch.Tensor, lengths: list[int], x: torch.Tensor) -> torch.Tensor:
        context = model.forward(model.empty_context(len(ids)), ids, lengths).context
        none = torch.zeros(len(ids), 0, model.token_dim)
        context = model.encode_image(context, none, (0, 0), view.expand(len(ids), -1, -1, -1))
        image = NoisyImage(x, torch.full((len(x), 1), 0.7), (2, 3))
        return model.forward(context, image=image).velocity_BKND

    both = velocity(padded, [len(t) for t in texts], x)
    for k, ids in enumerate(texts):
        assert torch.allclose(both[k : k + 1], velocity(ids[None], [len(ids)], x[k : k + 1]), atol=1e-5)


# ----- guidance in a rollout


def test_guidance_of_one_is_no_guidance_and_more_is_some() -> None:
    model = load_model(str(TINY))

    def latent(guidance: Guidance) -> torch.Tensor:
        groups = rollout(model, PROMPTS, 1, replace(SAMPLING, guidance=guidance), flow.Window(0, 0), seed=0)
        return groups[0].episodes[0].images[0].latent

    plain = latent(Guidance())
    assert torch.equal(plain, latent(Guidance(text=1.0, image=9.0)))
    assert not torch.allclose(plain, latent(Guidance(text=4.0)))
    assert torch.equal(plain, latent(Guidance(text=4.0, above=0.5, up_to=0.4)))


def test_guidance_compares_with_the_contexts_of_the_official_sampler(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thinking and a source: without text system and source remain, without pictures system and prompt."""
    model = load_model(str(TINY))
    prompt = replace(PROMPTS[0], image=str(picture))
    caught: list = []

    def paint(policy, context, sampling, window, seeds, grid, unconditional):
        caught.append((context, unconditional))
        return real(policy, context, sampling, window, seeds, grid, unconditional)

    real = rollout_module.sample_image
    monkeypatch.setattr(rollout_module, "sample_image", paint)
    rollout(model, [prompt], 2, replace(SAMPLING, guidance=Guidance(text=4.0, image=2.0)), flow.Window(0, 0), seed=0)
    (context, unconditional), (system, source, asked) = caught[0], model.preamble(prompt, think=True)
    shown = len(source.latent) + 2 + (source.view.shape[0] // 14) * (source.view.shape[1] // 14) + 2
    words, request = len(system.ids), len(asked.ids)
    assert (unconditional.less_text.used, unconditional.less_image.used) == (words + shown, words + request)
    assert context.used > words + shown + request, "and the thinking"
    assert unconditional.less_text.position_B.tolist() == [words + 2] * 2
    assert unconditional.less_image.position_B.tolist() == [words + request] * 2
    with torch.no_grad():
        alone = read_given(model, [(system, asked)])
    assert torch.allclose(alone.keys[0][0], unconditional.less_image.keys[0][1, :, : alone.used], atol=1e-6)


# ----- training


def _prepared(config: Config) -> MoTPolicy:
    policy = load_model(str(TINY), dtype=getattr(torch, config.dtype if config.dtype == "bfloat16" else "float32"))
    policy.network.requires_grad_(False)
    return prepare_policy(policy, config)


def _trained(settings: list[str], prompts: list[Prompt] = PROMPTS) -> tuple[MoTPolicy, dict]:
    """Two optimizer steps on one rollout with made-up advantages; the policy and the first step's facts."""
    config = load_config(overrides=["train.micro_batch_size=3", "train.minibatches=1", *settings])
    policy = _prepared(config)
    optimizer = make_optimizer(policy, config)
    episodes = flatten(rollout(policy, prompts, 3, SAMPLING, WINDOW, seed=0))
    objective = Objective(1.0, 1.0, 0.2, 1e-3, 0.0, "ratio-norm", "velocity-mse", 0.01)
    advantage_B = torch.linspace(-1, 1, len(episodes))
    (share,) = with_advantages(
        score_old_and_reference(policy, episodes, config, objective), advantage_B[:, None].expand(-1, 2)
    )
    facts: dict = {"drift": drift([(m.batch, m.old) for m in share])}
    for step in range(2):
        for m in share:
            new = replay(policy, m.batch, grad_through_images=config.objective.grad_through_images)
            loss = unigrpo_loss(
                m.batch.actions, new, m.old, m.reference, m.advantages, objective, episodes=len(episodes)
            )
            loss.total.backward()
            if step == 0:
                facts.setdefault("first", []).append(
                    {name: value.item() for name, value in (loss.maxima | loss.means).items()}
                )
        optimizer.step()
        optimizer.zero_grad()
    return policy, facts


def _fast(finetune: str, dtype: str, checkpointing: str = "true") -> list[str]:
    settings = [f"train.finetune={finetune}", f"dtype={dtype}", f"train.activation_checkpointing={checkpointing}"]
    return [*settings, "train.lr_text=1e-2", "train.lr_image=1e-2", "train.lora_rank=2"]


@cache
def _learned(finetune: str, dtype: str, checkpointing: str) -> tuple[MoTPolicy, dict]:
    """Trained once for all tests that look at it."""
    return _trained(_fast(finetune, dtype, checkpointing))


@pytest.mark.parametrize(
    ("finetune", "dtype", "checkpointing"),
    [
        ("lora", "bfloat16", "true"),
        ("full", "float32", "true"),
        pytest.param("lora", "float32", "false", marks=pytest.mark.long),
        pytest.param("full", "bfloat16", "false", marks=pytest.mark.long),
    ],
)
def test_the_first_ratio_is_exactly_one_and_both_experts_move(finetune: str, dtype: str, checkpointing: str) -> None:
    """In either dtype: ratio exactly 1, reference equal to the policy at first, what is trained kept in fp32."""
    policy, facts = _learned(finetune, dtype, checkpointing)
    for found in facts["first"]:
        assert found["text/max_abs_log_ratio"] == 0.0
        assert found["image/max_abs_log_ratio"] == 0.0
        assert found["image/velocity-mse"] < 1e-12
    trained = policy.trainable()
    for expert in ("text", "image"):
        assert trained[expert]
        assert {p.dtype for p in trained[expert]} == {torch.float32}
    assert policy.network.dtype == getattr(torch, dtype)
    if dtype == "float32":
        assert facts["drift"]["text/drift_max"] < 1e-5
        assert facts["drift"]["image/drift_max"] < 1e-5
    start = load_model(str(TINY), dtype=policy.network.dtype)
    ids = policy.given("prompt", "a red cube").ids[None]
    image = NoisyImage(torch.ones(1, 1, 6, 64), torch.full((1, 1), 0.9), (2, 3))
    with torch.no_grad(), policy.reference() as reference:
        outs = [m.forward(m.empty_context(1), ids, image=image) for m in (reference, start)]
    with torch.no_grad():
        moved = policy.forward(policy.empty_context(1), ids, image=image)
    for name in ("hidden_BLC", "velocity_BKND"):
        assert torch.equal(getattr(outs[0], name), getattr(outs[1], name)), "the reference is where training began"
        assert not torch.equal(getattr(moved, name), getattr(outs[1], name))
    assert outs[0].velocity_BKND.dtype == torch.float32


def test_updates_below_bf16s_rounding_are_kept() -> None:
    """A learning rate at which a bf16 weight of 1 would never move."""
    policy, _ = _trained(["train.finetune=full", "dtype=bfloat16", "train.lr_text=1e-5", "train.lr_image=1e-5"])
    start = load_model(str(TINY)).network.state_dict()
    norm = "language_model.model.layers.0.input_layernorm.weight"
    change = (policy.network.state_dict()[norm] - start[norm]).abs().max()
    assert 5e-6 < change < 1e-4
    assert torch.equal((start[norm] + 2e-5).bfloat16(), start[norm].bfloat16())


def test_gradients_of_a_bf16_base_reach_its_adapters_in_fp32() -> None:
    """Adapters compute in bf16 and are kept in fp32; their update is near the one of an fp32 base."""
    policy, _ = _learned("lora", "bfloat16", "true")
    matrices = [m for n, m in policy.network.named_modules() if n.endswith("lora_A.default")]
    assert matrices
    assert all(isinstance(m, Linear) and m.weight.dtype == torch.float32 for m in matrices)
    seen: set[torch.dtype] = set()
    for matrix in matrices:
        matrix.register_forward_hook(lambda _m, given, out: seen.update((given[0].dtype, out.dtype)))
    with torch.no_grad():
        policy.forward(policy.empty_context(1), policy.given("prompt", "a cube").ids[None])
    assert seen == {torch.bfloat16}


@torch.no_grad()
def test_logits_and_velocities_of_a_bf16_network_are_not_rounded_to_it() -> None:
    """They are computed in fp32 from bf16 states, so hardly any of them is a bf16 number."""
    model = load_model(str(TINY), dtype=torch.bfloat16)
    ids = model.given("prompt", "a red cube").ids[None]
    image = NoisyImage(torch.ones(1, 1, 6, 64), torch.full((1, 1), 0.9), (2, 3))
    out = model.forward(model.empty_context(1), ids, image=image)
    for values in (model.network.logits(out.hidden_BLC), out.velocity_BKND):
        assert values.dtype == torch.float32
        assert (values == values.bfloat16().float()).float().mean() < 0.05


def test_the_reference_on_the_host_is_the_same_reference() -> None:
    """Streamed layer by layer it gives the same velocities, and its weights go home after each layer."""
    near, here = _learned("full", "float32", "true")
    far, there = _trained([*_fast("full", "float32"), "train.reference_device=host"])
    assert here["first"] == there["first"]
    ids = near.given("prompt", "a red cube").ids[None]
    with torch.no_grad(), near.reference() as a, far.reference() as b:
        assert torch.equal(*(m.forward(m.empty_context(1), ids).hidden_BLC for m in (a, b)))
    for policy in (near, far):  # what is not trained is not copied
        assert policy.frozen.vit_model.vision_model.post_layernorm.weight is (
            policy.network.vit_model.vision_model.post_layernorm.weight
        )
    layer = far.frozen.language_model.model.layers[0]
    assert layer._forward_pre_hooks
    assert layer._forward_hooks


def test_a_streamed_layer_has_its_weights_only_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is another: a copy is made for the pass, and the host's own tensor is back afterwards."""
    from unigrpo_cli.models.mot.layers import stream_from_host

    layer, seen = torch.nn.Linear(3, 3), []
    real, before = torch.Tensor.to, layer.weight.detach().clone()
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: real(x, *a).clone())
    stream_from_host(layer, torch.device("cpu"))
    home = layer.weight.data.data_ptr()
    assert torch.equal(layer.weight, before)
    assert layer.weight.untyped_storage().data_ptr() == layer.bias.untyped_storage().data_ptr(), "one flat buffer"
    assert layer.weight.untyped_storage().nbytes() == 2 * 256, "no larger than its tensors, each aligned"
    layer.register_forward_hook(lambda *_: None)
    inner = layer.forward
    layer.forward = lambda x: (seen.append(layer.weight.data.data_ptr()), inner(x))[1]
    with torch.no_grad():
        layer(torch.ones(1, 3))
    assert seen != [home]
    assert layer.weight.data.data_ptr() == home


ALL = ("train.finetune=full", "train.lr_text=1e-2", "train.lr_image=1e-2", "objective.grad_through_images=true")


@pytest.fixture(scope="module")
def layers_alone(picture: Path) -> dict[str, torch.Tensor]:
    """Weights after full tuning of nothing but the layers."""
    return _trained([*ALL], prompts=[replace(PROMPTS[0], image=str(picture))])[0].network.state_dict()


@pytest.mark.parametrize(
    ("also", "moves"),
    [
        ("head", "language_model.lm_head.weight"),
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                ("norms", "language_model.model.norm.weight"),
                ("projections", "vae2llm.weight"),
                ("embeddings", "language_model.model.embed_tokens.weight"),
                ("connector", "connector.fc1.weight"),
            )
        ),
        ("vision", "vit_model.vision_model.post_layernorm.weight"),
    ],
)
def test_what_else_trains_is_chosen_by_name(also: str, moves: str, picture: Path, layers_alone: dict) -> None:
    """Only the layers move by default, and one named part besides when it is named."""
    prompts = [replace(PROMPTS[0], image=str(picture))]
    start = load_model(str(TINY)).network.state_dict()
    chosen, _ = _trained([*ALL, f'train.extra_modules=["{also}"]'], prompts=prompts)
    assert torch.equal(layers_alone[moves], start[moves])
    assert not torch.equal(chosen.network.state_dict()[moves], start[moves])


@pytest.mark.parametrize("part", ["connector", "vision"])
def test_what_learns_through_pictures_alone_needs_their_gradient(part: str) -> None:
    with pytest.raises(UsageError, match="set objective.grad_through_images=true"):
        _trained(["train.finetune=full", f'train.extra_modules=["{part}"]'])


def test_edits_of_several_sizes_and_numbers_train_together(picture: Path, tmp_path: Path) -> None:
    """Rows of one structure share a batch, others wait; saved episodes replay with the pictures they were shown."""
    Image.open(picture).resize((40, 90)).save(tmp_path / "tall.png")
    prompts = [replace(PROMPTS[0], image=str(p)) for p in (picture, tmp_path / "tall.png")]
    prompts.append(replace(PROMPTS[0], image=tuple(p.image for p in prompts)))
    prompts = [replace(p, id=str(k)) for k, p in enumerate(prompts)] + [PROMPTS[1]]
    model = load_model(str(TINY))
    groups = rollout(model, prompts, 2, SAMPLING, WINDOW, seed=0)
    save_episodes(groups, tmp_path / "episodes")
    episodes = flatten(load_episodes(tmp_path / "episodes"))
    assert [e.prompt.image for e in episodes[::2]] == [p.image for p in prompts]
    shown = [[s.grid for s in e.segments if isinstance(s, GivenImage)] for e in episodes[::2]]
    assert [len(grids) for grids in shown] == [1, 1, 2, 0] and shown[2] == shown[0] + shown[1]
    assert episodes[4].images[0].grid == shown[1][0], "the size of the last picture"
    parts = micro_batches(episodes, range(8), 8)
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert micro_batches(episodes, [5, 0, 4], 1) == [[5], [4], [0]]
    with torch.no_grad():
        for part in parts:
            batch = collate([episodes[k] for k in part])
            found = drift([(batch, replay(model, batch))])
            assert found["text/drift_max"] < 1e-5
            assert found["image/drift_max"] < 1e-5
        blind = [replace(e, segments=tuple(_unseen(s) for s in e.segments)) for e in episodes[:2]]
        assert drift([(collate(blind), replay(model, collate(blind)))])["text/drift_max"] > 1e-4, "it is looked at"
    with pytest.raises(ValueError, match="same order and sizes"):
        collate(episodes[1:3])


def _unseen(segment):
    return replace(segment, view=None) if isinstance(segment, GivenImage) else segment


# ----- saving what was trained


def test_an_adapter_opens_in_peft_and_gives_identical_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our files through peft's own loader onto the bare network; and through ours, in bf16, to the bit."""
    from peft import PeftModel

    monkeypatch.setattr(layers, "onednn_is_faster", lambda: False)  # peft's matrices are multiplied by torch's choice

    policy, _ = _trained(_fast("lora", "float32"))
    save_adapters(policy.network, tmp_path, str(TINY))
    bare = load_model(str(TINY))
    wrapped = PeftModel.from_pretrained(bare.network, str(tmp_path))
    ours = load_model(str(TINY))
    load_adapters(ours.network, tmp_path)
    ids = ours.given("prompt", "a red cube").ids[None]
    with torch.no_grad():
        outs = [
            m(policy.empty_context(1), ids).hidden_BLC for m in (policy.network, ours.network, wrapped.base_model.model)
        ]
        plain = load_model(str(TINY)).forward(policy.empty_context(1), ids).hidden_BLC
    assert torch.equal(outs[0], outs[1])
    assert torch.allclose(outs[0], outs[2], atol=1e-6)
    assert not torch.allclose(outs[0], plain, atol=1e-3)
    low, _ = _learned("lora", "bfloat16", "true")
    save_adapters(low.network, tmp_path / "low", str(TINY))
    again = load_model(str(TINY), dtype=torch.bfloat16)
    load_adapters(again.network, tmp_path / "low")
    with torch.no_grad():
        assert torch.equal(*(m.forward(m.empty_context(1), ids).hidden_BLC for m in (low, again)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_are_saved_in_the_official_names_and_come_back(tmp_path: Path, dtype: str) -> None:
    """Masters in fp32 within a complete release; loaded again it computes the same, restored it is the same."""
    policy, _ = _learned("full", dtype, "true")
    policy.save(tmp_path, "")
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        assert set(file.keys()) == set(_state(TINY))
    again = load_model(str(tmp_path), dtype=getattr(torch, dtype))
    ids = policy.given("prompt", "a red cube").ids[None]
    with torch.no_grad():
        assert torch.equal(*(m.forward(m.empty_context(1), ids).hidden_BLC for m in (policy, again)))
    fresh = _prepared(load_config(overrides=["train.finetune=full", f"dtype={dtype}"]))
    fresh.restore(tmp_path)
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, fresh.network.state_dict()[name])
        assert value.dtype == fresh.network.state_dict()[name].dtype
