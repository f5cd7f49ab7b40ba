"""Hostile input, over all commands: one clear line, the documented exit code, and nothing written or lost.

Each row of the tables is one bad input: what makes it, the command that is given it, the exit code, and words that
the line must have, what was given first and a remedy last.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.commands import Process, command_line, unigrpo
from unigrpo_cli.models.hub import embedded_directory

QUICK = ["--set", "train.prompts_per_step=2", "--set", "train.group_size=2", "--set", "eval.limit=1"]
QUICK += ["--set", "eval.steps=2", "--set", "sampling.max_new_tokens=8"]
QUICK += ["--set", "train.samples_every=0", "--set", "threads=1"]
GENERATE = ["generate", "a red heart", "--out", "out"]
TRAIN = ["train", "--reward", "geneval", "--out", "out", *QUICK]
ROLLOUT = ["rollout", "--reward", "geneval", "--limit", 1, "--group-size", 2, "--out", "out"]
EVAL = ["eval", "--limit", 1, "--out", "out"]
DOCTOR = ["doctor", "--reward", "geneval", *QUICK]
SCORE = ["rewards", "score", "jpeg"]
CLONE_NEWUSER, CLONE_NEWNS = 0x1000_0000, 0x0002_0000  # of sched.h; Python 3.12 has them
DEEP = "[" * 100_000
LONG = "9" * 5_000


def _tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, and what is in it; Python's own caches beside a plugin's file do not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.relative_to(folder).parts:
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory"
    return found


@dataclass(frozen=True)
class Bad:
    """A bad input. `make` puts it into the working directory; `made` are healthy things to copy and to damage."""

    name: str
    arguments: list[Any]
    code: int
    says: tuple[str, ...]
    make: Callable[[Path, Made], Any] = lambda here, made: None
    json: bool = True


@dataclass(frozen=True)
class Made:
    """Healthy things, made once: a small model, a full and a LoRA run of it without steps, and saved episodes."""

    small: Path
    full: Path
    lora: Path
    episodes: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Made:
    home = tmp_path_factory.mktemp("made")
    common = ["train", "--reward", "geneval", "--steps", 0, "--set", "train.samples_every=0", *QUICK, "--quiet"]
    common += ["--model", small_model]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
        for name, more in (("full", []), ("lora", ["--set", "train.finetune=lora", "--set", "train.lora_rank=4"])):
            assert unigrpo(*common, "--out", home / name, *more).exit_code == 0
        episodes = [*ROLLOUT[:-1], home / "episodes", "--quiet", "--model", small_model]
        assert unigrpo(*episodes).exit_code == 0
    return Made(small_model, home / "full", home / "lora", home / "episodes")


def check(bad: Bad, here: Path, made: Made, patch: pytest.MonkeyPatch) -> None:
    """One line with what was given and a remedy, the exit code, an empty stdout, and every file as it was."""
    patch.chdir(here)
    patch.setenv("UNIGRPO_DEBUG", "")
    bad.make(here, made)
    before = _tree(here)
    arguments = [*bad.arguments, *(["--json"] if bad.json else [])]
    result = unigrpo(*arguments)
    assert result.exit_code == bad.code, (result.exit_code, result.output[-2000:], result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr[-2000:]
    assert all(line.startswith(("error:", "warning:", "vlm:")) for line in result.stderr.splitlines()), result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "the error is the last line"
    assert "Traceback" not in result.output
    assert "--debug" not in errors[0], f"not a line for people: {errors[0][:500]}"
    assert len(errors[0]) < 2_000
    assert errors[0].isprintable()
    for words in bad.says:
        assert words in errors[0], errors[0]
    assert result.stdout == ""
    assert _tree(here) == before, "files were written, changed or lost"


def text(name: str, content: str | bytes) -> Callable[[Path, Made], Any]:
    """A file in the working directory."""
    return lambda here, made: (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*rows: Any, name: str = "p.jsonl") -> Callable[[Path, Made], Any]:
    return text(name, "".join(json.dumps(row) + "\n" for row in rows))


def folder(name: str) -> Callable[[Path, Made], Any]:
    return lambda here, made: (here / name).mkdir()


# ----- configuration


def config(name: str, content: str | bytes, *says: str, code: int = 2, command: list[Any] = GENERATE) -> Bad:
    return Bad(name, [*command, "--config", "c.toml"], code, says, text("c.toml", content))


def setting(name: str, given: str, *says: str, code: int = 2, command: list[Any] = GENERATE) -> Bad:
    return Bad(name, [*command, "--set", given], code, says)


CONFIGURATION = [
    config("no-toml", "[train", "c.toml", "not readable TOML"),
    config("key-twice", "seed = 1\nseed = 2\n", "c.toml", "not readable TOML"),
    config("unknown-key", "[train]\nstpes = 3\n", "train.stpes", "did you mean train.steps"),
    config("unknown-section", "[trian]\nsteps = 3\n", "trian", "did you mean train"),
    config("wrong-section", "[sampling]\ngroup_size = 3\n", "sampling.group_size", "did you mean train.group_size"),
    config("key-at-the-top", "group_size = 3\n", "group_size", "did you mean train.group_size"),
    config("text-for-a-number", '[train]\nsteps = "many"\n', "train.steps = 'many'", "valid integer"),
    config("list-for-a-number", "[train]\nsteps = [1]\n", "train.steps = [1]", "valid integer"),
    config("number-for-text", "model = 3\n", "model = 3", "valid string"),
    config("number-for-a-preset", "preset = 3\n", "preset", "accepted: bagel-one-gpu, embedded, paper"),
    config("nan-in-a-pair", "[eval]\nguidance_interval = [0.4, nan]\n", "eval.guidance_interval", "finite"),
    config("pair-of-one", "[train]\nbetas = [0.9]\n", "train.betas", "required"),
    config("5000-digits", f"[train]\nsteps = {LONG}\n", "c.toml", "digits"),
    config("beyond-int64", "[train]\nsteps = 1000000000000000000000000000000\n", "train.steps", "less than"),
    config("seed-beyond-int64", "seed = 1000000000000000000000000000000\n", "seed", "less than"),
    config("seed-below-zero", "seed = -1\n", "seed = -1", "greater than or equal to 0"),
    config("threads-beyond-any", "threads = 1000000000\n", "threads", "less than"),
    config("not-utf8", b'model = "\xff\xfe"\n', "c.toml", "UTF-8"),
    config("nul-byte", b"seed = 1\x00\n", "c.toml", "not readable TOML"),
    config("nul-in-a-path", 'model = "a\\u0000b"\n', "model", "NUL"),
    config("nul-in-a-prompts-path", 'prompts = "a\\u0000.txt"\n', "prompts", "NUL", command=TRAIN),
    config("very-deep", f"seed = {DEEP}\n", "c.toml", "nested too deep"),
    config("terminal-codes", '"\\u001b[31mred" = 1\n', "unknown configuration key", "accepted"),
    config("window-backwards", "[sampling]\nwindow_range = [5, 2]\n", "sampling.window_range=[5, 2]", "does not fit"),
    config("model-name-too-long", f'model = "{"m" * 5000}"\n', "no model at mmm", "give `embedded`", code=5),
    Bad("config-is-a-directory", [*GENERATE, "--config", "d"], 2, ("d ", "directory"), folder("d")),
    Bad("config-name-too-long", [*GENERATE, "--config", "c" * 300], 2, ("ccc", "too long")),
    Bad("config-is-an-endless-file", [*GENERATE, "--config", "/dev/zero"], 2, ("/dev/zero", "not a regular file")),
    setting("set-without-a-key", "=3", "--set =3", "section.key=value"),
    setting("set-an-empty-part", "train..steps=3", "'train.'", "did you mean train."),
    setting("set-deep", f"seed={DEEP}", "seed = '[[[", "valid integer"),
    setting("set-digits", f"seed={LONG}", "seed = '999", "exceeded maximum size"),
    *(
        setting(f"count-{key}", f"{key}=999999999999", key, "less than or equal to", command=TRAIN)
        for key in ("train.group_size", "train.prompts_per_step", "eval.samples", "doctor.members")
    ),
    setting("image-of-zero", "sampling.height=0", "sampling.height = 0", "greater than or equal to 1"),
    setting("image-too-large", "sampling.height=1000000000", "sampling.height", "multiples of 8, at most"),
    setting("image-odd", "sampling.width=50", "sampling.width", "multiples of 8"),
    setting("device", "device=quantum", "device=quantum", "give device=cpu"),
    setting(
        "rank-beyond-memory",
        "train.lora_rank=1000000000",
        "GiB",
        "train.",
        code=1,
        command=[*TRAIN, "--set", "train.finetune=lora"],
    ),
    Bad(
        "two-models",
        [*TRAIN, "--adapter", "m.lora"],
        2,
        ("adapter", "train.finetune=lora"),
        lambda h, m: shutil.copytree(m.lora, h / "m.lora"),
    ),
    setting("samples-zero", "eval.samples=0", "eval.samples = 0", "greater than or equal to 1", command=EVAL),
]

# ----- prompts


def prompts(name: str, content: str | bytes, *says: str, command: list[Any] = GENERATE[:1] + GENERATE[2:]) -> Bad:
    return Bad(name, [*command, "--prompts", "p.jsonl"], 2, says, text("p.jsonl", content))


def pipe(here: Path, made: Made) -> None:
    os.mkfifo(here / "p.jsonl")


_EVAL = ["eval", "--reward", "jpeg", "--out", "out"]
_SUITE = [*_EVAL, "--suite"]
PROMPTS = [
    prompts("prompts-empty", "", "p.jsonl", "holds no prompt"),
    prompts("prompts-blank", "\n  \n", "p.jsonl", "holds no prompt", command=TRAIN),
    prompts("prompts-no-json", '{"prompt": "a"}\n{x\n', "p.jsonl:2", "each line is one object", command=ROLLOUT),
    Bad("no-prompt", ["generate"], 2, ("no prompt", "--prompts FILE")),
    prompts("prompts-surrogate", '{"prompt": "a \\ud800 cat"}\n', "p.jsonl:1", "surrogate"),
    prompts("metadata-surrogate", '{"prompt": "a cat", "tag": "\\udfff"}\n', "p.jsonl:1", "surrogate"),
    prompts("prompts-nul", '{"prompt": "a \\u0000 cat"}\n', "p.jsonl:1", "NUL"),
    prompts("prompts-nul-byte", b'{"prompt": "a\x00cat"}\n', "p.jsonl:1", "each line is one object"),
    prompts("prompts-not-utf8", b'{"prompt": "\xff"}\n', "p.jsonl", "UTF-8"),
    prompts("prompts-utf16", '{"prompt": "a"}\n'.encode("utf-16"), "p.jsonl", "UTF-8"),
    prompts("prompts-long-line", b'{"prompt": "' + b"a " * 5_000_000 + b'"}\n', "p.jsonl:1", "at most"),
    prompts("prompts-deep", '{"prompt": "a", "x": ' + DEEP + "}\n", "p.jsonl:1", "nested too deep"),
    prompts("prompts-digits", '{"prompt": "a", "x": ' + LONG + "}\n", "p.jsonl:1", "digits"),
    prompts("prompts-nan", '{"prompt": "a", "x": NaN}\n', "p.jsonl:1", "NaN", command=TRAIN),
    prompts("prompts-image-missing", '{"prompt": "a", "image": "x.png"}\n', "p.jsonl:1", "next to"),
    prompts("prompts-image-number", '{"prompt": "a", "image": 3}\n', "p.jsonl:1", "next to"),
    prompts("prompts-image-directory", '{"prompt": "a", "image": "."}\n', "p.jsonl:1", "next to"),
    prompts("prompts-image-nul", '{"prompt": "a", "image": "a\\u0000b"}\n', "p.jsonl:1", "NUL"),
    prompts("prompts-image-too-long", json.dumps({"prompt": "a", "image": "x" * 5000}), "p.jsonl:1", "next to"),
    prompts("prompts-clauses", '{"prompt": "a", "include": [{"class": 3}]}\n', "p.jsonl:1", '"class" (text)'),
    prompts(
        "prompts-count-true", '{"prompt": "a", "include": [{"class": "a", "count": true}]}\n', "p.jsonl:1", "1 or more"
    ),
    Bad("prompts-a-directory", [*TRAIN, "--prompts", "d.jsonl"], 2, ("d.jsonl", "directory"), folder("d.jsonl")),
    Bad("prompts-of-another-kind", [*TRAIN, "--prompts", "p.xls"], 2, ("p.xls", ".txt"), text("p.xls", "a\n")),
    Bad(
        "prompts-endless",
        [*TRAIN, "--prompts", "p.txt"],
        2,
        ("p.txt", "not a regular file"),
        lambda h, m: (h / "p.txt").symlink_to("/dev/zero"),
    ),
    *(
        Bad(f"pipe-{option}", [*command, option, "p.jsonl"], 2, ("p.jsonl", "not a regular file"), pipe)
        for option, command in (("--prompts", TRAIN), ("--config", TRAIN), ("--suite", _EVAL), ("--image", SCORE))
    ),
    prompts("prompts-of-a-megabyte", json.dumps({"prompt": "a " * 500_000}), "p.jsonl:1", "at most 20,000"),
    Bad("line-of-a-megabyte", [*TRAIN, "--prompts", "p.txt"], 2, ("p.txt:1", "at most"), text("p.txt", "a " * 400_000)),
    Bad("text-of-blanks", [*TRAIN, "--prompts", "p.txt"], 2, ("holds no prompt",), text("p.txt", "\u200b\n\ufeff\n")),
    Bad("prompts-loop", [*TRAIN, "--prompts", "p.txt"], 2, ("p.txt",), lambda h, m: (h / "p.txt").symlink_to("p.txt")),
    Bad("text-nul", [*TRAIN, "--prompts", "p.txt"], 2, ("p.txt:1", "NUL"), text("p.txt", "a\x00cat\n")),
    Bad("suite-nothing-there", [*_SUITE, "geneval2:none.json"], 2, ("geneval2:none.json", "no such file")),
    Bad("suite-of-another-form", [*_SUITE, "geneval2:p.jsonl"], 2, ("p.jsonl:1", "vqa_list"), lines({"prompt": "a"})),
    Bad("suite-deep", [*_SUITE, "geneval2:p.json"], 2, ("p.json", "nested too deep"), text("p.json", DEEP)),
    Bad(
        "suite-surrogate",
        [*_SUITE, "geneval2:p.jsonl"],
        2,
        ("p.jsonl:1", "surrogate"),
        lines({"prompt": "\ud800", "vqa_list": [["a", "b"]]}),
    ),
    Bad("suite-a-directory", [*_SUITE, "parti:d"], 2, ("d ", "not readable text"), folder("d")),
    Bad("suite-table", [*_SUITE, "parti:p.tsv"], 2, ("p.tsv", "Prompt"), text("p.tsv", "a\tb\nc\td\n")),
    Bad(
        "suite-table-field",
        [*_SUITE, "parti:p.tsv"],
        2,
        ("p.tsv:2", "at most"),
        text("p.tsv", "Prompt\n" + "a" * 200_000),
    ),
    Bad("prompt-empty", ["generate", " ", "--out", "out"], 2, ("empty prompt", "write what to paint")),
    Bad("prompt-surrogate", ["generate", "a \udcff cat", "--out", "out"], 2, ("PROMPT", "UTF-8")),
    Bad("prompt-nul", ["generate", "a\x00cat", "--out", "out"], 2, ("PROMPT", "NUL")),
]

# ----- models


def reheader(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file; its data stay."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def rejson(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, size)


def gone(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **values: Any) -> Callable[[Path], Any]:
    return lambda folder: rejson(folder / name, **values)


def replaced(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


HEAD = "language_model.lm_head.weight"
EMA, LLM, STATE = "ema.safetensors", "llm_config.json", "state.json"
AGAIN, OTHER = "fetch or save it again", "another checkpoint"


def model(name: str, damage: Callable[[Path], Any], *says: str, code: int = 5, command: list[Any] = GENERATE) -> Bad:
    """A damaged copy of the embedded model, in `m`."""

    def make(here: Path, made: Made) -> None:
        shutil.copytree(embedded_directory(), here / "m")
        damage(here / "m")

    return Bad(name, [*command, "--model", "m"], code, says, make)


def weights(name: str, change: Callable[[dict[str, Any]], Any], *says: str, command: list[Any] = GENERATE) -> Bad:
    return model(name, lambda m: reheader(m / "ema.safetensors", change), *says, command=command)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[HEAD].update(changes)


def _index(m: Path, table: Any) -> None:
    (m / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


MODELS = [
    model("weights-cut", cut(EMA, 100_000), EMA, AGAIN),
    model("weights-five-bytes", put(EMA, b"hello"), EMA, AGAIN),
    model("header-of-100-GB", put(EMA, struct.pack("<Q", 100 * 2**30) + b"{}"), EMA, AGAIN),
    model("header-of-2-to-the-63", put(EMA, b"\xff" * 8 + b"{}"), EMA, AGAIN),
    weights("entry-array", lambda h: h.update({HEAD: list(h[HEAD].values())}), EMA, AGAIN),
    weights("offset-huge", _entry(data_offsets=[0, 10**30]), EMA, AGAIN),
    weights("offsets-overlap", lambda h: h[HEAD].update(data_offsets=h["vae2llm.bias"]["data_offsets"]), EMA, AGAIN),
    weights("shape-huge", _entry(shape=[10**12, 10**12]), EMA, AGAIN),
    weights(
        "shape-turned", lambda h: h[HEAD].update(shape=h[HEAD]["shape"][::-1]), EMA, "another shape", command=TRAIN
    ),
    weights("dtype-unknown", _entry(dtype="F3"), EMA, AGAIN),
    model("weights-a-pickle", put(EMA, b"\x80\x04\x95" + b"." * 200), EMA, AGAIN),
    model("weights-a-directory", lambda m: ((m / EMA).unlink(), (m / EMA).mkdir()), EMA, "missing"),
    model("config-deep", put(LLM, DEEP), LLM, "fetch or save it again"),
    model("config-digits", put(LLM, f'{{"hidden_size": {LONG}}}'), LLM, "fetch or save it again"),
    model("config-a-list", put(LLM, "[]"), LLM, "object is needed"),
    model("config-not-utf8", put(LLM, b"\xff"), LLM, "not UTF-8"),
    model("config-of-billions", changed(LLM, num_hidden_layers=10**9), "m: ", "num_hidden_layers"),
    model("config-negative", changed(LLM, hidden_size=-128), "hidden_size = -128", "above 0"),
    model("config-nan", changed(LLM, rms_norm_eps=float("nan")), LLM, "NaN is not JSON"),
    model("config-epsilon", changed(LLM, rms_norm_eps=-1e-6), "rms_norm_eps = -1e-06", "above 0"),
    model("config-theta", changed(LLM, rope_theta=0.0), "rope_theta = 0.0", "above 0"),
    model("system-prompt-a-surrogate", changed("config.json", system_prompt="\ud800"), "system_prompt", "surrogate"),
    model("tokenizer-of-others", lambda m: replaced(m / "tokenizer.json", "<|im_end|>", "<|eom|>"), "m", "<|im_end|>"),
    model("index-escapes", lambda m: _index(m, {HEAD: "../secret.safetensors"}), "index.json", "outside its directory"),
    model("index-absolute", lambda m: _index(m, {HEAD: "/etc/passwd"}), "index.json", "outside its directory"),
    model("index-to-the-parent", lambda m: _index(m, {HEAD: ".."}), "index.json", "outside its directory"),
    model("index-nul", lambda m: _index(m, {HEAD: "a\x00b"}), "index.json", "outside its directory"),
    Bad("model-missing", ["generate", "a", "--model", "none"], 5, ("none", "give `embedded`")),
    Bad("model-a-file", ["generate", "a", "--model", "x.bin"], 5, ("x.bin", "give `embedded`"), text("x.bin", "x")),
    Bad(
        "model-empty-directory",
        [*EVAL, "--model", "m"],
        5,
        ("m is a model of no known family", "ema.safetensors"),
        folder("m"),
    ),
    Bad(
        "weights-file-escapes",
        [*GENERATE, "--model", "m", "--weights-file", "../../x"],
        5,
        ("no weights file ../../x", "it has"),
        lambda h, m: shutil.copytree(embedded_directory(), h / "m"),
    ),
    Bad("inspect-missing", ["inspect", "none"], 5, ("none", "give `embedded`")),
    Bad(
        "inspect-cut",
        ["inspect", "m"],
        5,
        (EMA, AGAIN),
        lambda h, m: (shutil.copytree(embedded_directory(), h / "m"), os.truncate(h / "m" / EMA, 9_999)),
    ),
    Bad(
        "inspect-an-adapter",
        ["inspect", "m"],
        5,
        ("m is an adapter", "--adapter"),
        lambda h, m: ((h / "m").mkdir(), (h / "m" / "adapter_config.json").write_text("{}")),
    ),
]

# ----- checkpoints


def checkpoint(name: str, damage: Callable[[Path], Any], *says: str, command: list[Any], lora: bool = False) -> Bad:
    """A damaged copy of a run, in `run`; `damage` is given its checkpoint."""

    def make(here: Path, made: Made) -> None:
        shutil.copytree(made.lora if lora else made.full, here / "run")
        damage(here / "run" / "checkpoints" / "step_000000")

    return Bad(name, command, 5, says, make)


STEP = "run/checkpoints/step_000000"
FROM = ["generate", "a red heart", "--out", "out", "--model", STEP]
ON = ["train", "--resume", STEP]
CHECKPOINTS = [
    checkpoint("state-no-json", put(STATE, "{"), STATE, OTHER, command=FROM),
    checkpoint("state-no-json-resumed", put(STATE, "{"), STATE, OTHER, command=ON),
    checkpoint("state-deep", put(STATE, DEEP), STATE, OTHER, command=FROM),
    checkpoint("state-digits", put(STATE, f'{{"step": {LONG}}}'), STATE, OTHER, command=FROM),
    checkpoint("state-not-utf8", put(STATE, b"\xff"), STATE, OTHER, command=FROM),
    checkpoint("state-a-list", put(STATE, "[]"), STATE, OTHER, command=FROM),
    checkpoint("state-of-the-future", changed(STATE, format=99), "step_000000", "format", command=FROM),
    checkpoint("state-of-the-future-resumed", changed(STATE, format=99), "step_000000", "format", command=ON),
    checkpoint("state-step-text", changed(STATE, step="3"), STATE, OTHER, command=FROM),
    checkpoint("state-base-a-number", changed(STATE, base=3), STATE, OTHER, command=FROM),
    checkpoint("state-missing", gone(STATE), STATE, "missing", command=ON),
    checkpoint("weights-missing", gone(EMA), EMA, "missing", command=FROM),
    checkpoint("weights-missing-resumed", gone(EMA), EMA, "missing", command=ON),
    checkpoint(
        "weights-cut-resumed",
        cut(EMA, 50_000),
        "ema.safetensors has 50,000 bytes",
        "no earlier one is intact",
        command=ON,
    ),
    checkpoint("moments-cut", cut("optimizer.safetensors", 5), "optimizer.safetensors", "damaged", command=ON),
    checkpoint(
        "base-gone", changed(STATE, base="/nowhere/model"), "/nowhere/model", "give `embedded`", command=FROM, lora=True
    ),
    checkpoint(
        "lora-weights-missing",
        gone("adapter_model.safetensors"),
        "adapter_model.safetensors",
        "missing",
        command=FROM,
        lora=True,
    ),
]

# ----- adapters


def adapter(name: str, damage: Callable[[Path], Any], *says: str) -> Bad:
    """A damaged copy of a LoRA checkpoint as a plain adapter, in `a`."""

    def make(here: Path, made: Made) -> None:
        shutil.copytree(made.small, here / "base")
        (here / "a").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(made.lora / "checkpoints" / "step_000000" / file, here / "a")
        damage(here / "a")

    return Bad(name, [*GENERATE, "--model", "base", "--adapter", "a"], 5, says, make)


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def _drop(state: dict[str, torch.Tensor]) -> None:
    state.pop(min(state))


ADAPTERS = [
    Bad(
        "adapter-missing",
        [*GENERATE, "--adapter", "none"],
        5,
        ("no adapter directory none", "give a run, a checkpoint or a PEFT adapter"),
    ),
    adapter("adapter-no-config", gone("adapter_config.json"), "a is no adapter", "adapter_config.json is missing"),
    adapter("adapter-config-no-json", put("adapter_config.json", "{"), "adapter_config.json", AGAIN),
    adapter("adapter-config-deep", put("adapter_config.json", DEEP), "adapter_config.json", AGAIN),
    adapter("adapter-config-a-list", put("adapter_config.json", "[]"), "adapter_config.json", AGAIN),
    adapter("adapter-of-another-kind", changed("adapter_config.json", peft_type="LOHA"), "kind LOHA", "LoRA"),
    adapter("adapter-of-another-rank", changed("adapter_config.json", r=3), "rank 3", "rank 4"),
    adapter("adapter-of-huge-rank", changed("adapter_config.json", r=10**9), "rank 1000000000", "rank 4"),
    adapter("adapter-rank-text", changed("adapter_config.json", r="4"), "rank '4'", "rank 4"),
    adapter("adapter-of-other-layers", changed("adapter_config.json", target_modules=["nothing"]), "a: ", "nothing"),
    adapter(
        "adapter-names-a-module",
        changed("adapter_config.json", megatron_config={}, megatron_core="antigravity"),
        "megatron",
        "leave",
    ),
    adapter(
        "adapter-bad-pattern", lambda a: rejson(a / "adapter_config.json", target_modules="(("), "a: ", "cannot be used"
    ),
    adapter("adapter-no-weights", gone("adapter_model.safetensors"), "adapter_model.safetensors", "missing"),
    adapter(
        "adapter-a-pickle",
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        "adapter_model.bin",
        "adapter_model.safetensors",
    ),
    adapter("adapter-cut", cut("adapter_model.safetensors", 500), "adapter_model.safetensors", AGAIN),
    adapter(
        "adapter-tensor-missing",
        lambda a: retensor(a / "adapter_model.safetensors", _drop),
        "a: ",
        "1 tensors of the adapter are missing",
        "lora_A",
    ),
    adapter(
        "adapter-tensor-unknown",
        lambda a: retensor(a / "adapter_model.safetensors", lambda s: s.update(x=torch.zeros(1))),
        "x",
        "does not fit",
    ),
    adapter(
        "adapter-tensor-misshaped",
        lambda a: retensor(
            a / "adapter_model.safetensors", lambda s: s.update({min(s): s[min(s)][:, :5].contiguous()})
        ),
        "a: ",
        "size mismatch",
    ),
    Bad(
        "adapter-a-file",
        [*GENERATE, "--adapter", "a"],
        5,
        ("no adapter directory a", "give a run, a checkpoint or a PEFT adapter"),
        text("a", "x"),
    ),
]

# ----- episodes


def episodes(name: str, damage: Callable[[Path], Any], *says: str) -> Bad:
    """A damaged copy of saved episodes, in `e`."""

    def make(here: Path, made: Made) -> None:
        shutil.copytree(made.episodes, here / "e")
        damage(here / "e")

    return Bad(name, ["rollout", "--from", "e", "--reward", "jpeg", "--out", "out"], 2, ("e", *says), make)


def _painted(e: Path, **changes: Any) -> None:
    """Change plain values of the first painted image."""
    data = json.loads((e / "episodes.json").read_text())
    segment = next(s for s in data["groups"][0]["episodes"][0]["segments"] if s["kind"] == "image")
    for key, value in changes.items():
        segment[key] = value if key != "window" else segment["window"] | value
    (e / "episodes.json").write_text(json.dumps(data))


def _first(e: Path, **changes: Any) -> None:
    """Change the first group, or (member, seed, segments) its first episode."""
    data = json.loads((e / "episodes.json").read_text())
    group = data["groups"][0]
    (group if changes.keys() & {"id", "text", "metadata", "image", "episodes"} else group["episodes"][0]).update(
        changes
    )
    (e / "episodes.json").write_text(json.dumps(data))


def _spoiled(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


def _tensor(e: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    state = load_file(e / "episodes.safetensors")
    name = next(n for n in sorted(state) if n.endswith(ending))
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name]).contiguous()
    save_file(state, e / "episodes.safetensors")


DAMAGED = "save them again"
EPISODES = [
    episodes("episodes-no-json", put("episodes.json", "{"), DAMAGED),
    episodes("episodes-deep", put("episodes.json", DEEP), DAMAGED),
    episodes("episodes-digits", put("episodes.json", f'{{"format": {LONG}}}'), DAMAGED),
    episodes("episodes-a-list", put("episodes.json", "[]"), DAMAGED),
    episodes("episodes-not-utf8", put("episodes.json", b"\xff"), DAMAGED),
    episodes("episodes-of-the-future", changed("episodes.json", format=99), "format 99", "this version reads"),
    episodes("episodes-none", changed("episodes.json", groups=[]), "empty"),
    episodes("episodes-missing", gone("episodes.json"), "holds no episodes", "unigrpo rollout --out"),
    episodes("episodes-tensors-missing", gone("episodes.safetensors"), "holds no episodes", "unigrpo rollout --out"),
    episodes("episodes-tensors-cut", cut("episodes.safetensors", 999), DAMAGED),
    episodes("episodes-tensor-gone", lambda e: _tensor(e, ".after", None), DAMAGED),
    episodes("episodes-tensor-short", lambda e: _tensor(e, ".before", lambda x: x[:1]), "before has shape", DAMAGED),
    episodes("episodes-latent-nan", lambda e: _tensor(e, ".latent", _spoiled), "latent", "finite", DAMAGED),
    episodes("episodes-log-prob-nan", lambda e: _tensor(e, ".log_prob", _spoiled), "log_prob", "finite", DAMAGED),
    episodes(
        "episodes-log-prob-above-0", lambda e: _tensor(e, "1.log_prob", lambda x: x.abs() + 1), "log_prob", DAMAGED
    ),
    episodes("episodes-ids-negative", lambda e: _tensor(e, "1.ids", lambda x: -x - 1), "ids", DAMAGED),
    episodes("episodes-ids-floats", lambda e: _tensor(e, "1.ids", lambda x: x.float()), "ids", DAMAGED),
    episodes("episodes-pixels-floats", lambda e: _tensor(e, ".pixels", lambda x: x.float()), "pixels", DAMAGED),
    episodes("episodes-pixels-none", lambda e: _tensor(e, ".pixels", lambda x: x[:0]), "pixels", DAMAGED),
    episodes("episodes-times-backwards", lambda e: _tensor(e, ".times", lambda x: x.flip(0)), "times", DAMAGED),
    episodes("episodes-grid-negative", lambda e: _painted(e, grid=[-6, -6]), "grid", DAMAGED),
    episodes("episodes-grid-text", lambda e: _painted(e, grid="66"), "grid", DAMAGED),
    episodes("episodes-grid-of-three", lambda e: _painted(e, grid=[6, 6, 1]), "grid", DAMAGED),
    episodes("episodes-window-outside", lambda e: _painted(e, window={"start": 1000}), "window", DAMAGED),
    episodes("episodes-window-below", lambda e: _painted(e, window={"start": -1}), "window", DAMAGED),
    episodes("episodes-kernel", lambda e: _painted(e, sde="magic"), "sde", DAMAGED),
    episodes("episodes-noise", lambda e: _painted(e, noise_level=float("inf")), "noise_level", DAMAGED),
    episodes("episodes-kind", lambda e: _painted(e, kind="film"), "film", DAMAGED),
    episodes("episodes-tensors-named-twice", lambda e: _painted(e, tensors=["latent"]), DAMAGED),
    episodes("episodes-id-a-number", lambda e: _first(e, id=3), "id", DAMAGED),
    episodes("episodes-text-a-list", lambda e: _first(e, text=[]), "text", DAMAGED),
    episodes("episodes-metadata-a-list", lambda e: _first(e, metadata=[]), "metadata", DAMAGED),
    episodes("episodes-member-a-path", lambda e: _first(e, member="../../../x"), "member", DAMAGED),
    episodes("episodes-member-negative", lambda e: _first(e, member=-1), "member", DAMAGED),
    episodes("episodes-seed-text", lambda e: _first(e, seed="x"), "seed", DAMAGED),
    episodes("episodes-without-an-image", lambda e: _first(e, segments=[]), "image", DAMAGED),
    episodes("episodes-group-empty", lambda e: _first(e, episodes=[]), "empty"),
    Bad(
        "from-a-file",
        ["rollout", "--from", "e", "--reward", "jpeg", "--out", "out"],
        2,
        ("e ", "unigrpo rollout --out"),
        text("e", "x"),
    ),
]

# ----- pictures


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of one colour as its header says it, however large; its data are as short as zlib can make them."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def picture(name: str, make: Callable[[Path], Any], *says: str, command: list[Any] = SCORE) -> Bad:
    return Bad(name, [*command, "--image", "i.png"], 2, ("i.png", *says), lambda here, made: make(here / "i.png"))


def _painted_png(path: Path, mode: str = "RGB", size: tuple[int, int] = (48, 48), kind: str = "PNG") -> None:
    Image.new(mode, size).save(path, kind)


def _animated(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def _cut_png(path: Path) -> None:
    _painted_png(path, size=(400, 400))
    os.truncate(path, path.stat().st_size // 2)


def with_picture(here: Path, made: Made) -> None:
    _painted_png(here / "i.png")


PICTURES = [
    picture("picture-none", lambda p: None, "no picture", "give a file"),
    picture("picture-text", lambda p: p.write_text("hello"), "PNG, JPEG"),
    picture("picture-empty", lambda p: p.write_bytes(b""), "PNG, JPEG"),
    picture("picture-a-directory", lambda p: p.mkdir(), "directory"),
    picture("picture-cut", _cut_png, "PNG, JPEG"),
    picture("picture-zero", lambda p: p.write_bytes(png(0, 0)), "PNG, JPEG"),
    picture("picture-no-data", lambda p: p.write_bytes(png(9, 9)), "PNG, JPEG"),
    picture("picture-bomb", lambda p: p.write_bytes(png(60_000, 60_000)), "pixels", "smaller"),
    picture("picture-half-a-bomb", lambda p: p.write_bytes(png(12_000, 9_000)), "pixels", "smaller"),
    picture("picture-two-to-the-31", lambda p: p.write_bytes(png(2**31 - 1, 2**31 - 1)), "pixels", "smaller"),
    picture(
        "picture-long-text",
        lambda p: p.write_bytes(png(4, 4, _chunk(b"zTXt", b"unigrpo\0\0" + zlib.compress(b"a" * 20_000_000)))),
        "PNG, JPEG",
    ),
    picture("picture-endless", lambda p: p.symlink_to("/dev/zero"), "not a regular file", "PNG, JPEG"),
    picture("picture-svg", lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "PNG, JPEG"),
    picture(
        "picture-postscript",
        lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        "PNG, JPEG",
    ),
    picture("picture-animated", _animated, "2 pictures", "one"),
    picture("edit-none", lambda p: None, "no picture", command=GENERATE),
    picture("edit-text", lambda p: p.write_text("hello"), "PNG, JPEG", command=GENERATE),
    picture("edit-bomb", lambda p: p.write_bytes(png(60_000, 60_000)), "pixels", command=GENERATE),
    picture("edit-animated", _animated, "2 pictures", command=GENERATE),
    Bad(
        "asking-a-model-that-cannot-see",
        [*GENERATE, "--image", "i.png", "--answer"],
        2,
        ("no vision tower", "as latents alone"),
        with_picture,
    ),
    Bad("score-nothing", ["rewards", "score", "jpeg"], 2, ("--image", "--prompts")),
    Bad(
        "score-two-ways",
        [*SCORE, "--image", "i.png", "--prompts", "p.jsonl"],
        2,
        ("--prompts", "leave out"),
        with_picture,
    ),
    Bad(
        "score-split",
        [*SCORE, "--image", "i.png", "--split", "test"],
        2,
        ("--split test", "accepted: eval, train"),
        with_picture,
    ),
    Bad(
        "score-prompts-without-images",
        [*SCORE, "--prompts", "p.jsonl"],
        2,
        ("p.jsonl", "`image`"),
        lines({"prompt": "a"}),
    ),
    Bad("calibrate-nothing", ["rewards", "calibrate", "jpeg", "clip"], 2, ("--images", "--prompts")),
    Bad("calibrate-no-folder", ["rewards", "calibrate", "jpeg", "clip", "--images", "d"], 2, ("--images d", "folder")),
    Bad(
        "calibrate-empty-folder",
        ["rewards", "calibrate", "jpeg", "clip", "--images", "d"],
        2,
        ("--images d", ".png"),
        folder("d"),
    ),
    Bad(
        "calibrate-a-threshold",
        ["rewards", "calibrate", "jpeg", "jpeg", "--images", "d", "--threshold", "nan"],
        2,
        ("--threshold nan", "finite"),
        lambda h, m: ((h / "d").mkdir(), _painted_png(h / "d" / "i.png")),
    ),
    Bad(
        "calibrate-several",
        ["rewards", "calibrate", "jpeg,clip", "jpeg", "--images", "d"],
        2,
        ("'jpeg,clip'", "one with one"),
        lambda h, m: ((h / "d").mkdir(), _painted_png(h / "d" / "i.png")),
    ),
]

# ----- plugins and rewards

HEADING = "import os, sys, time\nfrom unigrpo_cli import Options, reward\n\n"


def plugin(name: str, source: str | bytes, *says: str, command: list[Any] | None = None) -> Bad:
    """A file of a plugin, `mine.py`."""
    own = command or ["rewards", "info", "mine"]
    return Bad(name, [*own, "--plugin", "mine.py"], 3, says, text("mine.py", source))


def failing(name: str, body: str, *says: str, more: list[Any] | None = None) -> Bad:
    """A reward whose function has that body, in a training run."""
    source = f'{HEADING}@reward("mine")\ndef mine(images):\n    {body}\n'
    command = ["train", "--reward", "mine", "--out", "out", "--plugin", "mine.py", *QUICK, "--quiet", *(more or [])]

    def make(here: Path, made: Made) -> None:
        (here / "mine.py").write_text(source)
        (here / "m").symlink_to(made.small)

    return Bad(name, [*command, "--model", "m"], 3, ("'mine'", *says), make)


def rewards(name: str, given: str, code: int, *says: str) -> Bad:
    return Bad(name, ["train", "--reward", given, "--out", "out", *QUICK], code, says)


PLUGINS = [
    plugin("plugin-syntax", "def x(:\n", "--plugin mine.py", "line 1", "fix it"),
    plugin("plugin-nul", b"x = 1\x00\n", "--plugin mine.py", "fix it"),
    plugin("plugin-not-utf8", b"x = '\xff'\n", "--plugin mine.py", "fix it"),
    plugin("plugin-imports-nothing", "import no_such_module\n", "--plugin mine.py", "no_such_module", "fix it"),
    plugin("plugin-raises", "raise RuntimeError('no licence')\n", "--plugin mine.py", "no licence", "fix it"),
    plugin(
        "plugin-raises-lines", "raise RuntimeError('one\\ntwo\\x1b[31m')\n", "--plugin mine.py", "one two", "fix it"
    ),
    plugin("plugin-exits", "import sys\nsys.exit(0)\n", "--plugin mine.py", "SystemExit", "fix it"),
    plugin("plugin-recurses", "def f(): return f()\nf()\n", "--plugin mine.py", "RecursionError", "fix it"),
    plugin("plugin-base-exception", "raise BaseException('odd')\n", "--plugin mine.py", "odd", "fix it"),
    plugin("plugin-empty", "", "--plugin mine.py", "@reward"),
    plugin(
        "plugin-two-of-one-name",
        f'{HEADING}@reward("mine")\ndef a(images): ...\n@reward("mine")\ndef b(images): ...\n',
        "'mine'",
        "rename one",
    ),
    plugin("plugin-signature", f'{HEADING}@reward("mine")\ndef mine(picture): ...\n', "'picture'", "pixels"),
    plugin(
        "plugin-of-another-tool",
        f'{HEADING}@reward("mine")\ndef mine(completions, **kwargs): ...\n',
        "'completions'",
        "use images",
    ),
    plugin(
        "plugin-any-keywords", f'{HEADING}@reward("mine")\ndef mine(images, **kwargs): ...\n', "'**kwargs'", "metadata"
    ),
    plugin("plugin-name-with-a-comma", f'{HEADING}@reward("a,b")\ndef mine(images): ...\n', "'a,b'", "letters"),
    plugin(
        "plugin-range-backwards",
        f'{HEADING}@reward("mine", range=(1, 0))\ndef mine(images): ...\n',
        "(1, 0)",
        "low, high",
        command=["train", "--reward", "mine", "--out", "out"],
    ),
    plugin(
        "plugin-unknown-hook",
        "from unigrpo_cli import hookimpl\n@hookimpl\ndef unigrpo_befor_score(): ...\n",
        "unigrpo_befor_score",
        "did you mean",
    ),
    Bad("plugin-missing", ["rewards", "list", "--plugin", "none.py"], 3, ("--plugin none.py", "no file")),
    Bad("plugin-a-directory", ["rewards", "list", "--plugin", "d.py"], 3, ("--plugin d.py", "no file"), folder("d.py")),
    Bad(
        "plugin-no-module", ["rewards", "list", "--plugin", "no.such.module"], 3, ("--plugin no.such.module", "fix it")
    ),
    Bad("plugin-relative-module", ["rewards", "list", "--plugin", "..x"], 3, ("--plugin ..x", "fix it")),
    Bad("plugins-no-folder", ["rewards", "list", "--plugins-dir", "d"], 2, ("no plugins directory d", "--plugins-dir")),
    rewards("reward-unknown", "klip", 3, "'klip'", "did you mean clip"),
    rewards("reward-grammar", "clip:x", 2, "'clip:x'", "[alias=]name"),
    rewards("reward-without-its-weights", "clip@model=ViT-B-32", 3, "needs @pretrained="),
    rewards("reward-of-an-unknown-model", "clip@model=nowhere@pretrained=x", 3, "cannot be loaded"),
    Bad("reward-opt-of-another-reward", [*TRAIN, "-R", "clip.mode=x"], 2, ("--reward-opt clip.mode",)),
    Bad(
        "reward-needs-reasoning",
        ["rollout", "--reward", "plan", "--set", "sampling.think=false", "--out", "out"],
        3,
        ("does not think",),
    ),
    Bad("suite-beyond-a-reward", ["eval", "--suite", "geneval", "--out", "out"], 3, ("cannot see", "airplane")),
    rewards("reward-weight-nan", "clip:nan", 2, "'clip:nan'", "[alias=]name"),
    rewards("reward-weights-zero", "clip:0,geneval:0.0", 2, "weight 0", "name:1"),
    rewards("reward-unknown-option", "clip@modle=x", 3, "'modle'", "did you mean model"),
    rewards("reward-option-of-another-kind", "vlm@concurrency=many", 3, "concurrency='many'", "integer"),
    rewards("reward-option-out-of-range", "vlm@concurrency=0", 3, "concurrency=0", "greater than"),
    rewards("reward-option-digits", f"vlm@concurrency={LONG}", 3, "concurrency", "integer"),
    rewards("reward-option-nan", "vlm@deadline_s=.nan", 3, "deadline_s", "greater than"),
    rewards("reward-option-pattern", "format@pattern=((", 3, "pattern='(('", "regular expression"),
    rewards("reward-option-body", "vlm@body=[1]", 3, "body='[1]'", "JSON object"),
    Bad("reward-opt-form", [*TRAIN, "-R", "geneval"], 2, ("--reward-opt geneval", "ALIAS.KEY=VALUE")),
    Bad("reward-opt-secret", [*TRAIN, "-R", "geneval.api_key=sk-123456"], 2, ("geneval.api_key", "env:MY_KEY")),
    Bad(
        "reward-opt-credentials",
        [*TRAIN, "-R", "geneval.url=https://u:p@h/"],
        2,
        ("geneval.url", "environment variable"),
    ),
    rewards("reward-option-variable-not-set", "mine@api_key=env:NO_SUCH_KEY", 3, "'mine'", "accepted: "),
    Bad("reward-opt-deep", [*TRAIN, "-R", f"geneval.mode={DEEP}"], 3, ("mode", "'strict'")),
    Bad("reward-opt-bomb", [*TRAIN, "-R", "geneval.mode=" + "&a [*a,*a]"], 3, ("mode", "'strict'")),
    Bad(
        "no-reward",
        ["train", "--preset", "paper", "--model", "embedded", "--out", "out"],
        2,
        ("no reward is chosen", "--reward clip,geneval"),
    ),
    failing("score-raises", "raise ValueError('no judge')", "no judge", "rewards test mine"),
    failing("score-exits", "sys.exit(0)", "SystemExit", "rewards test mine"),
    failing("score-too-few", "return [1.0]", "1 scores for", "one number per sample"),
    failing("score-text", "return 'good'", "one str", "a list of"),
    failing("score-nan", "return [float('nan')] * len(images)", "abstained", "rewards test mine"),
    failing(
        "score-hangs", "time.sleep(600)", "within 0.2 s", "reward.timeout_s", more=["--set", "reward.timeout_s=0.2"]
    ),
    Bad("info-unknown", ["rewards", "info", "jpg"], 3, ("'jpg'", "did you mean jpeg")),
    Bad("list-of-a-broken-environment", ["rewards", "list", "--plugin", "\udcff.py"], 3, ("--plugin", "no file")),
    Bad("new-bad-name", ["rewards", "new", "Not-A-Name"], 2, ("'Not-A-Name'", "lower-case letters"), json=False),
    Bad("new-path-name", ["rewards", "new", "../x"], 2, ("'../x'", "lower-case letters"), json=False),
    Bad("new-long-name", ["rewards", "new", "x" * 300], 2, ("xxx", "64 letters"), json=False),
    Bad("new-keyword", ["rewards", "new", "class"], 2, ("'class'", "lower-case letters"), json=False),
    Bad("new-taken", ["rewards", "new", "clip"], 2, ("'clip'", "choose another name"), json=False),
    Bad("new-kind", ["rewards", "new", "x", "--kind", "poem"], 2, ("--kind poem", "accepted: class"), json=False),
    Bad(
        "new-out-a-file",
        ["rewards", "new", "x", "--out", "f"],
        2,
        ("--out f", "give a folder"),
        text("f", ""),
        json=False,
    ),
    Bad(
        "new-out-in-a-file",
        ["rewards", "new", "x", "--out", "f/g"],
        2,
        ("f/g", "choose another --out"),
        text("f", ""),
        json=False,
    ),
    Bad("new-exists", ["rewards", "new", "x"], 2, ("x.py exists", "choose another name"), text("x.py", ""), json=False),
    Bad("serve-several", ["rewards", "serve", "jpeg,clip"], 2, ("not 2", "start one server for each")),
    Bad("serve-without-its-model", ["rewards", "serve", "clip"], 3, ("say which model",)),
    Bad("serve-unknown", ["rewards", "serve", "jpg"], 3, ("'jpg'", "did you mean jpeg")),
    Bad(
        "serve-outside-without-a-token",
        ["rewards", "serve", "jpeg", "--host", "0.0.0.0"],
        2,
        ("0.0.0.0", "--token-file"),
    ),
    Bad(
        "serve-nowhere",
        ["rewards", "serve", "jpeg", "--host", "256.0.0.1", "--token-file", "t"],
        2,
        ("256.0.0.1", "--host"),
        text("t", "abc"),
    ),
    Bad(
        "serve-token-missing", ["rewards", "serve", "jpeg", "--token-file", "t"], 2, ("--token-file t", "openssl rand")
    ),
    Bad(
        "serve-token-empty",
        ["rewards", "serve", "jpeg", "--token-file", "t"],
        2,
        ("--token-file t", "openssl rand"),
        text("t", "\n"),
    ),
    Bad(
        "serve-token-two-words",
        ["rewards", "serve", "jpeg", "--token-file", "t"],
        2,
        ("--token-file t", "openssl rand"),
        text("t", "a b"),
    ),
    Bad("serve-device", ["rewards", "serve", "jpeg", "--device", "quantum"], 2, ("--device quantum", "cpu")),
    Bad("gate-form", [*EVAL, "--fail-under", "geneval"], 2, ("--fail-under geneval", "NAME=VALUE")),
    Bad("gate-unknown", [*EVAL, "--fail-under", "genval=1"], 2, ("--fail-under genval", "did you mean geneval")),
    Bad("gate-nan", [*EVAL, "--fail-under", "geneval=nan"], 2, ("--fail-under geneval=nan", "NAME=VALUE")),
]

# ----- places that cannot be read or written


def _file_in_the_way(here: Path, made: Made) -> None:
    (here / "f").write_text("mine")


PLACES = [
    Bad("out-a-file", ["generate", "a", "--out", "f"], 2, ("f is a file", "choose another --out"), _file_in_the_way),
    Bad("out-below-a-file", ["generate", "a", "--out", "f/g"], 2, ("f/g", "choose another --out"), _file_in_the_way),
    *(
        Bad(f"out-in-use-{own[0]}", [*own, "--out", "."], 2, ("not empty", "choose another --out"), _file_in_the_way)
        for own in (["eval", "--limit", 1], TRAIN[:3], ["generate", "a"])
    ),
    Bad("out-not-utf8", ["generate", "a", "--out", "\udcffx"], 2, ("--out", "not UTF-8", "choose another --out")),
    Bad("out-not-utf8-of-a-run", [*TRAIN[:3], "--out", "\udcffx", *QUICK], 2, ("--out", "choose another --out")),
    Bad("out-name-too-long", ["generate", "a", "--out", "o" * 300], 2, ("ooo", "choose another --out")),
    Bad("out-in-proc", ["rollout", *ROLLOUT[1:-1], "/proc/x"], 2, ("/proc/x", "choose another --out")),
    Bad("out-on-a-device", [*TRAIN[:3], "--out", "/dev/full", *QUICK], 2, ("/dev/full", "choose another --out")),
    Bad(
        "out-a-loop",
        ["generate", "a", "--out", "l"],
        2,
        ("l", "choose another --out"),
        lambda h, m: (h / "l").symlink_to("l"),
    ),
    Bad("resume-nowhere", ["train", "--resume", "none"], 2, ("--resume none", "no such checkpoint or run")),
    Bad("resume-nothing", ["train", "--resume", "auto"], 2, ("--resume auto", "--out DIR")),
    Bad(
        "resume-an-empty-run", ["train", "--resume", "r"], 2, ("r holds no checkpoint", "give a directory"), folder("r")
    ),
    Bad(
        "resume-with-another-out",
        ["train", "--resume", "run", "--out", "x"],
        2,
        ("--resume", "leave out --out x"),
        lambda h, m: shutil.copytree(m.full, h / "run"),
    ),
    Bad(
        "resume-with-another-model",
        ["train", "--resume", "run", "--model", "x"],
        2,
        ("--resume", "leave out --model"),
        lambda h, m: shutil.copytree(m.full, h / "run"),
    ),
    Bad(
        "resume-a-damaged-config",
        ["train", "--resume", "run"],
        2,
        ("config.toml", "not readable TOML"),
        lambda h, m: (shutil.copytree(m.full, h / "run"), (h / "run" / "config.toml").write_text("[")),
    ),
    Bad(
        "resume-without-a-config",
        ["train", "--resume", "run"],
        2,
        ("config.toml", "is missing; restore it"),
        lambda h, m: (shutil.copytree(m.full, h / "run"), (h / "run" / "config.toml").unlink()),
    ),
    Bad("compare-twice", [*EVAL, "--compare", "x", "--compare", "x"], 2, ("x is given 2 times", "each model once")),
    Bad("compare-nowhere", [*EVAL, "--compare", "none"], 5, ("none", "give `embedded`")),
]

RAISES = """
from unigrpo_cli import reward

@reward("mine")
def mine(images):
    raise OSError("the judge is gone")
"""
EXAMINED = [
    setting("doctor-key", "doctor.promts=1", "doctor.promts", "did you mean doctor.prompts", command=DOCTOR),
    setting("doctor-one-member", "doctor.members=1", "doctor.members = 1", "greater than", command=DOCTOR),
    setting("doctor-of-what", "doctor.at_start=maybe", "doctor.at_start", "'stop', 'warn' or 'off'", command=DOCTOR),
    setting(
        "doctor-nothing-trained",
        "sampling.think=false",
        "nothing is trained",
        "train.experts",
        command=[*DOCTOR, "--set", "train.experts=text", "--set", "eval.rewards=[]"],
    ),
    Bad(
        "doctor-no-reward",
        [*DOCTOR, "--set", "reward.names=[]", "--reward", "nosuch"],
        3,
        ("'nosuch'", "--plugin FILE"),
    ),
    Bad("doctor-weightless", ["doctor", "--reward", "geneval:0", *QUICK], 2, ("weight 0", "name:1")),
    Bad("doctor-no-model", [*DOCTOR, "--model", "nowhere/at/all"], 5, ("nowhere/at/all",)),
    Bad("doctor-no-prompts", [*DOCTOR, "--prompts", "none.txt"], 2, ("none.txt",)),
    Bad("doctor-no-plugin", [*DOCTOR, "--plugin", "none.py"], 3, ("none.py",)),
    Bad(
        "doctor-full-from-an-adapter",
        [*DOCTOR, "--adapter", "m.lora"],
        2,
        ("adapter", "train.finetune=lora"),
        lambda h, m: shutil.copytree(m.lora, h / "m.lora"),
    ),
    Bad(
        "doctor-reward-raises",
        ["doctor", "--reward", "mine", "--plugin", "mine.py", *QUICK],
        3,
        ("'mine'", "the judge is gone"),
        text("mine.py", RAISES),
    ),
]


TABLE = [*EXAMINED, *CONFIGURATION, *PROMPTS, *MODELS, *CHECKPOINTS, *ADAPTERS, *EPISODES, *PICTURES, *PLUGINS, *PLACES]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    check(bad, tmp_path, made, monkeypatch)


def test_the_table_has_no_row_twice() -> None:
    names = [bad.name for bad in TABLE]
    assert len(set(names)) == len(names) >= 100
    assert all(bad.says for bad in TABLE)


# ----- servers


class _Odd(BaseHTTPRequestHandler):
    """Answers as its path says; what a wrong address may meet."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.path.split("/")[1]
        status = {"broken": 500, "elsewhere": 302, "teapot": 418, "away": 503}.get(kind, 200)
        self.send_response(status)
        if kind == "elsewhere":
            self.send_header("Location", "file:///etc/passwd")
        self.end_headers()
        with contextlib.suppress(OSError):  # who had enough hangs up
            for _ in range(400 if kind == "endless" else 1):
                self.wfile.write({"endless": b" " * 2**18, "deep": DEEP.encode()}.get(kind, b"<html>hello</html>"))

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def odd_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _refused_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("name", ["remote", "vlm"])
@pytest.mark.parametrize("kind", ["html", "broken", "elsewhere", "teapot", "away", "endless", "deep"])
def test_a_server_of_another_kind(
    name: str, kind: str, odd_server: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"{name}.url={odd_server}/{kind}"
    more = ["-R", f"{name}.deadline_s=0.3", *(["-R", "vlm.attempts=1", "-R", "vlm.model=m"] if name == "vlm" else [])]
    command = ["rewards", "score", name, "--image", "i.png", "--prompt", "a", "-R", given, *more]
    bad = Bad(kind, command, 3, (odd_server, "@"), with_picture)
    check(bad, tmp_path, made, monkeypatch)


@pytest.mark.parametrize("name", ["remote", "vlm"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "127.0.0.1"),
        ("file:///etc/passwd", "http"),
        ("", "url"),
    ],
)
def test_an_address_that_is_none(
    name: str, url: str | None, says: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"{name}.url={_refused_port() if url is None else url}"
    command = ["rewards", "score", name, "--image", "i.png", "--prompt", "a", "-R", given]
    command += ["-R", f"{name}.deadline_s=0.3"]
    bad = Bad("url", command, 3, (name if url is not None else "127.0.0.1", says), with_picture)
    check(bad, tmp_path, made, monkeypatch)


# ----- in a process of its own


def _command(*arguments: object, prefix: tuple[str, ...] = (), **how: Any) -> subprocess.CompletedProcess[str]:
    code = "from unigrpo_cli.cli import main; main()"
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **how)


def _on_a_small_disk(place: Path, *arguments: object) -> None:
    """The command, with a tmpfs of 64 KiB at a place that this process alone sees: as `unshare -rm` begins one."""
    user, group = os.getuid(), os.getgid()
    assert ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], check=True)
    command_line(*arguments)


def test_a_full_disk(tmp_path: Path, small_model: Path) -> None:
    """A small tmpfs fills while files are written: one line that says where and what to do."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs user namespaces")
    more = ["--model", small_model, *QUICK, "--quiet", "--json"]
    code, output, errors = Process(_on_a_small_disk, tmp_path, *ROLLOUT[:-1], tmp_path / "out", *more).ended()
    assert (code, output) == (1, ""), errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    assert "choose another --out" in line
    assert "Traceback" not in errors


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """Read-only by a mount, for root heeds no permissions."""
    prefix = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs user namespaces")
    done = _command("rewards", "new", "mine", "--out", tmp_path / "out", prefix=prefix)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"error: cannot write to {tmp_path / 'out'}: Read-only file system; choose another --out"


def test_debug_adds_a_traceback_and_keeps_line_and_code(tmp_path: Path) -> None:
    done = _command("--debug", "inspect", "none", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines()[-1].startswith("error: no model at none")
    assert "Traceback" in done.stderr


# ----- files that a program mangled

FUZZ = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mangled(draw: st.DrawFn, content: bytes, head: int = 2_000) -> bytes:
    """Bytes near `content`: some replaced, put in, cut out or doubled in its first `head`; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(head, len(content))))
        to = at + draw(st.integers(0, 20))
        new = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"-1", b"1e999", b"null", b"[", b'"', b"NaN"])))
        content = content[:at] + draw(st.sampled_from([new, new + content[at:to], b""])) + content[to:]
    return content


def _works_or_one_line(*arguments: object) -> None:
    result = unigrpo(*arguments)
    assert "Traceback" not in result.output
    assert result.exit_code in (0, 1, 2, 3, 5), result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == (result.exit_code != 0), result.output
    assert not any("--debug" in line for line in errors), errors


def _fuzz(path: Path, content: bytes, *arguments: object, out: Path | None = None) -> None:
    path.write_bytes(content)
    _works_or_one_line(*arguments)
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)


SETTINGS = (
    b'seed = 3\nmodel = "embedded"\n[sampling]\nthink = false\nsteps = 9\nwindow_range = [0, 4]\n'
    b"[train]\nlr_text = 1e-6\n"
)
ROWS = b'{"prompt": "a red heart"}\n{"prompt": "a cat", "include": [{"class": "cat", "count": 2}], "tag": "x"}\n'


@FUZZ
@given(mangled(SETTINGS))
def test_mangled_configuration(tmp_path: Path, content: bytes) -> None:
    from unigrpo_cli.config import load_config
    from unigrpo_cli.errors import UsageError

    (tmp_path / "c.toml").write_bytes(content)
    with contextlib.suppress(UsageError):
        load_config(file=tmp_path / "c.toml")


@FUZZ
@given(mangled(ROWS))
def test_mangled_prompts(tmp_path: Path, content: bytes) -> None:
    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.suites import read_prompts

    (tmp_path / "p.jsonl").write_bytes(content)
    with contextlib.suppress(UsageError):
        read_prompts(tmp_path / "p.jsonl")


@FUZZ
@given(st.data())
def test_mangled_models(tmp_path: Path, data: st.DataObject) -> None:
    """One file of a model at a time, the header of its weights among them."""
    model = tmp_path / "m"
    if not model.is_dir():
        shutil.copytree(embedded_directory(), model)
    path = model / data.draw(st.sampled_from(["ema.safetensors", "llm_config.json", "config.json"]))
    whole = path.read_bytes()
    _fuzz(path, data.draw(mangled(whole, 8_000)), "inspect", model)
    path.write_bytes(whole)


@FUZZ
@given(st.data())
def test_mangled_states(tmp_path: Path, made: Made, data: st.DataObject) -> None:
    run = tmp_path / "run"
    if not run.is_dir():
        shutil.copytree(made.full, run)
    path = run / "checkpoints" / "step_000000" / "state.json"
    whole = path.read_bytes()
    _fuzz(path, data.draw(mangled(whole)), "train", "--resume", path.parent, "--steps", 0, "--dry-run")
    path.write_bytes(whole)


@FUZZ
@given(st.data())
def test_mangled_episodes(tmp_path: Path, made: Made, data: st.DataObject) -> None:
    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.run.episode_files import load_episodes

    shutil.copytree(made.episodes, tmp_path / "e", dirs_exist_ok=True)
    path = tmp_path / "e" / data.draw(st.sampled_from(["episodes.json", "episodes.safetensors"]))
    whole = path.read_bytes()
    path.write_bytes(data.draw(mangled(whole, 4_000)))
    with contextlib.suppress(UsageError):
        load_episodes(tmp_path / "e")


@FUZZ
@given(st.data())
def test_mangled_pictures(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "i.png"
    _painted_png(path)
    content = data.draw(mangled(path.read_bytes(), 200))
    _fuzz(path, content, "rewards", "score", "jpeg", "--image", path, "--prompt", "a")


def test_a_configuration_with_a_mark_in_front_and_windows_line_ends(tmp_path: Path) -> None:
    from unigrpo_cli.config import load_config

    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 5\r\n[train]\r\nsteps = 7\r\n")
    assert load_config(file=tmp_path / "c.toml").train.steps == 7


def test_small_long_and_grey_pictures_are_taken(tmp_path: Path) -> None:
    """The control: what is odd and fine."""
    kinds = {
        "one.png": ("RGB", (1, 1)),
        "long.png": ("L", (2_000, 1)),
        "cmyk.jpg": ("CMYK", (8, 8)),
        "p.png": ("P", (9, 5)),
    }
    for name, (mode, size) in kinds.items():
        _painted_png(tmp_path / name, mode, size, "JPEG" if name.endswith("jpg") else "PNG")
        result = unigrpo(*SCORE, "--image", tmp_path / name, "--prompt", "a", "--json")
        assert result.exit_code == 0, result.output


def test_prompts_have_ids_of_their_own() -> None:
    """A text that looks like the number of another's repetition gets a number itself; `id`s given are metadata."""
    from unigrpo_cli.suites import as_prompts

    ids = [p.id for p in as_prompts([{"prompt": t, "id": "x"} for t in ("a", "a", "a#1", "a")])]
    assert ids == ["a", "a#1", "a#1#1", "a#2"]
