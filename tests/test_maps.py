"""Advantage maps: the objective under them, and the weights of the built-in ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import small
from tests.commands import unigrpo
from tests.test_objective import PAPER, B, D, K, N, _case, _leaf, _random
from unigrpo_cli import RewardContext, Sample
from unigrpo_cli.algo.credit import IMAGE, TEXT, terminal
from unigrpo_cli.algo.objective import element_log_ratios, per_action, unigrpo_loss
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.evaluate import samples_of
from unigrpo_cli.rewards.batch import RewardBatch
from unigrpo_cli.rewards.hooks import hookimpl
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.episode_files import load_episodes
from unigrpo_cli.run.samples import save_samples
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import Thing, plan_text
from unigrpo_cli.train import training_step
from unigrpo_cli.training.maps import advantage_maps
from unigrpo_cli.training.schedule import window_of
from unigrpo_plugins import maps
from unigrpo_plugins.geneval_rules import DetectedObject
from unigrpo_plugins.maps import resized, salience, smoothed, unigrpo_advantage_map

CONTEXT = RewardContext("cpu", 0, True, True)


def _loss(objective, map_of_image):
    """Loss and velocity gradient of two images under one map each."""
    actions, new, old, advantage_B = _case(images=2)
    given = per_action(terminal(advantage_B, torch.tensor([[TEXT, IMAGE, IMAGE]] * B)), actions, map_of_image)
    leaf = _leaf(new)
    loss = unigrpo_loss(actions, leaf, old, old, given, objective, episodes=B)
    loss.total.backward()
    return loss, [v.grad for v in leaf.velocities]


def test_an_all_ones_map_by_step_is_the_scalar_objective_to_the_bit() -> None:
    plain, gradients = _loss(PAPER, ())
    mapped, own = _loss(PAPER, (torch.ones(B, N), torch.ones(B, N)))
    assert torch.equal(plain.total, mapped.total)
    assert all(torch.equal(a, b) for a, b in zip(gradients, own, strict=True))
    assert {n: v.item() for n, v in plain.means.items()} == {n: v.item() for n, v in mapped.means.items()}


@pytest.mark.parametrize("map_ratio", ["step", "position"])
def test_a_map_weighs_the_gradient_of_each_position(map_ratio: str) -> None:
    """At the old policy, by both ratios: the scalar gradient of position p times M_p."""
    actions, _, old, advantage_B = _case(images=2)
    weights = tuple(_random(B, N, seed=20 + k).abs() + 0.1 for k in range(2))
    weights = tuple(m / m.mean(dim=1, keepdim=True) for m in weights)
    advantage_BS = terminal(advantage_B, torch.tensor([[TEXT, IMAGE, IMAGE]] * B))
    objective = replace(PAPER, penalty="none", map_ratio=map_ratio)
    found = []
    for own in ((), weights):
        leaf = _leaf(old)
        loss = unigrpo_loss(actions, leaf, old, None, per_action(advantage_BS, actions, own), objective, episodes=B)
        loss.total.backward()
        found.append([v.grad for v in leaf.velocities])
    for scalar, mapped, m in zip(*found, weights, strict=True):
        torch.testing.assert_close(mapped, scalar * m[:, None, :, None], rtol=1e-9, atol=1e-15)


def test_ratio_and_clip_of_each_position_by_hand() -> None:
    actions, new, old, advantage_B = _case()
    weights = _random(B, N, seed=30).abs()
    objective = replace(PAPER, text_weight=0.0, penalty="none", image_clip=1e-3, map_ratio="position")
    given = per_action(terminal(advantage_B, torch.tensor([[TEXT, IMAGE]] * B)), actions, (weights,))
    loss = unigrpo_loss(actions, new, old, None, given, objective, episodes=B)
    (element_BKND,) = element_log_ratios(actions, new, old, objective)
    r, a = element_BKND.mean(dim=-1).exp(), (advantage_B[:, None] * weights)[:, None]
    expected = torch.minimum(r * a, r.clamp(1 - 1e-3, 1 + 1e-3) * a).mean(dim=(1, 2)).mean()
    constant = a.expand(B, K, N).mean(dim=(1, 2)).mean()
    torch.testing.assert_close(-loss.total + constant, expected, rtol=1e-9, atol=1e-12)
    assert D > 1


# ----- the built-in maps


def _map(name: str, sample: Sample, grid: tuple[int, int] = (6, 6), **options: object) -> np.ndarray:
    (found,) = unigrpo_advantage_map(name, options, RewardBatch((sample,)), [grid], CONTEXT)
    return found


def test_the_detector_weighs_what_is_wrong_and_what_is_missing() -> None:
    """Asked and said: red circle a1, blue star c3. Shown: red circle a1, green heart b2."""
    said = (Thing("red", "circle", "a1"), Thing("blue", "star", "c3"))
    shown = (said[0], Thing("green", "heart", "b2"))
    asked = {"include": [{"class": t.shape, "color": t.color, "count": 1} for t in said]}
    pixels = render(shown, np.random.default_rng(0))
    found = _map("detector", Sample("p", pixels, plan_text(said), asked), wrong=5.0)
    assert (found[2:4, 2:4] == 5).all(), "the heart that nobody asked for"
    assert (found[4:, 4:] == 5).all(), "the star that is not there"
    assert found[:2, :2].max() == 2, "the circle is right"
    assert (found[:2, 4:] == 1).all()
    right = Sample("p", render(said, np.random.default_rng(0)), plan_text(said), asked)
    assert _map("detector", right).max() == 2


def test_salience_is_the_weighted_distance_along_the_components() -> None:
    """Features along two orthogonal axes, by hand: shares s_k^2 / sum s^2 times the distances."""
    a, b = np.array([3.0, -3.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, -1.0])
    features = np.stack([a, b, np.zeros(4)], axis=1).reshape(2, 2, 3) + 7.0
    total = (a**2).sum() + (b**2).sum()
    expected = (a**2).sum() / total * np.abs(a) + (b**2).sum() / total * np.abs(b)
    np.testing.assert_allclose(salience(features), expected.reshape(2, 2))
    np.testing.assert_allclose(salience(-features), salience(features))
    assert (salience(np.ones((3, 3, 5))) == 1).all()


def test_smoothing_and_resizing_keep_constants_and_order() -> None:
    ones = np.ones((4, 5))
    np.testing.assert_allclose(smoothed(ones, 1.0), ones)
    np.testing.assert_allclose(resized(ones, (7, 3)), np.ones((7, 3)))
    peak = np.zeros((5, 5))
    peak[2, 2] = 1.0
    assert smoothed(peak, 1.0).argmax() == 12
    assert smoothed(peak, 1.0).max() < 0.2
    np.testing.assert_allclose(resized(np.array([[0.0, 1.0]]), (1, 4))[0], [0, 0.25, 0.75, 1])


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained DINOv2 of two narrow layers, as a directory."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)
    return str(folder)


def test_features_of_a_backbone_follow_the_picture(dinov2: str) -> None:
    pixels = np.full((48, 48, 3), 128, np.uint8)
    pixels[24:, 24:] = (255, 0, 0)
    found = _map("features", Sample("p", pixels), grid=(8, 8), model=dinov2, smooth=0.0)
    assert found.shape == (8, 8)
    assert found[5:, 5:].mean() > found[:4, :4].mean(), "the corner that differs from the rest"


# ----- from the setting to the step


def _scorer(*hooks: object) -> Scorer:
    plugins = Plugins()
    plugins.load()
    for k, own in enumerate((maps, *hooks)):
        plugins._register(own, f"maps {k}", "tests", "-")
    plugins.rewards.add("bright", small.bright)
    return Scorer(parse_rewards(["bright"]), plugins, CONTEXT)


def _stepped(*settings: str) -> dict[str, float]:
    config = load_config(overrides=[*small.SETTINGS, "train.group_size=4", "train.micro_batch_size=3", *settings])
    with _scorer() as rewards:
        return training_step(small.state_of(config), small.PROMPTS, rewards, config).metrics


def test_a_step_under_an_all_ones_map_is_the_step_without_one() -> None:
    kept = ("loss", "image/", "text/", "advantage/")
    plain, ones = (
        {n: v for n, v in _stepped(*s).items() if n.startswith(kept)} for s in ([], ["advantage.map=uniform"])
    )
    assert plain == ones
    by_position = _stepped("advantage.map=uniform", "advantage.map_ratio=position")
    assert by_position["image/max_abs_log_ratio"] != plain["image/max_abs_log_ratio"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda grids: [np.ones((3, 3))] * len(grids), r"shape \[3, 3\]"),
        (lambda grids: [-np.ones(g) for g in grids], "at least 0"),
        (lambda grids: [np.zeros(g) for g in grids], "not all 0"),
        (lambda grids: [np.full(g, np.nan) for g in grids], "finite"),
        (lambda grids: [], "0 maps for"),
    ],
)
def test_a_plugins_map_is_checked(answer, says: str) -> None:
    class Own:
        @hookimpl
        def unigrpo_advantage_map(self, name, grids):
            return answer(grids) if name == "own" else None

    config = load_config(overrides=[*small.SETTINGS, "train.group_size=2", "advantage.map=own"])
    with _scorer(Own()) as rewards, pytest.raises(RewardError, match=says):
        training_step(small.state_of(config), small.PROMPTS, rewards, config)


@pytest.mark.parametrize(
    ("text", "says"),
    [("vision", "no map that a plugin knows"), ("detector@weight=3", "options: detector, weights, wrong, thing")],
)
def test_an_unknown_map_is_named(text: str, says: str) -> None:
    config = load_config(overrides=[*small.SETTINGS, "train.group_size=2", f"advantage.map={text}"])
    with _scorer() as rewards, pytest.raises(UsageError, match=says):
        training_step(small.state_of(config), small.PROMPTS, rewards, config)


def test_maps_have_mean_one_and_are_saved_with_samples(tmp_path: Path) -> None:
    config = load_config(overrides=[*small.SETTINGS, "train.group_size=2", "advantage.map=detector@wrong=9"])
    with _scorer() as rewards:
        prompts = [Prompt("a", "a red circle", {"include": [{"class": "circle", "color": "red", "count": 1}]})]
        done = training_step(small.state_of(config), prompts * 2, rewards, config)
        groups = done.groups[:1]
        found = advantage_maps(flatten(groups), samples_of(groups), rewards, config, step=0, split="train")
    for own in found:
        assert own[0].mean().item() == pytest.approx(1.0)
        assert own[0].min() >= 0
    save_samples(groups, {}, tmp_path, 3, found)
    saved = load_file(tmp_path / "step_000003" / "maps.safetensors")
    assert saved["0_1"].shape == groups[0].episodes[0].images[0].grid
    assert (tmp_path / "step_000003" / "maps" / "0_1.png").is_file()


def test_rollout_writes_the_maps_of_all_its_images(small_model: Path, tmp_path: Path) -> None:
    small_step = [part for setting in small.SETTINGS for part in ("--set", setting)]
    two = ["--set", "sampling.program=reflect", "--set", "sampling.rounds=2", "--limit", 1, "--group-size", 2]
    chosen = ["--model", small_model, "--reward", "clean", "--set", "advantage.map=uniform", "--seed", 1]
    done = unigrpo("rollout", *chosen, *small_step, *two, "--out", tmp_path / "r")
    assert done.exit_code == 0, done.output
    names = [f"0000_{member:03d}_{k}" for member in range(2) for k in (1, 2)]
    saved = load_file(tmp_path / "r" / "maps.safetensors")
    assert sorted(saved) == sorted(path.stem for path in (tmp_path / "r" / "maps").iterdir()) == names
    assert all((weights == 1).all() for weights in saved.values())
    (group,) = load_episodes(tmp_path / "r")
    assert [image.grid for image in group.episodes[1].images] == [saved[name].shape for name in names[2:]]
    config = load_config(file=tmp_path / "r" / "config.toml")
    windows = [window_of(config, 0, k) for k in range(2)]
    assert windows[0] != windows[1]
    assert [image.window for image in group.episodes[0].images] == windows, "as training draws them"


def _object(color: str, x: float) -> DetectedObject:
    return DetectedObject(0.9, (x, 0.0, x + 8.0, 8.0), color, {})


@pytest.mark.parametrize(
    ("include", "wrong"),
    [
        ([{"class": "circle", "color": "red", "count": 1}, {"class": "circle", "color": "blue", "count": 1}], []),
        ([{"class": "circle", "color": "blue", "count": 2}], [0.0]),
        ([{"class": "circle", "count": 1}], [16.0]),  # the second is one too many
        ([], []),  # nothing was asked for, so nothing is wrong
    ],
)
def test_marks_of_the_detector_map(include: list, wrong: list[float]) -> None:
    sample = Sample("p", np.zeros((24, 24, 3), np.uint8), None, {"include": include})
    marks = maps._marks({"circle": [_object("red", 0.0), _object("blue", 16.0)]}, sample, False)
    assert [box[0] for box, is_wrong in marks if is_wrong] == wrong
    assert len(marks) == 2
