"""Image actions: the time grid, the stochastic window, the transition kernel, its log-probability.

One function, `step`, both draws and scores: given noise it draws the next latent, given the next latent it
scores it, through the same lines in the same dtype.

Log-probabilities here are *means* over the latent's elements, as in Flow-GRPO;
their ratio is therefore the D-th root of the true one, and clip ranges of 1e-6 to 1e-4 only make sense so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SDES = ("flow", "dance", "cps")
WINDOWS = ("all", "fixed", "random", "sliding")


def time_grid(steps: int, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Times t_T of a sampler with `steps` network calls: T = steps + 1 points from 1 down to 0.

    t = shift * u / (1 + (shift - 1) * u) for u evenly spaced. BAGEL counts points, we count calls: its
    "25 timesteps" are `steps=24`.

    Raises:
        ValueError: when `steps` < 1 or `shift` <= 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"time_grid needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).to(dtype)


def noised(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The straight path of flow matching (arXiv 2210.02747, 2209.03003): x_t = (1 - t) x_0 + t noise."""
    return (1 - t) * x_0 + t * noise


def path_velocity(x_0: Tensor, noise: Tensor) -> Tensor:
    """The velocity of that path at any t, dx_t/dt = noise - x_0: what a network learns to predict at x_t."""
    return noise - x_0


def logit_normal_times(normal: Tensor, shift: float) -> Tensor:
    """Times from standard normal numbers z: t = sigmoid(z), then the shift of the sampler's grid.

    Logit-normal times teach the middle of the path, where velocities are hardest to predict, and the shift moves them
    to where the sampler spends its steps (arXiv 2403.03206, sections 3.1 and 5.3.2). Shift s of sigmoid(z) is
    s u / (1 + (s - 1) u) = sigmoid(z + ln s).

    Raises:
        ValueError: when `shift` <= 0.
    """
    if shift <= 0:
        raise ValueError(f"logit_normal_times needs shift > 0, got {shift}")
    return torch.sigmoid(normal + math.log(shift))


@dataclass(frozen=True)
class Window:
    """The contiguous steps that are stochastic, `start .. start + size - 1`; all others are Euler steps."""

    start: int
    size: int

    @property
    def steps(self) -> range:
        return range(self.start, self.start + self.size)


def sde_window(
    kind: str, *, steps: int, size: int, within: tuple[int, int], uniform: float = 0.0, turn: int = 0
) -> Window:
    """The stochastic window of one rollout, shared by all members of every group in it.

    Sharing matters: windows drawn per sample put noise at different steps of the members that are compared,
    which swamps the group baseline (reported collapse: algorithm notes in docs/algorithm.md).

    Args:
        kind: "all" every step but the last, which ends at t = 0 and would leave its noise in the picture;
            "fixed" starts at `within[0]`; "random" a uniformly drawn start (paper: [0, 5], size 3);
            "sliding" moves one step later at every `turn` and begins again at the end (MixGRPO).
        within: half-open range [lo, hi) of steps that the window may cover.
        uniform: a draw from [0, 1), used by "random" only.
        turn: how often a sliding window has moved, used by "sliding" only.

    Raises:
        ValueError: when the window does not fit.
    """
    if kind not in WINDOWS:
        raise ValueError(f"unknown window {kind!r}; choose one of {', '.join(WINDOWS)}")
    if kind == "all":
        if steps < 2:
            raise ValueError(f"window 'all' leaves out the last step, so it needs steps >= 2, got {steps}")
        return Window(0, steps - 1)
    lo, hi = within
    if not (lo >= 0 and size >= 1 and lo + size <= hi <= steps):
        raise ValueError(
            f"a window of size {size} in steps [{lo}, {hi}) does not fit a sampler of {steps} steps; "
            "choose 0 <= lo, lo + size <= hi <= steps"
        )
    starts = hi - size - lo + 1
    if kind == "fixed":
        return Window(lo, size)
    if kind == "random":
        return Window(lo + min(int(uniform * starts), starts - 1), size)
    return Window(lo + turn % starts, size)


@dataclass(frozen=True)
class Transition:
    """The Gaussian p(x_next | x_t) of one or more steps: mean like x, standard deviation broadcastable."""

    mean: Tensor
    std: Tensor


def transition(
    sde: str, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, *, noise_level: float, t_second: Tensor
) -> Transition:
    """The stochastic step of a flow (paper eq 3), in the dtype of its arguments.

    "flow" (Flow-GRPO; the paper): sigma_t = a sqrt(t / (1 - t)), where at t = 1 the t in (1 - t) is the
    second point of the grid;

        mean = x (1 + sigma^2 / (2t) dt) + v (1 + sigma^2 (1 - t) / (2t)) dt,    std = sigma sqrt(-dt).

    "dance" (DanceGRPO): the same with sigma_t = a. "cps" (Flow-CPS): std = t_next sin(a pi / 2) and the mean
    recombines the data and noise estimates so that the total noise is exactly t_next; no excess noise stays.

    The order of operations is that of the official Flow-GRPO code, so fp32 results are equal to the bit
    (tests/golden).

    Args:
        x, v: latent and velocity, [..., N, D].
        t, t_next: times, shaped to broadcast against x; t > t_next.
        noise_level: a.
        t_second: the grid's second point, a scalar tensor.
    """
    dt = t_next - t
    if sde == "cps":
        std = t_next * math.sin(noise_level * math.pi / 2)
        clean, noise = data_estimate(x, v, t), x + (1 - t) * v
        return Transition((1 - t_next) * clean + (t_next**2 - std**2).sqrt() * noise, std)
    if sde == "flow":
        sigma = (t / (1 - torch.where(t == 1, t_second, t))) ** 0.5 * noise_level
    elif sde == "dance":
        sigma = torch.full_like(t, noise_level)
    else:
        raise ValueError(f"unknown sde {sde!r}; choose one of {', '.join(SDES)}")
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return Transition(mean, sigma * (-dt) ** 0.5)


def data_estimate(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 as one step sees it: x_t = (1 - t) data + t noise and v = noise - data, so data = x_t - t v."""
    return x - t * v


def log_prob(sde: str, x_next: Tensor, p: Transition) -> Tensor:
    """Mean over (N, D) of the log-density of `x_next`.

    For "cps" the density's scale is left out, as its authors do: minus the mean squared distance.
    """
    square = (x_next - p.mean) ** 2
    if sde == "cps":
        return -square.mean(dim=(-2, -1))
    density = -square / (2 * p.std**2) - torch.log(p.std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=(-2, -1))


@dataclass(frozen=True)
class Action:
    """One image action: where it led, how probable that was (mean over elements), and the density itself."""

    x_next: Tensor
    log_prob: Tensor
    p: Transition


def step(
    sde: str,
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    noise_level: float,
    t_second: Tensor,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> Action:
    """Draw the next latent with `noise` (standard normal, like x), or score the given `x_next`.

    Raises:
        ValueError: unless exactly one of `noise` and `x_next` is given.
    """
    if (noise is None) == (x_next is None):
        raise ValueError("give step() either noise, to draw an action, or x_next, to score one")
    p = transition(sde, x, v, t, t_next, noise_level=noise_level, t_second=t_second)
    if x_next is None:
        assert noise is not None
        x_next = p.mean + p.std * noise
    return Action(x_next, log_prob(sde, x_next, p), p)


def euler(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """The deterministic step: x + v dt."""
    return x + v * (t_next - t)


def log_ratio(sde: str, x_next: Tensor, new: Transition, old: Transition) -> Tensor:
    """log r = log p_new(x_next) - log p_old(x_next) per element, [..., N, D]; its mean over (N, D) is the log-ratio.

    Computed from the difference of the means, so that no large terms cancel: with e = (x_next - mu_old)/s,
    log r = e d - d^2 / 2, d = (mu_new - mu_old)/s. For "cps", whose log-probability has no scale, s is 1 and the
    factor 2 of its square appears.
    """
    if sde == "cps":
        d = new.mean - old.mean
        return 2 * (x_next - old.mean) * d - d**2
    d = (new.mean - old.mean) / old.std
    return (x_next - old.mean) / old.std * d - d**2 / 2


def ratio_norm(x_next: Tensor, new: Transition, old: Transition) -> Tensor:
    """RatioNorm (paper eq 4-5): log r~ per element, [..., N, D]; its mean over (N, D) is the log-ratio.

    The paper writes std * (log r + |mu_old - mu_new|^2 / (2 std^2)). That is identically
    mean(e * (mu_new - mu_old)) with e = (x_next - mu_old) / std: exactly 0 at the first update and free of
    cancellation. It is returned per element, so that positions can be weighted.
    """
    return (x_next - old.mean) / old.std * (new.mean - old.mean)


def latent_kl(new: Transition, reference: Transition) -> Tensor:
    """KL between two steps of equal deviation: mean over (N, D) of (mu_new - mu_ref)^2 / (2 std^2)."""
    return ((new.mean - reference.mean) ** 2 / (2 * new.std**2)).mean(dim=(-2, -1))


def velocity_mse(v: Tensor, v_reference: Tensor) -> Tensor:
    """Velocity penalty (paper eq 8): mean over (N, D) of (v - v_ref)^2, with no weight in t.

    The exact KL weighs it by w_t proportional to (1 - t)/t and so nearly vanishes at high noise, which is
    where the window is; that is why the paper replaces it. The paper does not say mean or sum: mean, as
    both reproductions do (docs/decisions/0003).
    """
    return ((v - v_reference) ** 2).mean(dim=(-2, -1))
