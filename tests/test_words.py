"""Old identifiers and sentences do not come back; history (log, changelog, decisions, renamed keys) may name them."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unigrpo_cli.cli import app

ROOT = Path(__file__).parents[1]
HISTORY = ("docs/log.md", "docs/decisions", "CHANGELOG.md", "unigrpo_cli/config/loading.py", "tests/test_words.py")
# fmt: off
IDENTIFIERS = {
    "Chapters", "Fixed", "Lane", "OpenReward", "Pending", "Poorer", "RewardChoice", "Scored", "Scoring",
    "Turn", "UnifiedModel", "Witness", "_owe", "_pay", "_settle", "at_once", "come_and_go", "chapters",
    "coupling", "decode_in_strips", "decode_strip", "edge_ids", "go_on", "intake", "jsontext", "keep_every",
    "lanes", "micro_tokens", "old_apart", "outgrown", "replay_fixed", "reference_on", "set_aside",
    "side_by_side", "surroundings", "training_run", "weighed", "window_every", "window_within", "witness",
}
# fmt: on
KEYS = [
    *("sampling.rows", "sampling.decode_strip", "sampling.window_within", "sampling.window_every", "sampling.kernel"),
    *("objective.coupling", "advantage.std", "train.updates", "train.tune", "train.also", "train.reference_on"),
    *("train.micro_batch", "train.micro_tokens", "train.keep_every", "train.old_scores", "reward.use", "reward.on"),
    *("watch.explosion", "watch.bad_steps", "watch.entropy", "watch.kl_text"),
]
SENTENCES = [
    "Of everything random",
    "all that follows is of each",
    "goes on with",
    "as before, but no longer to the bit",
    "free space or mend that",
    "mend that plugin",
    "says nothing about nothing",
    "have left the numbers",
    "memory that did not suffice",
    "what the network is really fed",
    "is gone on with",
    "for whoever takes up",
    "they say what they have to say",
    "is of no use to",
    "who writes on",
]


def _kept(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return not name.startswith(HISTORY) and not {".venv", "build", "runs"} & set(path.parts)


CODE = [p for d in ("unigrpo_cli", "plugins", "tools", "benchmarks", "examples") for p in ROOT.glob(f"{d}/**/*.py")]
TEXT = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("**/*.toml")]


def test_no_old_identifier_is_used() -> None:
    found = []
    for path in filter(_kept, CODE):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME and token.string in IDENTIFIERS:
                found.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert len(CODE) > 150
    assert not found


@pytest.mark.parametrize("what", ["keys", "sentences"])
def test_no_old_key_or_sentence_is_written(what: str) -> None:
    words = KEYS if what == "keys" else SENTENCES
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
    found = []
    for path in filter(_kept, [*CODE, *TEXT, *ROOT.glob("tests/**/*.py")]):
        text = re.sub(r"\s+", " ", path.read_text())
        found += [f"{path.relative_to(ROOT)}: {match}" for match in pattern.findall(text)]
    assert not found


@pytest.mark.parametrize(
    "command",
    ["train", "sft", "eval", "rollout", "sweep", "export", "push", "generate", "doctor", "inspect", "rewards"],
)
def test_help_has_no_old_sentence(command: str) -> None:
    shown = re.sub(r"\s+", " ", CliRunner().invoke(app, [command, "--help"]).output)
    assert "Usage" in shown
    assert not [sentence for sentence in SENTENCES if sentence in shown]
