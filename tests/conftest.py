"""Shared fixtures: a tiny true model, never a mock."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command sets it; read when torch loads

import pytest
import torch
import typer.testing

from tools.toy_model import build_model
from unigrpo_cli.models.mot import checkpoint
from unigrpo_cli.models.mot.codec import Autoencoder
from unigrpo_cli.models.mot.config import AutoencoderConfig
from unigrpo_cli.models.mot.policy import MoTPolicy

torch.set_num_threads(1)  # the tensors are small: a second thread mostly waits
typer.testing._get_command = cache(typer.testing._get_command)  # the tree of commands is made once, not at each call


_READ: dict[tuple[object, ...], Autoencoder] = {}


def _autoencoder_once(path: Path, config: AutoencoderConfig, device: torch.device | str, rows: int) -> Autoencoder:
    """The frozen autoencoder of a file whose bytes were read before; diffusers takes a tenth of a second for any."""
    key = (sha256(path.read_bytes()).digest(), config, str(device), rows)
    if key not in _READ:
        _READ[key] = Autoencoder(path, config, device, rows)
    return _READ[key]


checkpoint.Autoencoder = _autoencoder_once  # type: ignore[assignment,misc]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="directory with flow_sde.safetensors, geneval_rules.jsonl and bagel_tiny/ to check against",
    )


def pytest_configure(config: pytest.Config) -> None:
    """A mistyped --golden-dir must not pass by checking nothing."""
    directory = config.getoption("--golden-dir")
    files = ("flow_sde.safetensors", "geneval_rules.jsonl", "bagel_tiny/golden.json", "golden.json")
    if not any((directory / name).is_file() for name in files):
        raise pytest.UsageError(f"--golden-dir {directory} holds none of {', '.join(files)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests, and further rows of tables whose first rows find most faults, are left out of the four minutes."""
    if not os.environ.get("UNIGRPO_LONG_TESTS"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: set UNIGRPO_LONG_TESTS=1"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: looking for garbage meanwhile, and later in that, would take a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever a run before has set: two test processes on two cores would spin for each other's."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _only_our_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to be installed beside us must not decide a test."""
    monkeypatch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("UNIGRPO_PLUGINS", raising=False)
    monkeypatch.delenv("UNIGRPO_PLUGINS_DIR", raising=False)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of that architecture, untrained and small, for commands whose numbers do not matter."""
    directory = tmp_path_factory.mktemp("small") / "model"
    build_model(seed=0, width=32, layers=2).save(directory, "")
    return directory


@pytest.fixture(scope="session")
def one_prompt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of a suite of one prompt, for runs whose evaluation does not matter."""
    path = tmp_path_factory.mktemp("suite") / "one.txt"
    path.write_text("a red circle\n")
    return f"eval.suite={path}"


@pytest.fixture
def tiny() -> MoTPolicy:
    """The embedded architecture, untrained and small, in fp64: 2 layers of width 32."""
    model = build_model(seed=0, width=32, layers=2)
    model.network.double().requires_grad_(True)
    model.network.latent_pos_embed.pos_embed.requires_grad_(False)
    with torch.no_grad():  # biases and norms that are not at their neutral values, so that losing one shows
        generator = torch.Generator().manual_seed(1)
        for parameter in model.network.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model
