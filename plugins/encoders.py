"""open_clip models that rewards share: pictures and texts to unit vectors.

`clip`, `aesthetic`, `hpsv2` and the colours of `geneval` get the same model for the same key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.weights import LFS, first_line, is_lfs_pointer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

EMBEDDED = "embedded"


class PromptLength:
    """Counts tokens of prompts and warns once when some do not fit.

    Args:
        reward: its name, for the warning.
        context: tokens that the encoder reads, start and end included.
        count: tokens of a text, start and end included; None when they cannot be counted.
        texts: their name, for the warning.
    """

    def __init__(self, reward: str, context: int, count: Callable[[str], int] | None, texts: str = "prompts"):
        self.reward, self.context, self._count, self.texts = reward, context, count, texts
        self._tokens: dict[str, int] = {}
        self._warned = False

    def check(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        self.info([str(row.get("prompt", "")) for row in metadata])

    def info(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """For each text a row with its tokens and the context when it is cut, else an empty one."""
        if self._count is None:
            return [{} for _ in texts]
        for text in texts:
            if text not in self._tokens:
                self._tokens[text] = self._count(text)
        long = [text for text in dict.fromkeys(texts) if self._tokens[text] > self.context]
        if long and not self._warned:
            self._warned = True
            most = max(self._tokens[text] for text in long)
            warnings.warn(
                f"reward {self.reward!r}: {len(long)} of {len(set(texts))} {self.texts} are longer than the text "
                f"encoder's context of {self.context} tokens (up to {most}); their end is cut off. Shorten them, or "
                "choose a model with a longer context",
                stacklevel=2,
            )
        return [
            {"prompt_cut": {"tokens": self._tokens[text], "context": self.context}} if text in long else {}
            for text in texts
        ]


class Encoder:
    """An open_clip model with its preprocessing and tokenizer. Embeddings are fp32 and of length 1."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: str):
        self.model, self.preprocess, self.tokenizer, self.device = model, preprocess, tokenizer, device

    def to(self, device: str) -> None:
        self.model.to(device)
        self.device = device

    def prompt_length(self, reward: str, texts: str = "prompts") -> PromptLength:
        """The check of a reward's texts against this text encoder's context."""
        context = getattr(self.tokenizer, "context_length", None) or self.model.context_length
        return PromptLength(reward, int(context), token_counter(self.tokenizer), texts)

    @property
    def scale(self) -> float:
        """The factor of cosines before a softmax: the model's inverse temperature."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, images: Sequence[Image]) -> torch.Tensor:
        """[B, E] of PIL images."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(image) for image in images])
            dtype = next(self.model.visual.parameters()).dtype
            return self.model.encode_image(pixels.to(self.device, dtype), normalize=True).float()

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[B, E] of texts; equal ones are encoded once."""
        import torch

        with torch.inference_mode():
            unique = list(dict.fromkeys(texts))
            read = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True).float()
            return read[[unique.index(text) for text in texts]]


def token_counter(tokenizer: Any) -> Callable[[str], int] | None:
    """How to count the tokens of a text, start and end included, for one of open_clip's tokenizers."""
    inner = getattr(tokenizer, "tokenizer", None)  # of transformers
    if inner is not None:
        clean = getattr(tokenizer, "clean_fn", str)
        fast = getattr(inner, "backend_tokenizer", None)
        if fast is None:
            return lambda text: len(inner(clean(text))["input_ids"])
        # A copy: to switch truncation off on the original is not safe while another thread uses it.
        whole = type(fast).from_str(fast.to_str())
        whole.no_truncation()
        whole.no_padding()
        return lambda text: len(whole.encode(clean(text)).ids)
    if hasattr(tokenizer, "encode"):
        return lambda text: len(tokenizer.encode(text)) + 2
    return None


def key_of(model: str, pretrained: str | None, precision: str, resize: str | None = None) -> tuple[str, ...]:
    """What names an encoder among the shared models."""
    return ("open_clip", model, pretrained or "", precision, resize or "")


def shared_encoder(
    context: RewardContext,
    reward: str,
    model: str | None,
    pretrained: str | None,
    precision: str = "fp32",
    resize: str | None = None,
    option: str = "model",
) -> tuple[Encoder, tuple[str, ...]]:
    """The encoder of that name and its key, for `context.shared.release` at teardown.

    Args:
        resize: open_clip's resize mode ("longest" pads instead of cropping); None is that of the weights.
        option: the reward's option that names the model, for errors.
    """
    name = named_model(context, reward, model, option)
    for given in (name, pretrained) if name != EMBEDDED else ():
        if given and ":" not in given and _is_directory(given, name):
            raise RewardError(f"reward {reward!r}: {given} is a directory; write @{option}=local-dir:{given}")
    if pretrained and Path(pretrained).is_file() and is_lfs_pointer(Path(pretrained)):
        raise RewardError(f"reward {reward!r}: {LFS.format(pretrained)}")
    if pretrained and (name == EMBEDDED or ":" in name):
        raise RewardError(
            f"reward {reward!r}: @pretrained={pretrained} does not go with @{option}={name}, which brings its own "
            "weights; remove one of them"
        )
    key = key_of(name, pretrained, precision, resize)
    return context.shared.get(key, lambda: load_encoder(context, reward, name, pretrained, precision, resize)), key


def named_model(context: RewardContext, reward: str, model: str | None, option: str) -> str:
    """The model that is meant: the named one, else the toy model's own CLIP for the toy model."""
    if model is None and not context.embedded:
        raise RewardError(
            f"reward {reward!r}: say which model, e.g. {reward}@{option}=ViT-B-32@pretrained=laion2b_s34b_b79k "
            f"or {reward}@{option}=local-dir:/path"
        )
    return model or EMBEDDED


def _is_directory(given: str, model: str) -> bool:
    """Whether a model or tag is the path of a directory, and not a name that open_clip knows."""
    if not Path(given).expanduser().is_dir():
        return False
    import open_clip

    return given not in (*open_clip.list_models(), *open_clip.list_pretrained_tags_by_model(model))


def load_encoder(
    context: RewardContext,
    reward: str,
    name: str,
    pretrained: str | None,
    precision: str,
    resize: str | None = None,
) -> Encoder:
    """Load an open_clip model; random weights are refused."""
    import open_clip
    from safetensors import SafetensorError

    schema = f"local-dir:{files('unigrpo_cli') / 'toy' / 'weights' / 'clip'}" if name == EMBEDDED else name
    plain = ":" not in schema
    if plain and not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"one of {', '.join(tags[:6])}" if tags else "a weights file"
        raise RewardError(f"reward {reward!r}: model {name!r} needs @pretrained=..., {known}")
    try:
        # OpenAI's, MetaCLIP's and other weights were trained with QuickGELU. open_clip's table of tags knows that, but
        # under a plain name it only warns and computes another function.
        facts = (open_clip.get_pretrained_cfg(name, pretrained) if plain and pretrained else None) or {}
        model, preprocess = open_clip.create_model_from_pretrained(
            schema,
            pretrained=pretrained if plain else None,
            precision=precision,
            device=context.device,
            image_resize_mode=resize,
            **({"force_quick_gelu": True} if facts.get("quick_gelu") else {}),
        )
        tokenizer = open_clip.get_tokenizer(schema)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        hint = " (HF_HUB_OFFLINE is set)" if context.offline else ""
        raise RewardError(f"reward {reward!r}: {name!r} cannot be loaded{hint}: {first_line(error)}") from error
    model.eval()
    if plain and pretrained and resize is None and Path(pretrained).is_file():
        _warn_of_other_settings(reward, name, Path(pretrained), model.visual.preprocess_cfg)
    return Encoder(model, preprocess, tokenizer, context.device)


def _warn_of_other_settings(reward: str, name: str, file: Path, own: Mapping[str, Any]) -> None:
    """A weights file does not say how it was trained. Name the tags of its model that need other settings.

    A file named after a tag is compared with that one alone.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    quick_gelu = bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    stem = f"{file.parent.name}/{file.name}".casefold().replace("-", "_")
    other: dict[str, list[str]] = {}
    for tag in [tag for tag in tags if tag.casefold().replace("-", "_") in stem] or tags:
        facts = open_clip.get_pretrained_cfg(name, tag) or {}
        differ = [
            key for key in ("mean", "std", "interpolation", "resize_mode") if _differ(facts.get(key), own.get(key))
        ]
        if bool(facts.get("quick_gelu")) != quick_gelu:
            differ.insert(0, "quick_gelu")
        if differ:
            other.setdefault(", ".join(differ), []).append(tag)
    if other:
        listed = "; ".join(f"{what}: {', '.join(tags)}" for what, tags in other.items())
        used = f"quick_gelu {str(quick_gelu).lower()}, mean {own.get('mean')}, std {own.get('std')}"
        used += f", {own.get('interpolation')}, resize {own.get('resize_mode')}"
        warnings.warn(
            f"reward {reward!r}: {file.name} is run as a plain {name} ({used}). Weights of these tags need another "
            f"setting ({listed}) and would give wrong scores: write @pretrained=TAG for one of them, or give a "
            "directory with open_clip_config.json as local-dir:DIR",
            stacklevel=2,
        )


def _differ(wanted: Any, own: Any) -> bool:
    pair = [tuple(v) if isinstance(v, list | tuple) else v for v in (wanted, own)]
    return wanted is not None and pair[0] != pair[1]
