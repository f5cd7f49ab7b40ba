"""Programs: several rounds, edits, critiques and a stranger's own, from the rollout to the gradient."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import small
from tools.toy_model import build_model
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance
from unigrpo_cli.algo.objective import Objective
from unigrpo_cli.algo.rng import derive, normal
from unigrpo_cli.cli import app
from unigrpo_cli.config import load_config, with_values
from unigrpo_cli.episode import (
    PAINTED,
    Episode,
    GivenImage,
    GivenText,
    ImageActions,
    Prompt,
    Segment,
    TextActions,
    flatten,
)
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.policy import Finetune, NoisyImage
from unigrpo_cli.programs import PROGRAMS, Program, ProgramRegistry, Rows, says
from unigrpo_cli.replay import Batch, collate, micro_batches, replay, replayed_tokens
from unigrpo_cli.rollout import Sampling, UnconditionalContexts, read_given, read_images, rollout, sample_image
from unigrpo_cli.run.episode_files import load_episodes, save_episodes
from unigrpo_cli.run.memory.flops import step_seconds
from unigrpo_cli.run.memory.workload import Workload
from unigrpo_cli.suites import as_prompts
from unigrpo_cli.suites.prompts import TRAINING
from unigrpo_cli.training.metrics import drift

ROOT = Path(__file__).parents[1]
SOURCE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
ASKED = [Prompt(t, t) for t in ("a red circle", "two blue stars and a green heart")]
EDITS = [replace(prompt, image=SOURCE) for prompt in ASKED]
WINDOW, LATER = flow.Window(1, 2), (flow.Window(0, 2), flow.Window(2, 2))
ROUNDS = Sampling(True, 8, 1.0, 16, 16, 5, 1.0, "flow", 0.8, 64, program="reflect", rounds=2)
OBJECTIVE = Objective(1.0, 1.0, 0.2, 1e-4, 0.0, "ratio-norm", "velocity-mse", 0.1)
TEXT, IMAGE, LOOK, GIVEN, SOURCE_PICTURE = "text", "image", "look", "given", "source"


def draw(model: MoTPolicy, sampling: Sampling, members: int = 3, prompts: list[Prompt] = ASKED) -> list[Episode]:
    return flatten(rollout(model, prompts, members, sampling, WINDOW, 0, later_windows=LATER))


def stopping(model: MoTPolicy) -> Sampling:
    """Three rounds with a stop phrase that about half of the texts have: some episodes stop, some do not."""
    texts = [set(e.segments[-2].text.split()) for e in draw(model, ROUNDS, 4)]
    counts = Counter(word for words in texts for word in sorted(words) if word.isalpha())
    phrase = min(counts, key=lambda word: abs(counts[word] - len(texts) / 2))
    return replace(ROUNDS, rounds=3, stop_phrase=phrase)


def kind(segment: Segment) -> str:
    if isinstance(segment, GivenImage):
        return LOOK if segment.role == PAINTED else SOURCE_PICTURE
    return {GivenText: GIVEN, TextActions: TEXT, ImageActions: IMAGE}[type(segment)]


def kinds(episode: Episode) -> tuple[str, ...]:
    return tuple(map(kind, episode.segments))


ROUND, AGAIN = (TEXT, IMAGE), (LOOK, TEXT, IMAGE)
STRUCTURES = {
    ("think-paint", 1): (GIVEN, *ROUND),
    ("reflect", 2): (GIVEN, *ROUND, *AGAIN),
    ("reflect", 3): (GIVEN, *ROUND, *AGAIN, *AGAIN),
    ("edit", 1): (SOURCE_PICTURE, GIVEN, *ROUND),
    ("edit", 2): (SOURCE_PICTURE, GIVEN, *ROUND, *AGAIN),
    ("critique-edit", 1): (SOURCE_PICTURE, *ROUND),
    ("critique-edit", 2): (SOURCE_PICTURE, *ROUND, *AGAIN),
}


@pytest.mark.parametrize(("program", "rounds"), STRUCTURES)
def test_what_an_episode_consists_of(tiny: MoTPolicy, program: str, rounds: int) -> None:
    """Segments in order; replay of each scores what was drawn."""
    prompts = EDITS if PROGRAMS.find(program).needs_picture else ASKED
    episodes = draw(tiny, replace(ROUNDS, program=program, rounds=rounds), prompts=prompts)
    assert {kinds(e) for e in episodes} == {STRUCTURES[program, rounds]}
    assert [i.window for i in episodes[0].images] == [WINDOW, *LATER][:rounds]
    if prompts is EDITS:
        source = next(s for s in episodes[0].segments if isinstance(s, GivenImage))
        assert np.array_equal(source.pixels, SOURCE)
        assert torch.equal(tiny.decode_pixels(source.latent[None], source.grid)[0], source.pixels)
        assert {image.grid for e in episodes for image in e.images} == {source.grid}
    batch = collate(episodes)
    with torch.no_grad():
        found = drift([(batch, replay(tiny, batch))])
    assert found["text/drift_max"] < 1e-6
    assert found["image/drift_max"] < 1e-6
    assert replayed_tokens(episodes[0]) == fed_tokens(episodes[0], len(tiny.network.boundary_ids))


def fed_tokens(episode: Episode, boundary: int) -> int:
    """Tokens of the passes of a replay."""
    count = 0
    for chunk in collate([episode]).chunks:
        count += chunk.ids_BS.shape[1]
        if chunk.image is not None:
            count += chunk.image.x_BKND.shape[1] * (chunk.image.x_BKND.shape[2] + boundary)
        if chunk.latent_BND is not None:
            count += chunk.latent_BND.shape[1] + boundary
    return count


def test_the_first_round_is_think_paint(tiny: MoTPolicy) -> None:
    """To the bit: later rounds take nothing from it."""
    once = draw(tiny, replace(ROUNDS, program="think-paint", rounds=1))
    for one, two in zip(once, draw(tiny, ROUNDS), strict=True):
        (text, image), (first, painted) = one.segments[1:3], two.segments[1:3]
        assert torch.equal(text.ids, first.ids)
        assert torch.equal(text.log_prob, first.log_prob)
        assert torch.equal(image.before, painted.before)
        assert torch.equal(image.latent, painted.latent)


def test_rounds_have_noise_and_budgets_of_their_own(tiny: MoTPolicy) -> None:
    episodes = draw(tiny, replace(ROUNDS, rounds=3, round_max_new_tokens=(8, 3)))
    for episode in episodes:
        _, second, _ = episode.images
        start = normal(derive(derive(episode.seed, "round", 1), "start"), *second.latent.shape)
        assert torch.equal(second.before[0], start), "the window of round 1 begins at its first step"
        noises = [(i.after - i.before)[0].flatten() for i in episode.images]
        assert torch.corrcoef(torch.stack(noises)).fill_diagonal_(0).abs().max() < 0.3
        lengths = [len(s.ids) for s in episode.segments if isinstance(s, TextActions)]
        assert lengths[0] <= 8
        assert max(lengths[1:]) <= 3
    assert any(len(e.segments[1].ids) > 3 for e in episodes)


def test_what_is_looked_at_is_what_was_painted(tiny: MoTPolicy) -> None:
    for episode in draw(tiny, ROUNDS):
        image, look = episode.segments[2:4]
        assert torch.equal(image.latent, look.latent)
        assert torch.equal(image.pixels, look.pixels)
        assert episode.pixels is episode.segments[-1].pixels


def test_an_episode_stops_where_its_words_say_so(tiny: MoTPolicy) -> None:
    """It ends with these words; others of its batch have three rounds, whatever the batch."""
    sampling = stopping(tiny)
    episodes = draw(tiny, sampling, members=6)
    assert {len(e.images) for e in episodes} == {1, 2, 3}
    for episode in episodes:
        later = [s.text for s in episode.segments if isinstance(s, TextActions)][1:]
        stopped = isinstance(episode.segments[-1], TextActions)
        assert stopped == says(later[-1], sampling.stop_phrase)
        assert stopped or len(episode.images) == 3
        assert not any(says(text, sampling.stop_phrase) for text in later[:-1])
    for rows in (1, 5):
        for a, b in zip(episodes, draw(tiny, replace(sampling, batch_size=rows), members=6), strict=True):
            assert kinds(a) == kinds(b)
            for s, t in zip(a.segments, b.segments, strict=True):
                if isinstance(s, TextActions):
                    assert torch.equal(s.ids, t.ids)
                elif isinstance(s, ImageActions):
                    torch.testing.assert_close(s.latent, t.latent, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "phrase", "stops"),
    [
        ("red keep , correct", "correct", True),
        ("Correct.", "correct", True),
        ("incorrect", "correct", False),
        ("it is all right", "all right", True),
        ("anything", "", False),
    ],
)
def test_a_phrase_is_whole_words(text: str, phrase: str, stops: bool) -> None:
    assert says(text, phrase) is stops


def mixed(model: MoTPolicy) -> list[Episode]:
    """One, two and three rounds, early stops, edits and critiques."""
    one = replace(ROUNDS, program="think-paint", rounds=1)
    edit, critique = (replace(ROUNDS, program=p, rounds=1) for p in ("edit", "critique-edit"))
    return [
        *draw(model, one, 1),
        *draw(model, ROUNDS, 2),
        *draw(model, stopping(model), 3),
        *draw(model, edit, 1, EDITS),
        *draw(model, critique, 1, EDITS),
    ]


@pytest.mark.parametrize(
    ("full", "dtype", "through"),
    [(True, torch.float32, True), (False, torch.bfloat16, False)],
)
def test_the_first_ratio_is_exactly_one_for_every_structure(full: bool, dtype: torch.dtype, through: bool) -> None:
    """In fp32 and bf16, with all weights and with adapters; micro-batches hold episodes of one structure."""
    model = build_model(seed=0, width=32, layers=2)
    model.network.to(dtype)
    model = model.finetune(Finetune(full, ("text", "image"), (), 2, 4.0, 0, False, False, 1))
    episodes = mixed(model)
    parts = micro_batches(episodes, range(len(episodes)), 4)
    assert sorted(k for part in parts for k in part) == list(range(len(episodes)))
    assert len(parts) >= 6
    for part in parts:
        batch = collate([episodes[k] for k in part])
        with torch.no_grad():
            old = replay(model, batch, grad_through_images=through)
        new = replay(model, batch, grad_through_images=through)
        assert torch.equal(new.log_prob_BL, old.log_prob_BL)
        assert all(torch.equal(a, b) for a, b in zip(new.velocities, old.velocities, strict=True))


def separate(model: MoTPolicy, batch: Batch, episode: Episode, through: bool, score: Callable) -> None:
    """Scores of one episode, each image state and each text in a pass of its own over everything before it."""

    def read(until: int):
        context = model.empty_context(1)
        for segment in episode.segments[:until]:
            if isinstance(segment, GivenImage):
                context = model.encode_image(context, segment.latent[None], segment.grid, detach=not through)
            elif not isinstance(segment, ImageActions):
                ids = segment.ids if isinstance(segment, GivenText) else spoken(segment)
                context = model.forward(context, ids[None]).context
        return context

    images = 0
    for k, segment in enumerate(episode.segments):
        if isinstance(segment, TextActions):
            hidden = model.forward(read(k), spoken(segment)[None]).hidden_BLC[0]
            log_prob = model.logits(hidden[: len(segment.ids)]).log_softmax(-1)
            score(TEXT, log_prob.gather(1, segment.ids[:, None])[:, 0])
        elif isinstance(segment, ImageActions):
            for j in range(segment.window.size):
                t = batch.actions.images[images].t_BK[:1, j : j + 1]
                noisy = NoisyImage(segment.before[None, j : j + 1], t, segment.grid)
                score(IMAGE, model.forward(read(k), image=noisy).velocity_BKND[0, 0])
            images += 1


def spoken(text: TextActions) -> torch.Tensor:
    return torch.cat([torch.tensor(text.opening), text.ids, torch.tensor(text.closing, dtype=torch.long)])


@pytest.mark.parametrize("through", [True, False])
def test_packed_rounds_are_separate_passes(tiny: MoTPolicy, through: bool) -> None:
    """Values and gradients, with and without a gradient through the pictures."""
    (episode, *_) = draw(tiny, replace(ROUNDS, program="edit", rounds=2), 1, EDITS)
    batch = collate([episode])
    generator = torch.Generator().manual_seed(0)

    def pulled(values: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        tiny.network.zero_grad()
        generator.manual_seed(0)
        sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values).backward()
        gradients = {n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None}
        return [v.detach() for v in values], gradients

    alone: dict[str, list[torch.Tensor]] = {TEXT: [], IMAGE: []}
    separate(tiny, batch, episode, through, lambda kind, value: alone[kind].append(value))
    wanted = pulled([torch.cat(alone[TEXT]), torch.stack(alone[IMAGE])])
    scores = replay(tiny, batch, grad_through_images=through)
    packed = pulled([scores.log_prob_BL[0], torch.cat([v[0] for v in scores.velocities])])
    for a, b in zip(packed[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert packed[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("through", [True, False])
def test_words_about_a_picture_teach_the_painter_only_where_that_is_asked_for(tiny: MoTPolicy, through: bool) -> None:
    """The text term's gradient in the image expert: none with the cut, as with one round."""
    episodes = draw(tiny, ROUNDS)
    scores = replay(tiny, collate(episodes), grad_through_images=through)
    scores.log_prob_BL.sum().backward()
    painter = [p.grad for n, p in tiny.network.named_parameters() if "_moe_gen" in n and p.grad is not None]
    assert bool(sum(float(g.abs().max()) for g in painter)) is through
    words = [p.grad for n, p in tiny.network.named_parameters() if "_moe_gen" not in n and p.grad is not None]
    assert max(float(g.abs().max()) for g in words) > 0


def test_micro_batches_change_no_gradient(tiny: MoTPolicy) -> None:
    episodes = mixed(tiny)
    gradients = []
    for size in (len(episodes), 1):
        tiny.network.zero_grad()
        for part in micro_batches(episodes, range(len(episodes)), size):
            batch = collate([episodes[k] for k in part])
            scores = replay(tiny, batch)
            words = torch.where(batch.actions.mask_BL, scores.log_prob_BL, 0.0).sum()
            (words + sum(v.square().sum() for v in scores.velocities)).backward()
        gradients.append({n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_files_give_back_rounds_and_pictures(tiny: MoTPolicy, tmp_path: Path) -> None:
    prompts = EDITS[:1]
    groups = rollout(tiny, prompts, 2, replace(ROUNDS, program="edit"), WINDOW, 0, later_windows=LATER)
    save_episodes(groups, tmp_path)
    (back,) = load_episodes(tmp_path)
    assert np.array_equal(back.prompt.image, SOURCE)
    for a, b in zip(groups[0].episodes, back.episodes, strict=True):
        assert kinds(a) == kinds(b)
        assert torch.equal(a.segments[-3].latent, b.segments[-3].latent)


@pytest.mark.parametrize("rounds", [2, 3])
def test_the_dry_run_counts_the_tokens_of_rounds(tiny: MoTPolicy, rounds: int) -> None:
    """Of an episode whose texts all have their full length: contexts of each round, and all that is replayed."""
    sampling = replace(ROUNDS, rounds=rounds, round_max_new_tokens=(8, 3))
    episodes = draw(tiny, sampling, prompts=ASKED[:1], members=8)
    full = next(e for e in episodes if not any(s.finished for s in e.segments if isinstance(s, TextActions)))
    config = load_config(
        overrides=[
            *small.SETTINGS,
            "sampling.program=reflect",
            f"sampling.rounds={rounds}",
            "sampling.round_max_new_tokens=[8, 3]",
            "train.group_size=2",
            "train.minibatches=1",
            "train.micro_batch_size=2",
        ]
    )
    work = Workload(tiny.network.config, None, config, prompt_tokens=len(full.segments[0].ids))
    images = rounds * WINDOW.size * work.image_tokens
    assert replayed_tokens(full) == work.last_context_tokens + images
    assert work.replayed_image_tokens == 2 * images
    before = [k for k, s in enumerate(full.segments) if isinstance(s, ImageActions)]
    for k, at in enumerate(before):
        part = replace(full, segments=tuple(s for s in full.segments[:at] if not isinstance(s, ImageActions)))
        assert replayed_tokens(part) == work.context_tokens(k)
    assert work.sampled_tokens == 8 + 3 * (rounds - 1)
    once = with_values(config, {"sampling.rounds": 1})
    assert step_seconds(work) > step_seconds(replace(work, config=once))


def test_generate_shows_every_round(small_model: Path, tmp_path: Path) -> None:
    """`--rounds 3` makes a program that paints once reflect; all texts and pictures are in files."""
    few = ["--set", "eval.steps=3", "--set", "sampling.max_new_tokens=6", "--set", "sampling.stop_phrase="]
    told = ["a red circle", "--model", str(small_model), "--rounds", "3", *few, "--json", "--out", str(tmp_path / "g")]
    done = CliRunner().invoke(app, ["generate", *told])
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert len(image["rounds"]) == 3
    assert image["reasoning"] == "\n\n".join(r["text"] for r in image["rounds"])
    assert image["rounds"][-1]["path"] == image["path"]
    pictures = [Image.open(r["path"]).tobytes() for r in image["rounds"]]
    assert len(set(pictures)) == 3
    assert Image.open(tmp_path / "g" / "sheet.png").width > 3 * 192


# ----- a program of somebody else


def twice(rows: Rows) -> None:
    """Two texts, an image, and another that saw it."""
    rows.sample_text()
    rows.sample_text()
    rows.sample_image()
    rows.read_image()
    rows.sample_image()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Rows], None]], str]:
    def added(run: Callable[[Rows], None]) -> str:
        monkeypatch.setattr(PROGRAMS, "programs", dict(PROGRAMS.programs))
        PROGRAMS.add(Program("own", run, "a test's"))
        return "own"

    return added


def test_rows_are_stopped_by_one_value_each(tiny: MoTPolicy, own: Callable) -> None:
    def early(rows: Rows) -> None:
        rows.sample_image()
        rows.stop([True])

    with pytest.raises(UsageError, match="rows.stop with 1 values for"):
        draw(tiny, replace(ROUNDS, program=own(early), rounds=1))


def test_any_order_of_segments_is_a_program(tiny: MoTPolicy, own: Callable) -> None:
    episodes = draw(tiny, replace(ROUNDS, program=own(twice), rounds=1))
    assert {kinds(e) for e in episodes} == {(GIVEN, TEXT, TEXT, IMAGE, LOOK, IMAGE)}
    assert any(not torch.equal(*(s.ids[:2] for s in e.segments[1:3])) for e in episodes), "two texts, two draws"
    batch = collate(episodes)
    with torch.no_grad():
        found = drift([(batch, replay(tiny, batch))])
    assert found["text/drift_max"] < 1e-6
    assert found["image/drift_max"] < 1e-6


def test_the_program_of_the_docs_is_the_example_and_runs(small_model: Path, tmp_path: Path) -> None:
    path = ROOT / "examples" / "own_program" / "draft_twice.py"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "interleaved.md").read_text(), re.DOTALL)
    (shown,) = (block for block in blocks if "def draft_twice" in block)
    body = [line for line in shown.splitlines() if line.startswith("    ")]
    assert [line for line in path.read_text().splitlines() if line.startswith("    ") and '"""' not in line] == body
    few = ["--set", "eval.steps=3", "--set", "sampling.max_new_tokens=4", "--set", "sampling.program=draft-twice"]
    told = [
        "a red circle",
        "--plugin",
        str(path),
        "--model",
        str(small_model),
        *few,
        "--json",
        "--out",
        str(tmp_path / "g"),
    ]
    done = CliRunner().invoke(app, ["generate", *told])
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert [bool(r["text"]) for r in image["rounds"]] == [True, False]


@pytest.mark.parametrize(
    ("run", "says_so"),
    [
        (lambda rows: rows.sample_text(), "ended an episode without an image"),
        (lambda rows: rows.read_image(), "looks at an image before it sampled one"),
    ],
)
def test_a_program_that_cannot_be(tiny: MoTPolicy, own: Callable, run: Callable, says_so: str) -> None:
    with pytest.raises(UsageError, match=says_so):
        draw(tiny, replace(ROUNDS, program=own(run), rounds=1))


def test_two_programs_of_one_name() -> None:
    registry = ProgramRegistry()
    registry.add(Program("a", twice, "x"))
    registry.add(Program("a", twice, "the same file, loaded again"))
    with pytest.raises(UsageError, match="two programs are named 'a'"):
        registry.add(Program("a", lambda rows: None, "x"))


REFUSED = {
    "think-paint paints once": ("sampling.program=think-paint", "sampling.rounds=2"),
    "takes two rounds or more": ("sampling.program=reflect",),
    "nothing to say of its picture": ("sampling.program=reflect", "sampling.rounds=2", "sampling.think=false"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_settings_that_contradict_each_other(why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_config(overrides=list(REFUSED[why]))


@pytest.mark.parametrize(("program", "prompts"), [("edit", "shapes-edit"), ("critique-edit", "shapes-restore")])
def test_a_program_has_prompts_that_fit(program: str, prompts: str) -> None:
    """Their pictures are there; prompts of one's own are kept."""
    chosen = f"sampling.program={program}"
    assert load_config(overrides=[chosen]).prompts == prompts
    assert load_config(overrides=[chosen]).sampling.max_new_tokens == 48
    assert load_config(overrides=[chosen, "prompts=mine.jsonl"]).prompts == "mine.jsonl"
    assert all(prompt.image is not None for prompt in as_prompts(TRAINING[prompts](20)))


def test_rounds_alone_reflect_with_the_presets_budgets() -> None:
    """A text budget that is typed holds for every round."""
    own = load_config(overrides=["sampling.rounds=3"]).sampling
    assert (own.program, own.round_max_new_tokens) == ("reflect", (20, 48))
    typed = load_config(overrides=["sampling.rounds=3", "sampling.max_new_tokens=6"]).sampling
    assert (typed.max_new_tokens, typed.round_max_new_tokens) == (6, ())
    assert load_config().sampling.round_max_new_tokens == ()


def test_what_a_program_needs_is_said(tiny: MoTPolicy) -> None:
    with pytest.raises(UsageError, match=r"unknown program sampling.program=reflekt: did you mean reflect"):
        draw(tiny, replace(ROUNDS, program="reflekt"))
    with pytest.raises(UsageError, match=r"sampling.program=edit starts from a picture, .*'a red circle' brings none"):
        draw(tiny, replace(ROUNDS, program="edit"))


def test_guidance_in_a_later_round_is_against_what_was_seen(tiny: MoTPolicy) -> None:
    """Up to the picture, without the words about it: with no such words there is nothing to guide away from."""

    def later(rounds: Sampling) -> torch.Tensor:
        groups = rollout(tiny, ASKED, 1, rounds, flow.Window(0, 0), 0)
        return torch.stack([e.images[-1].latent for e in flatten(groups)])

    guided = replace(ROUNDS, guidance=Guidance(text=4.0, above=-1.0, renorm_least=1.0))
    assert not torch.allclose(later(guided), later(ROUNDS), atol=1e-3)


# ----- BAGEL


@pytest.fixture(scope="module")
def bagel() -> MoTPolicy:
    return load_model(str(ROOT / "tests" / "golden" / "bagel_tiny"))


WAYS = {"latents": (True, False), "pixels": (True, False), "tower": (False, True), "pixels+tower": (True, True)}


@pytest.mark.parametrize("how", WAYS)
def test_how_a_picture_is_looked_at(bagel: MoTPolicy, how: str) -> None:
    """Not square, and of two rounds; replay of each way has no drift, and ratio exactly 1."""
    sampling = replace(ROUNDS, height=32, width=48, show_images=how)
    episodes = draw(bagel, sampling, 1)
    for episode in episodes:
        image, look = episode.segments[-4:-2]
        assert (len(look.latent) > 0, look.view is not None) == WAYS[how]
        encoded = bagel.encode_pixels(image.pixels[None])[0]
        if how == "latents":
            assert torch.equal(look.latent, image.latent)
        elif WAYS[how][0]:
            torch.testing.assert_close(look.latent, encoded)
            assert not torch.allclose(look.latent, image.latent, atol=1e-2), "the picture was decoded and encoded"
        assert look.view is None or torch.equal(look.view, bagel.resize_to_see(image.pixels))
        assert look.grid == image.grid == (2, 3)
    batch = collate(episodes)
    with torch.no_grad():
        old, again = replay(bagel, batch), replay(bagel, batch)
    found = drift([(batch, old)])
    assert found["text/drift_max"] < 1e-4
    assert found["image/drift_max"] < 1e-5
    assert torch.equal(old.log_prob_BL, again.log_prob_BL)


@torch.no_grad()
def test_later_guidance_compares_with_everything_up_to_the_picture(bagel: MoTPolicy) -> None:
    """The second image by hand: the context after the look and the text, against the one after the look."""
    guidance = Guidance(text=3.0, above=-1.0, renorm_least=1.0)
    sampling = replace(ROUNDS, guidance=guidance, height=32, width=48, steps=3)
    (episode,) = flatten(rollout(bagel, ASKED[:1], 1, sampling, flow.Window(0, 0), 0))
    *given, text, image = episode.segments
    system, prompt, first, _, look = given
    before = read_given(bagel, [(system, prompt)])
    seen = read_images(bagel, bagel.forward(before, spoken(first)[None]).context, [look])
    said = bagel.forward(seen, spoken(text)[None]).context
    seed = derive(episode.seed, "round", 1)
    contexts = UnconditionalContexts(less_text=seen, less_image=before)
    wanted = sample_image(bagel, said, sampling, flow.Window(0, 0), [seed], image.grid, contexts)[0]
    torch.testing.assert_close(image.latent, wanted.latent, atol=1e-4, rtol=0)
