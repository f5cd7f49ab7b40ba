"""Checks of sampled images: noise, stochastic window, time grid, latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.episode import Episode, ImageActions, TextActions, flatten
from unigrpo_cli.run.doctor.findings import OK, Outcome, fault, skipped
from unigrpo_cli.run.doctor.recorder import VelocityCall
from unigrpo_cli.run.doctor.recording import Recording, label

ROUNDED = 0.05  # share of fp32 latents that fit 16 bits; by chance about 1e-4 of them fit fp16
ALIKE = 0.5  # correlation of two noises; below 0.2 for independent noises of 768 numbers
SPREAD = (0.7, 1.4)  # deviation of standard normal noise, as recovered from a step
TIME = 1e-6  # largest difference of two times that are meant to be equal


def group_noise(r: Recording) -> Outcome:
    """Initial and step noises, as recovered from the recorded velocities, all differ and are standard normal."""
    names, noises = [], []
    for episode in r.episodes:
        image, calls = episode.images[-1], r.image_calls(episode)
        names.append(f"the initial noise of {label(episode)}")
        noises.append(calls[0].x_ND.flatten().float())
        for j, k in enumerate(image.window.steps):
            if k < len(calls) and calls[k].v_ND.shape == image.before[j].shape:
                step = _transition(image, calls[k].v_ND, image.before[j], k)
                names.append(f"the noise at step {k} of {label(episode)}")
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
    recorded = {(i.window.start, i.window.size) for e in r.episodes for i in e.images}
    if len(recorded) > 1:
        shown = ", ".join(str(w) for w in sorted(recorded))
        return fault(f"{len(recorded)} windows in one rollout (start, size): {shown}", len(recorded), 1)
    start, size = recorded.pop()
    low, high = (0, s.steps - 1) if s.window == "all" else s.window_range
    wanted = s.steps - 1 if s.window == "all" else s.window_size
    last = start + size - 1
    if not (low <= start and last < high and size == wanted):
        seen = f"noise at steps {start} to {last}; the settings ask for {wanted} steps within [{low}, {high})"
        return fault(seen, 1, 1)
    for episode in r.episodes:
        noisy = _noisy_steps(episode.images[-1], r.image_calls(episode))
        if noisy != set(range(start, last + 1)):
            seen = f"{label(episode)} has noise at steps {sorted(noisy)}, its window is {start} to {last}"
            return fault(seen, 1, 0)
    return Outcome(OK, 1, 1, f"steps {start} to {last} in all {len(r.episodes)} episodes")


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
    grid = s.shift * u / (1 + (s.shift - 1) * u)
    for episode in r.episodes:
        image, calls = episode.images[-1], r.image_calls(episode)
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
    for trace, m, b, episode in r.replayed_rows():
        image, steps = episode.images[-1], m.batch.actions.images[-1]
        window = list(image.window.steps)
        calls_at = [call.t for call in trace.calls if call.row == b][-len(window) :]
        before = torch.tensor(calls_at) if calls_at else steps.t_BK[b].cpu()
        sampled = torch.cat([image.times[window], image.times[[k + 1 for k in window]]])
        replayed = torch.cat([before, steps.t_next_BK[b].cpu()])
        gap = float((sampled - replayed).abs().max()) if len(sampled) == len(replayed) else math.inf
        if gap > TIME:
            shown = [" ".join(f"{t:.4f}" for t in times[: len(window)].tolist()) for times in (sampled, replayed)]
            return fault(f"{label(episode)}: sampled at t = {shown[0]}, replayed at {shown[1]}", gap, TIME)
    return Outcome(OK, 0.0, TIME, f"{s.steps} calls from 1 to 0")


def latents(r: Recording) -> Outcome:
    """Latents are finite fp32 numbers, join, and are those that the network received in rollout and replay."""
    largest, where = 0.0, ""
    for episode in r.episodes:
        image, calls = episode.images[-1], r.image_calls(episode)
        for name, x in (("before", image.before), ("after", image.after), ("received", calls[-1].x_ND)):
            if x.dtype != torch.float32 or not x.isfinite().all():
                return fault(f"{label(episode)}: {name} is {x.dtype} or not finite")
            share = max(float((x.to(d).float() == x).float().mean()) for d in (torch.bfloat16, torch.float16))
            if share > largest:
                largest, where = share, f"{name} of {label(episode)}"
    if largest > ROUNDED:
        return fault(f"{largest:.0%} of numbers fit 16 bits ({where}): they were rounded", largest, ROUNDED)
    for episode in r.episodes:
        image, calls = episode.images[-1], r.image_calls(episode)
        if not torch.equal(image.after[:-1], image.before[1:]):
            return fault(f"{label(episode)}: a step does not begin where the one before ended")
        received = [calls[k].x_ND for k in image.window.steps if k < len(calls)]
        if not _same(received, image.before):
            return fault(f"{label(episode)}: the network received other latents than are recorded")
    for trace, m, b, episode in r.replayed_rows():
        image, steps = episode.images[-1], m.batch.actions.images[-1]
        for name, x, y in (("before", steps.x_BKND, image.before), ("after", steps.x_next_BKND, image.after)):
            if not torch.equal(x[b].cpu(), y):
                return fault(f"{label(episode)}: replay scores other latents ({name}) than are recorded")
        received = [call.x_ND for call in trace.calls if call.row == b][-len(image.before) :]
        if received and not _same(received, image.before):
            return fault(f"{label(episode)}: the network received other latents in replay than are recorded")
    return Outcome(OK, largest, ROUNDED, "share of numbers that fit 16 bits")


def _same(received: Sequence[Tensor], recorded: Tensor) -> bool:
    found = torch.stack(list(received))
    return found.shape == recorded.shape and torch.equal(found, recorded)


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
    return float((a.images[-1].latent - b.images[-1].latent).abs().max()) if words[0] == words[1] else math.inf
