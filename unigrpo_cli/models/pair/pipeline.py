"""A diffusers pipeline as its configurations and headers describe it. Reads no weights, imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.files import Described, Stored, read_header, read_object, refuse_odd_files
from unigrpo_cli.models.pair.facts import (
    AUTOENCODER,
    INDEX,
    PAINTER,
    PAINTERS,
    REASONER,
    SCHEDULER,
    TARGETS_LM,
    TOKENIZER,
    TURN,
    PainterFacts,
    Schedule,
)

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
PLAIN = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "num_train_timesteps": 1000,
}
"""Settings of that scheduler with which its times are `algo.flow.time_grid`."""


@dataclass(frozen=True)
class Network:
    """One network of the pipeline: its folder, its configuration and its tensors."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.tensors.values())

    def matrices(self, targets: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices whose modules `targets` matches."""
        pattern = re.compile(rf"({targets})\.weight")
        return {
            name: t.shape
            for name, t in self.tensors.items()
            if pattern.fullmatch(name) or pattern.fullmatch(f"model.{name}")  # a language model saved without its head
        }


@dataclass(frozen=True)
class Pipeline(Described):
    """What a directory holds, and what is wrong with it.

    Args:
        reasoner: the folder of the language model; `tokenizer` goes with it.
        problems: one line each; empty when the directory can be loaded.
    """

    directory: Path
    facts: PainterFacts
    reasoner: Network
    painter: Network
    autoencoder: Network
    tokenizer: Path
    schedule: Schedule
    distilled: bool
    problems: tuple[str, ...]

    @property
    def networks(self) -> dict[str, Network]:
        return {REASONER: self.reasoner, PAINTER: self.painter, AUTOENCODER: self.autoencoder}

    @property
    def parts(self) -> dict[str, dict[str, Stored]]:
        return {part: network.tensors for part, network in self.networks.items()}


def reject(directory: Path) -> str | None:
    """Why a directory is no pipeline with a known painter; None when it is one, whole or damaged."""
    path = directory / INDEX
    if not path.is_file():
        return f"it has no {INDEX}"
    try:
        name = read_object(path).get("_class_name")
    except WeightsError:
        return None
    return None if name in PAINTERS else f"{INDEX} names {name}; known are {' and '.join(PAINTERS)}"


def read_pipeline(directory: Path, reasoner: str = "") -> Pipeline:
    """What a directory holds. Differences between its files are `problems`, not errors.

    Args:
        reasoner: directory of another language model, with its tokenizer; "" takes the pipeline's own.

    Raises:
        WeightsError: when a file that all others depend on is missing or damaged.
    """
    index = read_object(directory / INDEX)
    facts = PAINTERS.get(str(index.get("_class_name")))
    if facts is None:
        raise WeightsError(f"{directory / INDEX} names {index.get('_class_name')}; known are {' and '.join(PAINTERS)}")
    writes, words = directory / REASONER, directory / TOKENIZER
    if reasoner:
        writes = words = Path(reasoner)
        if not writes.is_dir():
            raise WeightsError(f"model_options.reasoner={reasoner}: no such directory; give that of a causal LM")
        refuse_odd_files(writes)
    networks = {
        REASONER: _network(writes),
        PAINTER: _network(directory / PAINTER),
        AUTOENCODER: _network(directory / AUTOENCODER),
    }
    schedule, odd = _schedule(directory, facts)
    problems = [*_unfit(facts, networks), *odd, *_tokenizer_problems(words)]
    return Pipeline(
        directory,
        facts,
        reasoner=networks[REASONER],
        painter=networks[PAINTER],
        autoencoder=networks[AUTOENCODER],
        tokenizer=words,
        schedule=schedule,
        distilled=bool(index.get("is_distilled", False)),
        problems=tuple(problems),
    )


def _network(directory: Path) -> Network:
    """Configuration and headers of one folder.

    Raises:
        WeightsError: when it is missing, or a file in it is missing, damaged or truncated.
    """
    if not directory.is_dir():
        raise WeightsError(f"{directory.parent} is not a complete model: {directory.name}/ is missing; fetch it again")
    config = read_object(directory / "config.json")
    tensors: dict[str, Stored] = {}
    for path in _weight_files(directory):
        tensors |= read_header(path)
    return Network(directory, config, tensors)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or the one that is there."""
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        names = read_object(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not all(Path(str(n)).name == n for n in names.values()):
            raise WeightsError(f"{indices[0]} is damaged (no weight_map of file names); fetch it again")
        files = [directory / str(name) for name in sorted(set(names.values()))]
        missing = next((path for path in files if not path.is_file()), None)
        if missing is not None:
            raise WeightsError(f"{missing} is missing, which {indices[0].name} names; fetch it again")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = ", ".join(sorted(p.name for p in directory.glob("*.bin"))) or "none"
        raise WeightsError(f"{directory} has no .safetensors file (other weights: {others}); fetch the model with them")
    if len(files) > 1:
        raise WeightsError(
            f"{directory} has {len(files)} .safetensors files and no index that names the right ones; keep one"
        )
    return files


def _unfit(facts: PainterFacts, networks: dict[str, Network]) -> list[str]:
    """Parts that are of another kind than the pipeline says, or do not fit each other."""
    found = []
    for part, wanted in ((PAINTER, facts.painter), (AUTOENCODER, facts.autoencoder)):
        name = networks[part].config.get("_class_name")
        if name != wanted:
            found.append(f"{part} is a {name}; {facts.pipeline} has a {wanted}")
    lm, painter = networks[REASONER].config, networks[PAINTER].config
    width, layers = lm.get("hidden_size"), lm.get("num_hidden_layers")
    taken = painter.get("cap_feat_dim", painter.get("joint_attention_dim"))
    if not (isinstance(width, int) and isinstance(layers, int)):
        return [*found, f"{networks[REASONER].directory} is no causal LM: config.json lacks hidden_size"]
    if width * len(facts.layers) != taken:
        found.append(f"the reasoner's states are {width} x {len(facts.layers)} wide, the painter takes {taken}")
    if layers <= max(facts.layers):
        found.append(f"the reasoner has {layers} layers; the painter takes states of layer {max(facts.layers)}")
    if not networks[REASONER].matrices(TARGETS_LM):
        found.append("the reasoner's layers are not named as those of Qwen, Llama or Mistral, so none can be trained")
    if not networks[PAINTER].matrices(facts.targets):
        found.append(f"no tensor of {PAINTER} has the name of a layer of {facts.painter}")
    if lm.get("final_logit_softcapping") or lm.get("logit_scale") or lm.get("logits_scaling"):
        found.append("the reasoner scales or caps its logits, which is not supported")
    latent = networks[AUTOENCODER].config.get("latent_channels")
    channels = painter.get("in_channels")
    per_token = 4 if facts.autoencoder == "AutoencoderKLFlux2" else 1
    if not isinstance(latent, int) or latent * per_token != channels:
        found.append(f"the autoencoder has {latent} latent channels, the painter takes {channels} inputs")
    return found


def _schedule(directory: Path, facts: PainterFacts) -> tuple[Schedule, list[str]]:
    """The scheduler's time shift, and settings that make other times."""
    own = read_object(directory / SCHEDULER / "scheduler_config.json")
    name = own.get("_class_name")
    if name not in SCHEDULERS:
        return Schedule(), [f"{SCHEDULER} is a {name}; known is {SCHEDULERS[0]}"]
    odd = [f"{SCHEDULER}: {k}={own[k]} is not supported" for k, plain in PLAIN.items() if own.get(k, plain) != plain]
    if not own.get("use_dynamic_shifting", False):
        return Schedule(shift=float(own.get("shift", 1.0))), odd
    if facts.autoencoder == "AutoencoderKLFlux2":
        return Schedule(empirical=True), odd
    tokens = (float(own.get("base_image_seq_len", 256)), float(own.get("max_image_seq_len", 4096)))
    return Schedule(tokens=tokens, mu=(float(own.get("base_shift", 0.5)), float(own.get("max_shift", 1.15)))), odd


def _tokenizer_problems(directory: Path) -> list[str]:
    """What is wrong with the tokenizer's files: unreadable, or not of ChatML."""
    if not directory.is_dir():
        return [f"{directory.name}/ is missing; fetch it again"]
    from unigrpo_cli.models.mot.tokenizer import load_tokenizer

    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        return [f"{directory} has neither tokenizer.json nor vocab.json; fetch it again"]
    try:
        tokenizer = load_tokenizer(directory)
    except WeightsError as error:
        return [str(error)]
    lacking = [token for token in TURN if tokenizer.token_to_id(token) is None]
    return [f"the tokenizer lacks {' and '.join(lacking)}: the reasoner must speak ChatML"] if lacking else []
