"""Batches at the same time equal batches one after another; workers with deadlines; out-of-memory errors."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import small
from tests.test_training_step import PROMPTS, SETTINGS
from tools.toy_model import build_model
from unigrpo_cli import RewardContext, reward, train
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.errors import TooLargeError
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.policy import Policy
from unigrpo_cli.parallel.out_of_memory import halve_until_it_fits, is_out_of_memory, out_of_memory_hint
from unigrpo_cli.parallel.workers import Worker, parallel_map, sequential, worker_count
from unigrpo_cli.rewards.batch import RewardBatch
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.rollout import Sampling, rollout
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _batch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_parts_run_at_the_same_time_and_come_in_order(four_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def meet(part: int) -> tuple[int, int, bool]:
        meeting.wait()  # breaks unless two are here
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = list(parallel_map(meet, range(6), 2))
    assert found == [(part, 2, False) for part in range(6)]
    assert torch.get_num_threads() == 4
    assert not _batch_threads()


def test_one_at_a_time_runs_in_this_thread_when_asked_for() -> None:
    begun: list[int] = []
    results = parallel_map(lambda part: begun.append(part) or threading.current_thread(), range(3), 1)
    assert next(results) is threading.current_thread()
    assert begun == [0]


def test_the_first_failure_is_raised_and_what_has_not_begun_is_left_out() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(part: int) -> int:
        begun.append(part)
        if part == 1:
            raise ValueError("part 1")
        time.sleep(0.2 if part else 0)
        ended.append(part)
        return part

    results = parallel_map(work, range(100), 2)
    assert next(results) == 0
    with pytest.raises(ValueError, match="part 1"):
        next(results)
    assert len(begun) < 6
    assert sorted([*ended, 1]) == sorted(begun), "what runs is waited for"
    assert not _batch_threads()


def test_results_are_not_kept() -> None:
    """Gradients, say: those that wait to be asked for, the one in use, and no others."""

    class Held:
        pass

    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def work(part: int) -> Held:
        alive.add(found := Held())
        return found

    for _ in parallel_map(work, range(20), 2):
        time.sleep(0.01)
        assert len(alive) <= 4  # two that wait, the one here, the one of the round before until it is rebound


INTERRUPTED = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from unigrpo_cli.parallel.out_of_memory import halve_until_it_fits, is_out_of_memory, out_of_memory_hint
from unigrpo_cli.parallel.workers import parallel_map
torch.set_num_threads(2)
x = torch.randn(600, 600)
def work(part):
    if part == 0:
        print("begun", flush=True)
    for _ in range(30):
        x @ x
try:
    list(parallel_map(work, range(1000), 2))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_process_that_is_interrupted_amid_batches_ends_as_it_says() -> None:
    """And not by a crash of a thread that is still inside an operator."""
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, b"")


def test_how_many_at_once(four_threads: None) -> None:
    assert [worker_count(n, CPU) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]
    assert worker_count(9, torch.device("cuda")) == 1
    with sequential():
        assert worker_count(9, CPU) == 1
    assert worker_count(9, CPU) == 4


# ----- a worker with deadlines


def test_a_worker_runs_calls_in_order_and_hands_back_results_and_exceptions() -> None:
    worker, seen = Worker("w"), []
    calls = [worker.submit(lambda k=k: seen.append(k) or k) for k in range(3)]
    failing = worker.submit(lambda: sys.exit(3))
    assert [worker.wait(call, 5) for call in calls] == [None] * 3
    assert [call.result() for call in calls] == seen == [0, 1, 2]
    assert isinstance(worker.wait(failing, 5), SystemExit)
    assert not worker.hung
    worker.close()
    assert worker._thread is not None and not worker._thread.is_alive()


def test_a_call_that_raises_a_timeout_of_its_own_is_not_a_hung_worker() -> None:
    worker, error = Worker("w"), TimeoutError("the server is slow")

    def raise_it() -> None:
        raise error

    assert worker.wait(worker.submit(raise_it), 5) is error
    assert not worker.hung
    worker.close()


def test_a_hung_call_is_abandoned_and_queued_ones_are_cancelled() -> None:
    worker, release = Worker("w"), threading.Event()
    stuck, queued = worker.submit(release.wait), worker.submit(lambda: 1)
    with pytest.raises(TimeoutError):
        worker.wait(stuck, 0.05)
    assert worker.hung
    worker.cancel_queued()
    assert queued.cancelled()
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 0.5, "a hung worker is not waited for"
    release.set()


# ----- out of memory

ALLOCATORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtMatmul(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("NCCL Error 1: unhandled cuda error. Last error:\nFailed to CUDA calloc async 608 bytes"),
    RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed.\nCuda failure 2 'out of memory'"),
]


@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda error: (str(error) or "MemoryError")[:30])
def test_out_of_memory_errors_name_the_setting(error: Exception) -> None:
    with (
        pytest.raises(TooLargeError, match=r"an update with train\.micro_batch_size=3: give \S+=1 "),
        out_of_memory_hint("an update", "train.micro_batch_size", 3),
    ):
        raise error
    with pytest.raises(TooLargeError, match="dtype=bfloat16"), out_of_memory_hint("an update", "x", 1):
        raise error


def test_other_errors_pass_unchanged() -> None:
    for error in (RuntimeError("CUBLAS_STATUS_INVALID_VALUE"), RuntimeError("an error of ours"), ValueError("memory")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), out_of_memory_hint("an update", "x", 3):
            raise error


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    tried: list[int] = []
    said: list[str] = []

    def run(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise TooLargeError("out of memory")
        return "done"

    assert halve_until_it_fits(run, 9, said.append) == "done"
    assert tried == [9, 4, 2]
    assert len(collected) == 2, "the failed attempt's tensors are freed before the next one"
    assert said[0] == "out of memory with a batch of 9: retrying with 4"

    def never(size: int) -> None:
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        halve_until_it_fits(never, 4, said.append)
    with pytest.raises(ZeroDivisionError):
        halve_until_it_fits(lambda size: 1 // 0, 4, said.append)


# ----- a training step


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("train.finetune=lora", "train.lora_rank=2"),
        pytest.param(("objective.text_kl=0.1",), marks=pytest.mark.long),
    ],
)
def test_a_step_is_the_same_to_the_bit_on_any_number_of_cores(settings: tuple[str, ...]) -> None:
    """Episodes, scores, metrics and weights after two updates; adapters are off for the reference alone."""
    own = ("train.minibatches=2", "train.micro_batch_size=2", "sampling.batch_size=4", "seed=5", *settings)
    config = load_config(overrides=[*SETTINGS, *own])
    left = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        state = small.state_of(config)
        with Scorer(parse_rewards(["contrast"]), _contrast(), RewardContext("cpu", 0, True, True)) as rewards:
            torch.set_num_threads(threads)
            try:
                for _ in range(2):  # in the second the reference is not the policy
                    step = train.training_step(state, PROMPTS, rewards, config, rescore=True)
                    state.step += 1
            finally:
                torch.set_num_threads(before)
        metrics = {k: v for k, v in step.metrics.items() if not k.startswith(("seconds/", "memory/"))}
        assert metrics["image/velocity-mse"] > 0
        left.append((metrics, {n: p.detach().clone() for n, p in state.policy.network.named_parameters()}))
    for metrics, weights in left[1:]:
        assert metrics == left[0][0]
        assert all(torch.equal(weights[n], p) for n, p in left[0][1].items())


@pytest.mark.parametrize("threads", [pytest.param(2, marks=pytest.mark.long), 4])
def test_the_first_ratio_is_one_on_any_number_of_cores(threads: int) -> None:
    """Old and new scores of an update have equally many threads: with others three rows are rounded otherwise."""
    own = ("train.minibatches=2", "train.group_size=3", "train.micro_batch_size=3")
    config = load_config(preset="embedded", overrides=["train.prompts_per_step=2", "sampling.batch_size=6", *own])
    policy = prepare_policy(build_model(seed=3, width=128, layers=6), config)
    state = TrainState(policy, make_optimizer(policy, config))
    with Scorer(parse_rewards(["contrast"]), _contrast(), RewardContext("cpu", 0, True, True)) as rewards:
        torch.set_num_threads(threads)
        step = train.training_step(state, PROMPTS, rewards, config, rescore=True)
    assert step.metrics["image/first_max_abs_log_ratio"] == step.metrics["text/first_max_abs_log_ratio"] == 0


def _contrast() -> Plugins:
    @reward("contrast")
    def contrast(pixels):
        return [float(picture.std()) for picture in pixels]

    plugins = Plugins()
    plugins.rewards.add("contrast", contrast)
    return plugins


def test_a_rollout_tells_of_its_batches_in_order(four_threads: None) -> None:
    config = load_config(overrides=[*SETTINGS, "sampling.batch_size=3"])
    told: list[str] = []
    groups = rollout(
        build_model(seed=3, width=32, layers=2),
        PROMPTS,
        6,
        replace(train_sampling(config), batch_size=3),
        train.window_of(config, 0),
        0,
        on_episodes=lambda drawn: told.extend(f"{e.prompt.id}{e.member}" for e in drawn),
    )
    assert told == [f"{e.prompt.id}{e.member}" for e in flatten(groups)]


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_tapers_its_rollout_where_a_reward_begins_early(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        range = (0.0, 255.0)
        concurrency = int(waits)

        def __init__(self, _options: object):
            pass

        def score(self, batch: RewardBatch) -> list[float]:
            return [float(picture.mean()) for picture in batch.pixels]

    plugins, asked = Plugins(), []
    plugins.rewards.add("elsewhere", Elsewhere)
    own = train.rollout

    def watched(policy: Policy, prompts: Sequence[Prompt], members: int, sampling: Sampling, *rest: Any, **more: Any):
        asked.append(sampling.tapered)
        return own(policy, prompts, members, sampling, *rest, **more)

    monkeypatch.setattr(train, "rollout", watched)
    config = load_config(overrides=[*SETTINGS])
    with Scorer(parse_rewards(["elsewhere"]), plugins, RewardContext("cpu", 0, True, True)) as rewards:
        train.training_step(small.state_of(config), PROMPTS, rewards, config)
    assert asked == [waits]


def test_tapered_rollouts_end_in_halves() -> None:
    """Little is left to judge then; the episodes are the same."""
    config = load_config(overrides=[*SETTINGS])
    drawn = {}
    for tapered, expected in ((False, [5, 5, 5, 5, 4]), (True, [5, 5, 5, 3, 2, 2, 2])):
        sizes: list[int] = []
        sampling = replace(train_sampling(config), batch_size=5, tapered=tapered)
        policy = build_model(seed=3, width=32, layers=2)
        groups = rollout(policy, PROMPTS, 24 // len(PROMPTS), sampling, train.window_of(config, 0), 0, sizes.append)
        assert sizes == expected
        drawn[tapered] = flatten(groups)
    for a, b in zip(*drawn.values(), strict=True):
        assert (a.prompt, a.member, a.reasoning) == (b.prompt, b.member, b.reasoning)
        torch.testing.assert_close(a.images[-1].latent, b.images[-1].latent, rtol=0, atol=1e-4)
