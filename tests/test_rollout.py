"""Episodes: what they hold, that seeds decide them alone, that files give them back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.episode import Episode, Group, ImageActions, Prompt, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rollout import Sampling, rollout
from unigrpo_cli.run.episode_files import load_episodes, save_episodes

SAMPLING = Sampling(True, 12, 1.0, 48, 48, 6, 1.0, "flow", 0.8, 64)
WINDOW = flow.Window(1, 3)
PROMPTS = [Prompt(t, t) for t in ("a red circle", "two blue stars and a green heart", "a heart above a cross")]


def _roll(model: MoTPolicy, members: int = 3, seed: int = 0, **changes) -> list[Group]:
    window = changes.pop("window", WINDOW)
    return rollout(model, PROMPTS, members, replace(SAMPLING, **changes), window, seed)


def _parts(episode: Episode) -> tuple[TextActions, ImageActions]:
    text, image = episode.segments[-2:]
    assert isinstance(text, TextActions)
    assert isinstance(image, ImageActions)
    return text, image


def test_batch_size_changes_no_sample(tiny: MoTPolicy) -> None:
    whole = flatten(_roll(tiny))
    for rows in (1, 5):
        for a, b in zip(whole, flatten(_roll(tiny, batch_size=rows)), strict=True):
            (text_a, image_a), (text_b, image_b) = _parts(a), _parts(b)
            assert torch.equal(text_a.ids, text_b.ids)
            assert torch.equal(image_a.pixels, image_b.pixels)
            torch.testing.assert_close(image_a.latent, image_b.latent, atol=1e-5, rtol=0)


def test_rows_that_have_stopped_are_carried_twice_at_most(tiny: MoTPolicy) -> None:
    """Texts of many lengths: the batch halves as they end, and each painter still sees its own words."""
    stop = tiny.stop_id
    with torch.no_grad():  # a stop about every eighth token; the tiny model's own is every fiftieth
        tiny.network.language_model.lm_head.weight.mul_(0.05)
    carried: list[int] = []

    class Counted:
        def __getattr__(self, name: str):
            return getattr(tiny, name)

        def logits(self, hidden):
            carried.append(len(hidden))
            logits = tiny.logits(hidden)
            logits[..., stop] += 2.0
            return logits

    sampling = replace(SAMPLING, max_new_tokens=40)
    together = flatten(rollout(Counted(), PROMPTS[:1], 16, sampling, WINDOW, 1))  # type: ignore[arg-type]
    lengths = sorted(len(_parts(e)[0].ids) for e in together)
    assert len(set(lengths)) > 6
    assert lengths[-1] > 2 * lengths[7]
    writing = [sum(n > k for n in lengths) for k in range(lengths[-1])]
    assert len(carried) == len(writing)
    assert all(n <= batch < 2 * n or n == 1 == batch for n, batch in zip(writing, carried, strict=True))
    alone = flatten(rollout(Counted(), PROMPTS[:1], 16, replace(sampling, batch_size=1), WINDOW, 1))  # type: ignore[arg-type]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(_parts(a)[0].ids, _parts(b)[0].ids)
        torch.testing.assert_close(_parts(a)[0].log_prob, _parts(b)[0].log_prob)
        torch.testing.assert_close(_parts(a)[1].latent, _parts(b)[1].latent)


def test_in_fp32_batches_differ_by_rounding_alone() -> None:
    """What is drawn is the same; matrix products of another size round another way, at most one grey level."""
    model = load_model("embedded")
    prompts = [Prompt(t, t) for t in ("a red circle", "two blue stars and a green heart", "a heart above a cross")]
    one, many = (
        flatten(rollout(model, prompts, 2, replace(SAMPLING, batch_size=rows), WINDOW, seed=3)) for rows in (1, 64)
    )
    for a, b in zip(one, many, strict=True):
        (text_a, image_a), (text_b, image_b) = _parts(a), _parts(b)
        assert torch.equal(text_a.ids, text_b.ids)
        torch.testing.assert_close(image_a.latent, image_b.latent, atol=1e-4, rtol=0)
        assert (image_a.pixels.int() - image_b.pixels.int()).abs().max() <= 1


def test_prompts_of_one_name_are_read_each_for_itself(tiny: MoTPolicy) -> None:
    twins = [Prompt("x", "a red circle"), Prompt("x", "two blue stars")]
    both = rollout(tiny, twins, 2, SAMPLING, WINDOW, 0)
    for k, twin in enumerate(twins):
        alone = rollout(tiny, [twin], 2, SAMPLING, WINDOW, 0)[0]
        torch.testing.assert_close(_parts(both[k].episodes[0])[1].latent, _parts(alone.episodes[0])[1].latent)


def test_neither_do_other_prompts(tiny: MoTPolicy) -> None:
    alone = rollout(tiny, PROMPTS[1:2], 2, SAMPLING, WINDOW, 0)[0].episodes
    among = rollout(tiny, PROMPTS, 2, SAMPLING, WINDOW, 0)[1].episodes
    for a, b in zip(alone, among, strict=True):
        assert torch.equal(_parts(a)[0].ids, _parts(b)[0].ids)
        assert torch.equal(_parts(a)[1].pixels, _parts(b)[1].pixels)


def test_seeds_decide_everything(tiny: MoTPolicy) -> None:
    one, same, other = (flatten(_roll(tiny, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(_parts(a)[1].latent, _parts(b)[1].latent) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(_parts(a)[1].latent, _parts(b)[1].latent) for a, b in zip(one, other, strict=True))


def test_members_share_the_window_and_nothing_else(tiny: MoTPolicy) -> None:
    for group in _roll(tiny, members=4):
        images = [_parts(e)[1] for e in group.episodes]
        assert len({i.window for i in images}) == 1
        starts = [i.before[0] for i in images]  # the first stochastic state already differs: own initial noise
        noises = [(i.after - i.before)[0] for i in images]
        for k in range(1, 4):
            assert not torch.equal(starts[0], starts[k])
            assert not torch.equal(noises[0], noises[k])


def test_the_record_is_the_path(tiny: MoTPolicy) -> None:
    """States chain, times are the schedule's, K follows the window, everything is fp32."""
    image = _parts(_roll(tiny)[0].episodes[0])[1]
    assert image.before.dtype == image.after.dtype == image.latent.dtype == torch.float32
    assert image.before.shape == (3, 36, 192)
    assert torch.equal(image.after[:-1], image.before[1:])
    assert torch.equal(image.times, flow.time_grid(6, 1.0))
    assert image.log_prob.shape == (3,)
    assert image.pixels.shape == (48, 48, 3)


def test_the_first_state_of_a_window_at_zero_is_the_seeds_noise(tiny: MoTPolicy) -> None:
    episode = _roll(tiny, window=flow.Window(0, 2))[0].episodes[1]
    expected = normal(derive(episode.seed, "start"), 36, 192)
    assert torch.equal(_parts(episode)[1].before[0], expected)
    assert episode.seed == derive(0, "a red circle", 1)


def test_an_image_by_euler_steps_alone_records_no_action(tiny: MoTPolicy) -> None:
    image = _parts(_roll(tiny, window=flow.Window(0, 0))[0].episodes[0])[1]
    assert image.before.shape == (0, 36, 192)
    assert image.log_prob.shape == (0,)


def test_the_size_may_be_smaller_and_not_square(tiny: MoTPolicy) -> None:
    image = _parts(_roll(tiny, height=24, width=40)[0].episodes[0])[1]
    assert image.grid == (3, 5)
    assert image.pixels.shape == (24, 40, 3)


def test_seeds_are_63_bit_and_keys_do_not_run_together() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(0, 1) == derive(0, "1")
    assert 0 <= derive(7, "x") < 2**63
    assert torch.equal(uniform(5, 4), uniform(5, 9)[:4])  # a longer budget keeps the numbers of a shorter one


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_files_give_back_what_was_saved(tiny: MoTPolicy, tmp_path: Path) -> None:
    groups = _roll(tiny)
    (episode, *_), others = groups[0].episodes, groups[0].episodes[1:]
    *given, image = episode.segments
    rotated = replace(image, latent=image.latent.T.contiguous().T)  # as a view may lie in memory
    groups[0] = Group(groups[0].prompt, (replace(episode, segments=(*given, rotated)), *others))
    save_episodes(groups, tmp_path)
    for before, after in zip(groups, load_episodes(tmp_path), strict=True):
        assert before.prompt == after.prompt
        for a, b in zip(before.episodes, after.episodes, strict=True):
            assert (a.member, a.seed) == (b.member, b.seed)
            for s, t in zip(a.segments, b.segments, strict=True):
                assert type(s) is type(t)
                assert all(_same(getattr(s, n), getattr(t, n)) for n in vars(s)), type(s)


DAMAGES = {
    "no file": "episodes.safetensors missing",
    "truncated": "damaged",
    "not json": "damaged",
    "not text": "damaged",
    "missing tensor": "damaged",
    "another shape": "log_prob has shape",
    "other format": "format 99",
    "no group": "empty",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_episodes_are_refused(tiny: MoTPolicy, tmp_path: Path, damage: str) -> None:
    save_episodes(_roll(tiny), tmp_path)
    tensors, text = tmp_path / "episodes.safetensors", tmp_path / "episodes.json"
    match damage:
        case "no file":
            tensors.unlink()
        case "truncated":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        case "not json":
            text.write_text(text.read_text()[:-50])
        case "missing tensor":
            text.write_text(text.read_text().replace('"ids"', '"idz"'))
        case "not text":
            text.write_bytes(b"\xff\xfe{")
        case "another shape":
            content = load_file(tensors)
            name = next(n for n in content if n.endswith(".log_prob"))
            save_file(content | {name: torch.zeros(1)}, tensors)
        case "no group":
            text.write_text(json.dumps(json.loads(text.read_text()) | {"groups": []}))
        case "other format":
            text.write_text(json.dumps(json.loads(text.read_text()) | {"format": 99}))
    with pytest.raises(UsageError, match=DAMAGES[damage]):
        load_episodes(tmp_path)


def test_a_size_that_was_left_open_is_refused(tiny: MoTPolicy) -> None:
    with pytest.raises(ValueError, match=r"sampling.batch_size=0: .* give the number"):
        _roll(tiny, batch_size=0)
