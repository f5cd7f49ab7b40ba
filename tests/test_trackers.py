"""Trackers get what metrics.jsonl has, a resumed run continues its own, and one that fails stops nothing."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tests.chaos import SETTINGS, write_inputs
from tests.commands import unigrpo
from tools.toy_model import build_model
from unigrpo_cli.config import load_config
from unigrpo_cli.errors import UsageError
from unigrpo_cli.run import trackers

INSTALLED = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]
TINY = (
    *("train.checkpoint_every=1", "train.samples_every=2", "eval.every=0", "eval.best=", "sampling.steps=3"),
    *("sampling.window_range=[0,2]", "sampling.window_size=1", "doctor.at_start=off"),
)
Steps = dict[str, list[tuple[int, float]]]


def _inputs(place: Path, body: str = "") -> list[str]:
    """A tiny model, its reward and prompts; the command that trains on them."""
    plugin = write_inputs(place)
    plugin.write_text(plugin.read_text() + body)
    build_model(seed=0, width=32, layers=2).save(place / "model", "")
    files = (f"model={place / 'model'}", f"prompts={place / 'prompts.txt'}", f"eval.suite={place / 'prompts.txt'}")
    words = [word for setting in (*SETTINGS, *TINY, *files) for word in ("--set", setting)]
    return ["train", "--plugin", str(plugin), "--reward", "moody", *words]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with every tracker that is here, then the second again and a third, from the first's checkpoint."""
    place = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(place / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
        chosen = [word for name in INSTALLED for word in ("--report-to", name)]
        _done(unigrpo(*_inputs(place), "--out", place / "run", "--set", "train.steps=2", *chosen))
        _done(unigrpo("train", "--resume", place / "run/checkpoints/step_000001", "--steps", 3, *_plugin(place)))
    return place / "run"


def _plugin(place: Path) -> list[str]:
    return ["--plugin", str(place / "moody.py")]


def _done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    assert "left out" not in result.output
    return result


def _logged(run: Path) -> Steps:
    """What metrics.jsonl has, by name."""
    found: Steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, float | int):
                found.setdefault(key, []).append((row["step"], value))
    return found


def test_tensorboard_reads_the_metrics_the_sheet_and_the_settings(run: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    logged = _logged(run)
    assert set(events.Tags()["scalars"]) == set(logged)
    for name, values in logged.items():
        seen = events.Scalars(name)
        assert [e.step for e in seen] == [step for step, _ in values], "the step that was repeated is there once"
        np.testing.assert_allclose([e.value for e in seen], [v for _, v in values], rtol=1e-6, err_msg=name)
    assert [image.step for image in events.Images("samples")] == [0, 2, 3]
    with Image.open(run / "samples" / "step_000000.png") as sheet:
        first = events.Images("samples")[0]
        assert (first.width, first.height) == sheet.size
    (settings,) = run.glob("tensorboard/*/hparams.yml")
    assert "train.group_size: 2\n" in settings.read_text()


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block's end that no header fits into
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_has_the_same_run_twice(run: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    names, found = set(), []
    for path in files:
        rows: dict[int, dict] = {}
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            names |= {(record.run.run_id, record.run.display_name)} if record.HasField("run") else set()
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if record.HasField("history"):
                rows.setdefault(row["_step"], {}).update(row)
        found.append(rows)
    identity = json.loads((run / "trackers.json").read_text())["wandb"]
    assert names == {(identity, "run")} and len(files) == 2
    assert [sorted(rows) for rows in found] == [[0, 1, 2], [2, 3]]
    logged = _logged(run)
    for step in (2, 3):
        row = found[1][step]
        for name in ("loss", "reward/moody", "image/velocity-mse"):
            assert row[name] == pytest.approx(dict(logged[name])[step]), name
    pictures = (run / "wandb").glob("*/files/media/images/samples_*.png")
    assert {int(path.name.split("_")[1]) for path in pictures} == {0, 2, 3}


def test_trackio_has_one_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", run.parent / "trackio")
    (name,) = SQLiteStorage.get_runs("unigrpo")
    assert name == f"run-{json.loads((run / 'trackers.json').read_text())['trackio']}"
    rows = [row for row in SQLiteStorage.get_logs("unigrpo", name) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    assert [row["loss"] for row in rows][-1] == pytest.approx(_logged(run)["loss"][-1][1])


class _Failing:
    """A tracker whose service is away from the second step on."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        self.steps.append(step)
        if step == 2:
            raise ConnectionError("the service\nis away")

    def log_artifact(self, path: str, folder: str) -> None: ...

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_that_raises_is_left_out_once_and_others_remain() -> None:
    said: list[str] = []
    broken, good = _Failing(), _Failing()
    both = trackers.Trackers(said.append)
    both.start("broken", lambda: broken)
    both.start("good", lambda: good)
    both.start("never", lambda: 1 / 0)
    for step in (1, 2, 3):
        if step == 2:
            good.log = lambda values, step: good.steps.append(step)  # type: ignore[method-assign]
        both.log({"step": step, "loss": 0.5, "warnings": ["x"], "skipped": "y"})
    both.finish()
    assert (broken.steps, broken.finished) == ([1, 2], True)
    assert (good.steps, good.finished) == ([1, 2, 3], True)
    assert [line.split(" failed")[0] for line in said] == ["tracker never", "tracker broken"]
    assert "ConnectionError: the service is away" in said[1]


def test_a_run_continues_without_a_tracker_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a plugin that fails after a step; its metrics are those of a run that nobody observes."""
    calls: list[Callable] = []

    def away(*given: object) -> None:
        calls.append(away)
        raise SystemExit("no key")

    monkeypatch.setitem(trackers._STARTS, "mlflow", away)
    monkeypatch.setattr("unigrpo_cli.run.inputs.refuse_missing", lambda config: None)
    hook = (
        "from unigrpo_cli import hookimpl\n\n@hookimpl\ndef unigrpo_after_step(step, metrics, groups):\n"
        "    print('AFTER', step, metrics['step'], len(groups), groups[0].episodes[0].prompt.text, flush=True)\n"
        "    raise ValueError('no disk')\n"
    )
    result = unigrpo(
        *_inputs(tmp_path, hook), "--out", tmp_path / "run", "--set", "train.steps=2", "--report-to", "mlflow"
    )
    assert result.exit_code == 0, result.output
    assert len(calls) == 1
    assert result.stderr.count("tracker mlflow failed and is left out from here on: SystemExit: no key") == 1
    assert result.stderr.count("ValueError: no disk") == 2
    after = [line.split(maxsplit=4) for line in result.output.splitlines() if line.startswith("AFTER")]
    assert [line[1:4] for line in after] == [["1", "1", "2"], ["2", "2", "2"]]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of that name lies in the working directory, as wandb's own does."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = load_config(named={"train.report_to": ["wandb"]})
    with pytest.raises(UsageError, match=r'pip install "unigrpo-cli\[wandb\]"'):
        trackers.refuse_missing(config)
    monkeypatch.setattr(trackers, "find_spec", lambda name: importlib.util.spec_from_loader(name, None))
    with pytest.raises(UsageError, match="package is missing"):
        trackers.refuse_missing(config)
    with pytest.raises(UsageError, match="'tensorboard', 'wandb', 'trackio' or 'mlflow'"):
        load_config(named={"train.report_to": ["tensorbord"]})
