"""The doctor in later rounds: sound programs pass, and each planted fault is found by its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests import small, test_doctor
from unigrpo_cli import replay, rollout
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.episode import Prompt
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.run.doctor import FAULT, Finding, examine

MonkeyPatch = pytest.MonkeyPatch
REFLECT = ["sampling.program=reflect", "sampling.rounds=2"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
PROMPTS = [replace(prompt, image=picture) for prompt, picture in zip(small.PROMPTS, PICTURES, strict=True)]


def faults(*settings: str, thorough: bool = False, prompts: list[Prompt] = PROMPTS) -> dict[str, Finding]:
    config, state = test_doctor._config(*settings), test_doctor._state(*settings)
    with test_doctor._rewards(test_doctor.mean) as rewards:
        found = examine(state, prompts, rewards, config, thorough=thorough)
    return {f.name: f for f in found if f.verdict == FAULT}


@pytest.mark.parametrize(
    "settings",
    [
        [*REFLECT, "sampling.stop_phrase=red", "sampling.max_new_tokens=12"],
        ["sampling.program=reflect", "sampling.rounds=3", "sampling.round_max_new_tokens=[6, 3]"],
        ["sampling.program=critique-edit", "sampling.rounds=2", "train.finetune=lora", "sampling.show_images=pixels"],
    ],
)
def test_a_sound_program_has_no_fault(settings: list[str]) -> None:
    prompts = PROMPTS if "edit" in settings[0] else small.PROMPTS
    found = faults(*settings, thorough="sampling.rounds=3" in settings, prompts=prompts)
    assert not found, {name: f.seen for name, f in found.items()}


def noise_shared_between_rounds(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "derive", lambda seed, *keys: seed if keys[0] == "round" else derive(seed, *keys))


def another_episodes_image_shown(monkeypatch: MonkeyPatch) -> None:
    show = MoTPolicy.show
    monkeypatch.setattr(MoTPolicy, "show", lambda policy, images, how: show(policy, images[1:] + images[:1], how))


def another_image_read_than_recorded(monkeypatch: MonkeyPatch) -> None:
    read = rollout.read_images
    monkeypatch.setattr(
        rollout, "read_images", lambda policy, context, images: read(policy, context, [*images[1:], images[0]])
    )


def scored_under_another_image(monkeypatch: MonkeyPatch) -> None:
    looked_at = replay._looked_at
    monkeypatch.setattr(replay, "_looked_at", lambda chunk, shown: looked_at(chunk, [*shown[1:], shown[0]]))


def scored_without_the_image(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_looked_at", lambda chunk, shown: chunk)


PLANTED = [
    (noise_shared_between_rounds, "group-noise", "image 2"),
    (another_episodes_image_shown, "looks", "not its latest"),
    (another_image_read_than_recorded, "tokens", "the network received the image"),
    (scored_under_another_image, "tokens", "replayed is the image"),
    (scored_without_the_image, "tokens", "replayed is"),
]


@pytest.mark.parametrize(("plant", "check", "seen"), PLANTED)
def test_a_fault_of_a_later_round_is_found(
    monkeypatch: MonkeyPatch, plant: Callable[[MonkeyPatch], None], check: str, seen: str
) -> None:
    plant(monkeypatch)
    found = faults(*REFLECT, prompts=small.PROMPTS)
    assert check in found, {name: f.seen for name, f in found.items()}
    assert seen in found[check].seen
