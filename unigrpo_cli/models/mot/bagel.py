"""A model directory as its configurations and headers describe it. Reads no weights, imports no torch.

BAGEL's release holds `ema.safetensors` (the network), `ae.safetensors` (the autoencoder), `llm_config.json`,
`vit_config.json`, an optional `config.json`, and a tokenizer. The embedded model and our own checkpoints have the same
layout; a model that paints pixels has no autoencoder.

Names and shapes of all tensors are compared with the configurations before anything is loaded. Sides of tables and
widths are read from the tensors; the official code has them as constants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unigrpo_cli.errors import WeightsError, quoted
from unigrpo_cli.io.limits import refuse_odd_text
from unigrpo_cli.models.files import Described, Stored, read_header, read_object, what
from unigrpo_cli.models.mot.config import (
    LATENT_POSITIONS,
    TABLES,
    VISION_PREFIXES,
    AutoencoderConfig,
    MoTConfig,
    Shapes,
    VisionConfig,
    autoencoder_shapes,
    network_shapes,
)

WEIGHTS, AUTOENCODER, INDEX = "ema.safetensors", "ae.safetensors", "model.safetensors.index.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
COMPANIONS = (
    "config.json",
    "llm_config.json",
    "vit_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
"""Small files of a release, carried over as they are when its weights are saved again."""
HUB_FILES = (*COMPANIONS, INDEX, "*.safetensors")
"""Patterns of what is fetched of a model on the hub."""
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Release(Described):
    """What a directory holds, and what is wrong with it.

    Args:
        kind: "BAGEL" when the model paints in the latents of an autoencoder, "pixels" when it paints pixels.
        tensors, autoencoder_tensors: everything in the weight files, by name.
        system_prompt: given before the prompt when the model is to think; None when no file says.
        problems: one line each; empty when the directory can be loaded.
        notes: oddities that do no harm.
    """

    directory: Path
    kind: str
    config: MoTConfig
    autoencoder: AutoencoderConfig | None
    tensors: dict[str, Stored]
    autoencoder_tensors: dict[str, Stored]
    system_prompt: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def wanted(self) -> Shapes:
        shapes = network_shapes(self.config)
        return {name: shape for name, shape in shapes.items() if name in self.tensors or name not in TABLES}

    @property
    def parts(self) -> dict[str, dict[str, Stored]]:
        return {"network": self.tensors, "autoencoder": self.autoencoder_tensors}


def read_release(directory: Path, weights_file: str | None = None) -> Release:
    """What a directory holds. Differences between its files are `problems`, not errors.

    Args:
        weights_file: name of the network's file; None follows the directory's index, or else takes
            `ema.safetensors`.
    """
    if not directory.is_dir():
        raise WeightsError(f"no model directory {directory}")
    notes: list[str] = []
    llm = read_object(directory / "llm_config.json")
    own = _optional_config(directory / "config.json", notes)
    files = _weight_files(directory, weights_file)
    tensors: dict[str, Stored] = {}
    for path in files:
        tensors |= read_header(path)
    ae_path = directory / AUTOENCODER
    ae_tensors = read_header(ae_path) if ae_path.is_file() else {}
    problems: list[str] = []
    try:
        autoencoder = _autoencoder_config(ae_tensors) if ae_tensors else None
        config = _config(llm, own, directory, tensors, autoencoder)
    except IndexError as error:
        raise WeightsError(
            f"{directory}: unreadable configuration (a tensor has fewer axes than it must: vae2llm.weight, "
            "decoder.conv_in.weight or a table of positions)"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{directory}: unreadable configuration ({what(error)})") from error
    for layers in (config.num_hidden_layers, config.vision.num_hidden_layers if config.vision else 0):
        if layers > max(1_000, len(tensors)):  # a count of billions must not be counted up to
            raise WeightsError(
                f"{directory}: unreadable configuration (num_hidden_layers = {layers:,}, and the files hold "
                f"{len(tensors):,} tensors); fetch it again"
            )
    kind = "BAGEL" if config.pixels_per_latent > 1 else "pixels"
    problems += _compare(" + ".join(f.name for f in files), network_shapes(config), tensors, optional=TABLES)
    if autoencoder is not None:
        problems += _compare(AUTOENCODER, autoencoder_shapes(autoencoder), ae_tensors)
        if autoencoder.pixels_per_latent != config.pixels_per_latent:
            problems.append(
                f"config.json says a latent stands for {config.pixels_per_latent} pixels along a side, "
                f"{AUTOENCODER} makes it {autoencoder.pixels_per_latent}"
            )
    elif kind == "BAGEL":
        problems.append(f"{AUTOENCODER} is missing; it comes with the release")
    if not any(all((directory / name).is_file() for name in pair) for pair in TOKENIZERS):
        problems.append("no tokenizer: tokenizer.json is missing, and so is the pair vocab.json and merges.txt")
    prompt = own.get("system_prompt")
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"config.json: system_prompt = {prompt!r}: a string is needed")
        prompt = None
    try:
        refuse_odd_text(prompt)
    except ValueError as error:
        problems.append(f"config.json: system_prompt: {error}")
    return Release(directory, kind, config, autoencoder, tensors, ae_tensors, prompt, tuple(problems), tuple(notes))


def tokenizer_problems(release: Release) -> list[str]:
    """What is wrong inside `tokenizer.json`: unreadable, a token missing, ids beyond the vocabulary."""
    path = release.directory / "tokenizer.json"
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises bare Exception
        return [f"tokenizer.json is unreadable ({' '.join(str(error).split())})"]
    lacking = [name for name in SPECIAL_TOKENS if name not in known]
    beyond = max(known.values(), default=0)
    problems = [f"tokenizer.json lacks {', '.join(lacking)}"] if lacking else []
    if beyond >= release.config.vocab_size:
        problems.append(
            f"tokenizer.json has ids up to {beyond}, the network's vocabulary {release.config.vocab_size} words"
        )
    return problems


def reject(directory: Path) -> str | None:
    """Why a directory is no model in BAGEL's layout; None when it is one, whole or damaged."""
    if any((directory / name).exists() for name in ("llm_config.json", WEIGHTS)):
        return None
    if (directory / "model_index.json").is_file():
        return "it is a diffusers pipeline"
    return f"it has neither llm_config.json nor {WEIGHTS}"


def config_files(config: MoTConfig, system_prompt: str) -> dict[str, dict]:
    """Contents of `llm_config.json` and `config.json` for a model that paints pixels."""
    sizes = asdict(config)
    assert sizes.pop("vision") is None
    image = {
        "latent_patch_size": sizes.pop("latent_patch_size"),
        "max_latent_size": sizes.pop("max_latent_size"),
        "prediction": sizes.pop("prediction"),
        "vae_config": {
            "z_channels": sizes.pop("latent_channels"),
            "downsample": sizes.pop("pixels_per_latent"),
        },
        "system_prompt": system_prompt,
    }
    return {
        "llm_config.json": {"model_type": "qwen2"} | sizes,
        "config.json": {"model_type": "bagel"} | image,
    }


def _optional_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """`config.json`, or nothing: for BAGEL all of it can be read from other files.

    Early snapshots of the release have a superfluous comma, which is accepted. A file damaged in any other way is
    refused, as other files may be damaged too.
    """
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except WeightsError:
        found = read_object(path, lambda text: re.sub(r",(\s*\})\s*\Z", r"\1", text))
        notes.append("config.json has a superfluous comma, as in early snapshots of the release; read without it")
        return found


def _weight_files(directory: Path, weights_file: str | None) -> list[Path]:
    """The files that hold the network: the one given, those of the index, or `ema.safetensors`."""
    if weights_file is not None:
        if (directory / weights_file).is_file():
            return [directory / weights_file]
        others = ", ".join(sorted(p.name for p in directory.glob("*.safetensors"))) or "none"
        raise WeightsError(f"no weights file {weights_file} in {directory}; it has {others}")
    index = directory / INDEX
    names = [WEIGHTS]
    if index.is_file():
        table = read_object(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise WeightsError(f"{index}: weight_map is missing or no table of file names; fetch it again")
        names = sorted({v for v in table.values() if v != AUTOENCODER}) or [WEIGHTS]
        for name in names:
            if Path(name).name != name or name == ".." or "\0" in name:
                raise WeightsError(f"{index} points outside its directory, to {name}")
            if not (directory / name).is_file():
                raise WeightsError(
                    f"{index} points to {name}, which is not there; fetch it, or name the file with --weights-file"
                )
    if not (directory / names[0]).is_file():
        found = sorted(p.name for p in directory.glob("*.safetensors") if p.name != AUTOENCODER)
        hint = f"; try --weights-file {quoted(found[0])}" if found else ""
        raise WeightsError(f"{directory} is not a complete model: {names[0]} is missing{hint}")
    return [directory / name for name in names]


def _rows(tensors: dict[str, Stored], name: str) -> int | None:
    """Side of the square table of that name, if the file has it."""
    if name not in tensors or not tensors[name].shape:
        return None
    side = math.isqrt(tensors[name].shape[0])
    if side * side != tensors[name].shape[0]:
        raise ValueError(f"{name} has {tensors[name].shape[0]} rows, which is no square")
    return side


def _config(
    llm: dict[str, Any],
    own: dict[str, Any],
    directory: Path,
    tensors: dict[str, Stored],
    autoencoder: AutoencoderConfig | None,
) -> MoTConfig:
    """Sizes from `llm_config.json`, `vit_config.json`, the tensors, and what only `config.json` can say."""
    if llm.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act = {llm['hidden_act']!r}: models of this form use silu")
    if llm.get("rope_scaling"):
        raise ValueError("rope_scaling is set; models of this form have none")
    theta = llm["rope_theta"] if "rope_theta" in llm else llm["rope_parameters"]["rope_theta"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    latent = own.get("vae_config", {})
    if not isinstance(latent, dict):
        raise ValueError(f"config.json: vae_config = {latent!r}: an object is needed")
    if autoencoder is not None:
        channels, factor = autoencoder.latent_channels, latent.get("downsample", autoencoder.pixels_per_latent)
        into = tensors["vae2llm.weight"].shape[-1] if "vae2llm.weight" in tensors else 4 * channels
        patch = own.get("latent_patch_size", math.isqrt(max(1, into // channels)))
        side = _rows(tensors, LATENT_POSITIONS) or own.get("max_latent_size", 64)
    else:
        channels, factor = latent["z_channels"], latent["downsample"]
        patch = own["latent_patch_size"]
        side = _rows(tensors, LATENT_POSITIONS) or own["max_latent_size"]
    return MoTConfig(
        **{name: llm[name] for name in (*names, "vocab_size")},
        rms_norm_eps=float(llm["rms_norm_eps"]),
        rope_theta=float(theta),
        latent_patch_size=patch,
        latent_channels=channels,
        pixels_per_latent=factor,
        max_latent_size=side,
        prediction=own.get("prediction", "velocity"),
        vision=_vision(directory, tensors),
    )


def _vision(directory: Path, tensors: dict[str, Stored]) -> VisionConfig | None:
    """The tower, when the files hold one. Their `vit_config.json` counts one layer more than they have."""
    if not any(name.startswith(VISION_PREFIXES) for name in tensors):
        return None
    vit = read_object(directory / "vit_config.json")
    table = _rows(tensors, "vit_model.vision_model.embeddings.position_embedding.weight")
    patch = vit["patch_size"]
    return VisionConfig(
        hidden_size=vit["hidden_size"],
        num_hidden_layers=vit["num_hidden_layers"] - 1,
        num_attention_heads=vit["num_attention_heads"],
        intermediate_size=vit["intermediate_size"],
        patch_size=patch,
        side=table or vit["image_size"] // patch,
        channels=vit.get("num_channels", 3),
        layer_norm_eps=float(vit.get("layer_norm_eps", 1e-6)),
    )


def _autoencoder_config(tensors: dict[str, Stored]) -> AutoencoderConfig:
    """Levels, blocks and widths, from the tensors."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    blocks = _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.")
    last = "encoder.down.{}.block.0.conv1.weight"
    if not levels or not blocks or "decoder.conv_in.weight" not in tensors:
        raise ValueError(f"{AUTOENCODER} is no autoencoder in FLUX's layout")
    widths = tuple(tensors[last.format(level)].shape[0] for level in range(levels))
    return AutoencoderConfig(widths, blocks, tensors["decoder.conv_in.weight"].shape[1])


def _count(names: Iterable[str], pattern: str) -> int:
    names = list(names)
    count = max((int(m.group(1)) for m in (re.match(pattern, name) for name in names) if m), default=-1) + 1
    if count > len(names):
        raise ValueError(f"{AUTOENCODER} numbers {count:,} parts and has {len(names):,} tensors")
    return count


def _compare(
    where: str,
    wanted: Shapes,
    found: dict[str, Stored],
    *,
    optional: tuple[str, ...] = (),
) -> list[str]:
    """Differences between what is wanted and what a file holds, one line per kind."""
    missing = sorted(name for name in wanted.keys() - found.keys() if name not in optional)
    unexpected = sorted(found.keys() - wanted.keys())
    misshaped = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n].shape)
    odd = sorted(n for n in wanted.keys() & found.keys() if found[n].dtype not in FLOATS)
    problems = []
    if missing:
        problems.append(f"{where}: {_tensors(missing)} missing (e.g. {missing[0]})")
    if unexpected:
        problems.append(f"{where}: {_tensors(unexpected)} unexpected (e.g. {unexpected[0]})")
    if misshaped:
        name = misshaped[0]
        problems.append(
            f"{where}: {_tensors(misshaped)} of another shape than the configuration says (e.g. {name}: file "
            f"{list(found[name].shape)}, configuration {list(wanted[name])})"
        )
    if odd:
        problems.append(
            f"{where}: {_tensors(odd)} not of floating-point numbers (e.g. {odd[0]}: {found[odd[0]].dtype})"
        )
    return problems


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
