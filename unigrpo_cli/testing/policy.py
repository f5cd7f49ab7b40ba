"""What training needs of a model, checked on a few short episodes: `check_policy`.

Shape letters: B rows (episodes), L tokens, K noisy copies of each row's image, N image tokens of D numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Scores, step_densities
from unigrpo_cli.algo.rng import normal
from unigrpo_cli.episode import Episode, GivenText, Prompt, TextActions, flatten
from unigrpo_cli.models.policy import Finetune, NoisyImage, TrainablePolicy
from unigrpo_cli.replay import Batch, collate, replay
from unigrpo_cli.rewards.conformance import Check
from unigrpo_cli.rollout import Sampling, read_given, rollout

PROMPTS = ("a red circle", "two blue squares and one green star", "x")
MEMBERS = 2
BASE = "the model under test"


@dataclass(frozen=True)
class Trial:
    """A policy that is ready to train and episodes that it drew.

    Args:
        load: makes the policy anew, with the same weights.
        tolerance: largest difference of log-probabilities and velocities that rounding may make.
    """

    load: Callable[[], TrainablePolicy]
    full: bool
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    tolerance: float

    def fresh(self) -> TrainablePolicy:
        """The policy as it starts, ready to train."""
        return self.load().finetune(
            Finetune(self.full, ("text", "image"), (), 2, 4.0, 0, activation_checkpointing=False,
                     reference_on_host=False, shard_over=1)
        )  # fmt: skip

    @cached_property
    def policy(self) -> TrainablePolicy:
        return moved(self.fresh())

    def draw(self, batch_size: int) -> list[Episode]:
        window = flow.Window(0, min(2, self.sampling.steps))
        sampling = replace(self.sampling, batch_size=batch_size)
        return flatten(rollout(self.policy, self.prompts, MEMBERS, sampling, window, seed=0))

    @cached_property
    def episodes(self) -> list[Episode]:
        return self.draw(len(self.prompts) * MEMBERS)

    @cached_property
    def batch(self) -> Batch:
        return collate(self.episodes, self.policy.device)

    @cached_property
    def own(self) -> Scores:
        return self.scores(self.policy)

    @torch.no_grad()
    def scores(self, policy: TrainablePolicy, copies: int | None = None) -> Scores:
        return replay(policy, self.batch, copies=copies)


def check_policy(
    load: Callable[[], TrainablePolicy],
    *,
    prompts: Sequence[str] = PROMPTS,
    height: int = 32,
    width: int = 32,
    steps: int = 4,
    max_new_tokens: int = 6,
    full: bool = False,
    trained: bool = True,
    tolerance: float = 1e-4,
) -> list[Check]:
    """Check the promises of `models.policy.TrainablePolicy` that training rests on.

    Args:
        load: gives the policy with frozen weights, the same ones at each call; e.g. a family's `load`.
        full: train all weights; else adapters.
        trained: the weights are of a trained model, so the direction of time and velocity shows in its images. It
            cannot be seen in random weights; compare those with another implementation.
        tolerance: largest difference of log-probabilities and velocities that rounding may make.
    """
    sampling = Sampling(True, max_new_tokens, 1.0, height, width, steps, 0.0, "flow", 0.5, 1)
    own = tuple(Prompt(f"{k}", text) for k, text in enumerate(prompts))
    trial = Trial(load, full, own, sampling, tolerance)
    checks = [_drawn_is_replayed, _ratio, _batches, _packed, _reading, _encoded, _gradients, _reference, _saved]
    if trained:
        checks.append(_direction)
    return [_checked(check, trial) for check in checks]


def _checked(check: Callable[[Trial], tuple[bool, str]], trial: Trial) -> Check:
    """An exception breaks a promise too."""
    name = (check.__doc__ or "").rstrip(".")
    try:
        return Check(name, *check(trial))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


@torch.no_grad()
def moved(policy: TrainablePolicy, scale: float = 0.02) -> TrainablePolicy:
    """The policy after a step of noise on all trained weights, so that adapters act and a reference differs."""
    for k, parameter in enumerate(p for own in policy.trainable().values() for p in own):
        size = parameter.float().square().mean().sqrt() + 0.1
        parameter.add_(scale * size * normal(k, *parameter.shape).to(parameter))
    return policy


def _within(seen: float, trial: Trial, what: str) -> tuple[bool, str]:
    return seen <= trial.tolerance, f"{what} differ by up to {seen:.2g}, rounding by {trial.tolerance:g}"


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is not a number."""
    if a.shape != b.shape:
        return float("inf")
    gap = (a.float() - b.float()).abs()
    return float(torch.where(gap.isnan(), torch.inf, gap).max()) if gap.numel() else 0.0


def _difference(a: Scores, b: Scores) -> float:
    pairs = zip((a.log_prob_BL, *a.velocities), (b.log_prob_BL, *b.velocities), strict=True)
    return max(_gap(x, y) for x, y in pairs)


def _drawn_is_replayed(trial: Trial) -> tuple[bool, str]:
    """replay scores each action as the rollout did."""
    scores, batch = trial.own, trial.batch
    text = _gap(scores.log_prob_BL, batch.behaviour_text_BL)
    pairs = zip(batch.actions.images, scores.velocities, strict=True)
    image_BK = torch.cat([flow.log_prob(s.sde, s.x_next_BKND, step_densities(s, v)) for s, v in pairs], dim=1)
    image = _gap(image_BK, batch.behaviour_image_BK)
    return _within(max(text, image), trial, f"log-probabilities (text {text:.2g}, image {image:.2g})")


def _ratio(trial: Trial) -> tuple[bool, str]:
    """before an update the ratio is exactly 1, with and without gradients."""
    with torch.enable_grad():
        with_gradients = replay(trial.policy, trial.batch).detached()
    gap = max(_difference(trial.own, scores) for scores in (trial.scores(trial.policy), with_gradients))
    return gap == 0 or trial.policy.device.type != "cpu", f"two replays differ by {gap:.2g}"


def _batches(trial: Trial) -> tuple[bool, str]:
    """an episode does not depend on the others in its batch, whatever their lengths."""
    for own, other in zip(trial.episodes, trial.draw(1), strict=True):
        for a, b in zip(own.segments, other.segments, strict=True):
            if isinstance(a, TextActions) and isinstance(b, TextActions) and a.ids.tolist() != b.ids.tolist():
                return False, f"prompt {own.prompt.text!r} gets other words in a batch than alone"
    alone = []
    for k, episode in enumerate(trial.episodes):
        with torch.no_grad():
            scores = replay(trial.policy, collate([episode], trial.policy.device))
        text = scores.log_prob_BL[0]
        alone.append(_gap(trial.own.log_prob_BL[k, : len(text)], text))
        alone += [_gap(v[k], w[0]) for v, w in zip(trial.own.velocities, scores.velocities, strict=True)]
    return _within(max(alone), trial, "replays of a row alone and in a batch")


def _packed(trial: Trial) -> tuple[bool, str]:
    """noisy copies in one pass or in several give the same velocities."""
    return _within(_difference(trial.scores(trial.policy, 1), trial.scores(trial.policy, 16)), trial, "velocities")


@torch.no_grad()
def _reading(trial: Trial) -> tuple[bool, str]:
    """text read at once or token by token, padded with anything, leads to the same states and image."""
    policy = trial.policy
    given = [policy.preamble(prompt, True) for prompt in trial.prompts]
    texts = [s for e in trial.episodes[::MEMBERS] for s in e.segments if isinstance(s, TextActions)]
    more = [s.ids.tolist()[:4] for row in given for s in row[-1:] if isinstance(s, GivenText)]
    rows = [torch.tensor([*t.opening, *t.ids.tolist(), *ids]) for t, ids in zip(texts, more, strict=True)]
    length = torch.tensor([len(row) - (k % 2) for k, row in enumerate(rows)])  # ragged even where all are truncated
    found = []
    for filler in (policy.stop_id, policy.open_id):
        ids_BL = torch.full((len(rows), int(length.max()) + 2), filler)
        for row, ids, n in zip(ids_BL, rows, length.tolist(), strict=True):
            row[:n] = ids[:n]
        found.append(policy.forward(read_given(policy, given), ids_BL.to(policy.device), length.tolist()))
    context, states = read_given(policy, given), []
    for k in range(int(length.max())):
        column = torch.stack([row[min(k, len(row) - 1)] for row in rows])[:, None].to(policy.device)
        out = policy.forward(context, column, (k < length).long())
        context = out.context
        assert out.hidden_BLC is not None
        states.append(out.hidden_BLC)
    grid = policy.grid(trial.sampling.height, trial.sampling.width)
    x_BKND = normal(0, len(rows), 1, grid[0] * grid[1], policy.token_dim).to(policy.device)
    image = NoisyImage(x_BKND, torch.full((len(rows), 1), 0.5, device=policy.device), grid)
    v = [policy.forward(c, image=image).velocity_BKND for c in (found[0].context, found[1].context, context)]
    stepwise_BLC = torch.cat(states, 1)
    gaps = [_gap(v[0], v[k]) for k in (1, 2)]  # type: ignore[arg-type]
    for row, n in enumerate(length.tolist()):
        gaps += [_gap(f.hidden_BLC[row, :n], stepwise_BLC[row, :n]) for f in found]  # type: ignore[index]
    return _within(max(gaps), trial, "states or velocities")


def _encoded(trial: Trial) -> tuple[bool, str]:
    """its own texts and pictures can be encoded again."""
    for image in (image for e in trial.episodes for image in e.images):
        latent = trial.policy.encode_pixels(image.pixels[None])
        if latent.shape[1:] != image.latent.shape or latent.dtype != torch.float32 or not latent.isfinite().all():
            return False, f"encode_pixels gives {latent.dtype} of shape {list(latent.shape[1:])}"
    for text in (s.text for e in trial.episodes for s in e.segments if isinstance(s, TextActions)):
        again = trial.policy.decode_text(trial.policy.encode_text(text))
        if again != text:
            return False, f"{text!r} is encoded and decoded to {again!r}"
    return True, "texts come back, latents have their shape"


def _gradients(trial: Trial) -> tuple[bool, str]:
    """each loss gives gradients to the experts that it trains, and to nothing else."""
    policy, names = trial.policy, {id(p): name for name, p in trial.policy.named_parameters()}
    experts = policy.trainable()
    both = {id(p) for p in experts["text"]} & {id(p) for p in experts["image"]}
    lost = [name for name, p in policy.named_parameters() if p.requires_grad and not _is_in(p, experts)]
    if both or lost or not all(experts.values()):
        return (
            False,
            f"trainable weights are not in exactly one expert, e.g. {[names[i] for i in both][:1] or lost[:1]}",
        )

    def reached(text: bool, through: bool) -> set[str]:
        """Experts with a gradient that is not 0."""
        with torch.enable_grad():
            scores = replay(policy, trial.batch, grad_through_context=through)
            total = scores.log_prob_BL.sum() if text else sum((v.sum() for v in scores.velocities), torch.zeros(()))
            own = [p for part in experts.values() for p in part]
            found = dict(zip(map(id, own), torch.autograd.grad(total, own, allow_unused=True), strict=True))
        nonzero = {key for key, g in found.items() if g is not None and bool(g.any())}
        return {expert for expert, part in experts.items() if any(id(p) in nonzero for p in part)}

    for what, wanted, seen in (
        ("the text loss", {"text"}, reached(True, True)),
        ("the image loss", {"text", "image"}, reached(False, True)),
        ("the image loss without grad_through_context", {"image"}, reached(False, False)),
    ):
        if seen != wanted:
            return False, f"{what} trains {' and '.join(sorted(seen)) or 'nothing'}, not {' and '.join(sorted(wanted))}"
    return True, "each loss reaches the experts that it trains"


def _is_in(parameter: Tensor, experts: dict[str, list]) -> bool:
    return any(parameter is p for part in experts.values() for p in part)


def _reference(trial: Trial) -> tuple[bool, str]:
    """the reference is the model before training, while the policy moves."""
    with torch.no_grad():
        start = replay(trial.load(), trial.batch)
        with trial.policy.reference() as reference:
            now = replay(reference, trial.batch)
    gap, distance = _difference(start, now), _difference(trial.own, now)
    if not distance > 10 * gap:
        return False, f"the moved policy differs by {distance:.2g} from its reference, which moved by {gap:.2g}"
    again = _difference(trial.own, trial.scores(moved(trial.fresh())))
    return (
        gap <= trial.tolerance and again == 0,
        f"the reference moved by {gap:.2g}, the policy after it by {again:.2g}",
    )


def _saved(trial: Trial) -> tuple[bool, str]:
    """weights that are saved and loaded score the same."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "saved"
        trial.policy.save(place, BASE)
        policy = trial.fresh() if trial.full else trial.load()
        if trial.full:
            policy.restore(place)
        else:
            policy.load_adapter(place)
        gap = _difference(trial.own, trial.scores(policy))
    return gap == 0, f"scores differ by {gap:.2g} after saving and loading"


@torch.no_grad()
def _direction(trial: Trial) -> tuple[bool, str]:
    """t = 1 is noise, t = 0 is data and v = noise - data: seen on the model's own images, noised again."""
    policy, episodes = trial.load(), trial.episodes
    given = [[s for s in e.segments if not hasattr(s, "latent")] for e in episodes]
    context = read_given(policy, [_as_given(row) for row in given])
    grid = episodes[0].images[-1].grid
    x_BND = torch.stack([e.images[-1].latent for e in episodes]).to(policy.device)
    noise_BND = normal(1, *x_BND.shape).to(policy.device)
    t = 0.7
    t_B1 = torch.full((len(x_BND), 1), t, device=x_BND.device)
    image = NoisyImage(flow.noised(x_BND, noise_BND, t_B1[..., None])[:, None], t_B1, grid)
    v = policy.forward(context, image=image).velocity_BKND
    assert v is not None
    wanted = flow.path_velocity(x_BND, noise_BND)
    error = float((v[:, 0] - wanted).square().mean() / wanted.square().mean())
    return error < 0.5, f"relative square error of v at t = {t}: {error:.2g}; 1 is no better than 0 everywhere"


def _as_given(segments: Sequence[object]) -> tuple:
    """Sampled text as text that is read."""
    found = []
    for s in segments:
        if isinstance(s, TextActions):
            ids = torch.tensor([*s.opening, *s.ids.tolist(), *s.closing])
            s = GivenText("text", s.text, ids)
        found.append(s)
    return tuple(found)
