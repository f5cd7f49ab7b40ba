"""Files are data: nothing unpickles, nothing leaves its directory, and no secret is written down."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import unigrpo
from tests.judge_server import JudgeServer
from unigrpo_cli.io.atomic import SUMS, digest_of
from unigrpo_cli.io.secrets import from_environment, names_secret, redacted
from unigrpo_cli.models.hub import embedded_directory

ROOT = Path(__file__).parents[1]
QUICK = ["--set", "train.prompts_per_step=2", "--set", "train.group_size=2", "--set", "eval.limit=1"]
QUICK += ["--set", "eval.steps=2", "--set", "sampling.max_new_tokens=8"]
QUICK += ["--set", "train.samples_every=0", "--set", "threads=1", "--set", "doctor.at_start=warn"]


# ----- what the source may call

MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = (
    "torch.load", "torch.save", "torch.hub.", "np.load", "numpy.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load",
)  # fmt: skip
KEYWORDS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
LOADS_MODULES = {
    "unigrpo_cli/rewards/registry.py": "plugins are code that the user names with --plugin or installs",
}


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """Calls and imports that could run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found += [f"import {m}" for m in modules if m.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            found += [name] if name in NAMES or name.startswith(ATTRIBUTES) else []
            found += [name] if name.split(".")[-1] in ("import_module", "exec_module") else []
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS:
                    safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS[keyword.arg]
                    found += [] if safe else [f"{keyword.arg}="]
    return found


def test_nothing_in_the_source_runs_code_out_of_files() -> None:
    files = [*ROOT.glob("unigrpo_cli/**/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert len(files) > 80
    for path in files:
        name = str(path.relative_to(ROOT))
        found = offences(path.read_text())
        if name in LOADS_MODULES:
            found = [f for f in found if not f.endswith(("import_module", "exec_module"))]
        assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "torch.hub.load(r, n)",
        "f(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "eval(t)",
        "exec(t)",
        "f(p, trust_remote_code=True)",
        "importlib.import_module(n)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert offences(line)
    assert not offences("re.compile(x); network.eval(); yaml.safe_load(t); f(trust_remote_code=False)")


# ----- planted files


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def _archive(payload: bytes) -> bytes:
    """The form of torch.save: a zip with the pickle inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3")
    return buffer.getvalue()


PICKLED = (
    "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "adapter_model.bin", "optimizer.pt", 
    "optimizer.bin",
    "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "random_states_0.pkl", "weights.npy",
    "episodes.npy", "vocab.pkl", "state.pkl",
)  # fmt: skip
CODE = (
    "modeling.py",
    "tokenization.py",
    "configuration.py",
    "setup.py",
    "sitecustomize.py",
    "conftest.py",
    "__init__.py",
)


def _plant(folder: Path, marker: Path) -> None:
    """Bombs under every name that a loader might look for; none replaces a file."""
    payload = pickle.dumps(_Bomb(marker))
    for name in PICKLED:
        content = payload
        if name.endswith(".npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.array([_Bomb(marker)], dtype=object), allow_pickle=True)
            content = buffer.getvalue()
        elif name.endswith((".bin", ".pt", ".pth")):
            content = _archive(payload)
        (folder / name).write_bytes(content)
    for name in CODE:
        (folder / name).write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    remote = {"AutoConfig": "configuration.C", "AutoModel": "modeling.M", "AutoTokenizer": ["tokenization.T", None]}
    for name in (
        "config.json",
        "tokenizer_config.json",
        "llm_config.json",
        "adapter_config.json",
        "preprocessor_config.json",
    ):
        path = folder / name
        facts = json.loads(path.read_text()) if path.is_file() else {}
        if name in ("adapter_config.json", "llm_config.json", "config.json") and not facts:
            continue
        path.write_text(json.dumps(facts | {"auto_map": remote, "trust_remote_code": True}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def test_the_bombs_are_live(marker: Path) -> None:
    """The control: whoever unpickles makes the marker."""
    pickle.loads(pickle.dumps(_Bomb(marker)))
    assert marker.is_dir()


def _seal(checkpoint: Path) -> None:
    """Sizes and sums as of what lies there now: whoever plants files can mend those, too."""
    state = checkpoint / "state.json"
    content = json.loads(state.read_text())
    content["files"] = {name: (checkpoint / name).stat().st_size for name in content["files"]}
    state.write_text(json.dumps(content))
    names = [line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()]
    (checkpoint / SUMS).write_text("".join(f"{digest_of(checkpoint / name)}  {name}\n" for name in names))


def test_planted_files_beside_a_model_a_run_and_an_adapter_are_not_read(
    tmp_path: Path, marker: Path, small_model: Path, one_prompt: str
) -> None:
    run = tmp_path / "run"
    more = ["--steps", 0, "--set", "train.finetune=lora", "--set", one_prompt, "--model", small_model, *QUICK]
    assert unigrpo("train", "--reward", "geneval", *more, "--out", run).exit_code == 0
    checkpoint = run / "checkpoints" / "step_000000"
    model = Path(shutil.copytree(small_model, tmp_path / "m"))
    for folder in (model, run, checkpoint):
        _plant(folder, marker)
    _seal(checkpoint)
    episodes = tmp_path / "e"
    sampled = ["rollout", "--reward", "jpeg", "--limit", 1, "--group-size", 2, *QUICK, "--out", episodes]
    assert unigrpo(*sampled, "--model", model).exit_code == 0
    _plant(episodes, marker)
    for command in (
        ["inspect", model],
        ["generate", "a red heart", "--model", model, "--adapter", checkpoint, "--out", tmp_path / "a"],
        ["generate", "a red heart", "--model", run, "--out", tmp_path / "b"],
        ["rollout", "--from", episodes, "--reward", "jpeg", "--out", tmp_path / "c"],
        ["train", "--resume", run, "--steps", 0],
    ):
        result = unigrpo(*command)
        assert result.exit_code == 0, result.output
        assert not marker.exists(), command


@pytest.mark.parametrize("name", ["ema.safetensors", "tokenizer.json", "llm_config.json", "config.json"])
def test_a_pickle_under_a_good_name_is_refused(name: str, tmp_path: Path, marker: Path) -> None:
    model = Path(shutil.copytree(embedded_directory(), tmp_path / "m"))
    for content in (pickle.dumps(_Bomb(marker)), _archive(pickle.dumps(_Bomb(marker)))):
        (model / name).write_bytes(content)
        result = unigrpo("generate", "a", "--model", model, "--out", tmp_path / "o")
        assert result.exit_code == 5, result.output
        assert name in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    ("reward", "option"),
    [
        ("aesthetic", "head"),
        ("clip", "model"),
        ("pickscore", "model"),
        ("hpsv2", "weights"),
        ("ocr", "model"),
        ("vlm", "model"),
    ],
)
def test_judges_of_planted_directories(
    reward: str, option: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of pickles, with a configuration that asks for its own code to be run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "judge"
    folder.mkdir()
    for name in ("config.json", "open_clip_config.json"):
        (folder / name).write_text('{"model_type": "odd"}')
    _plant(folder, marker)
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    given = f"{reward}@{option}={folder}"
    result = unigrpo("rewards", "score", given, "--image", tmp_path / "i.png", "--prompt", "a")
    assert result.exit_code == 3, result.output
    assert not marker.exists()


# ----- nothing leaves its directory


def test_names_inside_files_do_not_become_paths(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and ids that look like paths: what is written stays below --out."""
    home = tmp_path / "home"
    home.mkdir()
    odd = ["../../x", "/etc/x", "..", "a/../../b", "C:\\x", "-rf"]
    (home / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "id": p, "tag": p, "member": p}) + "\n" for p in odd)
    )
    monkeypatch.chdir(home)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for command in (
        ["generate", "--prompts", "p.jsonl", *QUICK, "--model", small_model, "--out", "out/g"],
        [
            "rollout",
            "--prompts",
            "p.jsonl",
            "--reward",
            "jpeg",
            "--group-size",
            2,
            *QUICK,
            "--model",
            small_model,
            "--out",
            "out/r",
        ],
        ["rollout", "--from", "out/r", "--reward", "jpeg", "--out", "out/s"],
        ["eval", "--suite", "p.jsonl", "--reward", "jpeg", *QUICK, "--model", small_model, "--out", "out/e"],
    ):
        result = unigrpo(*command)
        assert result.exit_code == 0, result.output
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert written
    assert all(p.is_relative_to(home / "out") for p in written)


def test_links_out_of_a_model_are_followed_and_names_out_of_it_are_not(tmp_path: Path) -> None:
    """The hub's cache is made of links to files elsewhere; an index that names one elsewhere is refused."""
    blobs, model = tmp_path / "blobs", tmp_path / "m"
    shutil.copytree(embedded_directory(), blobs)
    model.mkdir()
    for path in blobs.iterdir():
        (model / path.name).symlink_to(path)
    assert unigrpo("inspect", model).exit_code == 0
    for name in ("../blobs/ema.safetensors", str(blobs / "ema.safetensors"), "..", "a/../ema.safetensors"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        result = unigrpo("inspect", model)
        assert result.exit_code == 5
        assert "outside its directory" in result.stderr


def test_pictures_of_a_prompts_file_are_relative_to_it_and_may_be_anywhere(tmp_path: Path) -> None:
    """The user wrote that file, so an absolute path in it is the user's word."""
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    rows = [{"prompt": "a", "image": "../i.png"}, {"prompt": "b", "image": str(tmp_path / "i.png")}]
    (tmp_path / "rows" / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = unigrpo("rewards", "score", "jpeg", "--prompts", tmp_path / "rows" / "p.jsonl", "--json")
    assert result.exit_code == 0, result.output
    assert {row["image"] for row in json.loads(result.stdout)["images"]} == {str(tmp_path / "i.png")}


# ----- secrets

SECRET = "sk-marked-0123456789"
KEYED = """
from pydantic import SecretStr
from unigrpo_cli import Options, RewardContext


class KeyedOptions(Options):
    api_key: str | None = None
    pin: SecretStr | None = None
    fail: bool = False


class Keyed:
    name = "keyed"
    range = (0.0, 1.0)
    Options = KeyedOptions

    def __init__(self, options):
        self.options = options

    def score(self, batch):
        assert self.options.api_key == "sk-marked-0123456789"
        if self.options.fail:
            raise ValueError(f"refused key {self.options.api_key}")
        return [0.5] * len(batch)


from unigrpo_cli import hookimpl

@hookimpl
def unigrpo_register_rewards(registry):
    registry.add("keyed", Keyed)
"""
VARIABLES = ("MY_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "UNIGRPO_JUDGE_KEY", "UNIGRPO_REWARD_TOKEN")


def _nowhere(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert SECRET not in path.name
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UNIGRPO_DEBUG", "")
    (tmp_path / "plugins").mkdir()
    path = tmp_path / "plugins" / "keyed.py"
    path.write_text(KEYED)
    return path


def test_a_run_writes_no_secret(tmp_path: Path, keyed: Path, small_model: Path, one_prompt: str) -> None:
    """By option, by variable, to an endpoint with a cache: no byte of it in the run, the cache or the streams."""
    server = JudgeServer().start()
    out = tmp_path / "work" / "run"
    try:
        rewards = f"keyed@api_key=env:MY_API_KEY,vlm:0@url={server.url}@cache=on"
        more = [
            "--plugin",
            keyed,
            "--set",
            "train.checkpoint_every=1",
            "--set",
            one_prompt,
            *QUICK,
            "--model",
            small_model,
            "--json",
        ]
        done = unigrpo("train", "--reward", rewards, "--steps", 1, *more, "--out", out)
        assert done.exit_code == 0, done.output
        again = unigrpo("train", "--resume", out, "--steps", 2, "--plugin", keyed, "--json")
        assert again.exit_code == 0, again.output
        looked = unigrpo("doctor", "--reward", rewards, "--plugin", keyed, *QUICK, "--model", small_model, "--json")
        assert looked.exit_code == 6, "the reward is a constant"
    finally:
        server.stop()
    assert "env:MY_API_KEY" in (out / "config.toml").read_text()
    assert (tmp_path / "cache" / "unigrpo" / "judge.sqlite").is_file()
    for result in (done, again, looked):
        assert SECRET not in result.output + result.stderr
    _nowhere(out.parent)
    _nowhere(tmp_path / "cache")


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--reward", f"keyed@api_key={SECRET}"], 2, "keyed.api_key=env:MY_KEY"),
        (["--reward", "keyed", "-R", f"keyed.api_key={SECRET}"], 2, "keyed.api_key=env:MY_KEY"),
        (["--reward", "keyed", "--set", f"reward.options.keyed.api_key={SECRET}"], 2, "keyed.api_key=env:MY_KEY"),
        (["--reward", f"keyed@pin={SECRET}"], 3, "env:VARIABLE"),
        (["--reward", "keyed@api_key=env:NO_SUCH"], 3, "NO_SUCH is not set; export it"),
        (["--reward", "keyed@api_key=env:MY_API_KEY@fail=true", "--quiet"], 3, "[MY_API_KEY]"),
        (["--reward", "remote", "-R", f"remote.url=http://u:{SECRET}@h/"], 2, "environment variable"),
        (["--reward", "remote", "-R", f"remote.url=http://h/?key={SECRET}"], 3, "must hold no user"),
        (["--reward", "vlm", "-R", f"vlm.url=http://h/v1?key={SECRET}"], 3, "must hold no user"),
        (["--reward", "jpeg", "--model", f"https://u:{SECRET}@h/m"], 5, "https://[credentials]@h"),
    ],
)
def test_a_secret_is_refused_or_cut_out_of_what_is_said(
    arguments: list[str],
    code: int,
    says: str,
    debug: str,
    tmp_path: Path,
    keyed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNIGRPO_DEBUG", debug)
    more = ["--plugin", keyed, *QUICK, "--out", tmp_path / "work" / "run", "--json"]
    result = unigrpo("train", *arguments, *more)
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error:")
    assert says in line
    assert ("Traceback" in result.stderr) == bool(debug)
    assert SECRET not in result.output + result.stderr
    assert not (tmp_path / "work" / "run").exists()


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True), ("vlm.api_key", True), ("HF_TOKEN", True), ("password", True), ("client_secret", True),
        ("openai-api-key", True), ("token_file", False), ("max_tokens", False), ("tokenizer", False), 
        ("key", False),
        ("sort_key", False), ("secretary", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) == secret


def test_secrets_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    assert from_environment("env:MY_TOKEN") == SECRET
    for text in (SECRET, "env:", "env:NO_SUCH", "env:a b"):
        with pytest.raises(ValueError, match="export"):
            from_environment(text)
    assert redacted(f"a {SECRET} at ftp://me:{SECRET}@h/x") == "a [MY_TOKEN] at ftp://[credentials]@h/x"
    assert redacted("clip@model=x") == "clip@model=x"
