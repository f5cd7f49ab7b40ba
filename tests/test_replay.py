"""Rollout and its mirror image: replay of a fresh rollout says ratio 1, by whatever path, for any program."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small import terminal_loss
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance, guided
from unigrpo_cli.algo.objective import Objective, step_densities
from unigrpo_cli.episode import Episode, GivenImage, GivenText, Group, Prompt, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot import policy as mot_policy
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.network import Attention
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import _passes_of, collate, micro_batches, replay, replayed_tokens
from unigrpo_cli.rollout import Sampling, rollout, sample_image, sample_text
from unigrpo_cli.run.episode_files import load_episodes, save_episodes
from unigrpo_cli.training.metrics import drift

SAMPLING = Sampling(True, 12, 1.0, 48, 48, 6, 1.0, "flow", 0.8, 64)
WINDOW = flow.Window(1, 3)
PROMPTS = [Prompt(t, t) for t in ("a red circle", "two blue stars and a green heart", "a heart above a cross")]
OBJECTIVE = Objective(1.0, 1.0, 0.2, 1e-4, 0.0, "ratio-norm", "velocity-mse", 0.1)


def _episodes(model: MoTPolicy, members: int = 2, sampling: Sampling = SAMPLING, seed: int = 0) -> list[Episode]:
    groups = rollout(model, PROMPTS, members, sampling, WINDOW, seed)
    return [e for g in groups for e in g.episodes]


def test_replay_agrees_with_rollout(tiny: MoTPolicy) -> None:
    """Decoding token by token from a cache and one packed pass: to 1e-5 in fp32 noise, 1e-7 here in fp64.

    Latents are fp32 by design, so the image's log-probabilities carry fp32 rounding even here.
    """
    batch = collate(_episodes(tiny))
    with torch.no_grad():
        scores = replay(tiny, batch)
    found = drift([(batch, scores)])
    assert found["text/drift_max"] < 1e-6  # behaviour log-probs are stored in fp32
    assert found["image/drift_max"] < 1e-6


def test_embedded_precision_drifts_less_than_1e_5(tiny: MoTPolicy) -> None:
    tiny.network.float()
    batch = collate(_episodes(tiny))
    with torch.no_grad():
        found = drift([(batch, replay(tiny, batch))])
    assert found["text/drift_max"] < 1e-5
    assert found["image/drift_max"] < 1e-5


@pytest.mark.parametrize("copies", [None, 1])
@pytest.mark.parametrize("joined", [True, False])
def test_the_first_ratio_is_exactly_one(tiny: MoTPolicy, joined: bool, copies: int | None) -> None:
    """With and without gradients the replay computes the same numbers: log-ratio 0.0, not 1e-7."""
    tiny.network.float()
    batch = collate(_episodes(tiny))
    with torch.no_grad():
        old = replay(tiny, batch, grad_through_context=joined, copies=copies)
    new = replay(tiny, batch, grad_through_context=joined, copies=copies)
    assert new.log_prob_BL.requires_grad
    advantage = torch.tensor([1.0, -1.0] * 3)
    loss = terminal_loss(batch.actions, new, old, old, advantage, OBJECTIVE, episodes=6)
    assert loss.maxima["text/max_abs_log_ratio"].item() == 0.0
    assert loss.maxima["image/max_abs_log_ratio"].item() == 0.0


def test_the_first_gradient_is_reinforces(tiny: MoTPolicy) -> None:
    """At ratio 1, the objective's gradient is that of sum(A log p): the score-function estimator."""
    batch = collate(_episodes(tiny))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    text_only = replace(OBJECTIVE, image_weight=0.0)
    with torch.no_grad():
        old = replay(tiny, batch)
    terminal_loss(batch.actions, replay(tiny, batch), old, None, advantage, text_only, episodes=6).total.backward()
    ours = {n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None}
    tiny.network.zero_grad()
    log_prob = replay(tiny, batch, image=False).log_prob_BL
    mask = batch.actions.mask_BL
    reinforce = -(torch.where(mask, log_prob, 0.0).sum(dim=1) / mask.sum(dim=1) * advantage).mean()
    reinforce.backward()
    for name, parameter in tiny.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trust_region", ["ratio", "ratio-norm"])
def test_the_first_image_gradient_is_reinforces(tiny: MoTPolicy, trust_region: str) -> None:
    """Through the network, of sum(A log p), mean over the steps; RatioNorm weighs each step by its deviation.

    To 1e-5, for deviations come from fp32 times.
    """
    batch = collate(_episodes(tiny))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    image_only = replace(OBJECTIVE, text_weight=0.0, penalty="none", trust_region=trust_region)
    with torch.no_grad():
        old = replay(tiny, batch)
    terminal_loss(batch.actions, replay(tiny, batch), old, None, advantage, image_only, episodes=6).total.backward()
    ours = {n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None}
    assert max(g.abs().max() for g in ours.values()) > 1e-4
    tiny.network.zero_grad()
    steps = batch.actions.images[0]
    p = step_densities(steps, replay(tiny, batch).velocities[0])
    weight = p.std[..., 0, 0] if trust_region == "ratio-norm" else torch.ones(())
    reinforce = -(weight * flow.log_prob(steps.sde, steps.x_next_BKND, p) * advantage[:, None]).mean()
    reinforce.backward()
    for name, parameter in tiny.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_micro_batches_change_no_gradient(tiny: MoTPolicy) -> None:
    """Other rows pad a batch differently; the gradient of all of them together stays."""
    episodes = _episodes(tiny)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    results = []
    for size in (6, 4, 1):
        tiny.network.zero_grad()
        for at in range(0, 6, size):
            batch = collate(episodes[at : at + size])
            with torch.no_grad():
                old = replay(tiny, batch)
            loss = terminal_loss(
                batch.actions, replay(tiny, batch), old, old, advantage[at : at + size], OBJECTIVE, episodes=6
            )
            loss.total.backward()
        results.append({n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None})
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_padding_ids_do_not_matter(tiny: MoTPolicy) -> None:
    batch = collate(_episodes(tiny))
    turn = batch.chunks[0]
    assert len(set(turn.length_B)) > 1, "the case must have padding"
    hole = torch.arange(turn.ids_BS.shape[1]) >= torch.tensor(turn.length_B)[:, None]
    poisoned = replace(batch, chunks=(replace(turn, ids_BS=torch.where(hole, 17, turn.ids_BS)),))
    with torch.no_grad():
        clean, spoilt = replay(tiny, batch), replay(tiny, poisoned)
    mask = batch.actions.mask_BL
    torch.testing.assert_close(clean.log_prob_BL[mask], spoilt.log_prob_BL[mask], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(clean.velocities[0], spoilt.velocities[0], rtol=1e-12, atol=1e-14)


def test_the_stop_token_is_an_action_and_a_forced_one_is_not(tiny: MoTPolicy) -> None:
    """Finished texts end in a scored stop token; truncated ones are closed by a token that nobody chose."""
    finished = [e for e in _episodes(tiny, members=16) if e.segments[-2].finished]
    truncated = [e for e in _episodes(tiny, members=16) if not e.segments[-2].finished]
    assert finished
    assert truncated
    text = finished[0].segments[-2]
    assert text.ids[-1] == tiny.stop_id
    assert text.closing == ()
    cut = truncated[0].segments[-2]
    assert cut.closing == (tiny.stop_id,)
    assert tiny.stop_id not in cut.ids
    assert len(cut.ids) == SAMPLING.max_new_tokens
    batch = collate([finished[0], truncated[0]])
    assert batch.actions.mask_BL.sum(dim=1).tolist() == [len(text.ids), len(cut.ids)]
    assert [int(batch.chunks[0].ids_BS[row, n - 1]) for row, n in enumerate(batch.chunks[0].length_B)] == [
        tiny.stop_id
    ] * 2


def test_temperature_is_inside_the_scored_distribution(tiny: MoTPolicy) -> None:
    """Sampled at 0.5 and scored at 0.5: no drift. Scored at 1: drift, which is how a mismatch would show."""
    batch = collate(_episodes(tiny, sampling=replace(SAMPLING, temperature=0.5)))
    assert batch.temperature == 0.5
    with torch.no_grad():
        assert drift([(batch, replay(tiny, batch))])["text/drift_max"] < 1e-6
        wrong = replace(batch, temperature=1.0)
        assert drift([(wrong, replay(tiny, wrong))])["text/drift_max"] > 1e-2


def _two_rounds(model: MoTPolicy) -> list[Episode]:
    """Prompt, text, image, a look at it, text, image."""
    sampling = replace(SAMPLING, program="reflect", rounds=2)
    return [e for g in rollout(model, PROMPTS, 1, sampling, WINDOW, 0) for e in g.episodes]


def test_several_rounds_replay_like_one(tiny: MoTPolicy) -> None:
    """Nothing assumes two acted segments: text, image, text that saw it, image again."""
    episodes = _two_rounds(tiny)
    batch = collate(episodes)
    assert len(batch.chunks) == 2
    assert len(batch.actions.images) == 2
    with torch.no_grad():
        scores = replay(tiny, batch)
    found = drift([(batch, scores)])
    assert found["text/drift_max"] < 1e-6
    assert found["image/drift_max"] < 1e-6
    counts = [sum(len(s.ids) for s in e.segments if isinstance(s, TextActions)) for e in episodes]
    assert batch.actions.mask_BL.sum(dim=1).tolist() == counts


@pytest.mark.parametrize("joined", [True, False])
def test_few_copies_at_a_time_score_and_teach_the_same(tiny: MoTPolicy, joined: bool) -> None:
    """Texts of differing length, two images of three steps: all in one pass, two and one, one by one."""
    batch = collate(_two_rounds(tiny))
    assert len(set(batch.chunks[0].length_B)) > 1, "the case must have padding"
    generator = torch.Generator().manual_seed(0)
    pull_BL = torch.randn(batch.actions.mask_BL.shape, generator=generator, dtype=torch.float64)
    pulls = [torch.randn(i.x_BKND.shape, generator=generator, dtype=torch.float64) for i in batch.actions.images]

    def scored(copies: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        tiny.network.zero_grad()
        scores = replay(tiny, batch, grad_through_context=joined, copies=copies)
        total = (scores.log_prob_BL * pull_BL).sum()
        (total + sum((v * p).sum() for v, p in zip(scores.velocities, pulls, strict=True))).backward()
        said = {"words": scores.log_prob_BL, "first": scores.velocities[0], "second": scores.velocities[1]}
        return said, {n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None}

    whole = scored(3)
    for copies in (2, 1):
        for found, meant in zip(scored(copies), whole, strict=True):
            assert found.keys() == meant.keys()
            for name, value in meant.items():
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("room", "passes"), [(3.0, [3]), (2.9, [2, 1]), (1.9, [1, 1, 1]), (0.1, [1, 1, 1])])
def test_copies_at_once_are_a_rule_of_shapes(
    tiny: MoTPolicy, monkeypatch: pytest.MonkeyPatch, room: float, passes: list[int]
) -> None:
    """Room for so many copies: whatever the rows say. On a GPU, and in sharded layers, all of them always."""
    batch = collate(_episodes(tiny, members=1))
    config = tiny.network.config
    one_copy = len(PROMPTS) * (batch.actions.images[0].x_BKND.shape[2] + 2) * config.intermediate_size * 8
    monkeypatch.setattr(mot_policy, "PASS_BYTES", int(room * one_copy))
    looks = []
    forward = MoTPolicy.forward

    def watched(model, context, ids=None, lengths=None, image=None, **more):
        looks.append((ids is not None, image.x_BKND.shape[1]))
        return forward(model, context, ids, lengths, image, **more)

    monkeypatch.setattr(MoTPolicy, "forward", watched)
    with torch.no_grad():
        replay(tiny, batch)
    assert [copies for _, copies in looks] == passes
    assert [reads for reads, _ in looks] == [True] + [False] * (len(passes) - 1), "the text is read once"
    noisy = batch.chunks[0].image
    elsewhere = replace(tiny, network=copy.deepcopy(tiny.network).to("meta"))
    assert elsewhere.copies_at_once(noisy) == 3
    monkeypatch.setattr(MoTPolicy, "is_sharded", True)
    assert tiny.copies_at_once(noisy) == 3


@pytest.mark.parametrize(
    ("steps", "copies", "passes"), [(8, 8, [8]), (8, 5, [4, 4]), (8, 3, [3, 3, 2]), (3, 9, [3]), (0, 1, [0])]
)
def test_passes_share_the_copies_out_evenly(steps: int, copies: int, passes: list[int]) -> None:
    x_BKND, t_BK = torch.arange(2.0 * steps).view(2, steps, 1, 1), torch.rand(2, steps)
    parts = _passes_of(NoisyImage(x_BKND, t_BK, (1, 1)), copies)
    assert [part.x_BKND.shape[1] for part in parts] == passes
    assert torch.equal(torch.cat([part.x_BKND for part in parts], dim=1), x_BKND)
    assert torch.equal(torch.cat([part.t_BK for part in parts], dim=1), t_BK)
    assert {part.grid for part in parts} == {(1, 1)}


def test_attention_over_words_in_fp64_is_what_keeps_drift_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same episodes with and without it: in fp32 one query rounds unlike many."""
    model = load_model("embedded")

    def mean_drift() -> float:
        episodes = flatten(rollout(model, PROMPTS, 8, SAMPLING, flow.Window(0, 0), 0))
        batch = collate(episodes)
        with torch.no_grad():
            return drift([(batch, replay(model, batch, image=False))])["text/drift_mean"]

    wide = mean_drift()
    monkeypatch.setattr(Attention, "attend_text", Attention.attend)
    assert wide < mean_drift()


def test_an_edit_replays_what_it_was_shown(tiny: MoTPolicy, tmp_path: Path) -> None:
    """Source image, prompt, thinking, image: given segments may be pictures, also the very first."""
    episodes = []
    with torch.no_grad():
        for member, (prompt, source) in enumerate(zip(PROMPTS, _two_rounds(tiny), strict=True)):
            shown = source.images[0]
            given = GivenImage("source", shown.grid, shown.latent, shown.pixels)
            context = tiny.encode_image(tiny.empty_context(1), given.latent[None], given.grid)
            asked = tiny.preamble(prompt, think=True)
            context = tiny.forward(context, asked[0].ids[None]).context
            context, texts = sample_text(tiny, context, SAMPLING, [member])
            painted = sample_image(tiny, context, SAMPLING, WINDOW, [member])[0]
            episodes.append(Episode(prompt, member, member, (given, *asked, texts[0], painted)))
    save_episodes([Group(e.prompt, (e,)) for e in episodes], tmp_path)
    episodes = flatten(load_episodes(tmp_path))
    batch = collate(episodes)
    with torch.no_grad():
        found = drift([(batch, replay(tiny, batch))])
        blind = collate([replace(e, segments=e.segments[1:]) for e in episodes])
        lost = drift([(blind, replay(tiny, blind))])
    assert found["text/drift_max"] < 1e-6
    assert found["image/drift_max"] < 1e-6
    assert lost["text/drift_max"] > 1e-4, "the source is looked at"
    assert len(batch.actions.images) == 1
    assert episodes[0].pixels is episodes[0].images[-1].pixels


def test_an_episode_without_thinking(tiny: MoTPolicy) -> None:
    batch = collate(_episodes(tiny, sampling=replace(SAMPLING, think=False)))
    assert batch.actions.mask_BL.shape[1] == 0
    with torch.no_grad():
        old = replay(tiny, batch)
    assert drift([(batch, old)])["image/drift_max"] < 1e-6
    loss = terminal_loss(
        batch.actions, replay(tiny, batch), old, old, torch.ones(6, dtype=torch.float64), OBJECTIVE, episodes=6
    )
    loss.total.backward()
    assert torch.isfinite(loss.total)


def test_detach_keeps_the_image_term_from_the_words(tiny: MoTPolicy) -> None:
    """The embedding of a word that was read gets a gradient from the image only with grad_through_context."""
    batch = collate(_episodes(tiny))
    word = int(batch.chunks[0].ids_BS[0, 1])
    for joined in (True, False):
        tiny.network.zero_grad()
        replay(tiny, batch, grad_through_context=joined).velocities[0].square().sum().backward()
        gradient = tiny.network.language_model.model.embed_tokens.weight.grad[word]
        assert bool(gradient.abs().max() > 0) == joined


def test_what_cannot_be_stacked_is_refused(tiny: MoTPolicy) -> None:
    thinking = _episodes(tiny)
    plain = _episodes(tiny, sampling=replace(SAMPLING, think=False))
    with pytest.raises(ValueError, match="same segments"):
        collate([thinking[0], plain[0]])
    hot = _episodes(tiny, sampling=replace(SAMPLING, temperature=2.0))
    with pytest.raises(ValueError, match="one temperature"):
        collate([thinking[0], hot[0]])
    with pytest.raises(ValueError, match="copies=0"):
        replay(tiny, collate(thinking), copies=0)


def test_a_reference_for_velocities_alone_leaves_words_unscored(tiny: MoTPolicy) -> None:
    batch = collate(_episodes(tiny))
    with torch.no_grad():
        whole, silent = replay(tiny, batch), replay(tiny, batch, text=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.velocities, silent.velocities, strict=True))
    assert silent.log_prob_BL.shape == whole.log_prob_BL.shape
    assert not silent.log_prob_BL.any()


@pytest.mark.parametrize("tokens", [1, 100, 150, 400, 10**6])
def test_a_budget_of_tokens_bounds_micro_batches(tiny: MoTPolicy, tokens: int) -> None:
    """Every episode once, none too many, padding counted; those that are padded together are of a length."""
    episodes = _episodes(tiny, members=4)
    size, indices = 4, list(range(len(episodes)))[1:]
    parts = micro_batches(episodes, indices, size, tokens)
    assert sorted(k for part in parts for k in part) == indices
    padded = 0
    for part in parts:
        longest = max(replayed_tokens(episodes[k]) for k in part)
        assert len(part) == 1 or (len(part) <= size and len(part) * longest <= tokens)
        padded += len(part) * longest
    unsorted = micro_batches(episodes, indices, size)
    assert unsorted == [indices[at : at + size] for at in range(0, len(indices), size)]
    if tokens == 10**6:
        assert len(parts) == len(unsorted)
        assert padded < sum(len(p) * max(replayed_tokens(episodes[k]) for k in p) for p in unsorted)


def test_replayed_tokens_are_those_the_network_is_fed(tiny: MoTPolicy) -> None:
    for episode in _episodes(tiny):
        (turn,) = collate([episode]).chunks
        assert turn.image is not None
        copies, latents = turn.image.x_BKND.shape[1:3]
        fed = turn.ids_BS.shape[1] + copies * (latents + len(tiny.network.boundary_ids))
        assert replayed_tokens(episode) == fed


def test_a_size_that_was_left_open_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.micro_batch_size=0: .* give the number"):
        micro_batches([], [], 0)


# ----- guidance

GUIDED = Guidance(text=3.0, image=2.0, above=0.6)  # of the steps 1 to 3 of 6, at t = 5/6, 4/6, 1/2, the last is not


@pytest.mark.parametrize("copies", [None, 1])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_guided_action_is_replayed_as_it_was_drawn(tiny: MoTPolicy, copies: int | None, rounds: int) -> None:
    """With the log-probability of the guided velocity; with gradients the same numbers to the bit."""
    program = {"program": "reflect", "rounds": 2} if rounds == 2 else {}
    plain, more = (
        _episodes(tiny, sampling=replace(SAMPLING, guidance=guidance, **program)) for guidance in (Guidance(), GUIDED)
    )
    assert not torch.allclose(plain[0].images[0].after, more[0].images[0].after, atol=1e-3)
    batch = collate(more)
    assert all(chunk.guided == (0, 1) for chunk in batch.chunks if chunk.image)
    with torch.no_grad():
        old = replay(tiny, batch, copies=copies)
        without = replay(tiny, replace(batch, chunks=tuple(replace(c, guided=()) for c in batch.chunks)))
    assert drift([(batch, old)])["image/drift_max"] < 1e-6
    assert drift([(batch, without)])["image/drift_max"] > 1e-5
    new = replay(tiny, batch, copies=copies)
    assert all(torch.equal(a, b) for a, b in zip(old.velocities, new.velocities, strict=True))
    assert replayed_tokens(more[0]) - replayed_tokens(plain[0]) >= 2 * 3 * rounds * (len(more[0].images[0].latent) + 2)


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_is_that_of_the_guided_velocity(tiny: MoTPolicy, detach: bool) -> None:
    """By hand: a pass in each of three contexts, then the formula; a pull on the result reaches all three."""
    episodes = _episodes(tiny, 1, replace(SAMPLING, guidance=GUIDED))[:1]
    batch = collate(episodes)
    steps = batch.actions.images[0]
    segments = episodes[0].segments
    given = [s.ids for s in segments if isinstance(s, GivenText)]
    (spoken,) = [s for s in segments if isinstance(s, TextActions)]
    spoken_ids = torch.tensor([*spoken.opening, *spoken.ids.tolist(), *spoken.closing])
    contexts = (torch.cat([*given, spoken_ids]), torch.cat([spoken_ids[:0], *given[:-1]]), torch.cat(given))
    found = []
    for ids in contexts:
        context = tiny.empty_context(1)
        if len(ids):
            context = tiny.forward(context, ids[None]).context
        image = NoisyImage(steps.x_BKND[:, :2], steps.t_BK[:, :2], episodes[0].images[0].grid)
        found.append(tiny.forward(context, image=image, detach_context=detach).velocity_BKND[0])
    wanted = guided(*found, GUIDED)
    own = replay(tiny, batch, grad_through_context=not detach).velocities[0][0, :2]
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-5)
    pull = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    weights = [p for p in tiny.network.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((v * pull).sum(), weights, allow_unused=True) for v in (own, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_guidance_is_saved_with_the_actions(tiny: MoTPolicy, tmp_path: Path) -> None:
    """And only where there is some."""
    for guidance in (Guidance(), GUIDED):
        group = Group(PROMPTS[0], tuple(_episodes(tiny, sampling=replace(SAMPLING, guidance=guidance))[:2]))
        save_episodes([group], tmp_path)
        assert load_episodes(tmp_path)[0].episodes[0].images[0].guidance == guidance
        assert ("guidance" in (tmp_path / "episodes.json").read_text()) == guidance.on
    data = json.loads((tmp_path / "episodes.json").read_text())
    data["groups"][0]["episodes"][0]["segments"][-1]["guidance"]["text"] = "4"
    (tmp_path / "episodes.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="damaged"):
        load_episodes(tmp_path)
