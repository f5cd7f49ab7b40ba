"""What is trained and at what rate: adapters or all weights, one learning rate per expert."""

from __future__ import annotations

import torch

from unigrpo_cli.config import Config
from unigrpo_cli.models.unified import UnifiedModel
from unigrpo_cli.seeds import derive

ALSO = {
    "embeddings": ("language_model.model.embed_tokens.",),
    "head": ("language_model.lm_head.",),
    "projections": ("vae2llm.", "llm2vae.", "time_embedder."),
}
"""What `train.also` may add to the layers when all weights are trained."""


def prepare_policy(policy: UnifiedModel, config: Config) -> UnifiedModel:
    """Choose what is trained and keep the reference: adapters, or a frozen copy of the starting weights."""
    t, network = config.train, policy.network
    network.activation_checkpointing = t.activation_checkpointing
    if t.tune == "lora":
        from unigrpo_cli.models.lora import add_adapters, has_adapters

        if not has_adapters(network):
            add_adapters(network, t.lora_rank, t.lora_alpha, derive(config.seed, "adapters"))
        else:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_("lora_" in name)
    else:
        policy = policy.with_frozen_copy()
        wanted = ("language_model.model.layers.", *(prefix for name in t.also for prefix in ALSO[name]))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(wanted))
    if t.experts != "both":
        other = "image" if t.experts == "text" else "text"
        for parameter in policy.trainable()[other]:
            parameter.requires_grad_(False)
    return policy


def make_optimizer(policy: UnifiedModel, config: Config) -> torch.optim.AdamW:
    """AdamW with one group per expert, each with its own learning rate."""
    t = config.train
    rates = {"text": t.lr_text, "image": t.lr_image}
    groups = [
        {"params": parameters, "lr": rates[expert], "full_lr": rates[expert], "expert": expert}
        for expert, parameters in policy.trainable().items()
        if parameters
    ]
    return torch.optim.AdamW(groups, betas=t.betas, weight_decay=t.weight_decay)


def warmup(optimizer: torch.optim.Optimizer, config: Config) -> float:
    """Share of the full learning rate at the coming optimizer step."""
    done = max((int(s["step"]) for s in optimizer.state.values()), default=0)
    return min(1.0, (done + 1) / config.train.warmup) if config.train.warmup else 1.0
