"""Checks of sampled images: noise, stochastic window, time grid, latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.episode import PAINTED, Episode, GivenImage, ImageActions, TextActions, flatten
from unigrpo_cli.run.doctor.findings import OK, Outcome, fault, judged, skipped
from unigrpo_cli.run.doctor.recorder import VelocityCall
from unigrpo_cli.run.doctor.recording import Recording, label

ROUNDED = 0.05  # share of fp32 latents that fit 16 bits; by chance about 1e-4 of them fit fp16
ALIKE = 0.5  # correlation of two noises; below 0.2 for independent noises of 768 numbers
SPREAD = (0.7, 1.4)  # deviation of standard normal noise, as recovered from a step
ROUNDING = 1e-3  # largest difference of an image's latents that are encoded twice, on a GPU
TIME = 1e-6  # largest difference of two times that are meant to be equal


def group_noise(r: Recording) -> Outcome:
    """Initial and step noises, as recovered from the recorded velocities, all differ and are standard normal."""
    names, noises = [], []
    for name, _, image, calls in r.painted():
        names.append(f"the initial noise of {name}")
        noises.append(calls[0].x_ND.flatten().float())
        for j, k in enumerate(image.window.steps):
            if k < len(calls) and calls[k].v_ND.shape == image.before[j].shape:
                step = _transition(image, calls[k].v_ND, image.before[j], k)
                names.append(f"the noise at step {k} of {name}")
                noises.append(((image.after[j] - step.mean) / step.std).flatten().float())
    if len(noises) < 2:
        return skipped("there is only one noise")
    common = min(len(n) for n in noises)  # edited pictures may differ in size
    unit = torch.nn.functional.normalize(torch.stack([n[:common] for n in noises]), dim=1)
    correlation = (unit @ unit.T).fill_diagonal_(0).abs()
    value = float(correlation.max())
    if value > ALIKE:
        a, b = divmod(int(correlation.argmax()), len(noises))
        return fault(f"{names[a]} equals {names[b]} (correlation {value:.2f})", value, ALIKE)
    deviations = [float(n.std()) for n in noises]
    low, high = min(deviations), max(deviations)
    if not (SPREAD[0] <= low and high <= SPREAD[1]):
        return fault(f"noises have deviations from {low:.2f} to {high:.2f}, not 1", high, SPREAD[1])
    return Outcome(OK, value, ALIKE, f"largest correlation of {len(noises)} noises")


def _transition(image: ImageActions, v_ND: Tensor, x_ND: Tensor, k: int) -> flow.Transition:
    t = image.times
    return flow.transition(image.sde, x_ND, v_ND.float(), t[k], t[k + 1], noise_level=image.noise_level, t_second=t[1])


def window(r: Recording) -> Outcome:
    """All episodes have the window of this step, with noise in its steps and in no other."""
    s = r.config.sampling
    rounds: dict[int, set[tuple[int, int]]] = {}
    for _, k, image, _ in r.painted():
        rounds.setdefault(k, set()).add((image.window.start, image.window.size))
    low, high = (0, s.steps - 1) if s.window == "all" else s.window_range
    wanted = s.steps - 1 if s.window == "all" else s.window_size
    if not r.scores_steps:
        low = high = wanted = 0
    for recorded in rounds.values():
        if len(recorded) > 1:
            shown = ", ".join(str(w) for w in sorted(recorded))
            return fault(f"{len(recorded)} windows in one round (start, size): {shown}", len(recorded), 1)
        (start, size) = next(iter(recorded))
        last = start + size - 1
        if not (low <= start and last < high and size == wanted):
            seen = f"noise at steps {start} to {last}; the settings ask for {wanted} steps within [{low}, {high})"
            return fault(seen, 1, 1)
    for name, _, image, calls in r.painted():
        noisy, window = _noisy_steps(image, calls), image.window
        if noisy != set(window.steps):
            last = window.start + window.size - 1
            seen = f"{name} has noise at steps {sorted(noisy)}, its window is {window.start} to {last}"
            return fault(seen, 1, 0)
    if not wanted:
        return Outcome(OK, 0, 0, f"no step has noise in all {len(r.episodes)} episodes: final latents are scored")
    steps = "; ".join(f"steps {start} to {start + size - 1}" for ((start, size),) in rounds.values())
    return Outcome(OK, 1, 1, f"{steps} in all {len(r.episodes)} episodes")


def _noisy_steps(image: ImageActions, calls: Sequence[VelocityCall]) -> set[int]:
    """The steps that do not end where Euler's step would."""
    ends = [call.x_ND for call in calls[1:]] + [image.latent]
    noisy = set()
    for k, (call, end) in enumerate(zip(calls, ends, strict=True)):
        if k + 1 < len(image.times):
            straight = flow.euler(call.x_ND.float(), call.v_ND.float(), image.times[k], image.times[k + 1])
            std = _transition(image, call.v_ND, call.x_ND.float(), k).std.mean()
            if float((end - straight).abs().mean()) > 0.1 * float(std) + 1e-4:
                noisy.add(k)
    return noisy


def schedule(r: Recording) -> Outcome:
    """The network received the recorded times, in rollout and in replay."""
    s = r.config.sampling
    u = torch.linspace(1, 0, s.steps + 1, dtype=torch.float64)
    for _, _, image, calls in r.painted():
        shift = s.shift or r.policy.shift(image.grid, s.steps)
        grid = shift * u / (1 + (shift - 1) * u)
        if len(calls) != s.steps:
            return fault(f"{len(calls)} network calls for sampling.steps={s.steps}", len(calls), s.steps)
        received = torch.tensor([call.t for call in calls], dtype=torch.float64)
        for what, times, wanted in (("the network received", received, grid[:-1]), ("recorded is", image.times, grid)):
            if len(times) != len(wanted):
                return fault(f"{what} {len(times)} times, the grid has {len(wanted)}", len(times), len(wanted))
            gaps = (times.double() - wanted).abs()
            at = int(gaps.argmax())
            if gaps[at] > TIME:
                seen = f"{what} t = {float(times[at]):.4f} at step {at}, the grid has {float(wanted[at]):.4f}"
                return fault(seen, float(gaps[at]), TIME)
    for name, b, image, steps, replayed_calls in r.replayed_images():
        window = list(image.window.steps)
        before = torch.tensor([call.t for call in replayed_calls]) if replayed_calls else steps.t_BK[b].cpu()
        sampled = torch.cat([image.times[window], image.times[[k + 1 for k in window]]])
        replayed = torch.cat([before, steps.t_next_BK[b].cpu()])
        gap = float((sampled - replayed).abs().max()) if len(sampled) == len(replayed) else math.inf
        if gap > TIME:
            shown = [" ".join(f"{t:.4f}" for t in times[: len(window)].tolist()) for times in (sampled, replayed)]
            return fault(f"{name}: sampled at t = {shown[0]}, replayed at {shown[1]}", gap, TIME)
    return Outcome(OK, 0.0, TIME, f"{s.steps} calls from 1 to 0")


def latents(r: Recording) -> Outcome:
    """Latents are finite fp32 numbers, join, and are those that the network received in rollout and replay."""
    largest, where = 0.0, ""
    for name, _, image, calls in r.painted():
        for what, x in (("before", image.before), ("after", image.after), ("received", calls[-1].x_ND)):
            if x.dtype != torch.float32 or not x.isfinite().all():
                return fault(f"{name}: {what} is {x.dtype} or not finite")
            share = max(float((x.to(d).float() == x).float().mean()) for d in (torch.bfloat16, torch.float16))
            if share > largest:
                largest, where = share, f"{what} of {name}"
    if largest > ROUNDED:
        return fault(f"{largest:.0%} of numbers fit 16 bits ({where}): they were rounded", largest, ROUNDED)
    for name, _, image, calls in r.painted():
        if not torch.equal(image.after[:-1], image.before[1:]):
            return fault(f"{name}: a step does not begin where the one before ended")
        received = [calls[k].x_ND for k in image.window.steps if k < len(calls)]
        if received and not _same(received, image.before):
            return fault(f"{name}: the network received other latents than are recorded")
    for name, b, image, steps, replayed_calls in r.replayed_images():
        for what, x, y in (("before", steps.x_BKND, image.before), ("after", steps.x_next_BKND, image.after)):
            if not torch.equal(x[b].cpu(), y):
                return fault(f"{name}: replay scores other latents ({what}) than are recorded")
        if replayed_calls and not _same([call.x_ND for call in replayed_calls], image.before):
            return fault(f"{name}: the network received other latents in replay than are recorded")
    return Outcome(OK, largest, ROUNDED, "share of numbers that fit 16 bits")


def _same(received: Sequence[Tensor], recorded: Tensor) -> bool:
    found = torch.stack(list(received))
    return found.shape == recorded.shape and torch.equal(found, recorded)


def looks(r: Recording) -> Outcome:
    """What an episode looks at is its own latest image, as `sampling.show_images` says."""
    how, count, gap = r.config.sampling.show_images, 0, 0.0
    for episode in r.episodes:
        latest: ImageActions | None = None
        for segment in episode.segments:
            if isinstance(segment, ImageActions):
                latest = segment
            elif isinstance(segment, GivenImage) and segment.role == PAINTED:
                count += 1
                if latest is None or not torch.equal(segment.pixels, latest.pixels):
                    return fault(f"{label(episode)} looks at an image that is not its latest")
                (wanted,) = r.policy.show([latest], how)
                for a, b in ((segment.latent, wanted.latent), (segment.view, wanted.view)):
                    if (a is None) != (b is None) or (a is not None and b is not None and a.shape != b.shape):
                        return fault(f"{label(episode)} looks at its image in another way than {how}")
                    if a is not None and b is not None and a.numel():
                        gap = max(gap, float((a.double() - b.double()).abs().max()))
    if not count:
        return skipped("no episode looks at its images")
    return judged(gap, ROUNDING, f"{count} images looked at, each the episode's latest")


def repeats(r: Recording) -> Outcome:
    """The same seed gives the same episodes."""
    if r.rollout.again is None:
        return skipped("the short examination samples once")
    limit = 0.0 if r.policy.device.type == "cpu" else 1e-3
    gap = max(_difference(a, b) for a, b in zip(r.episodes, flatten(r.rollout.again), strict=True))
    if gap > limit:
        return fault("the same seed gives other episodes", gap, limit)
    return Outcome(OK, gap, limit, "the same seed gives the same episodes")


def _difference(a: Episode, b: Episode) -> float:
    words = [[s.ids.tolist() for s in e.segments if isinstance(s, TextActions)] for e in (a, b)]
    if words[0] != words[1] or len(a.images) != len(b.images):
        return math.inf
    return max(float((x.latent - y.latent).abs().max()) for x, y in zip(a.images, b.images, strict=True))
