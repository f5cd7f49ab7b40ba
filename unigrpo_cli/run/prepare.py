"""Before the first step: batch sizes, policy, optimizer and reference.

`run/memory` needs `run/setup`, and this file needs both, so it is one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import NotFetchedError, UsageError, WeightsError, quoted
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.parallel.launch import launched
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.run.checkpoint import StateFile, read_state, restore_checkpoint
from unigrpo_cli.run.memory import left_open
from unigrpo_cli.run.memory.plan import Plan, describe_sizes, most_pictures, plan_of, refuse_too_large
from unigrpo_cli.run.resume import refuse_changes, with_kept_sizes
from unigrpo_cli.run.setup import find_adapter, find_checkpoint, load_policy, model_of
from unigrpo_cli.suites import training_prompts
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import Reference, TrainState


def plan(config: Config, checkpoint: Path | None) -> Plan:
    """The memory and time of a run, from the model's headers: reads no weights, sets up no reward, writes nothing."""
    rank, world, here = launched()
    Ranks(rank, world, here).refuse_uneven(config.train.prompts_per_step, config.train.minibatches)
    if checkpoint is not None:
        content = read_state(checkpoint)
        config = with_kept_sizes(content, config)
        refuse_changes(content, checkpoint, config)
    pictures = most_pictures(training_prompts(config.prompts))
    return plan_of(config, *_origin(config, checkpoint, fetch=False), elsewhere=True, pictures=pictures)


def with_sizes(
    config: Config,
    checkpoint: Path | None,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Config:
    """The configuration with numbers for the batch sizes that it leaves open: the largest that fit every rank."""
    if not left_open(config):
        return config
    with ranks.together():
        planned = plan_of(config, *_origin(config, checkpoint), pictures=most_pictures(prompts))
    every = ranks.gather(planned.sizes)
    sizes = {key: min(own[key] for own in every) for key in planned.sizes}
    say(describe_sizes(sizes, planned.available))
    return with_values(config, sizes)


def _origin(config: Config, checkpoint: Path | None, fetch: bool = True) -> tuple[str, str | None]:
    """The base model and its adapter: of a new run, or of a checkpoint."""
    if checkpoint is None:
        try:
            name = model_of(config, fetch)
        except NotFetchedError:
            name = config.model
        base, own_adapter = find_checkpoint(name)
        adapter = find_adapter(config.adapter) if config.adapter else own_adapter
        if adapter and config.train.finetune == "full":
            raise UsageError("train.finetune=full cannot start from an adapter; use --set train.finetune=lora")
        return base, adapter
    content = read_state(checkpoint)
    base = content.base
    if Path(base).is_absolute() and not Path(base).exists():  # it was moved: take it where it is now said to be
        base = find_checkpoint(model_of(config, fetch))[0]
    return base, str(checkpoint) if content.finetune == "lora" else None


def prepare(
    config: Config,
    checkpoint: Path | None,
    content: StateFile | None,
    warn: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> tuple[TrainState, Reference]:
    """State and reference, new or from a checkpoint. Refused when the plan of memory does not fit.

    The reference is always the base model, never the weights that a run is resumed from. With adapters it is the
    network without them, also when training starts from an adapter.
    """
    base, adapter = _origin(config, checkpoint)
    if MODELS.sizes(base)[1] is not None:  # a family need not state its sizes
        planned = plan_of(config, base, adapter)
        refuse_too_large(planned)
        if planned.free is not None and planned.available > planned.free:
            warn(f"memory_gb={config.memory_gb:g}, but there are only {planned.free:.1f} GiB")
    family, directory, weights_file = MODELS.find(base)
    reference = Reference(base, family.digest(directory, weights_file))
    if content is None or checkpoint is None:
        policy = load_policy(model_of(config), config.adapter, config, warn)
        _warn_of_rank(policy, config, warn)
        policy = prepare_policy(policy, config, ranks)
        return TrainState(policy, make_optimizer(policy, config), ranks=ranks), reference
    if reference.digest != content.reference:
        raise WeightsError(
            f"{base} does not hold the weights that this run started from, which are its reference; restore those of "
            f"{content.base} or start a new run from the checkpoint with --model {quoted(checkpoint)}"
        )
    policy = prepare_policy(load_policy(base, adapter, config), config, ranks)
    if adapter is None:
        policy.restore(checkpoint)
    state = TrainState(policy, make_optimizer(policy, config), ranks=ranks)
    restore_checkpoint(state, checkpoint, content)
    return state, reference


def _warn_of_rank(policy: TrainablePolicy, config: Config, warn: Callable[[str], None]) -> None:
    """An adapter that training starts from keeps its own rank."""
    own = policy.adapter
    if own is not None and (own.rank, own.alpha) != (config.train.lora_rank, config.train.lora_alpha):
        warn(
            f"the adapter has rank {own.rank} and alpha {own.alpha:g}, which stay; train.lora_rank and "
            "train.lora_alpha are for fresh adapters"
        )
