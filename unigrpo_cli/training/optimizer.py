"""What is trained and at what rate: adapters or all weights, one learning rate per expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unigrpo_cli.algo.objective import Advantages
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.policy import Finetune, Policy, TrainablePolicy
from unigrpo_cli.parallel.ranks import ALONE, Ranks, is_shared, local
from unigrpo_cli.training import update_guard
from unigrpo_cli.training.state import TrainState


def prepare_policy(policy: TrainablePolicy, config: Config, ranks: Ranks = ALONE) -> TrainablePolicy:
    """Choose what is trained and keep the reference: adapters, or a frozen copy of the starting weights.

    Over several ranks the layers of full fine-tuning are sharded, policy and reference, where `ranks.weights` says so.
    """
    t = config.train
    _refuse_what_cannot_learn(config)
    wanted = Finetune(
        full=t.finetune == "full",
        experts=("text", "image") if t.experts == "both" else (t.experts,),
        extra_modules=tuple(t.extra_modules),
        lora_rank=t.lora_rank,
        lora_alpha=t.lora_alpha,
        seed=derive(config.seed, "adapters"),
        activation_checkpointing=t.activation_checkpointing,
        reference_on_host=t.reference_device == "host",
        shard_over=ranks.world if shards(config, ranks) else 1,
    )
    prepared = policy.finetune(wanted)
    through_pictures = sorted({"connector", "vision"} & set(t.extra_modules))
    if through_pictures and not config.objective.grad_through_images:
        raise UsageError(
            f"train.extra_modules={through_pictures} learn through pictures alone: set "
            "objective.grad_through_images=true"
        )
    return prepared


def shards(config: Config, ranks: Ranks) -> bool:
    """Whether weights are shared out over ranks."""
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


def _refuse_what_cannot_learn(config: Config) -> None:
    """Settings that would end in an error after the first rollout, or in a run that moves nothing."""
    t, o = config.train, config.sft if config.sft.data else config.objective
    writes = (config.sampling.think or config.sft.data) and o.text_weight > 0 and t.experts != "image"
    paints = o.image_weight > 0 and t.experts != "text"
    if not (writes or paints):
        name = "sft" if config.sft.data else "objective"
        raise UsageError(
            f"nothing is trained: sampling.think={str(config.sampling.think).lower()}, train.experts={t.experts}, "
            f"{name}.text_weight={o.text_weight:g}, {name}.image_weight={o.image_weight:g}"
        )
    if writes and config.sampling.temperature == 0 and not config.sft.data:
        raise UsageError("sampling.temperature=0 is greedy and leaves text nothing to learn from; give 1")
    if t.finetune == "lora" and t.extra_modules:
        raise UsageError("train.extra_modules is for train.finetune=full; adapters are on attention and MLP only")


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """AdamW with groups per expert, each with its own learning rate; none has both sharded and whole weights."""
    t = config.train
    rates = {"text": t.lr_text, "image": t.lr_image}
    groups = []
    for expert, parameters in policy.trainable().items():
        for sharded in (False, True):
            own = [p for p in parameters if is_shared(p) == sharded]
            if own:
                groups.append({"params": own, "lr": rates[expert], "full_lr": rates[expert], "expert": expert})
    return torch.optim.AdamW(groups, betas=t.betas, weight_decay=t.weight_decay)


def optimizer_step(state: TrainState, config: Config, advantages: Sequence[Advantages]) -> dict[str, float]:
    """One AdamW step on the gradients of all ranks: refuse what is not sound, clip, step.

    Args:
        advantages: of the update's actions on this rank.

    Returns the gradient norm of each expert before clipping, and `grad_clipped`.

    Raises:
        RefusedUpdateError: when a gradient is not finite or explodes. No weight has changed then.
        DivergedError: when a weight is not finite afterwards.
    """
    ranks, trained, known = state.ranks, state.policy.trainable(), state.record.gradient_norms
    parameters = [p for expert in trained.values() for p in expert]
    ranks.sum_gradients(parameters)
    each = {expert: n for expert, own in trained.items() if len(n := ranks.gradient_norms(own))}
    total = torch.cat([*each.values(), *([] if each else [torch.zeros(1)])]).norm()
    taught = torch.stack([part.any() for a in advantages for part in (a.text_BL, *a.images)]).any().to(total)
    *own_norms, norm, flag = torch.stack([*(n.norm() for n in each.values()), total, taught]).tolist()
    norms = dict(zip(each, own_norms, strict=True))
    update_guard.check_gradient(norms, known, config.monitor.explosion)
    update_guard.remember_norms(norms, known, taught=ranks.any(bool(flag)))
    clip_gradients(parameters, total, config.train.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = group["full_lr"] * rate_factor(state.optimizer, config)
    state.between = True
    state.optimizer.step()
    with ranks.together():
        update_guard.check_weights([local(p) for p in parameters], state.step)
    found = {f"{expert}/grad_norm": value for expert, value in norms.items()}
    return found | {"grad_clipped": float(norm > config.train.grad_clip)}


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients whose norm over all weights and ranks is `norm` to one of at most `limit`."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def rate_factor(optimizer: torch.optim.Optimizer, config: Config) -> float:
    """Share of the full learning rate at the coming optimizer step: warm-up, then 1 / (1 + steps / lr_decay)."""
    done, t = max((int(s["step"]) for s in optimizer.state.values()), default=0), config.train
    rise = min(1.0, (done + 1) / t.warmup) if t.warmup else 1.0
    return rise / (1 + max(0, done - t.warmup) / t.lr_decay) if t.lr_decay else rise
