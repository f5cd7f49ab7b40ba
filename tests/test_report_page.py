"""The page of `unigrpo report` in Chromium, opened from disk with the network blocked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, chromium, needs_browser
from commands import unigrpo
from made_run import DENOMINATOR, HOSTILE, LENGTH, made_run, made_trace

from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import load_config
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.report.build import write_report
from unigrpo_cli.report.runs import read_runs
from unigrpo_cli.report.serve import ReportServer
from unigrpo_cli.rollout import rollout
from unigrpo_cli.run.setup import load_policy
from unigrpo_cli.suites import training_prompts
from unigrpo_cli.training.schedule import prompts_for, window_of

pytestmark = needs_browser
PICTURES = os.environ.get("UNIGRPO_PICTURES")
"""A directory for screenshots, to look at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one setting and a run of another."""
    directory = tmp_path_factory.mktemp("runs")
    warnings = {k: ["entropy text"] for k in (3, 4)}
    made_run(directory / "a", seed=0, warnings=warnings)
    made_run(directory / "b", seed=1)
    made_run(directory / "rounds", rounds=2, settings=("train.lr_text=5e-4",))
    write_report(read_runs([directory]), directory / "report.html")
    return directory / "report.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    pages = []

    def page(hash: str = "", **options: Any) -> Page:
        pages.append(Page(browser, report, hash=hash, **options))
        return pages[-1]

    yield page
    for own in pages:
        assert own.trouble == []
        own.close()


def test_the_way_through_all_four_levels(opened: Any) -> None:
    """Search, overlay, step, sort, episode, token, denoising step, formula: by clicks, as a user would."""
    own = opened()
    page = own.page
    assert page.locator("#runs tbody tr").count() == 3
    page.fill("#search", "entropy")
    assert page.locator(".chart").count() == 1
    page.wait_for_selector(".chart .plot canvas, .chart .plot .bk-Figure")
    page.click('#runs a:has-text("3 steps") >> nth=0')
    own.level("step")
    assert own.text("h1") == "Step 6"
    page.click('.ticks a:has-text("3")')
    page.wait_for_selector('h1:has-text("Step 3")')
    page.click('button:has-text("spread")')
    page.wait_for_selector('button[aria-pressed="true"]:has-text("spread")')
    spreads = page.locator(".group header .chip .num").all_inner_texts()
    assert [float(s) for s in spreads] == sorted(map(float, spreads), reverse=True)
    page.click('[data-group="0"] [data-member="2"]')
    own.level("episode")
    page.hover('[data-segment="1"] [data-action="3"]')
    assert own.text("#side h3") == "“ b2”"
    page.click('[data-segment="2"] [data-action="1"]')
    page.wait_for_selector('[data-large="1"] canvas')
    page.click("#to-formula")
    own.level("formula")
    assert own.text("h1") == "Denoising step 2"


def test_numbers_of_a_token_and_of_a_step(opened: Any) -> None:
    """What the page shows is what the trace holds, and its own arithmetic ends at the recorded share of the loss."""
    episode = made_trace(3).groups[0].episodes[1]
    text, image = episode.segments[1], episode.segments[2]
    own = opened("#run=a&step=3&group=0&member=1&segment=1&action=2")
    assert own.number('[data-number="ratio"]') == pytest.approx(math.exp(text.log_ratio_L[2]), rel=1e-6)
    assert own.number('[data-number="change"]') == pytest.approx(float(text.change_L[2]), rel=1e-5)
    assert own.number('[data-number="push"]') == pytest.approx(float(text.change_L[2]) * episode.advantage, rel=1e-5)
    (cut,) = np.flatnonzero(text.clipped_L)
    for k in (2, cut):
        own.page.evaluate(f"go({{ ...place(), segment: 1, action: {k}, view: 'formula' }})")
        own.page.wait_for_selector(f'#main[data-level="formula"] .soft:has-text("token {k} of")')
        excess = math.expm1(float(text.log_ratio_L[k]))
        gain = min(excess * episode.advantage, max(-0.2, min(0.2, excess)) * episode.advantage)
        assert (gain != excess * episode.advantage) == (k == cut), "the clip binds for one of them"
        assert own.number("#recomputed") == pytest.approx(-gain / (DENOMINATOR * LENGTH), rel=1e-5)
        assert own.number("#recomputed") == pytest.approx(own.number("#recorded"), rel=1e-4)

    own.page.evaluate("location.hash = '#run=a&step=3&group=0&member=1&segment=2&action=1'")
    own.page.wait_for_selector('[data-large="1"]')
    assert own.number('[data-number="update_log_ratio"]') == pytest.approx(float(image.update.log_ratio_K[1]), rel=1e-6)
    largest = float(np.abs(image.after.log_ratio_KN).max())
    assert own.number("#map-mean") == pytest.approx(float(image.after.log_ratio_KN[1].mean()), abs=largest / 2**16)
    own.page.select_option("#map", "update_velocity_change")
    own.page.wait_for_selector('[data-map="update_velocity_change"]')
    assert own.number("#map-mean") == pytest.approx(float(image.update.velocity_change_KN[1].mean()), rel=1e-3)
    own.page.click("#to-formula")
    own.level("formula")
    assert own.number("#recomputed") == pytest.approx(float(image.loss_K[1]), rel=1e-4)


def test_the_page_equals_the_weights_of_the_checkpoint(browser: Any, small_model: Path, tmp_path: Path) -> None:
    """One training step by the command; then its episodes drawn again and scored by the weights that it saved."""
    small = ["train.prompts_per_step=2", "train.group_size=3", "train.minibatches=1", "eval.limit=1", "threads=1"]
    small += ["doctor.at_start=off", "train.trace_every=1", "train.lr_image=1e-3", "reward.names=['jpeg']"]
    small += ["eval.steps=1", "eval.rewards=[]", "sampling.steps=4", "sampling.window_range=[0, 3]"]
    settings = [part for setting in small for part in ("--set", setting)]
    trained = unigrpo("train", "--steps", 1, "--model", small_model, *settings, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    assert f"unigrpo report {tmp_path / 'run'}" in trained.output
    assert unigrpo("report", tmp_path / "run", "--out", tmp_path / "r.html").exit_code == 0

    config = load_config(overrides=small)
    before, after = load_policy(str(small_model), None, config), load_policy(str(tmp_path / "run"), None, config)
    prompts = prompts_for(training_prompts(config.prompts), config, 0)
    seed, window = derive(config.seed, "step", 0), window_of(config, 0)
    groups = rollout(before, prompts, 3, train_sampling(config), window, seed)
    batch = collate([groups[1].episodes[2]], before.device)
    with torch.no_grad():
        old, new = (replay(policy, batch) for policy in (before, after))
    length = int(batch.actions.mask_BL.sum())
    change_L = (new.log_prob_BL - old.log_prob_BL)[batch.actions.mask_BL]
    steps = batch.actions.images[0]
    x, x_next, t, t_next = (v[0, 1].double() for v in (steps.x_BKND, steps.x_next_BKND, steps.t_BK, steps.t_next_BK))
    sigma = config.sampling.noise_level * (t / (1 - t)).sqrt()  # by hand: eq 3, eq 4 and 5
    drift, pull = sigma**2 / (2 * t) * (t_next - t), (1 + sigma**2 * (1 - t) / (2 * t)) * (t_next - t)
    mean, mean_old = (x * (1 + drift) + p.velocities[0][0, 1].double() * pull for p in (new, old))
    log_ratio_N = ((x_next - mean_old) / (sigma * (t - t_next).sqrt()) * (mean - mean_old)).mean(dim=-1)

    own = Page(browser, tmp_path / "r.html", hash="#step=1&group=1&member=2&segment=1&action=1")
    assert own.page.locator('[data-segment="1"] .token').count() == length
    assert own.number('[data-number="change"]') == pytest.approx(float(change_L[1]), rel=1e-3, abs=1e-6)
    assert own.number('[data-number="ratio"]') == 1.0  # of the only update
    own.page.evaluate("location.hash = '#step=1&group=1&member=2&segment=2&action=1'")
    own.page.wait_for_selector('[data-large="1"]')
    assert own.number('[data-number="after_log_ratio"]') == pytest.approx(float(log_ratio_N.mean()), rel=1e-3)
    tolerance = float(log_ratio_N.abs().max()) / 2**14
    assert own.number("#map-mean") == pytest.approx(float(log_ratio_N.mean()), abs=tolerance)
    assert own.trouble == []
    own.close()


def test_keys_and_links(opened: Any) -> None:
    own = opened("#run=a&step=3&group=1&member=3")
    page = own.page

    def at() -> dict[str, str]:
        return dict(part.split("=") for part in page.evaluate("location.hash.slice(1)").split("&") if part)

    page.keyboard.press("ArrowRight")  # the last member of a group: the next group follows
    page.wait_for_function("location.hash.includes('group=2')")
    assert at() == {"run": "a", "step": "3", "group": "2", "member": "0"}
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_function("location.hash.includes('step=6')")
    page.reload()
    own.level("episode")
    assert "Step 6" in own.text(".soft")
    assert at() == {"run": "a", "step": "6", "group": "2", "member": "0"}
    page.keyboard.press("Enter")
    own.level("formula")
    page.keyboard.press("Escape")
    own.level("episode")
    page.keyboard.press("Escape")
    own.level("step")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("location.hash.includes('step=3')")
    page.keyboard.press("Escape")
    own.level("runs")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_text_of_prompts_stays_text(opened: Any) -> None:
    """No element, no alert (the fixture would see it), no hidden control character."""
    own = opened()
    for hash, level in (("#run=a&step=3", "step"), ("#run=a&step=3&group=1&member=0", "episode")):
        own.page.evaluate(f"location.hash = {hash!r}")
        own.level(level)
        shown = own.page.locator("#main").inner_text()
        assert "<img src=x onerror=alert(1)> \\x1b[31mred\\x1b[0m \\u202eltr </script>" in shown
        assert own.page.locator('img[src="x"]').count() == 0
        assert not set("\x1b\u202e") & set(shown)
    assert HOSTILE not in shown
    assert own.text('[data-segment="1"] .tokens') == "a star <b> b2■"


def test_rounds_are_shown_in_order(opened: Any) -> None:
    own = opened("#run=rounds&step=3&group=0&member=0")
    kinds = own.page.locator(".segment[data-segment] h2").all_inner_texts()
    assert kinds == ["Given", "Text", "Image"] * 2
    own.page.click('[data-segment="5"] [data-action="0"]')
    own.page.click("#to-formula")
    own.level("formula")
    assert own.number("#recomputed") == pytest.approx(own.number("#recorded"), rel=1e-4)  # the mean is over both rounds


def test_seeds_become_a_band_and_differences_are_listed(opened: Any) -> None:
    own = opened()
    assert own.page.locator(".legend span").all_inner_texts() == ["setting 1: 2 seeds", "rounds"]
    assert "mean of 2 seeds" in own.text("#scores")
    keys = own.page.locator("#differences table >> nth=0").locator("td:first-child").all_inner_texts()
    assert keys == ["seed", "train.lr_text"]
    assert "entropy text" in own.text("#warnings")
    own.page.click('#warnings a:has-text("3")')
    own.level("step")


def test_a_served_page_says_why_it_cannot_be_drawn_and_recovers(browser: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", traced=(1,))
    metrics = (run / "metrics.jsonl").read_text()
    server = ReportServer([tmp_path])
    with server, ThreadPoolExecutor(1) as thread, ExitStack() as at_end:
        at_end.callback(server.stop)
        thread.submit(server.serve_forever, 0.02)
        own = Page(browser, server.url, hash="#run=run&step=1")
        followed = own.text("#footer")
        (run / "metrics.jsonl").write_text("rubbish\n")
        own.page.evaluate("follow()")
        assert "metrics.jsonl, line 1" in own.text("#footer")
        (run / "metrics.jsonl").write_text(metrics)
        made_run(tmp_path / "later", traced=(2,))
        damaged = tmp_path / "later" / "traces" / "step_000002" / "trace.json"
        trace = damaged.read_text()
        damaged.write_text("{}")
        own.page.evaluate("follow()")
        assert own.text("#footer") == followed
        own.page.evaluate("go({ run: 'later', step: 2 })")
        own.page.wait_for_selector('.note:has-text("damaged trace")')
        damaged.write_text(trace)
        own.page.evaluate("show()")
        own.page.wait_for_selector('h1:has-text("Step 2")')
        own.close()


@pytest.mark.parametrize(
    ("width", "theme"),
    [(390, "dark"), *(pytest.param(*own, marks=pytest.mark.long) for own in ((1280, "dark"), (390, "light")))],
)
def test_every_level_fits_and_every_picture_has_words(opened: Any, width: int, theme: str) -> None:
    place = "#run=a&step=3&group=0&member=1&segment=2&action=1"
    own = opened(place, width=width, theme=theme)
    page = own.page
    for name, hash in {
        "episode": place,
        "formula": f"{place}&view=formula",
        "step": "#run=a&step=3",
        "runs": "#",
    }.items():
        page.evaluate(f"location.hash = {hash!r}")
        own.level(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert page.evaluate("[...document.images].every((image) => image.alt)")
        assert page.evaluate("[...document.querySelectorAll('canvas, svg')].every((c) => c.closest('[aria-label]'))")
        if PICTURES:
            page.screenshot(path=Path(PICTURES) / f"{name}_{width}_{theme}.png", full_page=True)
