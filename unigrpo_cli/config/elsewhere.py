"""Words of TRL, diffusers, flow_grpo and transformers' Trainer, and what they are called here.

Near misses by spelling point a user of those tools to the wrong option; this table points to the right one.
"""

from __future__ import annotations

LEARNING_RATES = "train.lr_text and train.lr_image"
LOGS = "metrics.jsonl in the output directory, which holds the metrics of every step"
SETTINGS = {
    "lr": LEARNING_RATES,
    "learning_rate": LEARNING_RATES,
    "num_generations": "train.group_size",
    "num_image_per_prompt": "train.group_size",
    "num_samples_per_prompt": "train.group_size",
    "train_batch_size": "train.prompts_per_step",
    "per_device_train_batch_size": "train.prompts_per_step and train.micro_batch_size",
    "batch_size": "train.prompts_per_step, or sampling.batch_size for sampling alone",
    "gradient_accumulation_steps": "train.micro_batch_size (gradients accumulate over micro-batches)",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "num_iterations": "train.epochs",
    "num_inner_epochs": "train.epochs",
    "max_completion_length": "sampling.max_new_tokens",
    "max_length": "sampling.max_new_tokens",
    "epsilon": "objective.text_clip and objective.image_clip",
    "clip_range": "objective.text_clip and objective.image_clip",
    "cliprange": "objective.text_clip and objective.image_clip",
    "beta": "objective.text_kl for text and objective.penalty_weight for images",
    "kl_coef": "objective.text_kl for text and objective.penalty_weight for images",
    "scale_rewards": "advantage.normalize",
    "adv_clip_max": "advantage.clamp",
    "num_inference_steps": "sampling.steps for training and eval.steps for evaluation and `generate`",
    "num_steps": "sampling.steps for training and eval.steps for evaluation and `generate`",
    "guidance_scale": "eval.guidance_text",
    "cfg": "eval.guidance_text",
    "cfg_scale": "eval.guidance_text",
    "negative_prompt": "eval.guidance_text (guidance is against the context without the prompt)",
    "image_guidance_scale": "eval.guidance_image",
    "resolution": "sampling.height and sampling.width",
    "eta": "sampling.noise_level",
    "sde_window_size": "sampling.window_size",
    "sde_window_range": "sampling.window_range",
    "timestep_shift": "sampling.shift",
    "save_steps": "train.checkpoint_every",
    "save_freq": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "eval.every",
    "eval_freq": "eval.every",
    "use_lora": "train.finetune=lora",
    "use_peft": "train.finetune=lora",
    "lora": "train.finetune=lora",
    "lora_r": "train.lora_rank",
    "bf16": "dtype=bfloat16",
    "mixed_precision": "dtype=bfloat16",
    "torch_dtype": "dtype",
    "gradient_checkpointing": "train.activation_checkpointing",
    "max_grad_norm": "train.grad_clip",
    "adam_beta1": "train.betas",
    "warmup_steps": "train.warmup",
    "lr_warmup_steps": "train.warmup",
    "resume_from_checkpoint": "--resume",
    "output_dir": "--out",
    "save_dir": "--out",
    "model_name_or_path": "--model",
    "pretrained_model_name_or_path": "--model",
    "dataset": "--prompts hf:ORG/NAME",
    "dataset_name": "--prompts hf:ORG/NAME",
    "prompt": 'an argument: unigrpo generate "a red circle"',
    "reward_funcs": "--reward",
    "reward_fn": "--reward",
    "reward_weights": "--reward NAME:WEIGHT",
    "log_with": "--report-to",
    "logging_steps": LOGS,
    "wandb": "--report-to wandb",
    "tensorboard": "--report-to tensorboard",
    "num_processes": "torchrun or accelerate launch (docs/scaling.md)",
    "gpus": "torchrun or accelerate launch (docs/scaling.md)",
}
COMMANDS = {
    "completion": "unigrpo --install-completion",
    "completions": "unigrpo --install-completion",
    "finetune": "unigrpo train",
    "evaluate": "unigrpo eval",
    "sample": "unigrpo generate",
    "inference": "unigrpo generate",
    "infer": "unigrpo generate",
    "score": "unigrpo rewards score",
    "serve": "unigrpo rewards serve",
    "list": "unigrpo rewards list",
    "test": "unigrpo rewards test",
    "check": "unigrpo doctor",
    "resume": "unigrpo train --resume RUN",
}
PARAMETERS = {
    "completions": "images, or reasoning for the text",
    "completion": "images, or reasoning for the text",
    "prompt": "prompts",
    "image": "images",
    "samples": "batch",
    "kwargs": "metadata, which holds the other fields of each prompt",
}
"""Parameters of reward functions elsewhere."""


def setting_here(name: str) -> str | None:
    """What to use here for an option or a key of another tool."""
    return SETTINGS.get(name.lstrip("-").rpartition(".")[2].replace("-", "_").lower())
