"""A language model and a painter as one policy: equal to diffusers' pipelines, trainable, saved, broken."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pair
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from peft import PeftModel
from tiny_pair import KINDS

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance
from unigrpo_cli.algo.rng import derive, normal
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt, TextActions, flatten
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.models.family import MODELS, family_options
from unigrpo_cli.models.pair import facts
from unigrpo_cli.models.pair.facts import KLEIN, PAINTER, PAINTERS, REASONER, Z_IMAGE, Schedule
from unigrpo_cli.models.pair.family import PairFamily
from unigrpo_cli.models.pair.options import PairOptions
from unigrpo_cli.models.pair.painters import patchify, unpatchify
from unigrpo_cli.models.pair.policy import PairPolicy
from unigrpo_cli.models.policy import Finetune
from unigrpo_cli.rollout import Sampling, read_given, rollout
from unigrpo_cli.run.setup import check_images
from unigrpo_cli.testing import assert_policy_contract
from unigrpo_cli.testing.policy import moved

each_kind = pytest.mark.parametrize("kind", KINDS)
TEXTS = ("a red circle", "two blue squares and a star")
NO_NOISE = flow.Window(0, 0)
SAMPLING = Sampling(False, 6, 1.0, 16, 24, 4, 0.0, "flow", 0.7, 2)


@pytest.fixture(scope="module", autouse=True)
def _small_klein() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(facts.PAINTERS, KLEIN.pipeline, tiny_pair.SMALL)
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_pair.write(kind, tmp_path_factory.mktemp("pairs") / kind) for kind in KINDS}


def _load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PairPolicy:
    return copy.deepcopy(_read(directory, dtype, tuple(options.items())))


@cache
def _read(directory: Path, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> PairPolicy:
    """The libraries take a tenth of a second for each of three networks."""
    own = PairOptions(**dict(options))
    return PairFamily().load(directory, None, device=torch.device("cpu"), dtype=dtype, vae_tile_rows=0, options=own)


def _pipeline(kind: str, directory: Path) -> Any:
    loaded = {"z-image": ZImagePipeline, "flux2-klein": Flux2KleinPipeline}[kind].from_pretrained(str(directory))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _finetune(full: bool, experts: tuple[str, ...] = ("text", "image")) -> Finetune:
    return Finetune(full, experts, (), 2, 4.0, 0, activation_checkpointing=False, reference_on_host=False, shard_over=1)


# ----- diffusers as the oracle


@each_kind
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_sampling_is_that_of_the_pipeline(kind: str, scale: float, directories: dict[str, Path]) -> None:
    """Latents to 1e-5 and the picture, with and without guidance: time, sign, shift, template, padding, statistics."""
    policy, pipeline = _load(directories[kind]), _pipeline(kind, directories[kind])
    z_image = kind == "z-image"
    text = 1 + scale if z_image else max(scale, 1.0)
    sampling = replace(SAMPLING, guidance=Guidance(text=text, above=0.0, renorm_least=1.0))
    prompts = [Prompt(text, text) for text in TEXTS]
    episodes = flatten(rollout(policy, prompts, 1, sampling, NO_NOISE, 0))
    grid = policy.grid(16, 24)
    noise_BND = torch.stack([normal(derive(e.seed, "start"), grid[0] * grid[1], policy.token_dim) for e in episodes])
    start = unpatchify(noise_BND, grid, channels_last=True) if z_image else noise_BND.mT.unflatten(2, grid)
    how: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 4, "latents": start}
    how |= {"guidance_scale": scale if z_image else max(scale, 1.0)}
    how |= {} if z_image else {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
    latents = pipeline(prompt=list(TEXTS), output_type="latent", **how).images
    own = policy.autoencoder.latents(torch.stack([e.images[0].latent for e in episodes]), grid)
    assert (own - policy.autoencoder.latents(noise_BND, grid)).abs().max() > 0.5
    torch.testing.assert_close(own, latents, atol=1e-5 * (1 + scale), rtol=1e-5)
    painted = [np.asarray(image).astype(int) for image in pipeline(prompt=list(TEXTS), output_type="pil", **how).images]
    for episode, picture in zip(episodes, painted, strict=True):
        assert np.abs(episode.pixels.numpy().astype(int) - picture).max() <= 1


def test_facts_are_the_pipelines_defaults() -> None:
    own = inspect.signature(Flux2KleinPipeline.__call__).parameters
    assert own["text_encoder_out_layers"].default == KLEIN.layers
    assert own["max_sequence_length"].default == KLEIN.padded_to == 512
    assert ".hidden_states[-2]" in inspect.getsource(ZImagePipeline._encode_prompt)
    assert Z_IMAGE.layers == (-2,)


@pytest.mark.parametrize(("tokens", "steps"), [(256, 4), (4096, 50), (4400, 10)])
def test_the_time_shift_of_klein_is_the_pipelines(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert Schedule(empirical=True).log_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_a_shift_that_grows_with_the_image_is_the_pipelines() -> None:
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    assert Schedule(tokens=(256, 4096), mu=(0.5, 1.15)).log_shift(900, 8) == pytest.approx(calculate_shift(900))


@pytest.mark.parametrize("last", [True, False])
def test_tokens_become_latents_and_tokens_again(last: bool) -> None:
    x = normal(0, 2, 12, 16)
    assert torch.equal(patchify(unpatchify(x, (3, 4), last), last), x)


# ----- the reasoner


def _drawn(policy: PairPolicy) -> tuple[list[Any], Any]:
    """Episodes with reasoning of ragged length, and the context after their text."""
    prompts = [Prompt(text, text) for text in TEXTS]
    episodes = flatten(rollout(policy, prompts, 1, replace(SAMPLING, think=True), flow.Window(0, 2), 0))
    rows = []
    for episode, prompt in zip(episodes, prompts, strict=True):
        text = next(s for s in episode.segments if isinstance(s, TextActions))
        given = policy.preamble(prompt, True)[0]
        ids = torch.cat([given.ids, torch.tensor([*text.opening, *text.ids.tolist(), *text.closing])])
        rows.append((replace(given, ids=ids),))
    return rows, read_given(policy, rows)


@each_kind
@torch.no_grad()
def test_same_pass_is_one_pass_of_the_language_model(kind: str, directories: dict[str, Path]) -> None:
    policy = _load(directories[kind])
    rows, context = _drawn(policy)
    lm, layers = policy.reasoner.network, policy.pipeline.facts.layers
    for (given,), own in zip(rows, context.condition, strict=True):
        states = lm(given.ids[None], output_hidden_states=True).hidden_states
        wanted = torch.cat([states[k][0] for k in layers], dim=-1)
        torch.testing.assert_close(own[: len(wanted)], wanted, atol=1e-5, rtol=0)
        assert len(own) == (len(wanted) if kind == "z-image" else -(-len(wanted) // 64) * 64)


@each_kind
@torch.no_grad()
def test_re_encoded_is_the_written_text_as_a_users_turn(kind: str, directories: dict[str, Path]) -> None:
    """Of the sampled ids themselves; the pipeline's template around them."""
    policy = _load(directories[kind], conditioning="re-encoded")
    rows, context = _drawn(policy)
    words = policy.reasoner.words
    for (given,), own in zip(rows, context.condition, strict=True):
        ids = given.ids.tolist()
        written = [k for k in ids[ids.index(words.open_id) + 1 :] if k != words.stop_id]
        turn = torch.tensor([[*words.before, *written, *words.after]])
        states = policy.reasoner.network(turn, output_hidden_states=True).hidden_states
        wanted = torch.cat([states[k][0] for k in policy.pipeline.facts.layers], dim=-1)
        torch.testing.assert_close(own[: len(wanted)], wanted, atol=1e-5, rtol=0)
    unwritten = [policy.preamble(Prompt(text, text), False) for text in TEXTS]  # without a text: the prompt's own turn
    same_pass = read_given(_load(directories[kind]), unwritten).condition
    for own, wanted in zip(read_given(policy, unwritten).condition, same_pass, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=0)
    answer = "<think>\n\n</think>\n\n" if kind == "flux2-klein" else ""
    turn_of_words = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n" + answer
    assert policy.preamble(Prompt("red", "red"), False)[0].ids.tolist() == policy.tokenizer.encode(turn_of_words).ids


def test_the_opening_token_cannot_be_sampled_or_given(directories: dict[str, Path]) -> None:
    policy = _load(directories["z-image"])
    logits = policy.logits(torch.randn(3, 16))
    beyond = len(tiny_pair.tokenizer())
    assert logits[:, policy.open_id].isneginf().all() and logits[:, beyond:].isneginf().all()
    assert logits.isfinite().sum() == 3 * (beyond - 1)
    with pytest.raises(UsageError, match="holds <think>, which opens the reasoning"):
        policy.preamble(Prompt("x", "a <think> b"), True)


# ----- training


@pytest.mark.parametrize(
    ("kind", "full", "conditioning", "dtype", "tolerance"),
    [
        ("z-image", False, "same-pass", "float32", 1e-5),
        ("flux2-klein", True, "re-encoded", "float32", 1e-5),
        *(
            pytest.param(kind, full, conditioning, dtype, tolerance, marks=pytest.mark.long)
            for kind, full, conditioning, dtype, tolerance in (
                ("z-image", True, "re-encoded", "float32", 1e-5),
                ("flux2-klein", False, "same-pass", "float32", 1e-5),
                ("z-image", False, "re-encoded", "bfloat16", 0.05),
                ("z-image", True, "same-pass", "bfloat16", 0.05),
                ("flux2-klein", False, "re-encoded", "bfloat16", 0.05),
                ("flux2-klein", True, "same-pass", "bfloat16", 0.05),
            )
        ),
    ],
)
def test_the_contract_is_kept(
    kind: str, full: bool, conditioning: str, dtype: str, tolerance: float, directories: dict[str, Path]
) -> None:
    """States that are rounded to bf16 differ by up to .02; the ratio is exactly 1 all the same."""

    def load() -> PairPolicy:
        return _load(directories[kind], getattr(torch, dtype), conditioning=conditioning)

    sizes = {"height": 8, "width": 8, "steps": 2, "max_new_tokens": 3}
    assert_policy_contract(load, full=full, trained=False, tolerance=tolerance, **sizes)


@each_kind
@pytest.mark.parametrize("full", [False, True])
def test_in_bf16_trained_weights_are_fp32_and_change_what_is_computed(
    kind: str, full: bool, directories: dict[str, Path]
) -> None:
    policy = _load(directories[kind], torch.bfloat16).finetune(_finetune(full))
    kinds = {p.dtype for own in policy.trainable().values() for p in own}
    assert kinds == {torch.float32} and policy.dtype == torch.bfloat16
    before = _drawn(policy)[1].condition
    with policy.reference() as reference:
        assert all(map(torch.equal, before, _drawn(reference)[1].condition))
    assert {row.dtype for row in before} == {torch.bfloat16}
    changed = _drawn(moved(policy, 0.2))[1].condition
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in pairwise([*before, *changed]))
    assert before[0].shape[1] == changed[0].shape[1] and not torch.equal(before[0][:8], changed[0][:8])


@each_kind
def test_activation_checkpointing_changes_no_gradient(kind: str, directories: dict[str, Path]) -> None:
    found = []
    for checkpointed in (False, True):
        wanted = replace(_finetune(True), activation_checkpointing=checkpointed)
        policy = _load(directories[kind]).finetune(wanted)
        context = _drawn(policy)[1]
        x_BKND = normal(0, 2, 1, 24, policy.token_dim)
        v = policy.painter.velocity(x_BKND, torch.full((2, 1), 0.5), (4, 6), context.condition)
        v.square().mean().backward()
        found.append([p.grad for own in policy.trainable().values() for p in own if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra_modules": ("head",)}, "train.extra_modules is for"),
        ({"reference_on_host": True}, "train.reference_device=host"),
    ],
)
def test_what_a_pair_cannot_do_is_refused(change: dict, says: str, directories: dict[str, Path]) -> None:
    policy = _load(directories["z-image"])
    with pytest.raises(UsageError, match=says):
        policy.finetune(replace(_finetune(True), **change))


@pytest.mark.parametrize("how", ["latents", "pixels+tower"])
def test_a_program_that_looks_at_its_picture_is_refused(how: str, directories: dict[str, Path]) -> None:
    settings = ["sampling.program=reflect", "sampling.rounds=2", f"sampling.show_images={how}"]
    sizes = ["sampling.height=8", "sampling.width=8"]
    with pytest.raises(UsageError, match=r"rounds=2, .* cannot look at pictures; leave them out$"):
        check_images(_load(directories["z-image"]), load_config(overrides=[*settings, *sizes]))


# ----- files


@each_kind
def test_adapters_load_in_peft_and_weights_in_diffusers(
    kind: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """What was trained says the same elsewhere: adapters by PEFT on the base, full weights by the pipeline."""
    for full in (False, True):
        policy = moved(_load(directories[kind]).finetune(_finetune(full)), 0.1)
        place = tmp_path / str(full)
        policy.save(place, "base")
        pipeline = _pipeline(kind, place if full else directories[kind])
        lm, painter = pipeline.text_encoder, pipeline.transformer
        if not full:
            lm = PeftModel.from_pretrained(lm, str(place / REASONER))
            painter = PeftModel.from_pretrained(painter, str(place / PAINTER))
        ids = torch.tensor([[1, 5, 9, 7]])
        with torch.no_grad():
            states = lm(ids, output_hidden_states=True).hidden_states[-2]
            own = policy.reasoner.network(ids, output_hidden_states=True).hidden_states[-2]
            torch.testing.assert_close(states, own, atol=1e-6, rtol=1e-5)
            wide = torch.randn(1, 5, own.shape[-1] * len(policy.pipeline.facts.layers)).unbind()
            x_BKND, t_BK = normal(0, 1, 1, 4, policy.token_dim), torch.full((1, 1), 0.4)
            theirs = replace(policy.painter, network=painter).velocity(x_BKND, t_BK, (2, 2), wide)
            torch.testing.assert_close(
                theirs, policy.painter.velocity(x_BKND, t_BK, (2, 2), wide), atol=1e-5, rtol=1e-4
            )


@each_kind
def test_merged_adapters_are_a_pipeline_that_computes_the_same(
    kind: str, directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy, ids = moved(_load(directories[kind]).finetune(_finetune(False)), 0.1), torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        own = policy.reasoner.network(ids, output_hidden_states=True).hidden_states[-2]
        capsys.readouterr()
        policy.merged().save(tmp_path / "m", "base")
        assert capsys.readouterr() == ("", ""), "a library shows its own progress"
        states = _pipeline(kind, tmp_path / "m").text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    assert policy.adapter is None
    torch.testing.assert_close(states, own, atol=1e-6, rtol=1e-5)


def test_options_are_saved_with_the_weights(directories: dict[str, Path], tmp_path: Path) -> None:
    policy = _load(directories["z-image"], conditioning="re-encoded", instruction="describe it")
    policy.finetune(_finetune(True)).save(tmp_path / "full", "base")
    again = _load(tmp_path / "full")
    assert again.reasoner.re_encodes and again.instruction == "describe it"
    assert not _load(tmp_path / "full", conditioning="same-pass").reasoner.re_encodes
    adapted = _load(directories["z-image"], conditioning="re-encoded").finetune(_finetune(False))
    adapted.save(tmp_path / "lora", "base")
    with pytest.raises(WeightsError, match="give --set 'model_options.conditioning=re-encoded'"):
        _load(directories["z-image"]).load_adapter(tmp_path / "lora")
    with pytest.raises(WeightsError, match="is an adapter: give its base with --model"):
        MODELS.find(str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conditionning": "same-pass"}, r"model_options.conditionning = 'same-pass': did you mean conditioning\?"),
        ({"conditioning": "both"}, "model_options.conditioning = 'both': Input should be 'same-pass'"),
    ],
)
def test_an_unknown_option_is_named(given: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        family_options(PairFamily(), given)
    with pytest.raises(UsageError, match="accepted: quantize"):
        family_options(MODELS.families()[0], given)


def test_the_table_has_every_painter() -> None:
    assert [own.name for own in PAINTERS.values()] == list(KINDS)
