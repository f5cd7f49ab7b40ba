"""A BAGEL checkpoint through the ordinary commands: generate, rollout, train, eval, resume; its adapter too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import unigrpo

TINY = Path(__file__).parent / "golden" / "bagel_tiny"
SMALL = [
    "--preset=paper",
    "--set=sampling.height=32",
    "--set=sampling.width=48",
    "--set=sampling.max_new_tokens=6",
    "--set=sampling.steps=4",
    "--set=sampling.window_range=[0,3]",
    "--set=eval.steps=2",
]
FEW = [
    "--set=train.prompts_per_step=2",
    "--set=train.minibatches=2",
    "--set=train.group_size=2",
    "--set=train.micro_batch_size=2",
    "--set=train.lora_rank=2",
    "--set=train.lr_text=1e-3",
    "--set=train.lr_image=1e-3",
    "--set=eval.limit=1",
    "--set=eval.rewards=[]",
]
LORA, FULL, NO_DOCTOR = "--set=train.finetune=lora", "--set=train.finetune=full", "--set=doctor.at_start=off"


def _do(*arguments: str | Path) -> dict:
    """The JSON of a command that must succeed."""
    done = unigrpo(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward that no two pictures share; beside it a suite of one prompt."""
    path = tmp_path_factory.mktemp("reward") / "brightness.py"
    path.with_name("suite.txt").write_text("a red cube\n")
    path.write_text(
        "import numpy as np\nfrom unigrpo_cli import reward\n\n\n"
        '@reward("brightness", range=(0, 1))\ndef brightness(images):\n'
        "    return [float(np.asarray(image).mean() / 255) for image in images]\n"
    )
    return path


def _rewarded(plugin: Path) -> list[str | Path]:
    return ["--reward", "brightness", "--plugin", plugin, f"--set=eval.suite={plugin.with_name('suite.txt')}"]


def _trained(base: Path, run: Path, brightness: Path, *settings: str) -> dict:
    """Two steps on a copy of the tiny release: the summary of `train`."""
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("golden.*"))
    reward = [*_rewarded(brightness), *SMALL, *FEW]
    return _do("train", "--model", base, *reward, "--steps=2", *settings, "--out", run)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, brightness: Path) -> dict:
    """A run of adapters in bf16, as its summary; `base` is beside it."""
    place = tmp_path_factory.mktemp("adapted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
        return _trained(place / "base", place / "run", brightness, LORA, "--set=dtype=bfloat16")


def test_adapters_train_and_other_commands_take_them(adapted: dict, tmp_path: Path, brightness: Path) -> None:
    _check(adapted, tmp_path, brightness, "bfloat16")


@pytest.mark.long
def test_all_weights_train_and_other_commands_take_them(tmp_path: Path, brightness: Path) -> None:
    trained = _trained(tmp_path / "base", tmp_path / "run", brightness, FULL, NO_DOCTOR, "--set=dtype=float32")
    _check(trained, tmp_path, brightness, "float32")
    assert _do("train", "--resume", tmp_path / "run", "--plugin", brightness, "--steps=3")["steps"] == 3


def _check(trained: dict, out: Path, brightness: Path, dtype: str) -> None:
    """Ratio exactly 1 at step 0; every other command takes what training left."""
    run, base, checkpoint = (Path(trained["run"]), Path(trained["run"]).parent / "base", Path(trained["checkpoint"]))
    assert trained["ratio_step0_max_abs_log"] == {"text": 0.0, "image": 0.0}
    # Seen: words 0 in both; images 1.2e-7 in fp32 and 6.6e-5 in bf16.
    drift = trained["rollout_drift_max_abs"]
    assert 0 <= drift["text"] < {"float32": 1e-5, "bfloat16": 1e-3}[dtype]
    assert 0 < drift["image"] < {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        assert row["text/grad_norm"] > 0
        assert row["image/grad_norm"] > 0
    assert metrics[1]["image/velocity-mse"] > 0, "both experts moved, so the reference is another"
    lora = dtype == "bfloat16"
    assert (checkpoint / ("adapter_model.safetensors" if lora else "ae.safetensors")).is_file()
    adapted = ["--model", base, "--adapter", checkpoint] if lora else ["--model", checkpoint]
    settings, reward = [*SMALL, f"--set=dtype={dtype}"], _rewarded(brightness)
    before = _do("generate", "a red cube", "--model", base, *settings, "--out", out / "g0")["images"]
    after = _do("generate", "a red cube", *adapted, *settings, "--out", out / "g1")["images"]
    assert Image.open(after[0]["path"]).size == (48, 32)
    assert Image.open(before[0]["path"]).tobytes() != Image.open(after[0]["path"]).tobytes()
    report = _do("eval", *adapted, *reward, *settings, *FEW, "--out", out / "e")
    assert report["scores"]["brightness"]["mean"] == pytest.approx(trained["eval_after"]["brightness"], abs=1e-6)
    rolled = _do("rollout", *adapted, *reward, *settings, "--limit=1", "--group-size=2", "--out", out / "r")
    assert rolled["episodes"] == 2


def test_a_runs_own_sampling_is_how_it_is_sampled(adapted: dict, tmp_path: Path) -> None:
    """`--model RUN` and an adapter of RUN need no size: the run has it. What is typed outranks it."""
    run = ["--model", adapted["run"]]
    adapter = ["--model", Path(adapted["run"]).parent / "base", "--adapter", adapted["checkpoint"]]
    for k, (words, size) in enumerate(
        ((run, (48, 32)), ([*run, "--set=sampling.height=16"], (48, 16)), (adapter, (48, 32)))
    ):
        (image,) = _do("generate", "a cube", *words, "--out", tmp_path / str(k))["images"]
        assert Image.open(image["path"]).size == size


def test_a_moved_base_is_found_again(adapted: dict, tmp_path: Path, brightness: Path) -> None:
    base, run = Path(adapted["run"]).parent / "base", tmp_path / "run"
    shutil.copytree(adapted["run"], run, symlinks=True)
    go_on = ["train", "--resume", run, "--plugin", brightness, "--steps=3"]
    for other, why in (
        (["--model", TINY], "continues with the model the run started from"),
        (["--weights-file", "nonsense.safetensors"], "cannot change in a run"),
    ):
        refused = unigrpo(*go_on, *other)
        assert refused.exit_code == 2
        assert why in refused.stderr
    moved = base.rename(tmp_path / "elsewhere")
    try:
        assert _do(*go_on, NO_DOCTOR, "--model", moved)["steps"] == 3
    finally:
        moved.rename(base)


def test_a_bagel_comes_with_the_papers_preset_at_its_own_size(tmp_path: Path) -> None:
    """Not with the embedded model's 48 pixels."""
    short = ["--set=sampling.max_new_tokens=4", "--set=eval.steps=2"]
    images = _do("generate", "a cube", "--model", TINY, *short, "--out", tmp_path / "a")["images"]
    assert Image.open(images[0]["path"]).size == (256, 256)


def test_edit_answer_and_paint_without_thinking(tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.effect_mandelbrot((90, 61), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(source)
    told = ["--model", TINY, *SMALL]
    edited = _do("generate", "make it green", "--image", source, *told, "--out", tmp_path / "a")["images"][0]
    assert edited["source"] == str(source)
    assert Image.open(edited["path"]).size == (192, 128), "the source's shape, at a size that can be painted"
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    both = [word for path in (tmp_path / "red.png", source) for word in ("--image", path)]
    mixed = _do("generate", "make it green", *both, *told, "--out", tmp_path / "g")["images"][0]
    assert mixed["source"] == [str(tmp_path / "red.png"), str(source)]
    assert Image.open(mixed["path"]).size == (192, 128), "the shape of the last"
    assert Image.open(mixed["path"]).tobytes() != Image.open(edited["path"]).tobytes(), "both are looked at"
    plain = _do("generate", "a cube", "--no-think", *told, "--out", tmp_path / "b")["images"][0]
    assert plain["reasoning"] is None
    said = _do("generate", "what is it?", "--image", source, "--answer", *told, "--out", tmp_path / "c")["answers"]
    assert said[0]["answer"]
    assert (tmp_path / "c" / "answers.json").is_file()
    blind = _do("generate", "what is it?", "--answer", *told, "--out", tmp_path / "d")["answers"]
    assert blind[0]["answer"] != said[0]["answer"], "the picture is looked at"
    guided = _do("generate", "a cube", *told, "--set=eval.guidance_text=4", "--out", tmp_path / "e")["images"][0]
    unguided = _do("generate", "a cube", *told, "--out", tmp_path / "f")["images"][0]
    assert Image.open(guided["path"]).tobytes() != Image.open(unguided["path"]).tobytes()


def test_training_on_edits_from_a_file(tmp_path: Path, brightness: Path) -> None:
    """Each prompt may bring a picture, beside the file; sizes may differ."""
    for k, size in enumerate([(90, 61), (40, 80)]):
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / f"{k}.png")
    rows = [{"prompt": "make it red", "image": "0.png"}, {"prompt": "make it green", "image": ["0.png", "1.png"]}]
    (tmp_path / "edits.jsonl").write_text("\n".join(json.dumps(r) for r in [*rows, {"prompt": "a cube"}]))
    reward = ["--reward", "brightness", "--plugin", brightness]
    told = ["--prompts", tmp_path / "edits.jsonl", "--set=eval.suite=" + str(tmp_path / "edits.jsonl")]
    few = [*SMALL, *FEW, "--set=train.prompts_per_step=3", "--set=train.minibatches=1", LORA, NO_DOCTOR]
    done = _do("train", "--model", TINY, *reward, *told, *few, "--steps=1", "--out", tmp_path / "run")
    assert done["ratio_step0_max_abs_log"] == {"text": 0.0, "image": 0.0}
    (tmp_path / "edits.jsonl").write_text('{"prompt": "x", "image": "gone.png"}')
    refused = unigrpo("generate", "--prompts", tmp_path / "edits.jsonl", "--model", TINY)
    assert refused.exit_code == 2
    assert "edits.jsonl:1: image 'gone.png' is not a file next to" in refused.stderr


def test_what_cannot_be_shown_pictures_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "p.png")
    for extra, says in (
        (["--image", str(tmp_path / "p.png"), "--answer"], "no vision tower"),
        (["--image", "gone.png"], "no picture"),
    ):
        done = unigrpo("generate", "red", *extra, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert says in done.stderr
        assert not (tmp_path / "out").exists()


def test_two_rounds_train_and_are_painted(tmp_path: Path, brightness: Path) -> None:
    """Adapters on two rounds by BAGEL's own way to look; the trained adapter reflects, guided, in evaluation."""
    rounds = ["--set=sampling.program=reflect", "--set=sampling.rounds=2", "--set=sampling.round_max_new_tokens=[6, 4]"]
    settings = [*SMALL, *rounds, "--set=dtype=bfloat16", LORA, NO_DOCTOR]
    run = tmp_path / "run"
    trained = _do("train", "--model", TINY, *_rewarded(brightness), *settings, *FEW, "--steps=1", "--out", run)
    assert trained["ratio_step0_max_abs_log"] == {"text": 0.0, "image": 0.0}
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert row["text/grad_norm"] > 0
    assert row["image/grad_norm"] > 0
    adapted = ["--model", TINY, "--adapter", trained["checkpoint"]]
    told = [*SMALL, "--set=sampling.max_new_tokens=6", "--set=eval.guidance_text=3"]
    (image,) = _do("generate", "a red cube", *adapted, *told, "--rounds", "2", "--out", tmp_path / "g")["images"]
    assert [Image.open(r["path"]).size for r in image["rounds"]] == [(48, 32)] * 2
    assert len({Image.open(r["path"]).tobytes() for r in image["rounds"]}) == 2
