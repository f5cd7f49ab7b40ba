"""A tiny BAGEL in the release's own files: everything that the official code computes on it, from `golden.json`.

Nothing here knows a size: names of cases, sizes, settings and tokens come from the fixture, so that another one
(`--golden-dir DIR`, with the files in DIR or in DIR/bagel_tiny) is checked just so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance, guided
from unigrpo_cli.algo.text import token
from unigrpo_cli.episode import PAINTED, Episode, GivenImage, GivenText, ImageActions, Prompt, Segment, TextActions
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.context import MoTContext
from unigrpo_cli.models.mot.policy import PLAN_FIRST, MoTPolicy
from unigrpo_cli.models.mot.resize import Resize
from unigrpo_cli.models.mot.vision import patchify
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.rollout import (
    Sampling,
    UnconditionalContexts,
    read_given,
    sample_image,
    sample_text,
    velocity,
)

TEXT, VELOCITY, PATH, GUIDED, EDIT, ANSWER, PACKED, ROUNDS = 2e-5, 1e-5, 2e-5, 3e-5, 2e-5, 2e-5, 1e-5, 2e-5


@dataclass(frozen=True)
class Golden:
    """A fixture: the model loaded from it in fp32, its stored tensors, what `golden.json` says."""

    model: MoTPolicy
    g: dict[str, Tensor]
    says: dict[str, Any]

    def text(self, *names: str) -> tuple[GivenText, ...]:
        return tuple(GivenText("given", "", self.g[f"ids.{name}"]) for name in names)

    def read(self, *given: GivenText | GivenImage) -> MoTContext:
        return read_given(self.model, [given])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.model.grid(height, width)


def directory_of(config: pytest.Config) -> Path | None:
    own = config.getoption("--golden-dir")
    return next((d for d in (own / "bagel_tiny", own) if (d / "golden.json").is_file()), None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases are those of the fixture."""
    directory = directory_of(metafunc.config)
    says = {} if directory is None else json.loads((directory / "golden.json").read_text())
    if "size" in metafunc.fixturenames:
        sizes = says.get("settings", {}).get("sizes_hw", [])
        metafunc.parametrize("size", [tuple(s) for s in sizes], ids=lambda s: f"{s[0]}x{s[1]}")
    for name in ("cfg_cases", "edit_cfg_cases"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, says.get(name, []), ids=lambda c: c["name"])


@pytest.fixture(scope="module")
def bagel(request: pytest.FixtureRequest) -> Golden:
    directory = directory_of(request.config)
    if directory is None:
        pytest.skip("no bagel_tiny in this golden directory")
    model = load_model(str(directory))
    says = json.loads((directory / "golden.json").read_text())
    return Golden(model, load_file(directory / "golden.safetensors"), says)


def off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return (found - wanted).abs().max().item()


def seeded(monkeypatch: pytest.MonkeyPatch, start: Tensor) -> None:
    """Makes `paint` begin with a stored noise."""
    monkeypatch.setattr(
        "unigrpo_cli.rollout.normal", lambda key, *shape: start.new_zeros(shape) if shape[0] == 0 else start
    )


def plain(steps: int, shift: float, guidance: Guidance | None = None) -> Sampling:
    return Sampling(
        think=False,
        max_new_tokens=1,
        temperature=0.0,
        height=0,
        width=0,
        steps=steps,
        shift=shift,
        sde="flow",
        noise_level=1.0,
        batch_size=1,
        guidance=guidance or Guidance(),
    )


def case_guidance(case: dict[str, Any]) -> Guidance:
    return Guidance(
        text=case["cfg_text_scale"],
        image=case["cfg_img_scale"],
        above=case["cfg_interval"][0],
        up_to=case["cfg_interval"][1],
        renorm=case["cfg_renorm_type"],
        renorm_least=case["cfg_renorm_min"],
    )


def test_tokens_are_the_official_ones(bagel: Golden) -> None:
    """Segments are encoded with their delimiters, and a text with thinking begins with the release's own prompt."""
    strings = bagel.says["strings"]
    names = {"system": "system_prompt", "prompt": "prompt", "think": "think", "instruction": "instruction"}
    for name, key in (names | {"question": "question"}).items():
        assert bagel.model.given("given", strings[key]).ids.tolist() == bagel.g[f"ids.{name}"].tolist()
    assert strings["system_prompt"] == PLAN_FIRST
    ids = bagel.says["special_token_ids"]
    assert (bagel.model.open_id, bagel.model.stop_id) == (ids["<|im_start|>"], ids["<|im_end|>"])
    assert bagel.model.network.boundary_ids == (ids["<|vision_start|>"], ids["<|vision_end|>"])


@torch.no_grad()
def test_text_logits_read_at_once_and_piece_by_piece(bagel: Golden) -> None:
    model, g = bagel.model, bagel.g
    ids = g["text.input_ids"][None]
    whole = model.forward(model.empty_context(1), ids).hidden_BLC
    logits = model.network.logits(whole)[0]
    assert off(logits, g["text.logits"]) < TEXT
    log_prob = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert off(log_prob, g["text.token_logprobs"]) < TEXT
    context, pieces = model.network.empty_context(1, capacity=ids.shape[1]), []
    cuts = [0, len(g["ids.system"]), len(g["ids.system"]) + len(g["ids.prompt"])]
    cuts += range(cuts[-1] + 1, ids.shape[1] + 1)
    for a, b in pairwise(cuts):
        out = model.forward(context, ids[:, a:b])
        context = out.context
        pieces.append(out.hidden_BLC)
    assert off(model.network.logits(torch.cat(pieces, dim=1))[0], g["text.logits"]) < TEXT


@torch.no_grad()
def test_greedy_thinking(bagel: Golden) -> None:
    """`write_text` at temperature 0 writes the official tokens, and no id that the tokenizer does not have."""
    wanted = bagel.g["text.greedy_ids"]
    sampling = Sampling(True, len(wanted), 0.0, 0, 0, 1, 1.0, "flow", 1.0, 1)
    context = bagel.read(*bagel.text("system", "prompt"))
    _, (written,) = sample_text(bagel.model, context, sampling, [0])
    assert written.ids.tolist() == wanted.tolist()


@torch.no_grad()
def test_context_ends_with_the_official_logits(bagel: Golden) -> None:
    out = bagel.model.forward(bagel.model.empty_context(1), bagel.g["context.ids"][None])
    assert off(bagel.model.network.logits(out.hidden_BLC)[0, -1], bagel.g["context.logits_last"]) < TEXT


@torch.no_grad()
def test_velocities(bagel: Golden, size: tuple[int, int]) -> None:
    """All times at once against a cached context, in fp32; square and not."""
    context, name = bagel.read(*bagel.text("system", "prompt", "think")), f"velocity.{size[0]}x{size[1]}"
    times = bagel.g["velocity.timesteps"]
    image = NoisyImage(bagel.g[f"{name}.x_t"][None], times[None], bagel.grid(*size))
    assert off(bagel.model.forward(context, image=image).velocity_BKND[0], bagel.g[f"{name}.v"]) < VELOCITY


@torch.no_grad()
def test_the_whole_denoising_path_and_its_picture(
    bagel: Golden, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule, every latent on the way, and the picture: raw, and within a grey level as uint8."""
    settings, name = bagel.says["settings"], f"denoise.{size[0]}x{size[1]}"
    steps, g, grid = settings["num_timesteps"] - 1, bagel.g, bagel.grid(*size)
    times = flow.time_grid(steps, settings["timestep_shift"])
    assert off(times, g["denoise.sigmas"]) < 1e-6
    context = bagel.read(*bagel.text("system", "prompt", "think"))
    x = g[f"{name}.init_noise"][None]
    for k, (t, t_next) in enumerate(pairwise(times)):
        assert off(x[0], g[f"{name}.latents"][k]) < PATH
        x = flow.euler(x, velocity(bagel.model, context, x, t, grid), t, t_next)
    assert off(x[0], g[f"{name}.latents"][-1]) < PATH
    seeded(monkeypatch, g[f"{name}.init_noise"])
    sampling = plain(steps, settings["timestep_shift"])
    painted = sample_image(bagel.model, context, sampling, flow.Window(0, 0), [0], grid)[0]
    assert off(painted.latent, x[0]) == 0
    assert painted.pixels.shape == (*size, 3)
    assert (painted.pixels.int() - g[f"{name}.image_uint8"].int()).abs().max() <= 1
    raw = bagel.model.codec.raw(g[f"{name}.final_latent_nchw"])
    assert off(raw, g[f"{name}.decoded_raw"]) < PATH
    same = bagel.model.decode_pixels(g[f"{name}.latents"][-1:], grid)[0]
    assert (same != g[f"{name}.image_uint8"]).float().mean() < 1e-3


@torch.no_grad()
def test_guidance(bagel: Golden, cfg_cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first guided velocity and the final latent, in the contexts that the official sampler builds."""
    g, settings, guidance = bagel.g, bagel.says["settings"], case_guidance(cfg_cases)
    size = settings["sizes_hw"][0]
    name, grid = f"denoise.{size[0]}x{size[1]}", bagel.grid(*size)
    context = bagel.read(*bagel.text("system", "prompt", "think"))
    unconditional = UnconditionalContexts(
        less_text=bagel.read(*bagel.text("system")), less_image=bagel.read(*bagel.text("system", "prompt"))
    )
    x, t = g[f"{name}.init_noise"][None], torch.tensor(1.0)
    branches = [
        velocity(bagel.model, c, x, t, grid) for c in (context, unconditional.less_text, unconditional.less_image)
    ]
    for found, branch in zip(branches, ("v_cond", "v_text_uncond", "v_img_uncond"), strict=True):
        assert off(found[0], g[f"cfg.first_step.{branch}"]) < GUIDED
    assert off(guided(*branches, guidance)[0], g[f"cfg.{cfg_cases['name']}.first_velocity"]) < GUIDED
    seeded(monkeypatch, x[0])
    sampling = plain(settings["num_timesteps"] - 1, settings["timestep_shift"], guidance)
    painted = sample_image(bagel.model, context, sampling, flow.Window(0, 0), [0], grid, unconditional)[0]
    assert off(painted.latent, g[f"cfg.{cfg_cases['name']}.final_latent"]) < GUIDED


def resizes(bagel: Golden) -> tuple[Resize, Resize]:
    rules = (bagel.says["settings"][name] for name in ("vae_transform", "vit_transform"))
    to_paint, to_see = (Resize(r["max_long_side"], r["min_short_side"], r["stride"]) for r in rules)
    return to_paint, to_see


def test_resizing_is_the_official_one(bagel: Golden) -> None:
    """Sizes by the release's rules, and the pixels of the fixture's own pictures: exactly by Pillow 13, which made
    them; older ones round otherwise.
    """
    rules = bagel.says["settings"]["release_transforms"]
    vae, vit = (Resize(r["max_long_side"], r["min_short_side"], r["stride"]) for r in (rules["vae"], rules["vit"]))
    cases = bagel.says["resize_cases"]["cases"]
    assert cases
    for case in cases:
        painted = vae.size(*case["input_wh"])
        assert list(painted) == case["after_vae_resize_wh"], case
        assert list(vit.size(*painted)) == case["then_vit_resize_wh"], case
        assert list(vit.size(*case["input_wh"])) == case["direct_vit_resize_wh"], case
    to_paint, to_see = resizes(bagel)
    levels = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 2
    for name in ("edit", "und"):
        pixels = to_paint(bagel.g[f"{name}.image_uint8"])
        for ours, official in ((pixels, "image_resized_uint8"), (to_see(pixels), "vit_image_uint8")):
            assert (ours.int() - bagel.g[f"{name}.{official}"].int()).abs().max() <= levels


def source(bagel: Golden, name: str, *, latents: bool) -> GivenImage:
    """The fixture's picture through our own door, in the fixture's sizes and with its draw of the posterior."""
    model = bagel.model
    model.__dict__["resize_to_paint"] = lambda _: bagel.g[f"{name}.image_resized_uint8"]
    model.__dict__["resize_to_see"] = lambda _: bagel.g[f"{name}.vit_image_uint8"]
    noise = bagel.g["edit.vae_posterior_noise"][0] if latents else None
    return model.given_image("source", bagel.g[f"{name}.image_uint8"], latents=latents, noise_Chw=noise)


@torch.no_grad()
def test_the_tower_sees_what_the_official_one_does(bagel: Golden) -> None:
    vision = bagel.model.network.config.vision
    for name in ("edit", "und"):
        view = bagel.g[f"{name}.vit_image_uint8"][None]
        grid = view.shape[1] // vision.patch_size, view.shape[2] // vision.patch_size
        patches = patchify(view, vision.patch_size)
        if f"{name}.vit_patches" in bagel.g:
            assert off(patches[0], bagel.g[f"{name}.vit_patches"]) < 1e-6
        assert off(bagel.model.network.vit_model(patches, grid)[0], bagel.g[f"{name}.vit_features"]) < EDIT
        assert off(bagel.model.encode_view(view)[0], bagel.g[f"{name}.vit_embeddings"]) < EDIT


@torch.no_grad()
def test_the_source_picture_as_latents(bagel: Golden) -> None:
    """Moments, the given draw of the posterior, and its tokens; without a draw, the mean."""
    codec, g = bagel.model.codec, bagel.g
    pixels = g["edit.image_resized_uint8"][None]
    assert off(codec.moments(pixels), g["edit.vae_moments"]) < EDIT
    assert off(codec.encode(pixels, g["edit.vae_posterior_noise"]), g["edit.vae_latent"]) < EDIT
    mean = g["edit.vae_moments"].chunk(2, dim=1)[0]
    vae = bagel.says["model"]["vae"]
    assert off(codec.encode(pixels), vae["scale_factor"] * (mean - vae["shift_factor"])) < EDIT
    assert off(source(bagel, "edit", latents=True).latent, g["edit.vae_tokens"]) < EDIT


@torch.no_grad()
def test_editing(bagel: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source as latents, then as the tower sees it, then the instruction: velocities and the final latent."""
    g, settings = bagel.g, bagel.says["settings"]
    picture = source(bagel, "edit", latents=True)
    context = bagel.read(picture, *bagel.text("instruction"))
    assert context.used == int(g["edit.kv_len"])
    assert int(context.position_B) == int(g["edit.position_ids.target"][0])
    image = NoisyImage(g["edit.x_t"][None], g["edit.timesteps"][None], picture.grid)
    assert off(bagel.model.forward(context, image=image).velocity_BKND[0], g["edit.v"]) < EDIT
    seeded(monkeypatch, g["edit.init_noise"])
    sampling = plain(settings["num_timesteps"] - 1, settings["timestep_shift"])
    painted = sample_image(bagel.model, context, sampling, flow.Window(0, 0), [0], picture.grid)[0]
    assert off(painted.latent, g["edit.nocfg.final_latent"]) < EDIT


@torch.no_grad()
def test_guided_editing(bagel: Golden, edit_cfg_cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text: the pictures alone. Without pictures: the instruction alone, from position 0."""
    g, settings = bagel.g, bagel.says["settings"]
    picture = source(bagel, "edit", latents=True)
    context = bagel.read(picture, *bagel.text("instruction"))
    unconditional = UnconditionalContexts(
        less_text=bagel.read(picture), less_image=bagel.read(*bagel.text("instruction"))
    )
    seeded(monkeypatch, g["edit.init_noise"])
    guidance = case_guidance(edit_cfg_cases)
    sampling = plain(settings["num_timesteps"] - 1, settings["timestep_shift"], guidance)
    painted = sample_image(bagel.model, context, sampling, flow.Window(0, 0), [0], picture.grid, unconditional)[0]
    assert off(painted.latent, g[f"edit.cfg.{edit_cfg_cases['name']}.final_latent"]) < EDIT


@torch.no_grad()
def test_understanding(bagel: Golden) -> None:
    """A picture that is only looked at, a question, a greedy answer; logits at every position."""
    g, model = bagel.g, bagel.model
    picture = source(bagel, "und", latents=False)
    context = model.encode_image(model.empty_context(1), picture.latent[None], picture.grid, picture.view[None])
    out = model.forward(context, g["und.input_ids"][None])
    assert off(model.network.logits(out.hidden_BLC)[0], g["und.logits"]) < ANSWER
    wanted = g["und.greedy_ids"]
    sampling = Sampling(True, len(wanted), 0.0, 0, 0, 1, 1.0, "flow", 1.0, 1)
    _, (answer,) = sample_text(model, bagel.read(picture, *bagel.text("question")), sampling, [0])
    assert answer.ids.tolist() == wanted.tolist()


@torch.no_grad()
def test_the_packed_pass_is_the_official_training_forward(bagel: Golden) -> None:
    """Context and noisy copies in one pass: packed and separate velocities, squared errors, cross-entropy."""
    g, model = bagel.g, bagel.model
    side = model.network.config.max_latent_size
    at = g["packed.latent_position_ids"][: g["packed.x0"].shape[0]]
    grid = int(at.max()) // side + 1, int((at % side).max()) + 1
    image = NoisyImage(g["packed.x_t"][None], g["packed.timesteps"][None], grid)
    ids = g["context.ids"][None]
    out = model.forward(model.empty_context(1), ids, image=image)
    v = out.velocity_BKND[0]
    assert off(v, g["packed.v_packed"]) < PACKED
    assert off(v, g["packed.v_separate"]) < PACKED
    assert off((v - (g["packed.eps"] - g["packed.x0"])).square(), g["packed.train_mse"]) < 1e-4
    logits = model.network.logits(out.hidden_BLC)[0]
    assert off(logits[-1], g["packed.context_logits_last"]) < TEXT
    scored = token(logits[:-1], temperature=1.0, id=ids[0, 1:])
    assert off(-scored.log_prob, g["packed.train_ce"]) < TEXT


@pytest.fixture(scope="module")
def rounds(request: pytest.FixtureRequest, bagel: Golden) -> tuple[dict[str, Tensor], dict[str, Any]]:
    directory = directory_of(request.config)
    if directory is None or not (directory / "rounds.json").is_file():
        pytest.skip("no rounds in this golden directory")
    return load_file(directory / "rounds.safetensors"), json.loads((directory / "rounds.json").read_text())


@torch.no_grad()
def test_rounds_are_the_official_contexts(bagel: Golden, rounds: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """A finished picture, a text about it, the next picture, twice: counters, logits at every position, velocities."""
    (g, says), model = rounds, bagel.model
    context = bagel.read(*bagel.text("system", "prompt", "think"))
    counters = {c["after"]: (c["kv"], c["rope"]) for c in says["counters"]}
    for k, told in enumerate(says["rounds"], start=1):
        context = model.encode_image(context, g[f"rounds.{k}.latent"][None], bagel.grid(*told["seen_hw"]))
        assert (context.used, int(context.position_B)) == counters[f"latent {k}"]
        assert g[f"rounds.{k}.ids"].tolist() == model.given("given", told["text"]).ids.tolist()
        out = model.forward(context, g[f"rounds.{k}.ids"][None])
        context = out.context
        assert (context.used, int(context.position_B)) == counters[f"text {k}"]
        assert off(model.network.logits(out.hidden_BLC)[0], g[f"rounds.{k}.logits"]) < ROUNDS
        image = NoisyImage(g[f"rounds.{k}.x_t"][None], torch.tensor([says["times"]]), bagel.grid(*told["painted_hw"]))
        assert off(model.forward(context, image=image).velocity_BKND[0], g[f"rounds.{k}.v"]) < ROUNDS


@torch.no_grad()
def test_replayed_rounds_are_the_official_ones(bagel: Golden, rounds: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """The same as an episode: its texts are actions, its pictures were looked at."""
    (g, says), model = rounds, bagel.model
    segments: list[Segment] = list(bagel.text("system", "prompt", "think"))
    times = torch.tensor([*says["times"], 0.0])
    for k, told in enumerate(says["rounds"], start=1):
        blank = torch.zeros(*told["seen_hw"], 3, dtype=torch.uint8)
        segments.append(GivenImage(PAINTED, bagel.grid(*told["seen_hw"]), g[f"rounds.{k}.latent"], blank))
        first, *ids = g[f"rounds.{k}.ids"].tolist()
        said = torch.tensor(ids)
        segments.append(TextActions(said, torch.zeros(len(ids)), True, 1.0, (first,), (), told["text"]))
        x = g[f"rounds.{k}.x_t"]
        window = flow.Window(0, len(x))
        grid = bagel.grid(*told["painted_hw"])
        segments.append(ImageActions(grid, times, window, "flow", 1.0, x, x, torch.zeros(len(x)), x[-1], blank))
    batch = collate([Episode(Prompt("rounds", ""), 0, 0, tuple(segments))])
    scores = replay(model, batch)
    for k, velocities in enumerate(scores.velocities, start=1):
        assert off(velocities[0], g[f"rounds.{k}.v"]) < ROUNDS
    wanted = []
    for k in range(1, len(says["rounds"]) + 1):
        logits = g[f"rounds.{k}.logits"][:-1].index_fill(-1, model._padding_ids, -torch.inf)
        wanted.append(logits.log_softmax(-1).gather(1, g[f"rounds.{k}.ids"][1:, None])[:, 0])
    assert off(scores.log_prob_BL[0], torch.cat(wanted)) < 2 * ROUNDS
