"""`rewards score`, `calibrate`, `list`, `test`, and the contract suite that third parties import."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tests.commands import unigrpo
from unigrpo_cli import Options, RewardBatch, RewardOutput, reward
from unigrpo_cli.errors import RewardError
from unigrpo_cli.io.pictures import save_png
from unigrpo_cli.rewards.agreement import agreement, kappa, ranks, spearman
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_cli.testing import Check, assert_reward_contract, check_reward

REDNESS = str(Path(__file__).parents[1] / "examples" / "custom_reward" / "redness.py")


def _json(*arguments: object) -> dict[str, Any]:
    result = unigrpo(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _refused(result: Result, code: int, says: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (result.exit_code, len(errors)) == (code, 1), (result.output, result.exception)
    assert says in errors[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures of the shapes world and a .jsonl file of their prompts."""
    rows = []
    for k, sample in enumerate(example_samples(8)):
        Image.fromarray(sample.pixels).save(tmp_path / f"{k}.png")
        rows.append(json.dumps(dict(sample.metadata) | {"image": f"{k}.png", "reasoning": sample.reasoning}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


# ----- score


def test_score_of_named_pictures(tmp_path: Path) -> None:
    for name, red in (("red.png", 255), ("half.jpg", 128)):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / name, quality=100)
    images = ("--image", tmp_path / "red.png", "--image", tmp_path / "half.jpg")
    found = _json("rewards", "score", "redness", "--plugin", REDNESS, *images, "--prompt", "red")
    assert [row["scores"]["redness"] for row in found["images"]] == pytest.approx([1.0, 128 / 255], abs=0.02)
    assert [row["prompt"] for row in found["images"]] == ["red", "red"]
    shown = unigrpo("rewards", "score", "redness", "--plugin", REDNESS, *images, "--prompt", "a", "--prompt", "b")
    assert shown.stdout.splitlines()[0] == f"{tmp_path / 'red.png'}: redness 1.0000"
    _refused(
        unigrpo("rewards", "score", "redness", "-p", REDNESS, *images, *("--prompt", "a") * 3), 2, "3 prompts for 2"
    )


def test_score_of_a_prompts_file(pictures: Path) -> None:
    found = _json("rewards", "score", "geneval@mode=strict,plan", "--prompts", pictures / "prompts.jsonl")
    assert [row["scores"] for row in found["images"]] == [{"geneval": 1.0, "plan": 1.0}] * 8
    assert all(row["components"]["geneval"]["official"] == 1.0 for row in found["images"])


def test_a_picture_of_ours_brings_its_prompt_along(tmp_path: Path) -> None:
    sample = example_samples(1)[0]
    save_png(sample.pixels, tmp_path / "x.png", {"prompt": sample.prompt, "reasoning": sample.reasoning})
    score = ("rewards", "score", "geneval,plan,fidelity", "--image", tmp_path / "x.png")
    (row,) = _json(*score)["images"]
    assert row["prompt"] == sample.prompt
    assert row["scores"] == {"geneval": 1.0, "plan": 1.0, "fidelity": 1.0}
    _refused(unigrpo(*score, "--prompt", "a red heart"), 3, "reasoning")  # the plan was for another prompt
    (row,) = _json("rewards", "score", "geneval", "--image", tmp_path / "x.png", "--prompt", "a white heart")["images"]
    assert row["scores"]["geneval"] == 0.0


def test_no_opinion_is_null_and_a_missing_prompt_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    plugin = tmp_path / "shy.py"
    plugin.write_text(
        "from unigrpo_cli import reward\n\n\n@reward('shy')\ndef shy(prompts):\n    return [None] * len(prompts)\n"
    )
    result = unigrpo("rewards", "score", "shy", "-p", plugin, "--image", tmp_path / "x.png", "--json")
    assert json.loads(result.stdout)["images"][0]["scores"] == {"shy": None}
    assert "has no prompt inside" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "geneval", "--image", "x.png", "--prompt", "words of no grammar"], "needs metadata 'include'"),
        (["score", "clip", "--image", "x.png", "--prompt", "a"], "say which model"),
        (["score", "plan", "--image", "x.png", "--prompt", "a red circle"], "reasoning"),
    ],
)
def test_what_a_reward_lacks_is_named(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    _refused(unigrpo("rewards", *arguments), 3, says)


def test_a_reward_slower_than_allowed_fails_its_test() -> None:
    assert unigrpo("rewards", "test", "clean", "--max-ms", 0).exit_code == 3


# ----- calibrate


def test_ranks_share_ties_and_spearman_is_worked_by_hand() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    a = np.array([1.0, 2.0, 3.0, 4.0])
    # rank differences 0, 1, 1, 2 in (1, 3, 2, 4) and (1, 2, 3, 4) squared: 0 + 1 + 1 + 0; 1 - 6 * 2 / (4 * 15)
    assert spearman(a, np.array([1.0, 9.0, 4.0, 70.0])) == pytest.approx(0.8)
    assert spearman(a, -(a**3)) == pytest.approx(-1.0)
    assert spearman(a, np.ones(4)) is None


def test_kappa_is_worked_by_hand() -> None:
    yes = np.array([True] * 5 + [False] * 5)
    also = np.array([True] * 4 + [False] * 4 + [True] * 2)
    # equal 4 + 3 of 10; by chance .5 * .6 + .5 * .4
    assert kappa(yes, also) == pytest.approx((0.7 - 0.5) / 0.5)
    assert kappa(yes, ~yes) == pytest.approx(-1.0)
    assert kappa(np.ones(4, bool), np.ones(4, bool)) is None


def test_agreement_leaves_out_who_has_no_opinion() -> None:
    a = np.array([0.9, 0.1, np.nan, 0.5, 0.2])
    b = np.array([0.6, 0.2, 1.0, 0.4, np.nan])
    report = agreement(a, b, ["x", "y", "x", "y", "y"], 0.5)
    assert (report["n"], report["abstained"]) == (3, [1, 1])
    assert report["agreement"] == pytest.approx(2 / 3)  # 0.5 reaches 0.5, 0.4 does not
    assert report["mean_difference"] == pytest.approx((0.3 - 0.1 + 0.1) / 3)
    assert report["per_tag"]["x"]["mean_difference"] == pytest.approx(0.3)
    assert report["per_tag"]["y"]["n"] == 2
    nothing = agreement(np.array([np.nan]), np.array([1.0]), ["x"], 0.5)
    assert (nothing["n"], nothing["spearman"], nothing["kappa"]) == (0, None, None)


def test_calibrate_reports_on_a_folder(pictures: Path) -> None:
    where = ("--images", pictures, "--prompts", pictures / "prompts.jsonl")
    report = _json("rewards", "calibrate", "geneval@mode=strict", "clip@model=embedded", *where)
    assert report["n"] == 8
    assert sum(row["n"] for row in report["per_tag"].values()) == 8
    assert "counting" in report["per_tag"]
    same = _json("rewards", "calibrate", "clean", "clean", *where)
    assert same["spearman"] == pytest.approx(1.0)
    assert (same["agreement"], same["mean_difference"]) == (1.0, 0.0)
    less = _json("rewards", "calibrate", "clean", "clip@model=embedded", "--prompts", pictures / "prompts.jsonl")
    back = _json("rewards", "calibrate", "clip@model=embedded", "clean", "--prompts", pictures / "prompts.jsonl")
    assert less["mean_difference"] == pytest.approx(-back["mean_difference"])
    shown = unigrpo("rewards", "calibrate", "clean", "clean", *where)
    assert "Spearman" in shown.stdout
    assert [line.split()[0] for line in shown.stdout.splitlines()[2:]][-1] == "all"


# ----- list


def test_the_list_shows_source_version_range_and_state(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from unigrpo_cli import hookimpl\n\n\n@hookimpl\ndef unigrpo_register_rewards(registry):\n"
        "    registry.add('bad', object)\n"
    )
    rows = {r["name"]: r for r in _json("rewards", "list", "--plugins-dir", tmp_path)["rewards"]}
    assert rows["geneval"]["origin"] == "unigrpo-cli"
    assert rows["geneval"]["range"] == [0, 1]
    assert rows["remote"]["range"] is None
    assert rows["bad"]["state"].startswith("broken: ")
    shown = unigrpo("rewards", "list", "--plugins-dir", tmp_path).stdout
    assert shown.splitlines()[1].split()[:3] == ["reward", "range", "from"]
    (line,) = [line for line in shown.splitlines() if line.split()[0] == "bad"]
    assert line.split()[1:3] == ["bad", "broken:"], "its origin has no version"


# ----- the contract suite


class Settings(Options):
    level: float = 1.0


class Steady:
    name, range, needs, Options = "steady", (0.0, 1.0), frozenset({"image"}), Settings

    def __init__(self, options: Settings):
        self.options = options

    def score(self, batch: RewardBatch) -> Any:
        return [self.options.level * float(image.mean()) / 255 for image in batch.pixels]


@reward("bright", range=(0, 1))
def bright(pixels):
    return [float(image.mean()) / 255 for image in pixels]


def _found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_the_suite_takes_a_name_a_class_or_a_function() -> None:
    names = [[check.name for check in assert_reward_contract(one)] for one in ("clean", Steady, bright)]
    assert all(a == b for a, b in pairwise(names))
    assert len(names[0]) == 11
    assert_reward_contract("redness", plugin=REDNESS)
    assert_reward_contract(Steady, options={"level": 0.5})
    with pytest.raises(AssertionError, match=r"stays in its declared range: 4.* to 5.* in \[0, 1\]"):
        assert_reward_contract(Steady, options={"level": 10.0})
    with pytest.raises(RewardError, match="no option 'levle': did you mean level"):
        assert_reward_contract(Steady, options={"levle": 2.0})
    with pytest.raises(RewardError, match="no `score` method"):
        assert_reward_contract(object)


def test_a_class_of_a_known_name_is_the_one_that_is_checked() -> None:
    class Clean(Steady):
        name = "clean"

        def score(self, batch: RewardBatch) -> list[float]:
            return [7.0 + k for k in range(len(batch))]

    assert not _found(check_reward(Clean), "stays in its declared range").ok


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        (lambda batch: [0.5] * max(1, len(batch)), "handles an empty batch"),
        (lambda batch: [0.5] * len(batch) if len(batch) else 0.0, "handles an empty batch"),
        (lambda batch: RewardOutput([0.5] * (len(batch) or 2)), "handles an empty batch"),
        (lambda batch: ["0.5"] * len(batch), "answers with one number per sample"),
        (lambda batch: [0.5 + 0j] * len(batch), "answers with one number per sample"),
        (lambda batch: [None if k else 0.5 for k in range(len(batch))], "does not depend on the batch"),
    ],
)
def test_the_suite_finds_each_fault(answer: Any, broken: str) -> None:
    faulty = type("Faulty", (Steady,), {"name": "faulty", "score": lambda self, batch: answer(batch)})
    assert not _found(check_reward(faulty), broken).ok
    assert _found(check_reward(Steady), broken).ok


def _swallowing(answer: Callable[[Any], Any], instead: Any) -> Callable[[Any, Any], Any]:
    def score(self: Any, batch: RewardBatch) -> Any:
        try:
            return answer(batch)
        except Exception:
            return [instead] * len(batch)

    return score


FAULT = {"raise": lambda batch: 1 / 0, "key": lambda batch: [m["grade"] for m in batch.metadata]}


@pytest.mark.parametrize("fault", FAULT)
@pytest.mark.parametrize("instead", [0.0, 1.0, 0.5])
def test_a_reward_that_hides_its_failure_is_found(fault: str, instead: float) -> None:
    hiding = type("Hiding", (Steady,), {"name": "hiding", "score": _swallowing(FAULT[fault], instead)})
    check = _found(check_reward(hiding), "tells samples apart")
    assert not check.ok
    assert f"{instead:.4g} for all 8 samples" in check.seen


def _bright_image(batch: RewardBatch) -> list[float]:
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in batch.images]


def _bright_array(batch: RewardBatch) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in batch.images]


def _bright_pixels(batch: RewardBatch) -> list[float]:
    return [float(pixels.mean()) / 255 for pixels in batch.pixels]


@pytest.mark.parametrize("reads", [_bright_image, _bright_array, _bright_pixels])
@pytest.mark.parametrize(("instead", "ok"), [(0.0, False), (0.3, False), (None, True)])
def test_a_score_for_an_unreadable_picture_is_found(reads: Any, instead: float | None, ok: bool) -> None:
    hiding = type("Hiding", (Steady,), {"name": "hiding", "score": _swallowing(reads, instead)})
    checks = check_reward(hiding)
    assert _found(checks, "does not score an unreadable picture").ok is ok
    assert _found(checks, "tells samples apart").ok, "it works on whole pictures"


def test_one_score_per_call_is_found() -> None:
    def mean_of_call(self: Any, batch: RewardBatch) -> list[float]:
        return [float(np.mean([image.mean() for image in batch.pixels])) / 255] * len(batch)

    for facts in ({"batch_size": 4}, {"batch_size": 4, "scope": "group"}, {"batch_size": 3}):
        check = _found(check_reward(type("Mean", (Steady,), {"score": mean_of_call} | facts)), "tells samples apart")
        assert not check.ok
        assert "for each call" in check.seen


@pytest.mark.parametrize("column", ["pixels", "reasoning", "prompts", "metadata"])
def test_the_samples_differ_for_rewards_of_every_kind(column: str) -> None:
    """One that only reads text gets texts that differ; the pictures differ in what they should score."""

    def length(self: Any, batch: RewardBatch) -> list[float]:
        return [(zlib.crc32(str(value).encode()) % 1000) / 1000 for value in getattr(batch, column)]

    hashed = type("Hashed", (Steady,), {"score": length, "needs": frozenset()})
    assert _found(check_reward(hashed), "tells samples apart").ok


def test_refusing_an_empty_batch_is_fine_and_a_run_never_asks_it() -> None:
    def refuses(self: Any, batch: RewardBatch) -> list[float]:
        assert len(batch), "asked about nothing"
        return [0.5] * len(batch)

    assert _found(check_reward(type("R", (Steady,), {"score": refuses})), "handles an empty batch").ok, (
        "an exception is as good"
    )


def test_a_failing_teardown_and_slowness_are_faults() -> None:
    class Clinging(Steady):
        def teardown(self) -> None:
            raise RuntimeError("cannot let go")

    check = _found(check_reward(Clinging), "can be torn down")
    assert not check.ok
    assert "cannot let go" in check.seen
    assert not _found(check_reward(Steady, max_seconds=0.0), "is fast enough").ok
    assert _found(check_reward(Steady, max_seconds=60.0), "is fast enough").ok


def test_a_group_reward_is_excused_from_being_the_same_alone() -> None:
    def ranked(self: Any, batch: RewardBatch) -> list[float]:
        means = np.array([image.mean() for image in batch.pixels])
        return [float((means < m).mean()) for m in means]

    alone = type("Ranked", (Steady,), {"score": ranked})
    assert not _found(check_reward(alone), "does not depend on the batch").ok
    grouped = type("Ranked", (Steady,), {"score": ranked, "scope": "group"})
    assert_reward_contract(grouped)
