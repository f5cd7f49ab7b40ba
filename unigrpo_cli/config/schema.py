"""Configuration: frozen, typed, printed with the run. Unknown keys are errors that name the near misses.

Precedence, later wins: defaults here < preset < `--config file.toml` < `--set a.b=c` < named options.
The defaults of the algorithm are the paper's; a preset says where and why it departs from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS = ("embedded", "paper")

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Key = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(Section):
    """How episodes are drawn, in training and (where eval does not say otherwise) in evaluation."""

    think: bool = Field(True, description="write reasoning before painting")
    max_new_tokens: Positive = Field(1024, description="budget of one text in tokens, its stop token included")
    temperature: Rate = Field(1.0, description="of the sampled and the scored distribution [paper: 1]")
    height: Positive = Field(1024, description="image height, pixels [paper: 1024]")
    width: Positive = Field(1024, description="image width, pixels [paper: 1024]")
    steps: Positive = Field(24, description="network calls per image [paper: 25 points = 24 calls]")
    shift: Size = Field(3.0, description="time shift of the grid [paper: 3]")
    sde: Literal["flow", "dance", "cps"] = Field("flow", description="stochastic transition [paper: flow]")
    noise_level: Size = Field(0.8, description="a of the transition [paper: 0.8]")
    window: Literal["all", "fixed", "random", "sliding"] = Field(
        "random", description="which steps are stochastic, one draw per rollout [paper: random]"
    )
    window_size: Positive = Field(3, description="stochastic steps K [paper: 3]")
    window_range: tuple[Count, Positive] = Field(
        (0, 5), description="half-open range of steps for the window [paper: 0, 5]"
    )
    window_period: Positive = Field(25, description="training steps between moves of a sliding window")
    batch_size: Count = Field(
        0,
        description="episodes sampled in one batch; changes speed, and in fp32 no sample (in bf16 another rounding "
        "may draw another word); 0: as many as fit the memory, in batches of one size",
    )
    vae_tile_rows: Count = Field(
        0,
        description="rows of pixels that the autoencoder decodes at a time: half the memory, the same picture but "
        "for rounding; 0: all",
    )
    compile: bool = Field(
        False,
        description="torch.compile the layers while episodes are drawn: fewer calls per word and denoising step, "
        "for a wait at the start; replays are as without",
    )


class Objective(Section):
    """Equations 2, 6, 7, 8: what is maximised."""

    text_weight: Rate = Field(1.0, description="weight of the text term")
    image_weight: Rate = Field(1.0, description="lambda, weight of the image term [paper: 1]")
    text_clip: Size = Field(
        0.2, description="clip range of the token ratio [paper: not given; 0.2 is the usual value of GRPO]"
    )
    image_clip: Size = Field(
        1e-6, description="clip range of the step ratio, mean over the latent's elements [paper: 1e-6]"
    )
    text_kl: Rate = Field(0.0, description="weight of the k3 KL to the reference on text [paper: 0]")
    trust_region: Literal["ratio-norm", "ratio"] = Field(
        "ratio-norm", description="log-ratio that is clipped for images [paper: ratio-norm]"
    )
    penalty: Literal["velocity-mse", "latent-kl", "none"] = Field(
        "velocity-mse", description="what holds images near the start [paper: velocity-mse]"
    )
    penalty_weight: Rate = Field(1.5e-5, description="weight of the penalty [paper: 1.5e-5]")
    grad_through_context: bool = Field(
        True,
        description="the image loss also trains the text expert, through keys and values of the context "
        "[paper: silent]",
    )


class Advantage(Section):
    """Equation 1, and how several rewards become one advantage."""

    normalize: Literal["group", "batch", "none"] = Field("group", description="what divides [paper: group]")
    clamp: Rate = Field(
        5.0,
        description="largest magnitude, 0 for no limit [Flow-GRPO: 5; in groups of 24 none exceeds 4.8]",
    )
    combine: Literal["auto", "sum", "gdpo", "rank"] = Field(
        "auto", description="several rewards: gdpo when their ranges differ, else sum"
    )
    shuffle: bool = Field(
        False, description="a control: permute advantages over the batch, so that nothing can be learnt"
    )


class Train(Section):
    """The loop and its optimizer."""

    steps: Count = Field(1000, description="rollouts, each followed by epochs * updates optimizer steps")
    prompts_per_step: Positive = Field(32, description="P, groups per rollout [paper: batch size 32]")
    group_size: Annotated[int, Field(ge=2)] = Field(24, description="G, episodes per prompt [paper: 24]")
    minibatches: Positive = Field(
        2, description="optimizer steps per pass, on disjoint halves [both reproductions of the paper: 2]"
    )
    epochs: Positive = Field(1, description="passes over one rollout's episodes")
    old_scores: Literal["auto", "replay"] = Field(
        "auto",
        description="replay: a pass of its own for every update. auto: the first update after a rollout takes what "
        "it says itself, which is the same to the bit; every 16th step sees that it is",
    )
    micro_batch_size: Count = Field(
        0,
        description="episodes in one backward pass; changes memory, no gradient; 0: as many as fit the memory, in "
        "micro-batches of one size",
    )
    max_tokens_per_micro_batch: Count = Field(
        0,
        description="and tokens, padding and every step's image counted; then episodes are sorted by length; 0 for "
        "no limit",
    )
    experts: Literal["both", "text", "image"] = Field(
        "both", description="which actions and weights are trained [paper: both]"
    )
    finetune: Literal["full", "lora"] = Field("full", description="all weights of the layers, or adapters")
    extra_modules: tuple[Literal["embeddings", "head", "norms", "projections", "connector", "vision"], ...] = Field(
        (),
        description="what else trains with tune = full: word embeddings, lm_head, the two last norms, latent "
        "in/out and time, the connector of the vision tower, the tower",
    )
    reference_device: Literal["device", "host"] = Field(
        "device", description="where the frozen copy of full tuning lives; host streams it layer by layer"
    )
    lora_rank: Positive = Field(64, description="rank of the adapters")
    lora_alpha: Size = Field(128.0, description="scale of the adapters, times rank")
    lr_text: Rate = Field(1e-6, description="learning rate of the text expert [paper: 1e-6]")
    lr_image: Rate = Field(3e-5, description="learning rate of the image expert [paper: 3e-5]")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decays")
    weight_decay: Rate = Field(0.0, description="AdamW's weight decay")
    grad_clip: Size = Field(1.0, description="largest gradient norm over all weights")
    warmup: Count = Field(0, description="optimizer steps of linear warm-up")
    activation_checkpointing: bool = Field(False, description="recompute layers in the backward pass")
    checkpoint_every: Count = Field(100, description="steps between checkpoints; 0 for the last one only")
    keep_checkpoints: Positive = Field(3, description="how many of the last checkpoints stay on disk")
    keep_checkpoint_every: Count = Field(
        0,
        description="checkpoints of steps that this divides stay for good; 0 for none (they are made by "
        "checkpoint_every)",
    )
    samples_every: Count = Field(25, description="steps between sheets of held-out samples; 0 for none")
    drift_limit: Size = Field(
        0.02, description="warn when rollout and replay log-probabilities differ by more (mean, text)"
    )


class Eval(Section):
    """Held-out evaluation: Euler steps only, fixed noise."""

    suite: str = Field(
        "shapes", description="shapes, geneval, a prompts file, or KIND:PATH of a foreign suite (docs/suites.md)"
    )
    samples: Positive = Field(1, description="images per prompt")
    limit: Count = Field(0, description="only the first n prompts of each task; 0 for all")
    temperature: Rate = Field(1.0, description="of the reasoning; 0 is greedy")
    steps: Positive = Field(49, description="network calls per image [paper: 50 points = 49 calls]")
    rewards: tuple[str, ...] = Field((), description="rewards reported beside the trained ones")
    every: Count = Field(0, description="training steps between evaluations of the suite; 0 for none in between")
    best: str = Field(
        "", description="the reward by whose held-out mean the best checkpoint is kept, as checkpoints/best"
    )
    guidance_text: Rate = Field(
        1.0, description="classifier-free guidance against the context without the prompt; up to 1 is none"
    )
    guidance_image: Rate = Field(
        1.0, description="and against the one without pictures and reasoning; only with guidance_text above 1"
    )
    guidance_interval: tuple[Finite, Finite] = Field(
        (0.4, 1.0), description="guidance acts where lower < t <= upper, t after the shift"
    )
    guidance_renorm: Literal["global", "channel", "text_channel"] = Field(
        "global", description="what holds the guided velocity's norm to the unguided one's"
    )
    guidance_renorm_min: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="least factor of that; 1 is no renormalisation"
    )
    seed: Key = Field(42, description="of the noise, whatever the run's seed: runs are compared on the same")


class Rewards(Section):
    """How rewards are run."""

    names: tuple[str, ...] = Field((), description="rewards, as [alias=]name[:weight](@key=value)*")
    options: dict[str, Any] = Field({}, description="more options, as alias.key = value")
    timeout_s: Size = Field(120.0, description="seconds one call of a reward may take")
    setup_timeout_s: Size = Field(1800.0, description="seconds a reward may take to set up, downloads included")
    max_abstain: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="stop when a reward abstains on a larger share of recent samples"
    )
    on_error: Literal["raise", "abstain"] = Field("raise", description="what an exception in a reward does")
    strict: bool = Field(False, description="a score outside the declared range is an error, not a warning")
    overlap: Literal["auto", "all", "none"] = Field(
        "auto",
        description="judge episodes while others are still sampled (sampling.batch_size at a time, the last in halves) "
        "or replayed: rewards that wait for an endpoint, all that take batches, or none",
    )
    offload: bool = Field(False, description="move rewards' models to host memory between scorings")
    scoring_rank: Literal["each", "first"] = Field(
        "each", description="with several ranks: each judges its own episodes, or the first judges all"
    )


class Ranks(Section):
    """Several processes (docs/scaling.md)."""

    weights: Literal["auto", "whole", "shard"] = Field(
        "auto", description="whole on every rank, or the layers of full tuning sharded (FSDP2); auto shards those"
    )


class Monitor(Section):
    """When a run warns, when it skips a step and when it stops; docs/troubleshooting.md has every rule."""

    explosion: Size = Field(
        1000.0, description="skip an update whose gradient norm is above this many times the recent median"
    )
    bad_steps: Positive = Field(3, description="skipped steps in a row after which the run stops")
    clip_fraction: Size = Field(0.5, description="warn when a larger share of text or image actions is clipped")
    drift_image: Size = Field(
        1e-3, description="warn when rollout and replay differ by more (log-probability of a step, mean)"
    )
    kl_text: Size = Field(0.05, description="warn when a step's updates move text by more, nats per token")
    kl_image: Size = Field(1e-4, description="and images by more, nats per element of a latent")
    entropy: Size = Field(0.1, description="warn when entropy falls below this share of what it was at first")
    truncated: Rate = Field(0.5, description="warn when a larger share of texts is cut off")
    duplicates: Rate = Field(0.1, description="warn when a larger share of a group's images are equal")
    zero_groups: Rate = Field(0.5, description="warn when a larger share of groups has rewards without spread")
    abstained: Rate = Field(0.1, description="warn when a reward abstains on a larger, and grown, share")
    slower: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        2.0, description="warn when a phase takes this many times its first seconds"
    )


class Doctor(Section):
    """The examination of a run (docs/troubleshooting.md)."""

    at_start: Literal["stop", "warn", "off"] = Field(
        "stop", description="what a fault does that the short examination at the start of a run finds"
    )
    prompts: Positive = Field(2, description="groups that the doctor draws")
    members: Annotated[int, Field(ge=2)] = Field(4, description="episodes in each, at most train.group_size")
    text_drift: Rate = Field(
        0.0, description="largest drift of a word's log-probability; 0: 0.001, below float32 0.5 nats"
    )
    image_drift: Rate = Field(
        0.0,
        description="likewise of a denoising step's, mean over the latent; 0: 0.001, below float32 0.1",
    )


class Config(Section):
    """Everything a run depends on."""

    model: str = Field("embedded", description="`embedded`, a model directory, a hub id, a checkpoint or a run")
    weights_file: str | None = Field(
        None, description="the model's weights, where they are not in its index or ema.safetensors"
    )
    adapter: str | None = Field(None, description="a PEFT adapter directory put on the model")
    preset: Literal["embedded", "paper"] = Field("embedded", description="where defaults come from")
    prompts: str = Field("shapes", description="`shapes` or a .txt or .jsonl file of prompts to train on")
    seed: Key = Field(0, description="of everything random")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of frozen weights and activations; what is trained is kept in float32"
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads, each for a batch of its own where there are several; 0 leaves it to torch"
    )
    memory_gb: Rate = Field(
        0.0,
        description="memory that a run may fill, GiB; 0 asks the device. A dry run is then for another machine: an "
        "accelerator, or with device=cpu a CPU of `threads` cores",
    )
    sampling: Sampling = Sampling()
    objective: Objective = Objective()
    advantage: Advantage = Advantage()
    train: Train = Train()
    eval: Eval = Eval()
    reward: Rewards = Rewards()
    ranks: Ranks = Ranks()
    monitor: Monitor = Monitor()
    doctor: Doctor = Doctor()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        s, t = self.sampling, self.train
        if s.window != "all":
            lo, hi = s.window_range
            if not lo + s.window_size <= hi <= s.steps:
                raise ValueError(
                    f"sampling.window_size={s.window_size} in sampling.window_range={list(s.window_range)} "
                    f"does not fit sampling.steps={s.steps}"
                )
        if s.sde == "cps" and s.window != "all" and s.window_range[1] == s.steps:
            raise ValueError("sampling.sde=cps has no noise in the last step; end sampling.window_range before it")
        if t.prompts_per_step % t.minibatches:
            raise ValueError(
                f"train.minibatches={t.minibatches} must divide train.prompts_per_step={t.prompts_per_step}: "
                "groups are never split over updates"
            )
        if self.eval.best and not self.eval.every:
            raise ValueError(
                f"eval.best={self.eval.best} needs evaluations to choose by: set eval.every, e.g. eval.every=20"
            )
        if s.sde == "cps" and s.noise_level > 1:
            raise ValueError(
                f"sampling.sde=cps takes sampling.noise_level up to 1, not {s.noise_level:g}: sin(a pi / 2) turns there"
            )
        return self

    @model_validator(mode="after")
    def _stays_finite(self) -> Config:
        """Refuse what fp32 cannot sample with, so that whatever is accepted gives finite numbers."""
        s = self.sampling
        if s.window == "all" and s.steps < 2:
            raise ValueError("sampling.window=all leaves out the last step; give sampling.steps=2 or more")
        if not 1e-3 <= s.noise_level <= 10:
            raise ValueError(
                f"sampling.noise_level={s.noise_level:g}: give 0.001 to 10; less is rounded away, more overflows"
            )
        for name, steps, temperature in (
            ("sampling", s.steps, s.temperature),
            ("eval", self.eval.steps, self.eval.temperature),
        ):
            if temperature and not 0.01 <= temperature <= 100:
                raise ValueError(f"{name}.temperature={temperature:g}: give 0.01 to 100, or 0 for greedy")
            # The grid's smallest interval is 1 / (1 + (steps - 1) max(shift, 1 / shift)); fp32 tells 6e-8 from 0.
            if steps * max(s.shift, 1 / s.shift) > 1e6:
                raise ValueError(
                    f"sampling.shift={s.shift:g} with {name}.steps={steps} puts times less than 1e-6 apart; "
                    "give a shift nearer to 1 or fewer steps"
                )
        for name in ("guidance_text", "guidance_image"):
            if (scale := getattr(self.eval, name)) > 100:
                raise ValueError(f"eval.{name}={scale:g}: give a scale up to 100")
        return self
