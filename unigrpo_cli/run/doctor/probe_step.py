"""Evidence: a small rollout, its rewards, its replay and a trial update, all by the functions that training calls.

They are called through the module `train`, under the names that it uses itself, so whatever is wrong with them
there is wrong here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli import train
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Objective, step_densities
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, Prompt, TextActions
from unigrpo_cli.errors import DivergedError, RewardError
from unigrpo_cli.evaluate import sample_of, samples_of
from unigrpo_cli.parallel.workers import sequential
from unigrpo_cli.rewards.batch import Sample
from unigrpo_cli.rewards.loaded import LoadedReward
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor.findings import Drawn, Evidence, Judged, Moved, Pushes, Replayed
from unigrpo_cli.run.doctor.recorder import Account, Recorder
from unigrpo_cli.run.doctor.unreadable import PARTS, unreadable
from unigrpo_cli.run.memory.plan import Plan
from unigrpo_cli.train import MicroBatch
from unigrpo_cli.training.optimizer import make_optimizer
from unigrpo_cli.training.state import TrainState

TRIAL_RATE = 1e-3  # of the trial update: large enough to be seen through bf16
UNDONE = 2**28  # bytes of trained weights up to which a copy is kept, to go back to


class Gradients(torch.optim.Optimizer):
    """An optimizer that looks at gradients and moves nothing."""

    def __init__(self, policy: Any):
        parameters = [p for own in policy.trainable().values() for p in own]
        super().__init__([{"params": parameters, "lr": 0.0, "full_lr": 0.0}], {})
        self.found: list[list[Tensor | None]] = []

    def step(self, closure: Any = None) -> Any:
        """Keep them."""
        params = self.param_groups[0]["params"]
        self.found.append([None if p.grad is None else p.grad.detach().clone() for p in params])

    def largest(self) -> dict[int, float | None]:
        """Largest magnitude over all updates by the parameter's id; None where there was no gradient."""
        largest: dict[int, float | None] = {}
        for k, parameter in enumerate(self.param_groups[0]["params"]):
            own = [g for update in self.found if (g := update[k]) is not None]
            largest[id(parameter)] = max((float(g.abs().max()) for g in own), default=None)
        return largest


def gather(
    state: TrainState,
    prompts: Sequence[Prompt],
    rewards: Scorer,
    config: Config,
    *,
    thorough: bool,
    plan: Plan | None = None,
) -> Evidence:
    """Draw, score, replay and update on trial. Weights are as before afterwards, unless there are too many to keep.

    Args:
        state: its optimizer is not used.
        thorough: also what takes further rollouts or asks rewards again; may change weights it cannot keep.

    Raises:
        RewardError: when a reward fails, as it would in training.
    """
    small = trial_config(config)
    chosen = train.prompts_for(prompts, small, state.step)
    witness = Recorder(state.policy)
    trouble: dict[str, str] = {}
    with _generators_untouched(), _undisturbed(rewards), sequential():
        drawn, scored = _draw(witness, chosen, rewards, small, state.step, thorough)
        judged = _judge(drawn, scored, rewards, small, state.step, thorough)
        replayed = _replay(witness, drawn, judged, small, trouble)
        moved = None
        if replayed is not None and "gradients" not in trouble:
            moved = _move(witness, chosen, replayed, rewards, small, state.step, thorough, trouble)
    return Evidence(small, state, rewards, thorough, drawn, judged, replayed, moved, plan, trouble)


def trial_config(config: Config) -> Config:
    """The run's settings with the doctor's few episodes, in several micro-batches."""
    d, t = config.doctor, config.train
    members = min(d.members, t.group_size)
    updates = t.minibatches if d.prompts % t.minibatches == 0 else 1
    size = max(1, min(t.micro_batch_size, d.prompts * members // max(2, updates)))
    own = {
        "prompts_per_step": d.prompts,
        "group_size": members,
        "updates": updates,
        "epochs": 1,
        "micro_batch_size": size,
        "old_scores": "replay",
    }
    drawn = config.sampling.model_copy(update={"compile": False})  # the witness sees calls, not a compiled graph's
    return config.model_copy(update={"train": t.model_copy(update=own), "sampling": drawn})


# ----- episodes and their rewards


def _draw(
    witness: Recorder, prompts: list[Prompt], rewards: Scorer, config: Config, step: int, thorough: bool
) -> tuple[Drawn, dict]:
    """The first half of a training step, and in a thorough examination two rollouts more."""
    sampling, window = train.train_sampling(config), train.window_of(config, step)
    members, seed = config.train.group_size, derive(config.seed, "doctor", step)
    scoring = rewards.start(step=step, overlap=config.reward.overlap)

    def drawn(seed: int, **more: Any) -> list[Group]:
        return train.rollout(witness.as_policy, prompts, members, sampling, window, seed, **more)

    groups = drawn(seed, on_episodes=lambda new: scoring.add([sample_of(e, step) for e in new]))
    accounts, _ = witness.take()
    scoring.submit([s.id for s in samples_of(groups, step)])
    scored = scoring.finish()
    again, other = (drawn(seed), drawn(derive(seed, "other"))) if thorough else (None, None)
    witness.take()
    return Drawn(groups, window, accounts, again, other), scored


def _judge(drawn: Drawn, scored: dict, rewards: Scorer, config: Config, step: int, thorough: bool) -> Judged:
    samples = samples_of(drawn.groups, step)
    seed = derive(config.seed, "doctor", step)
    advantage_B = train.advantages(scored, rewards, config, len(drawn.groups), seed)
    alone, again, contrasts, unread = {}, {}, {}, {}
    for opened in rewards.active("train"):
        name, own = opened.alias, scored[opened.alias]

        def ask(rows: Sequence[Sample], opened: LoadedReward = opened) -> list[float]:
            batch = rewards.prepare(rows, step=step, split="train")
            return opened.collect(opened.submit(batch)).scores.tolist()

        known = own.scores[own.valid]
        if len(known) and (known == known[0]).all():
            contrasts[name] = _of_contrasts(ask, samples)
        if opened.is_remote and not thorough:
            continue
        if opened.scores_alone:
            alone[name] = [ask([sample])[0] for sample in samples]
        again[name] = ask(samples)
        unread[name] = [unreadable(opened, samples[0], part, rewards.limits.timeout_s) for part in PARTS]
    return Judged(scored, advantage_B, alone, again, contrasts, unread)


def _of_contrasts(ask: Any, samples: Sequence[Sample]) -> list[float]:
    """Scores of pictures, words and prompts that have little to do with each other; of those that can be judged."""
    first, last = samples[0], samples[-1]
    noise = np.random.default_rng(0).integers(0, 256, first.pixels.shape, dtype=np.uint8)
    black, white = np.zeros_like(first.pixels), np.full_like(first.pixels, 255)
    shown = [replace(first, pixels=pixels) for pixels in (black, white, noise, last.pixels[::-1].copy())]
    asked = [replace(s, prompt=last.prompt, metadata=last.metadata) for s in samples[:2]]
    said = [replace(first, reasoning=text) for text in (last.reasoning, "", "other words")] if first.reasoning else []
    scores = []
    for sample in (*shown, *asked, *said):
        try:
            scores += ask([sample])
        except RewardError:
            continue  # it says that it cannot judge this one, which is an answer of its own
    return scores


@contextmanager
def _undisturbed(rewards: Scorer) -> Iterator[None]:
    """Rewards remember how often they abstained; what the doctor asks is left out of that, and stops nothing."""
    policy, recent = rewards.limits, [list(r.recent) for r in rewards.rewards]
    rewards.limits = replace(policy, max_abstain=1.0)
    try:
        yield
    finally:
        rewards.limits = policy
        for opened, before in zip(rewards.rewards, recent, strict=True):
            opened.recent.clear()
            opened.recent.extend(before)


@contextmanager
def _generators_untouched() -> Iterator[None]:
    """Global generators as they were: training draws from none of them, but a reward may."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


# ----- replay and gradients


def _replay(
    witness: Recorder, drawn: Drawn, judged: Judged, config: Config, trouble: dict[str, str]
) -> Replayed | None:
    """The second half of a training step up to its gradients; what fails in it is a finding, not a stop."""
    episodes, objective = drawn.episodes, train.objective_of(config)
    try:
        fixed = train.score_old_and_reference(witness.as_policy, episodes, config, objective)
        shares = train.with_advantages(fixed, judged.advantage_B)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, AssertionError) as error:
        trouble["replay"] = f"{type(error).__name__}: {error}"
        return None
    accounts, of_reference = witness.take()
    batches = [m for share in shares for m in share]
    looked = Gradients(witness)
    terms: list[dict[str, float]] = []
    by_term: dict[str, dict[str, float]] = {}
    pushes: list[Pushes] = []
    own = _with_own_advantages(shares)
    try:
        pushes += [_pushes(m, objective) for share in own for m in share]
        by_term |= _by_term(witness, own[0][0], objective, config)
        for share in own:
            terms.append(train.update(_trial(witness, looked), share, objective, config).terms)
    except torch.OutOfMemoryError:
        raise
    except (DivergedError, ValueError, RuntimeError, LookupError, TypeError, AssertionError) as error:
        trouble["gradients"] = f"{type(error).__name__}: {error}"
    finally:
        _forget_gradients(witness)
    witness.take()
    largest = looked.largest() if looked.found else {}
    named = {n: largest.get(id(p)) for n, p in witness.policy.named_parameters() if p.requires_grad}
    rows = [rows_of(m, episodes) for m in batches]
    return Replayed(shares, rows, accounts, of_reference, terms, named, by_term, pushes)


def _pushes(m: MicroBatch, objective: Objective) -> Pushes:
    """The derivative of the loss by what the policy says of each action; the network is not asked again."""
    plain = replace(objective, penalty="none", text_kl=0.0)
    said = m.old_scores.log_prob_BL.clone().requires_grad_()
    velocities = tuple(v.clone().requires_grad_() for v in m.old_scores.velocities)
    new = replace(m.old_scores, log_prob_BL=said, velocities=velocities)
    actions, rows = m.batch.actions, len(m.advantage_B)
    loss = train.unigrpo_loss(actions, new, m.old_scores, m.reference, m.advantage_B, plain, episodes=rows)
    by_text, *by_image = torch.autograd.grad(loss.total, [said, *velocities], allow_unused=True, materialize_grads=True)
    scale_B1 = -rows / m.advantage_B[:, None]
    words_B1 = actions.mask_BL.sum(dim=1, keepdim=True)
    text_BL = torch.where(actions.mask_BL, scale_B1 * words_B1 * by_text, torch.nan)
    along = [torch.zeros(rows, 0)]
    for steps, v, by_v in zip(actions.images, velocities, by_image, strict=False):  # no velocities: words alone
        log_prob_BK = flow.log_prob(steps.sde, steps.x_next_BKND, step_densities(steps, v))
        (up,) = torch.autograd.grad(log_prob_BK.sum(), v)
        along.append((scale_B1 * (by_v * up).sum(dim=(-2, -1)) / up.square().sum(dim=(-2, -1))).cpu())
    return Pushes(text_BL.detach().cpu(), torch.cat(along, dim=1).detach())


def _by_term(witness: Recorder, m: MicroBatch, objective: Objective, config: Config) -> dict[str, dict[str, float]]:
    """Largest gradients by term and expert: one term may have lost its way while the other still has one."""
    found: dict[str, dict[str, float]] = {}
    plain = replace(objective, penalty="none", text_kl=0.0)
    terms = {"text": replace(plain, image_weight=0.0), "image": replace(plain, text_weight=0.0)}
    for term, alone in terms.items():
        if not (alone.text_weight or alone.image_weight):
            continue
        looked = Gradients(witness)
        try:
            train.update(_trial(witness, looked), [m], alone, config)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        finally:
            _forget_gradients(witness)
        largest = looked.largest() if looked.found else {}
        found[term] = {
            expert: max((largest.get(id(p)) or 0.0 for p in own), default=0.0)
            for expert, own in witness.trainable().items()
        }
    return found


def _trial(witness: Recorder, optimizer: torch.optim.Optimizer) -> TrainState:
    return TrainState(witness.as_policy, cast(torch.optim.AdamW, optimizer))


def _with_own_advantages(shares: list[list[MicroBatch]], scale: float = 1.0) -> list[list[MicroBatch]]:
    """Advantages of both signs and growing size, so that no two episodes cancel and no reward decides."""
    own = []
    for share in shares:
        micro, at = [], 0
        for m in share:
            k = torch.arange(at, at + len(m.advantage_B), device=m.advantage_B.device)
            micro.append(replace(m, advantage_B=scale * (1 - 2.0 * (k % 2)) * (1 + k / 8)))
            at += len(k)
        own.append(micro)
    return own


def _forget_gradients(witness: Recorder) -> None:
    for _, parameter in witness.policy.named_parameters():
        parameter.grad = None


def rows_of(m: MicroBatch, episodes: Sequence[Episode]) -> list[int]:
    """The episode behind each row of a micro-batch, by its recorded latents, or its words where there are none."""
    mask, rows = m.batch.actions.mask_BL.cpu(), []
    ids_BL = torch.cat([turn.action_BL for turn in m.batch.turns], dim=1).cpu()
    for b in range(len(m.advantage_B)):
        own = m.batch.actions.images[0].x_BKND[b].cpu() if m.batch.actions.images else None
        said = ids_BL[b][mask[b]].tolist()

        def apart(k: int, own: Tensor | None = own, said: list[int] = said) -> tuple[float, bool]:
            """Orders episodes by how unlike the row they are."""
            images = episodes[k].images
            gap = 0.0
            if own is not None and images:
                same = images[0].before.shape == own.shape
                gap = float((images[0].before.double() - own.double()).abs().mean()) if same else float("inf")
            words = [i for s in episodes[k].segments if isinstance(s, TextActions) for i in s.ids.tolist()]
            return gap, words != said

        rows.append(min(range(len(episodes)), key=apart))
    return rows


# ----- after an update


def _move(
    witness: Recorder,
    prompts: list[Prompt],
    replayed: Replayed,
    rewards: Scorer,
    config: Config,
    step: int,
    thorough: bool,
    trouble: dict[str, str],
) -> Moved | None:
    """One update on trial, what it does to policy and reference, and a training step from there."""
    policy, objective = witness.policy, train.objective_of(config)
    trained = [p for own in policy.trainable().values() for p in own]
    small = sum(p.numel() * p.element_size() for p in trained) <= UNDONE
    if not trained or not (small or thorough):
        trouble["no update"] = "the trained weights are too many to go back to" if trained else "nothing is trained"
        return None
    start = [p.detach().clone() for p in trained] if small else None
    rates = {"lr_text": TRIAL_RATE, "lr_image": TRIAL_RATE, "warmup": 0, "weight_decay": 0.0}
    fast = config.model_copy(update={"train": config.train.model_copy(update=rates)})
    first, share = replayed.batches[0], replayed.shares[0]
    try:
        optimizer = make_optimizer(policy, fast)
        train.update(_trial(witness, optimizer), _with_own_advantages([share])[0], objective, fast)
        del optimizer
        reference_moved, distance = _apart(policy, first, config)
        still = Gradients(policy)
        train.update(_trial(witness, still), _with_own_advantages([share], 0.0)[0], objective, fast)
        outward = None
        if start is not None:
            pulls = zip(still.found[0], trained, start, strict=True)
            outward = sum(float((g * (p.detach() - q)).sum()) for g, p, q in pulls if g is not None)
        pull = max((x for x in still.largest().values() if x is not None), default=0.0)
        trial = replace(_trial(witness, Gradients(policy)), step=step)
        done = train.training_step(trial, prompts, rewards, config, rescore=True)
        return Moved(reference_moved, distance, pull, outward, done)
    except torch.OutOfMemoryError:
        raise
    except (DivergedError, ValueError, RuntimeError, LookupError, TypeError, AssertionError) as error:
        trouble["update"] = f"{type(error).__name__}: {error}"
        return None
    finally:
        _forget_gradients(witness)
        witness.take()
        if start is not None:
            with torch.no_grad():
                for parameter, before in zip(trained, start, strict=True):
                    parameter.copy_(before)


@torch.no_grad()
def _apart(policy: Any, m: MicroBatch, config: Config) -> tuple[float, float]:
    """How far the reference's scores are from those it gave before, and from the policy's present ones.

    Scored exactly as `train.replay_fixed` does. Both are 0 where there is no reference.
    """
    if m.reference is None:
        return 0.0, 0.0
    objective = train.objective_of(config)
    paints, words = objective.image_weight > 0, objective.text_kl > 0
    now = train.replay(policy, m.batch, grad_through_context=config.objective.grad_through_context, image=paints)
    with policy.reference() as beginning:
        again = train.replay(beginning, m.batch, image=paints, text=words)
    return difference(again, m.reference, words), difference(again, now, words)


def difference(a: Any, b: Any, words: bool) -> float:
    """Largest difference of two scores in velocities and, with `words`, in log-probabilities."""
    pairs = [(x, y) for x, y in zip(a.velocities, b.velocities, strict=True)]
    pairs += [(a.log_prob_BL, b.log_prob_BL)] if words else []
    return max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)


def accounts_of(replayed: Replayed) -> list[tuple[Account, MicroBatch, list[int]]]:
    """Each micro-batch with what the network saw of it and its episodes."""
    return list(zip(replayed.accounts, replayed.batches, replayed.rows, strict=False))
