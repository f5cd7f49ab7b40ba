"""A training step that takes a tenth of a second: its settings, prompts, reward and state."""

from __future__ import annotations

from torch import Tensor

from tools.toy_model import build_model
from unigrpo_cli import reward
from unigrpo_cli.algo.objective import Actions, Loss, Objective, Scores, per_action, unigrpo_loss
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SETTINGS = (
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=4",
    "sampling.window_range=[0, 3]",
    "sampling.window_size=2",
    "train.prompts_per_step=2",
    "train.minibatches=2",
)
"""What a test file sets beside these follows them in its own list."""
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two blue stars")]


@reward("bright", range=(0, 255))
def bright(pixels):
    """Mean brightness, which differs from picture to picture."""
    return [float(p.mean()) for p in pixels]


def state_of(config: Config) -> TrainState:
    """An untrained network of 2 layers of width 32, prepared as a run prepares it."""
    policy = prepare_policy(build_model(seed=3, width=32, layers=2), config)
    return TrainState(policy, make_optimizer(policy, config))


def terminal_loss(
    actions: Actions,
    new: Scores,
    old: Scores,
    reference: Scores | None,
    advantage_B: Tensor,
    objective: Objective,
    *,
    episodes: int,
) -> Loss:
    """`unigrpo_loss` with the same advantage for all actions of an episode."""
    numbers = [*actions.segment_BL.flatten().tolist(), *(i.segment for i in actions.images)]
    advantage_BS = advantage_B[:, None].expand(-1, 1 + max(numbers))
    return unigrpo_loss(actions, new, old, reference, per_action(advantage_BS, actions), objective, episodes=episodes)
