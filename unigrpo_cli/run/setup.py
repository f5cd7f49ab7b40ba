"""From configuration to live objects: device, plugins, rewards, policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import NotFetchedError, UsageError, WeightsError
from unigrpo_cli.io.atomic import SUMS, verify_checksums
from unigrpo_cli.models.family import MODELS, family_options
from unigrpo_cli.models.hub import EMBEDDED
from unigrpo_cli.models.policy import Policy, TrainablePolicy
from unigrpo_cli.parallel.join import gpu_of_rank
from unigrpo_cli.parallel.launch import launched
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec, parse_rewards
from unigrpo_cli.run.checkpoint import MOMENTS, STATE, missing_part, newest_checkpoint, read_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")


def device_of(config: Config, *, planned: bool = False) -> torch.device:
    """The device of a configuration.

    Args:
        planned: only its memory is asked for, so several processes need not be told apart.
    """
    if config.device.partition(":")[0] not in ("auto", *DEVICES):
        raise UsageError(f"device={config.device}: supported are cpu and cuda (NVIDIA); give device=cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    choose_attention(config.attention)
    _, world, here = launched()
    if world > 1 and not planned:
        return _device_of_rank(config, here)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {config.device!r} cannot be used ({reason}); try device=cpu") from error
    return device


def choose_attention(name: str) -> None:
    """Allow one of torch's fused attention kernels on a GPU, or with `auto` all but cuDNN's.

    Torch prefers cuDNN in bf16 on Hopper. It makes a plan for each shape, so decoding, where keys grow by one per
    token, would plan for every token. The unfused kernel stays allowed: some masks fit no fused one.
    """
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(name in ("auto", "flash"))
    cuda.enable_mem_efficient_sdp(name in ("auto", "efficient"))
    cuda.enable_cudnn_sdp(name == "cudnn")
    cuda.enable_math_sdp(True)


def _device_of_rank(config: Config, here: int) -> torch.device:
    if not torch.distributed.is_initialized():
        raise UsageError("only train, eval and rollout run in several processes; start this without a launcher")
    if ":" in config.device:
        raise UsageError(f"device={config.device} is one for all ranks; give device=cuda, and each takes its own")
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return gpu_of_rank(here)


def model_of(config: Config, fetch: bool = True) -> str:
    """The name of the configured model; with `weights_file` the path of that file.

    Raises:
        WeightsError: when there is no such file; NotFetchedError without `fetch`, for a model of the hub.
    """
    if config.weights_file is None:
        return config.model
    directory = MODELS.find(config.model, fetch).directory
    path = directory / config.weights_file
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in directory.glob("*.safetensors"))) or "none"
        raise WeightsError(f"no weights file {config.weights_file} in {directory}; it has {others}")
    return str(path)


def model_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """What a model brings: its run's sampling, or for a BAGEL the paper's preset at its size, in bf16.

    Args:
        given: what was asked for, of which `model`, `weights_file` and `adapter` are looked at. An adapter of a run
            brings that run's sampling.
    """
    model, adapter = str(given.get("model", EMBEDDED)), given.get("adapter")
    for path in [Path(p) for p in (adapter, model) if isinstance(p, str)]:
        for directory in (path, *path.absolute().parents[1:2]):
            if os.path.isdir(directory / "checkpoints") and os.path.isfile(directory / "config.toml"):
                own = load_config(file=directory / "config.toml", whole=True)
                drawn = own.sampling.model_dump(exclude={"batch_size", "compile"})  # those are the machine's
                found = {"preset": own.preset, "dtype": own.dtype, "sampling": drawn}
                if own.sampling.guidance_text > 1:
                    guided = ("guidance_interval", "guidance_renorm", "guidance_renorm_min")
                    found["eval"] = own.eval.model_dump(include=set(guided))
                return found | ({"model_options": own.model_options} if own.model_options else {})
    if model == EMBEDDED:
        return {}
    try:
        family, sizes, _ = MODELS.sizes(find_checkpoint(model)[0], given.get("weights_file"), fetch=False)
    except NotFetchedError:
        return MODELS.families()[0].defaults(None)
    except (WeightsError, UsageError):
        return {}  # loading says what is wrong
    return family.defaults(sizes)


def find_checkpoint(path: str) -> tuple[str, str | None]:
    """Model and adapter behind a name: a model, a checkpoint, or a run (then its newest complete checkpoint).

    Paths come back absolute, so that what is written down stays true elsewhere.
    """
    directory = Path(os.path.abspath(path))  # links stay: the hub's cache links names to files that have none
    if path == EMBEDDED or os.path.isfile(directory):  # os.path: a name that no system takes is only not there
        return (path if path == EMBEDDED else str(directory)), None
    if os.path.isdir(directory / "checkpoints"):
        directory = newest_checkpoint(directory)
    if os.path.isfile(directory / STATE):
        content = read_state(directory)
        lacking = missing_part(directory)
        if lacking is not None:
            raise WeightsError(f"{directory} is not complete: {lacking}; take another checkpoint of that run")
        if content.finetune == "lora":
            return content.base, str(directory)
    return str(directory) if os.path.isdir(directory) else path, None


def find_adapter(path: str) -> str:
    """The adapter directory behind a name: that directory, or a run's newest complete checkpoint."""
    directory = Path(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise WeightsError(f"no adapter directory {path}: give a run, a checkpoint or a PEFT adapter")
    if os.path.isdir(directory / "checkpoints"):
        directory = newest_checkpoint(directory)
    if os.path.isfile(directory / STATE) and find_checkpoint(str(directory))[1] is None:
        raise WeightsError(f"{path} holds all weights of a model, not an adapter: give it with --model")
    return str(directory)


def refuse_changed(directory: Path) -> None:
    """Verify a run's checkpoint against its checksums; the optimizer's file is verified when a run resumes."""
    if os.path.isfile(directory / STATE) and os.path.isfile(directory / SUMS):
        found = verify_checksums(directory, skip=(MOMENTS,))
        if found is not None:
            raise WeightsError(f"{directory}: {found}; take another checkpoint of that run")


def load_policy(
    model: str, adapter: str | None, config: Config, warn: Callable[[str], None] = lambda line: None
) -> TrainablePolicy:
    """A policy ready for sampling, its weights frozen. A run's checkpoint is verified first."""
    found, own_adapter = find_checkpoint(model)
    family, directory, weights_file = MODELS.find(found)
    adapters = [Path(own_adapter)] if own_adapter is not None else []
    if adapter is not None:
        adapters.append(Path(find_adapter(adapter)))
    for place in (directory, *adapters):
        refuse_changed(place)
    policy = family.load(
        directory,
        weights_file,
        device=device_of(config),
        dtype=DTYPES[config.dtype],
        vae_tile_rows=config.sampling.vae_tile_rows,
        **family_options(family, config.model_options),
    )
    for place in adapters:
        if policy.adapter is not None:
            raise WeightsError(f"{model} has an adapter of its own; --adapter {adapter} cannot be added")
        policy.load_adapter(place)
        if policy.adapter is not None and policy.adapter.idle:
            warn(f"adapter {place} changes nothing (its lora_B is zero, or its alpha is 0): the base model samples")
    check_images(policy, config)
    return policy


def check_images(policy: Policy, config: Config) -> None:
    """Refuse an image size that the model cannot paint, and looks at its images that it cannot take."""
    s = config.sampling
    try:
        policy.grid(s.height, s.width)
    except ValueError as error:
        raise UsageError(f"sampling.height, sampling.width: {error}") from error
    if s.rounds > 1:
        try:
            policy.show([], s.show_images)
        except UsageError as error:
            raise UsageError(f"sampling.rounds={s.rounds}, sampling.show_images={s.show_images}: {error}") from error


def is_embedded(policy: Policy) -> bool:
    """Whether a policy speaks the words of the shapes world, i.e. is the embedded model or grown from it."""
    from unigrpo_cli.toy.world import CELLS

    return all(policy.has_token(cell) for cell in CELLS)


def warn_of_unknown_words(policy: Policy, prompts: Sequence[Prompt], warn: Callable[[str], None]) -> None:
    unknown = sorted({word for prompt in prompts for word in policy.unknown_words(prompt.text)})
    if unknown:
        more = " ..." if len(unknown) > 5 else ""
        warn(f"the model has no word for {', '.join(unknown[:5])}{more}; it cannot read them")


def reward_choices(config: Config) -> list[RewardSpec]:
    """The trained rewards, and those of evaluation alone, marked so. On given answers no reward is trained."""
    if config.sft.data:
        chosen = parse_rewards(config.reward.names, config.reward.options) if config.reward.names else []
        chosen = [replace(choice, weight=0.0, eval_only=True) for choice in chosen]
        return chosen + watched_choices(config, {c.alias for c in chosen})
    if not config.reward.names:
        raise UsageError("no reward is chosen: give --reward, e.g. --reward clip,geneval")
    trained = parse_rewards(config.reward.names, config.reward.options)
    if not any(choice.weight for choice in trained):
        raise UsageError("every reward has weight 0, so there is nothing to train on; give one a weight, name:1")
    return trained + watched_choices(config, {c.alias for c in trained})


def watched_choices(config: Config, taken: set[str]) -> list[RewardSpec]:
    """Rewards of `eval.rewards` that are not chosen already."""
    watched = parse_rewards(config.eval.rewards) if config.eval.rewards else []
    return [RewardSpec(c.alias, c.name, 0.0, c.options, eval_only=True) for c in watched if c.alias not in taken]


def check_prompts(rewards: Scorer, prompts: Sequence[Prompt], thinks: bool, split: str) -> None:
    """Refuse prompts that lack what a reward of the split needs; `thinks`: the policy writes reasoning."""
    rows, given = [p.metadata for p in prompts], all(p.image is not None for p in prompts)
    rewards.check_needs(rows, has_source=given, has_reasoning=thinks, split=split)


def open_rewards(
    choices: Sequence[RewardSpec], plugins: Plugins, config: Config, *, embedded: bool, ranks: Ranks = ALONE
) -> Scorer:
    """Set up rewards for a run: on each rank, or with `reward.scoring_rank = "first"` on the first alone."""
    context = RewardContext(
        device=str(device_of(config)),
        seed=config.seed,
        embedded=embedded,
        offline=os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    )
    r = config.reward
    limits = RewardLimits(r.timeout_s, r.setup_timeout_s, r.max_abstain, r.on_error, r.strict, r.offload)
    first_only = r.scoring_rank == "first" and not ranks.alone
    with ranks.together():
        local = ranks.first or not first_only
        rewards = Scorer(choices, plugins, context, limits, first_rank_only=first_only, local=local)
    if first_only:  # a served reward learns its range from the server
        rewards.set_ranges(ranks.from_first([loaded.range for loaded in rewards.rewards]))
    return rewards
