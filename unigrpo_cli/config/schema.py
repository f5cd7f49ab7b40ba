"""Configuration: frozen, typed, saved with the run. Unknown keys are errors that name the near misses.

Precedence, later wins: defaults here < preset < `--config file.toml` < `--set a.b=c` < named options.
Defaults of the algorithm are the paper's, marked [paper: ...]; a preset gives the reason for each value it changes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS = ("embedded", "paper", "bagel-one-gpu")

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Several = Annotated[int, Field(ge=2, le=10_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Noise = Annotated[float, Field(ge=1e-3, le=10)]  # less is lost to rounding, more overflows


class Section(BaseModel):
    """A frozen table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingConfig(Section):
    """How episodes are sampled, in training and (unless `eval` overrides it) in evaluation."""

    program: str = Field(
        "think-paint",
        description="what an episode consists of: think-paint, reflect, edit, critique-edit, or a plugin's "
        "(docs/interleaved.md)",
    )
    rounds: Few = Field(1, description="images of an episode; each further one is painted after a look at the last")
    stop_phrase: str = Field(
        "", description="a text after a look that has these words ends its episode; empty: none does"
    )
    round_max_new_tokens: tuple[Positive, ...] = Field(
        (), description="longest text of each round, the last one repeated; empty: max_new_tokens for all"
    )
    show_images: Literal["latents", "pixels", "tower", "pixels+tower"] = Field(
        "pixels+tower",
        description="how a painted image is looked at: its latents, the decoded picture's, the vision tower's view of "
        "it, or both of these [BAGEL: pixels+tower]",
    )
    think: bool = Field(True, description="write reasoning before the image")
    max_new_tokens: Positive = Field(1024, description="longest text in tokens, stop token included")
    temperature: Scale = Field(1.0, description="softmax temperature of sampling and of log-probs [paper: 1]")
    height: Positive = Field(1024, description="image height in pixels [paper: 1024]")
    width: Positive = Field(1024, description="image width in pixels [paper: 1024]")
    steps: Positive = Field(24, description="denoising steps (network calls) per image [paper: 25 points = 24 calls]")
    shift: NonNegative = Field(
        3.0, description="time shift of the denoising schedule; 0: that of the model's own sampler [paper: 3]"
    )
    sde: Literal["flow", "dance", "cps"] = Field("flow", description="stochastic transition [paper: flow]")
    noise_level: Noise = Field(0.8, description="noise scale `a` of the stochastic transition [paper: 0.8]")
    window: Literal["all", "fixed", "random", "sliding"] = Field(
        "random", description="which steps are stochastic; one choice per rollout [paper: random]"
    )
    window_size: Positive = Field(3, description="number of stochastic steps [paper: 3]")
    window_range: tuple[Count, Positive] = Field(
        (0, 5), description="half-open range of steps that contains the window [paper: 0, 5]"
    )
    window_period: Positive = Field(25, description="training steps between moves of a sliding window")
    guidance_text: Scale = Field(
        1.0,
        description="classifier-free guidance in rollout, replay and gradients, against the context without the prompt "
        "[paper: 1, off]. Evaluation has scales of its own; interval and renormalisation are eval's for both",
    )
    guidance_image: Scale = Field(1.0, description="the same for images, as eval.guidance_image")
    batch_size: Count = Field(
        0,
        description="episodes sampled in one batch; 0: as many as fit in memory. Changes speed only; in bf16 "
        "rounding may also change a sampled token",
    )
    vae_tile_rows: Count = Field(
        0,
        description="pixel rows that the autoencoder decodes at a time; 0: all. Saves memory; rounding may differ",
    )
    compile: bool = Field(
        False, description="torch.compile the layers for sampling: slower start, faster sampling; replay is unchanged"
    )


class ObjectiveConfig(Section):
    """Equations 2, 6, 7, 8: what is maximised."""

    image: Literal["transition", "fpo", "nft"] = Field(
        "transition",
        description="what is scored of a picture: transition: its stochastic denoising steps [paper]; fpo (FPO) or nft "
        "(DiffusionNFT): the final latent, noised again; then all steps are Euler's and sampling.window has no effect",
    )
    draws: Few = Field(
        8,
        description="with image=fpo or nft: timesteps, each with noise of its own, to which a final latent is noised "
        "[FPO: 8]",
    )
    fpo_clip: AboveZero = Field(0.05, description="clip range of FPO's ratio, one per picture [FPO: 0.05]")
    nft_beta: AboveZero = Field(
        1.0,
        description="how far NFT's two velocities are from the old one [DiffusionNFT: 1, and 0.1 with several "
        "rewards]; advantage.clamp is the advantage of a certain success",
    )
    text_weight: NonNegative = Field(1.0, description="weight of the text term")
    image_weight: NonNegative = Field(1.0, description="weight of the image term, lambda [paper: 1]")
    text_clip: AboveZero = Field(
        0.2, description="clip range of the token ratio [paper: not given; 0.2 is usual in GRPO]"
    )
    image_clip: AboveZero = Field(
        1e-6, description="clip range of the denoising-step ratio, mean over latent elements [paper: 1e-6]"
    )
    text_kl: NonNegative = Field(0.0, description="weight of the k3 KL to the reference on text [paper: 0]")
    trust_region: Literal["ratio-norm", "ratio"] = Field(
        "ratio-norm", description="which log-ratio is clipped for images [paper: ratio-norm]"
    )
    penalty: Literal["velocity-mse", "latent-kl", "none"] = Field(
        "velocity-mse", description="regularizer of images towards the reference [paper: velocity-mse]"
    )
    penalty_weight: NonNegative = Field(1.5e-5, description="weight of the penalty [paper: 1.5e-5]")
    grad_through_context: bool = Field(
        True,
        description="image loss also updates the text expert through the context's keys and values [paper: not stated]",
    )
    grad_through_images: bool = Field(
        False,
        description="text and images after a look also update the experts through the picture's keys and values; words "
        "that read it send the image expert a gradient a thousand times its own, so it forgets how to paint",
    )


class AdvantageConfig(Section):
    """Equation 1, how several rewards become one advantage, and which actions answer for which reward."""

    credit: Literal["auto", "terminal", "reward-to-go"] = Field(
        "terminal",
        description="terminal: all actions answer for the last picture's rewards [paper]; reward-to-go: each segment "
        "for its own rewards and later ones, and every picture is scored; auto: reward-to-go with several rounds",
    )
    discount: Share = Field(
        1.0, description="with credit=reward-to-go: factor of a reward for each picture between it and the segment"
    )

    normalize: Literal["group", "batch", "none"] = Field(
        "group", description="standard deviation that divides the advantage [paper: group]"
    )
    clamp: NonNegative = Field(
        5.0, description="largest absolute advantage; 0: no limit [Flow-GRPO: 5; at most 4.8 in groups of 24]"
    )
    combine: Literal["auto", "sum", "gdpo", "rank"] = Field(
        "auto", description="how several rewards are combined; auto: gdpo when their ranges differ, else sum"
    )
    map: str = Field(
        "none",
        description="weights of a picture's positions: none, uniform, detector, features, or a plugin's, with options "
        "as of rewards, e.g. features@model=facebook/dinov2-base (docs/interleaved.md)",
    )
    map_ratio: Literal["step", "position"] = Field(
        "step",
        description="with a map: one ratio and clip for a step, of the weighted mean, or one for each position [ViPO: "
        "position, with an objective.image_clip of its own]",
    )
    shuffle: bool = Field(
        False, description="control experiment: permute advantages over the batch, so nothing is learnt"
    )


class TrainConfig(Section):
    """The training loop and its optimizer."""

    steps: Count = Field(1000, description="training steps: one rollout, then epochs * minibatches optimizer steps")
    prompts_per_step: Few = Field(32, description="prompts (groups) per rollout, P [paper: batch size 32]")
    group_size: Several = Field(24, description="episodes per prompt, G [paper: 24]")
    minibatches: Positive = Field(
        2, description="optimizer steps per pass, on disjoint groups [both reproductions of the paper: 2]"
    )
    epochs: Positive = Field(1, description="passes over one rollout's episodes")
    micro_batch_size: Count = Field(
        0, description="episodes per backward pass; 0: as many as fit in memory. Changes memory, not gradients"
    )
    max_tokens_per_micro_batch: Count = Field(
        0,
        description="token limit of a micro-batch, padding and images included; sorts episodes by length; 0: no limit",
    )
    experts: Literal["both", "text", "image"] = Field("both", description="which expert is trained [paper: both]")
    finetune: Literal["full", "lora"] = Field("full", description="train all weights of the layers, or LoRA adapters")
    extra_modules: tuple[Literal["embeddings", "head", "norms", "projections", "connector", "vision"], ...] = Field(
        (),
        description="more modules to train with finetune=full: word embeddings, lm_head, final norms, latent and time "
        "projections, vision connector, vision tower",
    )
    reference_device: Literal["device", "host"] = Field(
        "device", description="where the frozen reference of full fine-tuning is kept; host: streamed layer by layer"
    )
    lora_rank: Positive = Field(64, description="LoRA rank")
    lora_alpha: AboveZero = Field(128.0, description="LoRA alpha; the update is scaled by alpha / rank")
    lr_text: NonNegative = Field(1e-6, description="learning rate of the text expert [paper: 1e-6]")
    lr_image: NonNegative = Field(3e-5, description="learning rate of the image expert [paper: 3e-5]")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay")
    grad_clip: AboveZero = Field(1.0, description="largest gradient norm over all weights")
    warmup: Count = Field(0, description="optimizer steps of linear learning-rate warm-up")
    lr_decay: Count = Field(
        0,
        description="learning rates are divided by 1 + step / n, with this n and optimizer steps counted after the "
        "warm-up; 0: constant [paper: constant]",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )
    checkpoint_every: Count = Field(100, description="training steps between checkpoints; 0: only the last step")
    keep_checkpoints: Positive = Field(3, description="number of latest checkpoints kept on disk")
    keep_checkpoint_every: Count = Field(
        0,
        description="keep checkpoints whose step is divisible by this for good; 0: none (checkpoint_every writes them)",
    )
    samples_every: Count = Field(25, description="training steps between sheets of held-out samples; 0: none")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (), description='experiment trackers that get metrics, samples and settings, e.g. ["tensorboard"]'
    )
    trace_every: Count = Field(
        0,
        description="training steps between traces (what the updates saw of each token and denoising step), the first "
        "and the last step always; 0: none",
    )
    trace_groups: Few = Field(8, description="groups per trace, of the first rank")
    drift_limit: AboveZero = Field(
        0.02, description="warn when text log-probs of rollout and replay differ by more on average, nats"
    )


class SftConfig(Section):
    """Supervised fine-tuning on given answers (`unigrpo sft`). With `data`, a run imitates these in place of RL."""

    data: tuple[str, ...] = Field(
        (),
        description="answers to imitate: .jsonl files of prompt, reasoning and image, or directories of "
        "`unigrpo rollout`",
    )
    keep: str = Field(
        "",
        description="which episodes of a rollout's group: best:N, above:X by the weighted sum of rewards; empty: all",
    )
    text_weight: NonNegative = Field(1.0, description="weight of the reasoning's cross-entropy, mean over tokens, nats")
    image_weight: NonNegative = Field(1.0, description="weight of the image's flow-matching loss, mean over latents")
    times: Few = Field(1, description="timesteps drawn for each image in a step, all in one pass")
    drop: Share = Field(
        0.0, description="share of answers that are learnt without prompt and reasoning, for guidance [usual: 0.1]"
    )


class EvalConfig(Section):
    """Held-out evaluation: deterministic (Euler) steps, fixed noise."""

    suite: str = Field(
        "auto",
        description="shapes, geneval, a prompts file, or KIND:PATH (docs/suites.md); auto: shapes, or with other "
        "prompts a held-out tenth of them",
    )
    samples: Few = Field(1, description="images per prompt")
    limit: Count = Field(0, description="only the first n prompts of each task; 0: all")
    temperature: Scale = Field(1.0, description="softmax temperature of the reasoning; 0: greedy")
    steps: Positive = Field(49, description="denoising steps (network calls) per image [paper: 50 points = 49 calls]")
    rewards: tuple[str, ...] = Field((), description="more rewards to report next to the trained ones")
    every: Count = Field(0, description="training steps between evaluations; 0: only before and after training")
    best: str = Field("", description="reward whose held-out mean selects the checkpoint kept as checkpoints/best")
    guidance_text: Scale = Field(
        1.0, description="classifier-free guidance scale against the context without the prompt; 1: off"
    )
    guidance_image: Scale = Field(
        1.0,
        description="guidance scale against the context without images and reasoning; needs guidance_text above 1",
    )
    guidance_interval: tuple[Finite, Finite] = Field(
        (0.4, 1.0), description="guidance applies where lower < t <= upper, t after the shift"
    )
    guidance_renorm: Literal["global", "channel", "text_channel"] = Field(
        "global", description="over what the guided velocity's norm is reduced to the unguided one"
    )
    guidance_renorm_min: Share = Field(0.0, description="smallest factor of the renormalisation; 1: off")
    seed: Seed = Field(
        42, description="seed of the evaluation noise, independent of `seed`, so that runs are comparable"
    )


class RewardConfig(Section):
    """Which rewards are used and how they are run."""

    names: tuple[str, ...] = Field((), description="rewards, as `[alias=]name[:weight](@key=value)*`")
    options: dict[str, Any] = Field({}, description="more options, as alias.key = value")
    timeout_s: AboveZero = Field(120.0, description="timeout of one reward call, seconds")
    setup_timeout_s: AboveZero = Field(1800.0, description="timeout of a reward's set-up, downloads included, seconds")
    max_abstain: Share = Field(0.25, description="stop when a reward abstains on a larger share of recent samples")
    on_error: Literal["raise", "abstain"] = Field("raise", description="what an exception in a reward leads to")
    strict: bool = Field(False, description="treat a score outside the declared range as an error, not a warning")
    overlap: Literal["auto", "all", "none"] = Field(
        "auto",
        description="score in the background while episodes are sampled and replayed: auto: rewards that wait for an "
        "endpoint; all: every reward that accepts batches; none",
    )
    offload: bool = Field(False, description="move reward models to host memory between scorings")
    scoring_rank: Literal["each", "first"] = Field(
        "each", description="each: every rank scores its own episodes; first: rank 0 scores all"
    )


class RanksConfig(Section):
    """Several processes (docs/scaling.md)."""

    weights: Literal["auto", "whole", "shard"] = Field(
        "auto",
        description="whole: all weights on every rank; shard: layers sharded (FSDP2); auto: shard for full fine-tuning",
    )


class MonitorConfig(Section):
    """When a run warns, skips an update or stops; docs/troubleshooting.md lists every rule."""

    explosion: AboveZero = Field(
        1000.0, description="skip an update whose gradient norm exceeds this multiple of the recent median"
    )
    bad_steps: Positive = Field(3, description="consecutive skipped steps after which the run stops")
    clip_fraction: AboveZero = Field(0.5, description="warn when a larger share of text or image actions is clipped")
    drift_image: AboveZero = Field(
        1e-3, description="warn when log-probs of a denoising step differ by more between rollout and replay, mean"
    )
    kl_text: AboveZero = Field(0.05, description="warn when one step changes the text policy by more, nats per token")
    kl_image: AboveZero = Field(
        1e-4, description="warn when one step changes the image policy by more, nats per latent element"
    )
    entropy: AboveZero = Field(0.1, description="warn when entropy falls below this share of its initial value")
    truncated: NonNegative = Field(0.5, description="warn when a larger share of texts is truncated")
    duplicates: NonNegative = Field(0.1, description="warn when a larger share of a group's images is identical")
    zero_groups: NonNegative = Field(0.5, description="warn when a larger share of groups has only zero advantages")
    abstained: NonNegative = Field(
        0.1, description="warn when a reward abstains on a larger share, and on twice its initial one"
    )


class DoctorConfig(Section):
    """Checks before training (docs/troubleshooting.md)."""

    at_start: Literal["stop", "warn", "off"] = Field(
        "stop", description="check a run before its first step: stop on a fault, warn of it, or do not check"
    )
    prompts: Few = Field(2, description="groups that the doctor samples")
    members: Several = Field(4, description="episodes in each group, at most train.group_size")
    text_drift: NonNegative = Field(
        0.0, description="largest drift of a token's log-prob, nats; 0: 0.001 in float32, 0.5 in bfloat16"
    )
    image_drift: NonNegative = Field(
        0.0,
        description="largest drift of a denoising step's log-prob, latent mean; 0: 0.001 in float32, 0.1 in bfloat16",
    )


class Config(Section):
    """Everything a run depends on."""

    model: str = Field("embedded", description="`embedded`, a model directory, a hub id, a checkpoint or a run")
    weights_file: str | None = Field(
        None, description="weights file in the model directory, if it is neither indexed nor ema.safetensors"
    )
    adapter: str | None = Field(None, description="PEFT adapter directory applied to the model")
    model_options: dict[str, Any] = Field(
        {}, description="options of the model's family, as model_options.KEY=VALUE; `unigrpo models info FAMILY`"
    )
    preset: Literal["embedded", "paper", "bagel-one-gpu"] = Field("embedded", description="where defaults come from")
    prompts: str = Field(
        "shapes",
        description="prompts to train on: `shapes`, a .txt, .jsonl, .csv, .tsv or .parquet file, or hf:ORG/NAME",
    )
    seed: Seed = Field(0, description="random seed")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of frozen weights and activations; trained weights are kept in float32"
    )
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        "auto", description="attention kernel on a GPU; auto: flash or efficient, as cuDNN plans anew for each length"
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="CPU threads; each computes a batch of its own where there are several; 0: torch's choice"
    )
    memory_gb: NonNegative = Field(
        0.0,
        description="memory limit in GiB; 0: ask the device. With a limit, --dry-run plans for an accelerator of that "
        "size, or with device=cpu for a CPU of `threads` cores",
    )
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    reward: RewardConfig = RewardConfig()
    ranks: RanksConfig = RanksConfig()
    monitor: MonitorConfig = MonitorConfig()
    doctor: DoctorConfig = DoctorConfig()

    @property
    def command(self) -> str:
        """The command that trains with these settings."""
        return "sft" if self.sft.data else "train"

    @model_validator(mode="after")
    def _fits(self) -> Config:
        s, t = self.sampling, self.train
        transitions = self.objective.image == "transition"
        if s.window != "all" and transitions:
            lo, hi = s.window_range
            if not lo + s.window_size <= hi <= s.steps:
                raise ValueError(
                    f"sampling.window_size={s.window_size} in sampling.window_range={list(s.window_range)} "
                    f"does not fit sampling.steps={s.steps}"
                )
        if s.sde == "cps" and s.window != "all" and s.window_range[1] == s.steps and transitions:
            raise ValueError("sampling.sde=cps has no noise in the last step; end sampling.window_range earlier")
        if t.prompts_per_step % t.minibatches:
            raise ValueError(
                f"train.minibatches={t.minibatches} must divide train.prompts_per_step={t.prompts_per_step}: "
                "a group is never split over minibatches"
            )
        if self.eval.best and not self.eval.every:
            raise ValueError(
                f"eval.best={self.eval.best} needs evaluations during training: set eval.every, e.g. eval.every=20"
            )
        if s.sde == "cps" and s.noise_level > 1:
            raise ValueError(
                f"sampling.sde=cps takes sampling.noise_level up to 1, not {s.noise_level:g}: above 1 "
                "sin(a pi / 2) decreases"
            )
        return self

    @model_validator(mode="after")
    def _forward_fits(self) -> Config:
        """Refuse what is about denoising steps where none is scored."""
        o, a = self.objective, self.advantage
        if o.image == "transition":
            return self
        if self.sampling.guidance_text > 1:
            raise ValueError(
                f"objective.image={o.image} scores the model's own velocities; leave out sampling.guidance_text"
            )
        for key, given, without in (
            ("objective.trust_region", o.trust_region, "ratio-norm"),
            ("advantage.map", a.map, "none"),
        ):
            if given != without:
                raise ValueError(f"{key}={given} is about denoising steps; leave it out with objective.image={o.image}")
        if o.penalty == "latent-kl":
            raise ValueError(
                f"objective.penalty=latent-kl is about denoising steps; with objective.image={o.image} set velocity-mse"
            )
        if o.image == "nft" and not a.clamp:
            raise ValueError("objective.image=nft divides by advantage.clamp: set it above 0, e.g. advantage.clamp=5")
        return self

    @model_validator(mode="after")
    def _program_fits(self) -> Config:
        s = self.sampling
        if s.program == "think-paint" and s.rounds > 1:
            raise ValueError(f"sampling.rounds={s.rounds}: think-paint paints once; set sampling.program=reflect")
        if s.program == "reflect" and s.rounds < 2:
            raise ValueError(
                "sampling.program=reflect takes two rounds or more: set sampling.rounds=2; one round is think-paint"
            )
        if not s.think and (s.rounds > 1 or s.program == "critique-edit"):
            raise ValueError(
                f"sampling.think=false leaves sampling.program={s.program} with sampling.rounds={s.rounds} nothing to "
                "say of its picture; set sampling.think=true"
            )
        return self

    @model_validator(mode="after")
    def _stays_finite(self) -> Config:
        """Refuse settings with which fp32 sampling is not finite."""
        s = self.sampling
        if s.window == "all" and s.steps < 2:
            raise ValueError("sampling.window=all excludes the last step; set sampling.steps=2 or more")
        for name, steps, temperature in (
            ("sampling", s.steps, s.temperature),
            ("eval", self.eval.steps, self.eval.temperature),
        ):
            if 0 < temperature < 0.01:
                raise ValueError(f"{name}.temperature={temperature:g}: set 0.01 or more, or 0 for greedy")
            # The grid's smallest interval is 1 / (1 + (steps - 1) max(shift, 1 / shift)); fp32 resolves 6e-8.
            if s.shift and steps * max(s.shift, 1 / s.shift) > 1e6:
                raise ValueError(
                    f"sampling.shift={s.shift:g} with {name}.steps={steps} puts times less than 1e-6 apart; "
                    "set a shift nearer to 1 or fewer steps"
                )
        return self
