"""Traces: numbers recomputed from the weights, what they cost the training (nothing), files that are odd or hostile."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests import small
from unigrpo_cli import RewardContext, load_episodes, load_traces
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Episode, ImageActions, TextActions
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.pictures import shrunk
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.parallel.ranks import ALONE
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.episode_files import save_episodes
from unigrpo_cli.run.records import reward_rows
from unigrpo_cli.run.trace_files import load_trace, save_trace
from unigrpo_cli.run.trace_types import ImageTrace, StepTrace, TextTrace
from unigrpo_cli.run.traces import score_again, step_trace, token_pieces
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.schedule import traced_groups

SETTINGS = (
    *small.SETTINGS,
    *("train.group_size=3", "train.lr_text=1e-3", "train.lr_image=1e-3", "train.steps=1", "threads=1"),
    *("objective.image_clip=1e-5", "objective.text_clip=1e-3", "train.trace_every=1"),
)


def _run(*settings: str) -> tuple[list[StepTrace], list[StepResult], list[MoTPolicy]]:
    """Train and trace every step; also its results, and the policy before the run and after each step."""
    config = load_config(overrides=[*SETTINGS, *settings])
    state = small.state_of(config)
    traces: list[StepTrace] = []
    results: list[StepResult] = []
    policies = [copy.deepcopy(state.policy)]

    def note(result: StepResult) -> bool:
        policies.append(copy.deepcopy(state.policy))
        results.append(result)
        if result.traced:
            again = score_again(state.policy, result.traced, config, ALONE)
            traces.append(step_trace(result, again, state.step, state.policy, config, rewards.weights))
        return False

    plugins = Plugins()
    plugins.rewards.add("bright", small.bright)
    with Scorer(parse_rewards(["bright"]), plugins, RewardContext("cpu", config.seed, True, True)) as rewards:
        train(state, small.PROMPTS, rewards, config, note)
    return traces, results, policies


@pytest.fixture(scope="module")
def twice() -> tuple[StepTrace, StepResult, MoTPolicy, MoTPolicy, MoTPolicy]:
    """A step of two passes over one minibatch: its trace, its result, and the weights before, between and after."""
    torch.set_num_threads(1)
    (trace,), (result,), (before, after) = _run("train.minibatches=1", "train.epochs=2")
    _, _, (_, between) = _run("train.minibatches=1", "train.epochs=1", "train.trace_every=0")
    return trace, result, before, between, after


def _read(policy: MoTPolicy, episode: Episode) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of an episode's first text, and velocities of its image at the recorded steps."""
    prompt, text, image = episode.segments[-3:]
    read = [*prompt.ids.tolist(), *text.opening, *text.ids.tolist(), *text.closing]
    with torch.no_grad():
        noisy = NoisyImage(image.before[None], image.times[None, list(image.window.steps)], image.grid)
        out = policy.forward(policy.empty_context(1), torch.tensor([read]), [len(read)], noisy)
        first = len(prompt.ids) + len(text.opening)
        logits = policy.logits(out.hidden_BLC[0, first - 1 : first - 1 + len(text.ids)])
        return logits.log_softmax(-1)[range(len(text.ids)), text.ids], out.velocity_BKND[0]


def test_numbers_are_those_of_the_weights(twice: tuple) -> None:
    """From the weights that the last update saw, and from those after the step: a token's ratio, a step's, its map."""
    trace, result, before, between, after = twice
    for g in range(2):
        seen, episode = trace.groups[g].episodes[2], result.groups[g].episodes[2]
        text, image = seen.segments[-2:]
        assert isinstance(text, TextTrace) and isinstance(image, ImageTrace)
        (old, v_old), (new, v_new), (last, v_last) = (_read(p, episode) for p in (before, between, after))
        np.testing.assert_allclose(text.log_ratio_L, new - old, atol=1e-5)
        np.testing.assert_allclose(text.change_L, last - old, atol=1e-5)
        assert np.abs(text.change_L).max() > 1e-3
        t, t_next = image.t_K[:, None, None], image.t_next_K[:, None, None]
        x, x_next = episode.images[0].before.numpy(), episode.images[0].after.numpy()
        variance = image.noise_level**2 * t / (1 - np.where(t == 1, image.times_T[1], t))
        std = np.sqrt(variance * (t - t_next))
        weight = (t_next - t) * (1 + variance * (1 - t) / (2 * t))  # of the velocity in the step's mean
        mean_old = x * (1 + variance / (2 * t) * (t_next - t)) + v_old.numpy() * weight
        np.testing.assert_allclose(image.std_K, std[:, 0, 0], rtol=1e-6)
        for move, v in ((image.update, v_new), (image.after, v_last)):
            difference = (v - v_old).numpy() * weight
            map_KN = ((x_next - mean_old) / std * difference).mean(axis=2)
            np.testing.assert_allclose(move.log_ratio_KN, map_KN, atol=1e-4 * np.abs(map_KN).max())
            np.testing.assert_allclose(move.log_ratio_K, map_KN.mean(axis=1), atol=1e-4 * np.abs(map_KN).max())
            np.testing.assert_allclose(move.mean_change_K, np.sqrt((difference**2).mean(axis=(1, 2))), rtol=1e-3)
            assert np.abs(move.log_ratio_K).max() > 1e-6


def test_the_estimate_of_the_picture_is_that_of_the_old_velocity(twice: tuple) -> None:
    trace, result, before, *_ = twice
    episode, seen = result.groups[0].episodes[1], trace.groups[0].episodes[1]
    image, (_, v_KND) = episode.images[0], _read(before, episode)
    t_K = image.times[list(image.window.steps)]
    wanted = before.decode_pixels(image.before - t_K[:, None, None] * v_KND, image.grid)
    difference = seen.segments[-1].x0_KHWC.astype(int) - wanted.numpy()
    assert np.abs(difference).max() <= 1  # one rounds where the other does not
    assert np.array_equal(seen.segments[-1].pixels_HWC, image.pixels.numpy())


def test_shares_add_up_to_the_loss_of_the_step() -> None:
    """Two updates on a group each: the mean of their losses is the step's, and the first has ratio 1 everywhere."""
    (trace,), (result,), _ = _run("train.minibatches=2", "objective.text_kl=0.1", "objective.penalty_weight=0.3")
    assert [group.update for group in trace.groups] == [0, 1]
    assert (trace.updates, trace.denominator, trace.step, trace.skipped) == (2, 3, 1, None)
    actions = [[s for e in g.episodes for s in e.segments if s.kind in ("text", "image")] for g in trace.groups]
    losses = [sum((s.loss_L if s.kind == "text" else s.loss_K).sum() for s in own) for own in actions]
    assert sum(losses) / 2 == pytest.approx(result.metrics["loss"], rel=1e-4)
    for first, own in zip((True, False), actions, strict=True):
        ratios = [s.log_ratio_L if s.kind == "text" else s.update.log_ratio_K for s in own]
        assert all((ratio == 0).all() == first for ratio in ratios)
        after = [s.change_L if s.kind == "text" else s.after.log_ratio_K for s in own]
        assert all((ratio != 0).any() for ratio in after)
    texts, images = ([s for own in actions for s in own if s.kind == kind] for kind in ("text", "image"))
    clipped = np.mean([np.mean(s.clipped_L != 0) for s in texts]), np.mean([np.mean(s.clipped_K != 0) for s in images])
    assert clipped[0] == pytest.approx(result.metrics["text/clip_fraction"])
    assert clipped[1] == pytest.approx(result.metrics["image/clip_fraction"])
    assert np.mean([s.entropy_L.mean() for s in texts]) == pytest.approx(result.metrics["text/entropy"], rel=1e-5)
    assert np.mean([s.penalty_K.mean() for s in images]) == pytest.approx(result.metrics["image/velocity-mse"])
    for g, group in enumerate(trace.groups):
        for k, episode in enumerate(group.episodes):
            assert episode.rewards == {"bright": result.scored["bright"].scores[3 * g + k]}
            assert all((s.advantage_L if s.kind == "text" else s.advantage_K)[0] == np.float32(episode.advantage)
                       for s in episode.segments if s.kind in ("text", "image"))  # fmt: skip


def test_training_with_traces_is_training_without() -> None:
    """To the bit: weights and metrics of three steps."""
    _, traced, policies = _run("train.steps=3")
    none, plain, others = _run("train.steps=3", "train.trace_every=0")
    assert not none
    for a, b in zip(policies, others, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.network.parameters(), b.network.parameters(), strict=True))
    for a, b in zip(traced, plain, strict=True):
        assert not b.traced and all(m.new is None for m in b.traced)
        kept = [{k: v for k, v in r.metrics.items() if not k.startswith(("seconds/", "memory/"))} for r in (a, b)]
        assert kept[0] == kept[1]


def test_segments_of_every_round(tmp_path: Path) -> None:
    """Text, image, a look at it, text, image: each action in its own segment, through the files too."""
    rounds = ("sampling.program=reflect", "sampling.rounds=2", "sampling.stop_phrase=")
    (trace,), (result,), _ = _run(*rounds)
    save_trace(trace, tmp_path / "traces" / "step_000001")
    assert _same(trace, load_trace(tmp_path / "traces" / "step_000001"))
    for group, drawn in zip(trace.groups, result.groups, strict=True):
        for seen, episode in zip(group.episodes, drawn.episodes, strict=True):
            acted = [s for s in seen.segments if s.kind in ("text", "image")]
            assert [s.kind for s in acted] == ["text", "image"] * 2
            assert "given_image" in [s.kind for s in seen.segments]
            actions = [s for s in episode.segments if isinstance(s, TextActions | ImageActions)]
            for own, action in zip(acted, actions, strict=True):
                if isinstance(action, TextActions):
                    assert np.array_equal(own.ids_L, action.ids)
                    assert "".join(own.tokens) == action.text
                    np.testing.assert_allclose(own.log_prob_old_L, action.log_prob, atol=1e-5)
                else:
                    assert own.t_K.tolist() == action.times[list(action.window.steps)].tolist()
                    assert own.after.log_ratio_KN.shape == (2, action.grid[0] * action.grid[1])


@pytest.mark.parametrize(
    ("every", "groups", "wanted"),
    [(0, 8, {}), (10, 8, {1: 8, 10: 8, 20: 8, 25: 8}), (10, 3, {1: 3, 10: 3, 20: 3, 25: 3}), (30, 1, {1: 1, 25: 1})],
)
def test_first_and_last_and_every_so_many_steps(every: int, groups: int, wanted: dict[int, int]) -> None:
    config = load_config(overrides=[f"train.trace_every={every}", f"train.trace_groups={groups}", "train.steps=25"])
    chosen = {step + 1: traced_groups(config, step, 8) for step in range(25)}
    assert {step: len(own) for step, own in chosen.items() if own} == wanted
    assert all(max(own) >= 4 or len(own) == 1 for own in chosen.values() if own), "of both minibatches"


def test_pieces_of_tokens_are_the_text() -> None:
    """Bytes as tokens: a character of several tokens is the last one's; and words with spaces between them."""
    text = "aé 🙂 z"

    def decode(ids: torch.Tensor) -> str:
        return bytes(ids.tolist()).decode("utf-8", errors="replace")

    pieces = token_pieces(decode, np.frombuffer(text.encode(), np.uint8).astype(np.int64))
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert pieces[1:3] == ("", "é") and pieces[4:8] == ("", "", "", "🙂")
    words = ["red", "", "circle", "", "", "top"]
    spaced = token_pieces(lambda ids: " ".join(filter(None, (words[k] for k in ids))), np.arange(6))
    assert spaced == ("red", "", " circle", "", "", " top"), "special tokens are not shown"


def test_pictures_shrink_by_averages() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    assert np.abs(shrunk(pixels, 2)[0, 0] - pixels[:2, :2].mean(axis=(0, 1))).max() <= 0.5
    assert shrunk(pixels, 4) is pixels
    assert shrunk(np.zeros((300, 2, 3), np.uint8), 128).shape == (128, 1, 3)


# ----- files


def _same(a: object, b: object) -> bool:
    """Equality of traces, of arrays to the bit and the dtype."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)  # type: ignore[union-attr]
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))  # type: ignore[arg-type]
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(_same(v, vars(b)[name]) for name, v in vars(a).items())
    return a == b


@pytest.fixture
def run(twice: tuple, tmp_path: Path) -> Path:
    """A run's directory with one trace."""
    (tmp_path / "config.toml").touch()
    save_trace(twice[0], tmp_path / "traces" / "step_000001")
    return tmp_path


def test_a_trace_comes_back_to_the_bit(twice: tuple, run: Path) -> None:
    (read,) = load_traces(run)
    assert _same(twice[0], read)
    save_trace(replace(read, skipped="<b>why</b>"), run / "traces" / "step_000001")
    assert [trace.skipped for trace in load_traces(str(run))] == ["<b>why</b>"]
    assert sorted(p.name for p in (run / "traces").iterdir()) == ["step_000001"]


def test_a_rollout_is_read_as_step_0(twice: tuple, tmp_path: Path) -> None:
    _, result, *_ = twice
    save_episodes(result.groups, tmp_path)
    (bare,) = load_traces(tmp_path)
    assert bare.groups[0].episodes[0].rewards == {}
    (tmp_path / "rewards.json").write_text(json.dumps(reward_rows(result.groups, result.scored)))
    (trace,) = load_traces(tmp_path)
    episode = trace.groups[1].episodes[2]
    assert episode.rewards == {"bright": result.scored["bright"].scores[5]}
    text, image = episode.segments[-2:]
    assert np.array_equal(text.log_prob_rollout_L, result.groups[1].episodes[2].segments[-2].log_prob)
    assert (trace.step, trace.objective, text.log_prob_new_L, text.tokens, image.update) == (0, None, None, None, None)
    rows = reward_rows(result.groups, result.scored)
    rows[5]["segments"] = {"bright": {"image_1": 0.25, "text_1": None}, "other": {"image_2": 1.0}}
    (tmp_path / "rewards.json").write_text(json.dumps(rows))
    (trace,) = load_traces(tmp_path)
    own = [s.rewards for s in trace.groups[1].episodes[2].segments if s.kind in ("text", "image")]
    assert own == [{"bright": None}, {"bright": 0.25}]
    (tmp_path / "rewards.json").write_text("[]")
    with pytest.raises(UsageError, match="0 rows for 6 episodes"):
        load_traces(tmp_path)
    (tmp_path / "rewards.json").write_text(json.dumps([{"rewards": {"bright": "high"}}] * 6))
    with pytest.raises(UsageError, match="does not fit the episodes"):
        load_traces(tmp_path)


def test_only_runs_are_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run"):
        load_traces(tmp_path)
    with pytest.raises(UsageError, match="is no run"):
        load_traces(tmp_path / "none")
    (tmp_path / "config.toml").touch()
    assert load_traces(tmp_path) == []


def _edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edited(trace: Path) -> None:
        content = json.loads((trace / "trace.json").read_text())
        change(content)
        (trace / "trace.json").write_text(json.dumps(content))

    return edited


def _array(name: str, value: np.ndarray | None) -> Callable[[Path], object]:
    def edited(trace: Path) -> None:
        arrays = load_file(trace / "trace.safetensors") | ({} if value is None else {name: value})
        save_file({k: v for k, v in arrays.items() if value is not None or k != name}, trace / "trace.safetensors")

    return edited


def _text(trace: Path, name: str, content: str | bytes) -> None:
    (trace / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _pipe(trace: Path) -> None:
    (trace / "trace.safetensors").unlink()
    os.mkfifo(trace / "trace.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "trace.json").unlink(), "No such file"),
        (lambda p: (p / "trace.safetensors").unlink(), "No such file"),
        (_pipe, "pipe or device"),
        (lambda p: _text(p, "trace.json", "not json"), "not JSON"),
        (lambda p: _text(p, "trace.json", "[]"), "damaged"),
        (lambda p: _text(p, "trace.json", b"\xff"), "not UTF-8"),
        (lambda p: _text(p, "trace.json", "[" * 5000), "nested too deep"),
        (lambda p: _text(p, "trace.json", '{"format": NaN}'), "NaN is not JSON"),
        (lambda p: _text(p, "trace.safetensors", b"\xff" * 64), "damaged trace"),
        (lambda p: _text(p, "trace.safetensors", b""), "damaged trace"),
        (_edit(lambda c: c.update(format=2)), "format 2, this version reads 1"),
        (_edit(lambda c: c.pop("format")), "format"),
        (_edit(lambda c: c.update(step="x")), "step: "),
        (_edit(lambda c: c.update(groups={})), "damaged"),
        (_edit(lambda c: c["groups"].pop()), "index"),
        (_edit(lambda c: c["groups"][0]["episodes"][0].pop("seed")), "seed: Field required"),
        (_edit(lambda c: c["groups"][0].update(prompt="\0")), "NUL"),
        (_edit(lambda c: c["groups"][0]["episodes"][0]["segments"][1].update(kind="code")), "kind"),
        (_edit(lambda c: c["groups"][0]["episodes"][0]["segments"][1].update(tokens=["a"])), "of L, not"),
        (_edit(lambda c: c["groups"][0]["episodes"][0]["segments"][2].update(grid=[0, 3])), "grid"),
        (_edit(lambda c: c["groups"][0]["episodes"][0]["segments"][2].update(window_start=9)), "outside the schedule"),
        (_edit(lambda c: c["groups"][0]["episodes"][0]["rewards"].update(bright="x")), "rewards.bright"),
        (_array("0.0.1.ids_L", None), "ids_L: "),
        (_array("0.0.1.ids_L", np.zeros(6, np.float32)), "not an array of int64"),
        (_array("0.0.1.loss_L", np.zeros((6, 1), np.float32)), "with 1 axes"),
        (_array("0.0.1.loss_L", np.zeros(99, np.float32)), "of L, not"),
        (_array("0.0.2.pixels_HWC", np.zeros((4, 4, 4), np.uint8)), "pixels_HWC has shape"),
        (_array("0.0.2.update.log_ratio_KN", np.zeros((2, 5), np.float32)), "of N, not"),
        (_array("0.0.2.clipped_K", np.zeros(3, np.int8)), "of K, not"),
        (_array("0.0.1.loss_M", np.zeros(3, np.float32)), "loss_M: "),
        (_array("0.0.99.loss_L", np.zeros(3, np.float32)), "index"),
        (_array("a.b", np.zeros(3, np.float32)), "damaged"),
        (_array("__class__.0.1.x", np.zeros(3, np.float32)), "damaged"),
    ],
)
def test_hostile_files_are_one_line(run: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(run / "traces" / "step_000001")
    with pytest.raises(UsageError) as caught:
        load_traces(run)
    line = str(caught.value)
    assert says in line and "step_000001" in line and "\n" not in line and len(line) < 400


def test_reading_imports_no_torch(run: Path) -> None:
    code = (
        "import sys, unigrpo_cli\n"
        "assert 'numpy' not in sys.modules\n"
        f"(trace,) = unigrpo_cli.load_traces({str(run)!r})\n"
        "assert 'torch' not in sys.modules and trace.step == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_episodes.__module__ == "unigrpo_cli.run.episode_files"
