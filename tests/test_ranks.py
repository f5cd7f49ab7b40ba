"""Several processes train as one does: who draws what, what is summed, what is agreed, and how they end.

Two processes are started once for all scenes of tests/two_ranks.py; one process runs the same scenes as control.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import tiny_pair, two_ranks
from tests.commands import Process, command_line
from tests.two_ranks import STEPS
from tools.toy_answers import write_answers
from unigrpo_cli.config import load_config
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.pair.facts import PAINTERS
from unigrpo_cli.parallel import join
from unigrpo_cli.parallel.join import gpu_index, gpu_of_rank, share_gpu
from unigrpo_cli.parallel.launch import address, launched
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.replay import split_up
from unigrpo_cli.run.memory.kinds import training_memory, workload

LONG = bool(os.environ.get("UNIGRPO_LONG_TESTS"))
SCENES = (
    "lora",
    "replicated",
    "sharded",
    "pair",
    "checkpointed",
    "whole_control",
    "judged_on_first",
    "refused",
    "uneven_texts",
    "failing_judge",
    "uneven_program",
    "abstaining_judge",
    "imitated",
    "pair_full",
    *(RESTORED := tuple(f"restored_{what}" for what in two_ranks.TRAINED if LONG or what != "pair_full")),
)
CONTROLS = (*SCENES[:4], "abstaining_judge", "imitated", "pair_full", *RESTORED)
TOLERANCE = 1e-5
"""Largest difference of a weight after two steps (four updates of up to 1e-3 each) between one process and two.

Sums of gradients round in another order, and AdamW divides by their size: 2.4e-6 was measured."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(world: int, run: Callable[..., None], *given: object, fresh: bool = False, **more: str) -> list[Process]:
    """Processes with the variables that torchrun sets."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more for rank in range(world)]
    return [Process(run, *given, fresh=fresh, **variables) for variables in ranks]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes and one found."""
    out = tmp_path_factory.mktemp("ranks")
    for kind in tiny_pair.KINDS:
        tiny_pair.write(kind, out / kind)
    write_answers(out / "answers", 8)
    pair = launch(2, two_ranks.main, out, SCENES)
    try:
        two_ranks.main(out, CONTROLS)  # which waits for what the others save, and they for this
    finally:
        ended = [process.ended(180) for process in pair]
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    return out


def told(played: Path, scene: str, world: int, rank: int) -> dict[str, Any]:
    return json.loads((played / f"{scene}.{world}.{rank}.json").read_text())


def weights(played: Path, scene: str, world: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(played / f"{scene}.{world}.{rank}.safetensors")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# ----- who draws what


@settings(deadline=None)
@given(world=st.integers(1, 6), parts=st.integers(1, 4), each=st.integers(1, 4), rows=st.integers(1, 3))
def test_groups_are_shared_out_whole_and_come_back_in_order(world: int, parts: int, each: int, rows: int) -> None:
    """Every item in exactly one share; each part of a step the same set whatever the number of ranks."""
    groups = list(range(world * parts * each))
    ranks = [Ranks(rank, world) for rank in range(world)]
    shares = [r.share(groups, parts) for r in ranks]
    assert sorted(g for share in shares for g in share) == groups
    assert ranks[0].joined(shares, parts) == groups
    for part in range(parts):
        together = {g for share in shares for g in share[part * each : (part + 1) * each]}
        assert together == set(groups[part * world * each : (part + 1) * world * each])
    episodes = [(g, row) for g in groups for row in range(rows)]
    own = [r.share(episodes, parts) for r in ranks]
    assert [[g for g, row in share if row == 0] for share in own] == shares, "a group was split"
    assert ranks[0].joined(own, parts) == episodes


@settings(deadline=None)
@given(count=st.integers(0, 20), world=st.integers(1, 6))
def test_stretches_follow_each_other(count: int, world: int) -> None:
    stretches = [Ranks(rank, world).stretch(range(count)) for rank in range(world)]
    assert [k for own in stretches for k in own] == list(range(count))
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=5), more=st.integers(0, 6))
def test_parts_are_split_up_without_losing_an_episode(sizes: list[int], more: int) -> None:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parts = [list(range(at, at + n)) for at, n in zip(starts, sizes, strict=True)]
    count = min(len(parts) + more, sum(sizes))
    found = split_up(parts, count)
    assert len(found) == count
    assert [k for part in found for k in part] == list(range(sum(sizes)))
    assert all(found)


def test_what_cannot_be_shared_out_is_refused_with_what_can() -> None:
    Ranks(0, 4).refuse_uneven(32, 2)
    with pytest.raises(UsageError, match=r"prompts_per_step=12 .* 4 ranks x train.minibatches=2 .* give 8 or 16"):
        Ranks(0, 4).refuse_uneven(12, 2)
    with pytest.raises(UsageError, match="give 8,"):
        Ranks(0, 4).refuse_uneven(2, 2)


def test_alone_nothing_is_changed_or_started() -> None:
    ALONE.refuse_uneven(5, 1)
    content = {"a": (1, 2)}
    assert ALONE.gather(content)[0] is content
    assert ALONE.share([3, 1, 2], 3) == ALONE.joined([[3, 1, 2]], 3) == [3, 1, 2]
    with ALONE.together():
        assert ALONE.any(True) and ALONE.most(7) == 7
    assert not torch.distributed.is_initialized()


def test_what_a_launcher_says_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="torchrun"):
        launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="RANK=2 of WORLD_SIZE=2"):
        launched()


@pytest.mark.parametrize(
    ("rank", "missing"), [(0, "ranks 1, 2 of 3"), pytest.param(1, "rank 0 of 3", marks=pytest.mark.long)]
)
def test_waiting_for_ranks_that_do_not_come_is_said_and_ends(rank: int, missing: str) -> None:
    """Without a launcher that notices: a line within seconds, and an end by itself."""
    port = str(free_port())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "RANK": str(rank)}
    began = time.monotonic()
    waiting = Process(command_line, "train", "--reward", "geneval", UNIGRPO_JOIN_TIMEOUT="0.5", **address)
    code, _, errors = waiting.ended()
    assert time.monotonic() - began < 100
    lines = [line for line in errors.splitlines() if "waiting" in line]
    assert lines[0] == f"rank {rank} is waiting for {missing} at 127.0.0.1:{port}, for up to 0.5 s"
    assert f"error: rank {rank} gave up after 0.5 s of waiting for {missing}" in lines[1]
    assert (code, len(lines)) == (2, 2)


def test_an_address_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    for port in ("", "http", "70000"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UsageError, match="MASTER_PORT"):
            address()


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number on the machine, or the only one that a scheduler shows each task."""
    assert [gpu_index(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(local, 1) for local in range(4)] == [0, 0, 0, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_of_rank(1) == torch.device("cuda", 0)
    monkeypatch.setattr(join, "_shared", ["ranks 0, 1 share one GPU of this machine"])
    with pytest.raises(UsageError, match=r"ranks 0, 1 share one GPU .* give device=cpu"):
        gpu_of_rank(1)
    monkeypatch.setattr(join, "_shared", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="rank 2 of this machine has no GPU: it shows 2 GPUs"):
        gpu_of_rank(2)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (["a", "u0", None, 0], True),
        (["b", "u0", None, 0], False),  # another machine
        (["a", "u1", None, 0], False),  # the scheduler shows each task its own
        (["a", "u0", "0", 0], True),  # one device by two lists
        (["a", "u0", None, 1], False),  # a driver that gives all devices one uuid
        (None, False),
    ],
)
def test_ranks_that_share_a_gpu(other: list | None, shared: bool) -> None:
    assert share_gpu(["a", "u0", None, 0], other) is shared


# ----- two are one


@pytest.mark.parametrize("scene", SCENES[:4])
def test_two_ranks_learn_what_one_process_does(played: Path, scene: str) -> None:
    """The same episodes, advantages and, to the rounding of sums, the same weights; to the bit on both ranks."""
    one = told(played, scene, 1, 0)["steps"]
    two = [told(played, scene, 2, rank)["steps"] for rank in range(2)]
    for k in range(len(one)):
        assert [two[rank][k]["prompts"] for rank in range(2)] == [["a", "c"], ["b", "d"]]
        for key in ("texts", "advantages", "scores"):
            whole = Ranks(0, 2).joined([two[rank][k][key] for rank in range(2)], 2)
            assert whole == (one[k][key] if key == "texts" else pytest.approx(one[k][key], abs=1e-4)), key
        assert two[0][k]["metrics"] == two[1][k]["metrics"]
        for name, value in one[k]["metrics"].items():
            if not name.startswith(("seconds/", "memory/")):
                assert two[0][k]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
    first, second = weights(played, scene, 2, 0), weights(played, scene, 2, 1)
    assert apart(first, second) == 0
    assert 0 < apart(first, weights(played, scene, 1)) < TOLERANCE
    advantages = [value for step in one for value in step["advantages"]]
    assert sum(map(bool, advantages)) > 0.6 * len(advantages), "there was little to learn"


def test_sharded_weights_compute_what_whole_ones_do(played: Path) -> None:
    """In bf16 with recomputed layers and one frozen expert: the same two ranks to the bit, sharded or not."""
    assert apart(weights(played, "checkpointed", 2), weights(played, "whole_control", 2)) == 0
    kinds = {str(value.dtype) for value in weights(played, "checkpointed", 2).values()}
    assert kinds == {"torch.float32", "torch.bfloat16"}


def test_the_first_rank_may_judge_for_all(played: Path) -> None:
    """The same weights to the bit; the other rank set nothing up and asked nobody."""
    assert apart(weights(played, "judged_on_first", 2), weights(played, "lora", 2)) == 0
    found = [told(played, "judged_on_first", 2, rank) for rank in range(2)]
    assert [f["asked"] for f in found] == [2 * 4 * STEPS, 0]
    assert [told(played, "lora", 2, rank)["asked"] for rank in range(2)] == [4 * STEPS, 4 * STEPS]


def test_an_update_refused_on_one_rank_is_refused_on_both(played: Path) -> None:
    for rank in range(2):
        skipped = [step["skipped"] for step in told(played, "refused", 2, rank)["steps"]]
        assert skipped[1] is None
        assert skipped[0].startswith("update 2 of 2: rank 1: the loss is nan")
    assert apart(weights(played, "refused", 2, 0), weights(played, "refused", 2, 1)) == 0


def test_texts_of_other_lengths_hold_nobody_up(played: Path) -> None:
    """With sharded weights one rank writes one word per text, the other 12."""
    for rank in range(2):
        metrics = [step["metrics"] for step in told(played, "uneven_texts", 2, rank)["steps"]]
        assert [m["text/length"] for m in metrics] == [(1 + 12) / 2]
        assert [m["text/truncated"] for m in metrics] == [1 / 2]


def test_a_judge_that_fails_on_one_rank_fails_on_both(played: Path) -> None:
    """As the same kind of error, at the same place: so both can still save the step before it."""
    for rank in range(2):
        found = told(played, "failing_judge", 2, rank)
        assert found["everywhere"] and found["error"].startswith("rank 1: reward 'bright'")
        assert "judge is down" in found["error"]


def test_episodes_that_stop_on_one_rank_alone_are_refused_where_weights_are_sharded(played: Path) -> None:
    for rank in range(2):
        assert "give ranks.weights=whole" in told(played, "uneven_program", 2, rank)["error"]


def test_two_ranks_imitate_what_one_process_does(played: Path) -> None:
    """Each answer on one rank, the losses of all of them, and the same weights."""
    alone, first, second = (told(played, "imitated", world, rank) for world, rank in ((1, 0), (2, 0), (2, 1)))
    for one, a, b in zip(alone["steps"], first["steps"], second["steps"], strict=True):
        assert sorted(a["own"] + b["own"]) == sorted(one["own"])
        for name in ("sft/text_loss", "sft/image_loss", "image/grad_norm"):
            assert a["metrics"][name] == b["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5)
    assert apart(weights(played, "imitated", 2), weights(played, "imitated", 1)) < TOLERANCE
    assert apart(weights(played, "imitated", 2, 0), weights(played, "imitated", 2, 1)) == 0


def test_abstentions_are_counted_over_all_ranks(played: Path) -> None:
    """A quarter of all, which may be, is half of one rank's: no rank stops, and each knows of all."""
    alone = told(played, "abstaining_judge", 1, 0)["abstained"]
    assert sum(alone) * 4 == len(alone) == 8
    for rank in range(2):
        assert told(played, "abstaining_judge", 2, rank)["abstained"] == alone


def leave() -> None:
    """Join a group and leave it."""
    torch.set_num_threads(2 + int(os.environ["RANK"]))
    with join.join_ranks() as ranks:
        ranks.wait()
        from torch import _dynamo  # noqa: F401  with it comes torch.distributed.nn

        print("inside", group_threads() > 0, torch.get_num_threads())
    print("left", group_threads())


def group_threads() -> int:
    return sum("gloo" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads of libraries are read from /proc")
@pytest.mark.long
def test_no_thread_of_the_group_outlives_it() -> None:
    """One that asks for Python while the process ends aborts it: seen once, in an evaluation by two.

    Ranks that start with 2 and 3 torch threads both compute with 2, else they make different numbers of collectives.
    """
    for process in launch(2, leave, fresh=True):
        code, output, errors = process.ended()
        assert (code, output.split("\n")[:2]) == (0, ["inside True 2", "left 0"]), errors


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("sharded", "ema.safetensors"),
        ("lora", "adapter_model.safetensors"),
        pytest.param("pair_full", "transformer/diffusion_pytorch_model.safetensors", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_goes_on_under_another_number_of_ranks(played: Path, what: str, file: str) -> None:
    """Two ranks' checkpoint in one process and the other way round: files of the same names and tensors."""
    for written, resumed in ((2, 1), (1, 2)):
        assert told(played, f"restored_{what}", resumed, 0)["step"] == STEPS
        went_on = weights(played, f"restored_{what}", resumed)
        assert apart(went_on, weights(played, what, written)) < TOLERANCE
    assert apart(weights(played, what, 2, 0), weights(played, what, 2, 1)) == 0
    assert told(played, what, 2, 0)["sharded"] == (what != "lora")
    one, two = (played / f"{what}.{world}" for world in (1, 2))
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(two) for p in two.rglob("*"))
    for name in ("optimizer.safetensors", file):
        a, b = load_file(one / name), load_file(two / name)
        assert {n: (x.shape, x.dtype) for n, x in a.items()} == {n: (x.shape, x.dtype) for n, x in b.items()}
    assert json.loads((one / "state.json").read_text())["step"] == STEPS - 1


@patch.dict(PAINTERS, {two_ranks.PADDED.pipeline: two_ranks.PADDED})
@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_of_a_pair_holds_the_weights_that_are_planned(played: Path, world: int) -> None:
    """And whole ones are what one process learns."""
    config = load_config(overrides=["train.finetune=full", "dtype=float32"])
    work = workload(MODELS.sizes(str(played / "flux2-klein"))[1], config, world=world)
    planned = [i.bytes for i in training_memory(work).always if i.name.endswith("weights") or i.name == "reference"]
    assert told(played, "pair_full", world, 0)["held"] == sum(planned)
    names = [i.name for phase in training_memory(work).phases for i in phase.items]
    assert ("gathered weights" in names) == ("gathered matrices" in names) == (world == 2)
    for rank in range(world):
        assert apart(weights(played, "pair_full", world, rank), weights(played, "pair_full", 1)) < TOLERANCE
