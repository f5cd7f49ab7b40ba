"""A text-only GRPO step against TRL's: the same shape, weights, prompts and loss.

TRL is no dependency. Where it is missing, its rows say how to put it beside the package.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Cases, Comparison
from benchmarks.clock import NotMeasuredError
from benchmarks.report import RELATIVE, Goal, Row
from benchmarks.shapes import Size, made_up_tokenizer, random_policy
from unigrpo_cli.algo.objective import Scores, per_action, unigrpo_loss
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Episode, Prompt, TextActions
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.tokenizer import OPEN
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.rollout import read_given, sample_text
from unigrpo_cli.train import score_old_and_reference, update, with_advantages
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.schedule import objective_of
from unigrpo_cli.training.state import TrainState

WORDS, AGAINST = "text-only GRPO", "text-only GRPO against TRL"
INSTALL = "TRL is not installed: `python -m pip install trl`, or beside this environment as docs/performance.md says"


def rows(_cases: Cases) -> list[Row]:
    return [
        Row(WORDS, "whole step", "tokens/s"),
        Row(WORDS, "writing", "tokens/s"),
        Row(WORDS, "update alone", "tokens/s"),
        Row(AGAINST, "TRL, whole step", "tokens/s"),
        Row(AGAINST, "TRL, writing", "tokens/s"),
        Row(AGAINST, "TRL, update alone", "tokens/s"),
        Row(AGAINST, "whole step, times faster", "x", Goal(1.5, at_most=False)),
        Row(AGAINST, "writing, times faster", "x"),
        Row(AGAINST, "update alone, times faster", "x", Goal(1.5, at_most=False)),
        Row(AGAINST, "loss differs", RELATIVE),
        Row(AGAINST, "gradient norm differs", RELATIVE),
    ]


def reward_of(ids: Tensor | list[int]) -> float:
    """Share of even ids: cheap, and different for every text."""
    return sum(int(i) % 2 == 0 for i in ids) / max(1, len(ids))


def prompt_of(size: Size, k: int) -> str:
    """Made-up words, others for every prompt, of one length for all."""
    return " ".join(f"w{100 * k + word}" for word in range(size.given))


@dataclass
class Spent:
    """Seconds of one step and its sampled tokens."""

    tokens: int
    writing_s: float
    update_s: float
    whole_s: float


class OwnSteps:
    """Text-only steps by the package's functions. Everything that words go through is trained, as TRL does."""

    def __init__(self, bench: Comparison):
        size, self.clock = bench.cases.small, bench.clock
        self.members, self.prompts = size.groups[0], bench.cases.prompts
        episodes = self.prompts * self.members
        self.config = configuration(size, self.prompts)
        policy = random_policy(size, torch.device("cpu"), torch.float32)
        # TRL knows of no ids without a word, so here every id has one.
        policy = replace(policy, tokenizer=made_up_tokenizer(size.network.vocab_size, spare=0))
        self.policy = prepare_policy(policy, self.config)
        self.state = TrainState(self.policy, make_optimizer(self.policy, self.config))
        self.objective, self.sampling = objective_of(self.config), train_sampling(self.config)
        self.given = [(self.policy.given("prompt", prompt_of(size, k)),) for k in range(self.prompts)]
        self.at = torch.arange(episodes) // self.members
        self.steps = 0

    @torch.no_grad()
    def write(self) -> list[Episode]:
        seeds = [derive(self.steps, "text-only", k) for k in range(len(self.at))]
        context = read_given(self.policy, self.given).select(self.at)
        _, texts = sample_text(self.policy, context, self.sampling, seeds)
        prompts = [Prompt(str(k), "") for k in self.at.tolist()]
        return [
            Episode(prompt, row % self.members, seeds[row], (*self.given[self.at[row]], text))
            for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    def step(self) -> Spent:
        began = self.clock.now()
        episodes = self.write()
        written = self.clock.now()
        texts = [s for e in episodes for s in e.segments if isinstance(s, TextActions)]
        reward_PG = torch.tensor([reward_of(text.ids) for text in texts]).view(self.prompts, -1)
        spread = reward_PG.std(dim=1, keepdim=True) + 1e-4
        advantage_B = ((reward_PG - reward_PG.mean(dim=1, keepdim=True)) / spread).flatten()
        fixed = score_old_and_reference(self.policy, episodes, self.config, self.objective, rescore=False)
        shares = with_advantages(fixed, advantage_B[:, None])
        replayed = self.clock.now()
        update(self.state, shares[0], self.objective, self.config)
        ended = self.clock.now()
        self.steps += 1
        return Spent(sum(len(t.ids) for t in texts), written - began, ended - replayed, ended - began)


def configuration(size: Size, prompts: int) -> Config:
    return load_config(
        preset="paper",
        named={
            "sampling.max_new_tokens": size.thinking,
            "objective.image_weight": 0.0,
            "train.experts": "text",
            "train.finetune": "full",
            "train.extra_modules": ["embeddings", "head", "norms"],
            "train.prompts_per_step": prompts,
            "train.group_size": size.groups[0],
            "train.micro_batch_size": -(-prompts * size.groups[0] // torch.get_num_threads()),
            "train.minibatches": 1,
        },
    )


def rates(spent: list[Spent]) -> dict[str, float]:
    """Tokens per second, medians over steps."""
    return {
        "whole step": statistics.median(s.tokens / s.whole_s for s in spent),
        "writing": statistics.median(s.tokens / s.writing_s for s in spent),
        "update alone": statistics.median(s.tokens / s.update_s for s in spent),
    }


def measure_words(bench: Comparison) -> None:
    """Ours alone where there is no TRL, else both in turn.

    Raises:
        NotMeasuredError: when there is no TRL: how to get it.
    """
    own = OwnSteps(bench)
    if importlib.util.find_spec("trl") is None:
        found: list[Spent] = []
        bench.clock.repeated(lambda: found.append(own.step()), bench.cases.share_s)
        report_own(bench, found[1:])
        raise NotMeasuredError(INSTALL)
    theirs = TrlSteps(bench, own)
    compare_losses(bench, own, theirs)
    ours, others = theirs.in_turn_with(own, rounds=6)
    report_own(bench, ours)
    mine, other = rates(ours), rates(others)
    for name in mine:
        bench.report.add(AGAINST, f"TRL, {name}", other[name])
    for name in mine:
        faster = statistics.median(rates([a])[name] / rates([b])[name] for a, b in zip(ours, others, strict=True))
        bench.report.add(AGAINST, f"{name}, times faster", faster)


def report_own(bench: Comparison, spent: list[Spent]) -> None:
    size = bench.cases.small
    for name, rate in rates(spent).items():
        note = f"{bench.cases.prompts} x {size.groups[0]} texts of up to {size.thinking} tokens, {len(spent)} steps"
        bench.report.add(WORDS, name, rate, note if name == "whole step" else "")


# ----- TRL


def qwen3_of(policy: MoTPolicy) -> nn.Module:
    """Our text expert in transformers' Qwen3 (tests/test_oracles.py). It has one tensor more, which stays zero."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = policy.network.config
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_bias=True,
            tie_word_embeddings=False,
            bos_token_id=policy.open_id,
            eos_token_id=policy.stop_id,
            pad_token_id=None,  # its embedding would get no gradient, and the stop token needs one
        )
    )
    weights = {n: w for n, w in policy.network.language_model.state_dict().items() if "_moe_gen" not in n}
    for layer in range(config.num_hidden_layers):
        weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    model.load_state_dict(weights, strict=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("o_proj.bias"))
    return model


class TrlSteps:
    """Steps of TRL's `GRPOTrainer` in its own loop, with its defaults but for precision and recomputation."""

    def __init__(self, bench: Comparison, own: OwnSteps):
        import datasets
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        size, self.clock = bench.cases.small, bench.clock
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=own.policy.tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        asked = [f"{OPEN} {prompt_of(size, k)} <|im_end|> {OPEN}" for k in range(own.prompts)]
        expected = [[*given[0].ids.tolist(), own.policy.open_id] for given in own.given]
        assert words(asked)["input_ids"] == expected, "both sides must read the same tokens"
        self.folder = tempfile.TemporaryDirectory()
        self.tokens: list[int] = []

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.tokens.append(sum(map(len, completion_ids)))
            return [reward_of(ids) for ids in completion_ids]

        rate = own.config.train.lr_text
        arguments = trl.GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=own.prompts * own.members,
            num_generations=own.members,
            max_completion_length=size.thinking,
            loss_type="grpo",
            beta=0.0,
            epsilon=own.config.objective.text_clip,
            temperature=1.0,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_grad_norm=own.config.train.grad_clip,
            max_steps=1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in asked])
        self.trainer = trl.GRPOTrainer(
            qwen3_of(own.policy), reward_funcs=reward, args=arguments, train_dataset=rows, processing_class=words
        )

    def in_turn_with(self, own: OwnSteps, rounds: int) -> tuple[list[Spent], list[Spent]]:
        """`rounds` steps of each, one of ours after each of TRL's; the first of both, to warm up, is left out."""
        from transformers import TrainerCallback

        ours: list[Spent] = []
        theirs: list[Spent] = []
        clock, tokens, writing = self.clock, self.tokens, dict[str, float]()

        class InTurn(TrainerCallback):
            began = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                writing.clear()
                self.began = clock.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                whole_s = clock.now() - self.began
                (writing_s,) = writing.values()
                theirs.append(Spent(tokens[-1], writing_s, whole_s - writing_s, whole_s))
                ours.append(own.step())

        self.trainer.add_callback(InTurn())
        self.trainer.args.max_steps = rounds + 1
        with clock.watching(self.trainer, "_generate_and_score_completions", writing):
            self.trainer.train()
        return ours[1:], theirs[1:]


def compare_losses(bench: Comparison, own: OwnSteps, theirs: TrlSteps) -> None:
    """The loss and its gradient's norm on one batch of texts, old scores and advantages, some ratios clipped."""
    episodes = own.write()
    batch = collate(episodes)
    generator = torch.Generator().manual_seed(0)
    mask_BL, shape = batch.actions.mask_BL, batch.actions.mask_BL.shape
    old_BL = batch.behaviour_text_BL + 0.2 * torch.randn(shape, generator=generator)
    advantage_B = torch.randn(len(episodes), generator=generator)

    new = replay(own.policy, batch, image=False)
    old = Scores(old_BL, torch.zeros(shape), ())
    advantages = per_action(advantage_B[:, None], batch.actions)
    loss = unigrpo_loss(batch.actions, new, old, None, advantages, own.objective, episodes=len(episodes))
    assert 0.05 < float(loss.means["text/clip_fraction"]) < 0.95, "the clip range must be seen at work"
    loss.total.backward()
    mine = norm_of(own.policy.network)
    value = loss.total.detach() - advantage_B.mean()  # ours leaves out what has no gradient

    trainer = theirs.trainer
    prompt_ids = torch.stack([torch.cat([e.segments[0].ids, torch.tensor([own.policy.open_id])]) for e in episodes])
    given = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": batch.chunks[0].action_BL,
        "completion_mask": mask_BL.long(),
        "advantages": advantage_B,
        "old_per_token_logps": old_BL,
        "num_items_in_batch": mask_BL.sum(),
    }
    trainer.current_gradient_accumulation_steps = 1
    their_loss = trainer.compute_loss(trainer.model, given)
    their_loss.backward()
    other = norm_of(trainer.model)
    assert mine > 0
    bench.agree(AGAINST, "loss differs", abs(value.item() / their_loss.item() - 1), 1e-5)
    bench.agree(AGAINST, "gradient norm differs", abs(mine / other - 1), 1e-5)


def norm_of(network: nn.Module) -> float:
    """Norm of all gradients, which are then forgotten."""
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return torch.stack(norms).norm().item()
