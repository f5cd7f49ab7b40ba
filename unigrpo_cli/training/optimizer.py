"""What is trained and at what rate: adapters or all weights, one learning rate per expert."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.config import ALSO, LAYERS
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.sharding import fp32_masters, shard
from unigrpo_cli.parallel.ranks import ALONE, Ranks


def prepare_policy(policy: MoTPolicy, config: Config, ranks: Ranks = ALONE) -> MoTPolicy:
    """Choose what is trained and keep the reference: adapters, or a frozen copy of the starting weights.

    What is trained is kept in fp32, whatever the network computes in: updates of the sizes used here are lost to
    bf16's rounding. Over several ranks the layers of full tuning are sharded, policy and reference, where
    `ranks.weights` says so.
    """
    t, network = config.train, policy.network
    sharded = shards(config, ranks)
    _refuse_what_cannot_learn(config, network)
    network.activation_checkpointing = t.activation_checkpointing
    if t.finetune == "lora":
        from unigrpo_cli.models.lora import add_adapters, has_adapters

        if not has_adapters(network):
            add_adapters(network, t.lora_rank, t.lora_alpha, derive(config.seed, "adapters"))
        else:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_("lora_" in name)
    else:
        wanted = (LAYERS, *(prefix for name in t.extra_modules for prefix in ALSO[name]))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(wanted))
    if t.experts != "both":
        other = "image" if t.experts == "text" else "text"
        for parameter in policy.trainable()[other]:
            parameter.requires_grad_(False)
    if t.finetune == "full":
        policy = policy.with_frozen_copy(on_host=t.reference_device == "host")
        if sharded:
            assert policy.frozen is not None
            shard(policy.frozen, ranks.world)
            shard(network, ranks.world)
        fp32_masters(network)
    return policy


def shards(config: Config, ranks: Ranks) -> bool:
    """Whether weights are shared out over ranks.

    Raises:
        UsageError: when they shall be, but cannot.
    """
    t, chosen = config.train, config.ranks.weights
    if ranks.alone or chosen == "whole" or (chosen == "auto" and t.finetune == "lora"):
        return False
    if t.finetune == "lora":
        raise UsageError(
            "ranks.weights=shard is for train.finetune=full; leave it out: adapters are whole on every rank"
        )
    if t.reference_device == "host":
        raise UsageError(
            "train.reference_device=host is for whole weights; leave it out, for the reference is sharded too, or give "
            "ranks.weights=whole"
        )
    return True


def _refuse_what_cannot_learn(config: Config, network: MoT) -> None:
    """Settings that would end in an error after the first rollout, or in a run that moves nothing."""
    t, o = config.train, config.objective
    writes = config.sampling.think and o.text_weight > 0 and t.experts != "image"
    paints = o.image_weight > 0 and t.experts != "text"
    if not (writes or paints):
        raise UsageError(
            f"nothing is trained: sampling.think={str(config.sampling.think).lower()}, train.experts={t.experts}, "
            f"objective.text_weight={o.text_weight:g}, objective.image_weight={o.image_weight:g}"
        )
    if writes and config.sampling.temperature == 0:
        raise UsageError("sampling.temperature=0 is greedy and leaves text nothing to learn from; give 1")
    if t.finetune == "full" and network.config.vision is None and {"connector", "vision"} & set(t.extra_modules):
        raise UsageError("train.extra_modules: this model has no vision tower and no connector to train")
    if t.finetune == "lora" and t.extra_modules:
        raise UsageError("train.extra_modules is for train.finetune=full; adapters are on attention and MLP only")


def make_optimizer(policy: MoTPolicy, config: Config) -> torch.optim.AdamW:
    """AdamW with groups per expert, each with its own learning rate; none has both sharded and whole weights."""
    t = config.train
    rates = {"text": t.lr_text, "image": t.lr_image}
    groups = []
    for expert, parameters in policy.trainable().items():
        for sharded in (False, True):
            own = [p for p in parameters if isinstance(p, DTensor) == sharded]
            if own:
                groups.append({"params": own, "lr": rates[expert], "full_lr": rates[expert], "expert": expert})
    return torch.optim.AdamW(groups, betas=t.betas, weight_decay=t.weight_decay)


def warmup(optimizer: torch.optim.Optimizer, config: Config) -> float:
    """Share of the full learning rate at the coming optimizer step."""
    done = max((int(s["step"]) for s in optimizer.state.values()), default=0)
    return min(1.0, (done + 1) / config.train.warmup) if config.train.warmup else 1.0
