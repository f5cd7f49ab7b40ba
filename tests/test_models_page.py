"""The smallest model of docs/models.md, cut out of the page, and the contract of a policy with six planted faults."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import unigrpo
from safetensors.torch import save_file

from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.mot.family import MoTFamily
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.testing import assert_policy_contract

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's module; its weights lie in `model` beside it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 100
    path = tmp_path_factory.mktemp("page") / "colour.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("colour", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    (path.parent / "model").mkdir()
    save_file(module.Network().state_dict(), path.parent / "model" / "colour.safetensors")
    return module


def _load(example: Any, kind: type | None = None, **changes: Any) -> Any:
    directory = Path(example.__file__).parent / "model"
    found = example.ColourFamily().load(directory, None, device=None, dtype=None, vae_tile_rows=0)
    return (kind or example.ColourPolicy)(found.network, **changes)


def test_the_pages_model_keeps_the_contract(example: Any) -> None:
    checks = assert_policy_contract(lambda: _load(example), full=True)
    assert len(checks) == 10 and all(check.ok for check in checks)


def test_the_pages_model_trains_by_the_commands(example: Any, tmp_path: Path) -> None:
    """As a plugin file: nothing of it is known to the program."""
    model, plugin = str(Path(example.__file__).parent / "model"), ["--plugin", example.__file__]
    (tmp_path / "prompts.txt").write_text("a red square\na blue square\n")
    sizes = ("sampling.batch_size=4", "train.micro_batch_size=4", "train.prompts_per_step=2", "train.group_size=4")
    small = [part for key in (*sizes, "doctor.at_start=off", "train.samples_every=0") for part in ("--set", key)]
    out, prompts = str(tmp_path / "run"), str(tmp_path / "prompts.txt")
    given = ["--model", model, "--reward", "jpeg,length", "--prompts", prompts, "--steps", "2", "--out", out]
    try:
        done = unigrpo("train", *given, *small, *plugin, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["steps"] == 2
        painted = unigrpo("generate", "a red square", "--model", out, *plugin, "--out", str(tmp_path / "pictures"))
        assert painted.exit_code == 0, painted.output
    finally:
        MODELS._families.pop("colour", None)


# ----- planted faults, each a policy that is wrong in one way


def _time_reversed(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def forward(self, context, ids_BL=None, length_B=None, image=None, **how):
            if image is not None:
                image = NoisyImage(image.x_BKND, 1 - image.t_BK, image.grid)
            return super().forward(context, ids_BL, length_B, image, **how)

    return Wrong


def _velocity_negated(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def forward(self, *given, **how):
            out = super().forward(*given, **how)
            return out if out.velocity_BKND is None else replace(out, velocity_BKND=-out.velocity_BKND)

    return Wrong


def _padding_counted(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def forward(self, context, ids_BL=None, length_B=None, image=None, **how):
            return super().forward(context, ids_BL, None, image, **how)

    return Wrong


def _text_re_tokenised(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def forward(self, context, ids_BL=None, length_B=None, image=None, **how):
            if ids_BL is not None and ids_BL.shape[1] > 1:  # special tokens are lost on the way through text
                ids_BL = torch.where(ids_BL == self.stop_id, 2, ids_BL)
            return super().forward(context, ids_BL, length_B, image, **how)

    return Wrong


def _context_stale(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def forward(self, context, ids_BL=None, length_B=None, image=None, **how):
            out = super().forward(context, ids_BL, length_B, image, **how)
            if ids_BL is None or image is None:
                return out
            return replace(out, velocity_BKND=super().forward(context, image=image, **how).velocity_BKND)

    return Wrong


def _adapters_left_on(base: type) -> type:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def reference(self):
            return nullcontext(self)

    return Wrong


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (_time_reversed, "t = 1 is noise"),
        (_velocity_negated, "t = 1 is noise"),
        (_padding_counted, "padded with anything"),
        (_text_re_tokenised, "read at once or token by token"),
        (_context_stale, "replay scores each action"),
        (_adapters_left_on, "the reference is the model before training"),
    ],
)
def test_the_contract_finds_a_planted_fault(example: Any, plant: Any, says: str) -> None:
    wrong = plant(example.ColourPolicy)
    with pytest.raises(AssertionError, match=says):
        assert_policy_contract(lambda: _load(example, wrong), full=True)


def test_a_mixture_of_transformers_keeps_the_contract(small_model: Path) -> None:
    def load() -> Any:
        return MoTFamily().load(small_model, None, device=torch.device("cpu"), dtype=torch.float32, vae_tile_rows=0)

    assert_policy_contract(load, height=8, width=8, trained=False)
