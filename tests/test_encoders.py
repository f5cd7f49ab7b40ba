"""open_clip encoders: the activation and preprocessing of weights, and prompts beyond a text encoder's context."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unigrpo_cli import RewardBatch, RewardContext
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_plugins.clip import ClipReward
from unigrpo_plugins.colors import ClipColors, Coloured
from unigrpo_plugins.detectors import Detection
from unigrpo_plugins.encoders import shared_encoder, token_counter
from unigrpo_plugins.geneval import GenEvalOptions, GenEvalReward

CONTEXT = RewardContext(device="cpu", seed=0, embedded=True, offline=True)
LONG = "a photo of " + " and ".join(["a red circle"] * 12)

# ----- activation and preprocessing


TINY = """{"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16,
"head_width": 16}, "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}"""


def test_openais_weights_get_quick_gelu_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the plain name open_clip would warn and compute another function."""
    (tmp_path / "tiny-gelu.json").write_text(TINY)
    open_clip.add_model_config(tmp_path / "tiny-gelu.json")
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k, v in open_clip.create_model("tiny-gelu").state_dict().items()}
    path = str(tmp_path / "weights.safetensors")
    save_file({k: 4 * v if "c_fc" in k else v for k, v in weights.items()}, path)
    real = open_clip.create_model_from_pretrained

    def from_disk(name: str, pretrained: str | None = None, **kwargs):
        return real(name, pretrained=path if pretrained == "openai" else pretrained, **kwargs)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", from_disk)
    table = open_clip.get_pretrained_cfg
    facts = {("tiny-gelu", "openai"): {"quick_gelu": True}, ("tiny-gelu", path): {}}  # as the table has real models
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: facts.get((name, tag)) or table(name, tag))
    images = [Image.fromarray(s.pixels) for s in example_samples(2)]
    tagged, _ = shared_encoder(CONTEXT, "aesthetic", "tiny-gelu", "openai")
    plain, _ = shared_encoder(CONTEXT, "aesthetic", "tiny-gelu", path)
    model, preprocess = real("tiny-gelu", pretrained=path, force_quick_gelu=True)
    with torch.no_grad():
        pixels = torch.stack([preprocess(i) for i in images])
        expected = model.eval().encode_image(pixels, normalize=True)
    torch.testing.assert_close(tagged.images(images), expected, atol=1e-6, rtol=0)
    assert (plain.images(images) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "tag", "forced"),
    [
        ("ViT-B-32", "metaclip_400m", True),
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-32", "OpenAI", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_quick_gelu_is_forced_wherever_open_clips_table_says_so(
    name: str, tag: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict = {}

    def caught(*_args: object, **kwargs: object) -> None:
        asked.update(kwargs)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", caught)
    with pytest.raises(RewardError, match="far enough"):
        shared_encoder(CONTEXT, "clip", name, tag)
    assert asked.get("force_quick_gelu", False) is forced


def _weights(path: Path, name: str) -> Path:
    """A small model under one of open_clip's names, and its weights in a file."""
    (path / f"{name}.json").write_text(TINY)
    open_clip.add_model_config(path / f"{name}.json")
    file = path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in open_clip.create_model(name).state_dict().items()}, file)
    return file


@pytest.mark.parametrize(
    ("file", "tags", "says"),
    [
        ("weights", {"openai": {"quick_gelu": True}, "laion": {}}, r"quick_gelu: openai\)"),
        ("weights", {"one": {"mean": (0.5, 0.5, 0.5)}, "two": {"mean": (0.5, 0.5, 0.5)}}, r"mean: one, two\)"),
        ("weights", {"dfn": {"quick_gelu": True, "resize_mode": "squash"}}, r"quick_gelu, resize_mode: dfn\)"),
        ("weights", {"web": {"std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}}, r"std, interpolation: web\)"),
        ("openai", {"openai": {"quick_gelu": True}, "laion": {}}, "openai.safetensors is run as a plain tiny-"),
        ("tiny-laion", {"openai": {"quick_gelu": True}, "laion": {}}, None),  # named after a tag that fits
        ("weights", {"laion": {"mean": open_clip.OPENAI_DATASET_MEAN, "resize_mode": "shortest"}}, None),
        ("weights", {}, None),
    ],
)
def test_a_weights_file_under_a_name_whose_tags_need_other_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    file: str,
    tags: dict,
    says: str | None,
) -> None:
    name = "tiny-" + str(abs(hash(request.node.name)))
    path = _weights(tmp_path, name).rename(tmp_path / f"{file}.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: tags.get(tag, {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shared_encoder(replace(CONTEXT, shared=type(CONTEXT.shared)()), "clip", name, str(path))
    said = [str(w.message) for w in caught if "reward 'clip'" in str(w.message)]
    assert len(said) == (says is not None)
    if says is not None:
        assert re.search(says, said[0])


@pytest.mark.parametrize(
    ("reward", "options", "says"),
    [
        (ClipReward, {"model": "ViT-B-32", "pretrained": "DIR"}, "write @model=local-dir:DIR"),
        (ClipReward, {"model": "DIR"}, "write @model=local-dir:DIR"),
        (ClipReward, {"model": "local-dir:DIR", "pretrained": "openai"}, "@pretrained=openai does not go with"),
        (ClipReward, {"model": "embedded", "pretrained": "openai"}, "@pretrained=openai does not go with"),
        (GenEvalReward, {"color": "clip", "clip_pretrained": "DIR"}, "write @clip_model=local-dir:DIR"),
    ],
)
def test_a_directory_goes_to_local_dir(tmp_path: Path, reward: type, options: dict, says: str) -> None:
    given = {k: v.replace("DIR", str(tmp_path)) for k, v in options.items()}
    with pytest.raises(RewardError, match=says.replace("DIR", str(tmp_path))):
        reward(reward.Options(**given)).setup(CONTEXT)


def test_a_git_lfs_pointer_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3944692325\n")
    with pytest.raises(RewardError, match=r"w\.safetensors is a git-lfs pointer"):
        ClipReward(ClipReward.Options(model="ViT-B-32", pretrained=str(tmp_path / "w.safetensors"))).setup(CONTEXT)


def test_a_name_that_open_clip_knows_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of such names may lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("ViT-B-32", "openai"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(
        open_clip, "create_model_from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("far"))
    )
    with pytest.raises(RewardError, match=r"cannot be loaded.*far"):
        shared_encoder(CONTEXT, "clip", "ViT-B-32", "openai")
    with pytest.raises(RewardError, match="needs @pretrained="):
        shared_encoder(CONTEXT, "clip", "ViT-B-32", None)


# ----- prompts beyond the context


def _said(reward, batches: list[list[str]]) -> tuple[list[str], list[dict]]:
    """Warnings about the context of a reward that is asked about batches of prompts, and its info."""
    reward.setup(CONTEXT)
    info: list[dict] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for prompts in batches:
            rows = [replace(s, prompt=p) for s, p in zip(example_samples(len(prompts)), prompts, strict=True)]
            info += reward.score(RewardBatch(tuple(rows))).info
    reward.teardown()
    return [str(w.message) for w in caught if "context of" in str(w.message)], info


def test_clip_says_once_that_prompts_are_cut() -> None:
    said, info = _said(ClipReward(ClipReward.Options()), [["a red circle", LONG, LONG], [LONG, "a star"]])
    tokens = 3 + 3 * 12 + 11 + 2
    (message,) = said
    assert (
        f"reward 'clip': 1 of 2 prompts are longer than the text encoder's context of 20 tokens (up to {tokens})"
        in message
    )
    cut = {"prompt_cut": {"tokens": tokens, "context": 20}}
    assert info == [{}, cut, cut, cut, {}]


def test_prompts_of_a_run_are_counted_before_it() -> None:
    reward = ClipReward(ClipReward.Options())
    reward.setup(CONTEXT)
    with pytest.warns(UserWarning, match="'clip': 2 of 5 prompts"):
        reward.check_metadata([{"prompt": p} for p in ("a", "b", LONG, LONG + " c", "d", LONG)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.check_metadata([{"prompt": LONG}])
    reward.teardown()


def test_a_prompt_that_just_fits_is_not_cut() -> None:
    fits = "a photo of " + "red " * 15  # and start and end: 20
    assert _said(ClipReward(ClipReward.Options()), [[fits, fits.strip()]]) == ([], [{}, {}])
    assert len(_said(ClipReward(ClipReward.Options()), [[fits + " red"]])[0]) == 1


def test_tokens_are_those_of_the_tokenizer() -> None:
    """Counted without a limit, they are what open_clip's tokenizers give within a limit that is large enough."""
    encoder, _ = shared_encoder(CONTEXT, "clip", None, None)
    for tokenizer, padding in ((open_clip.get_tokenizer("ViT-B-32"), 0), (encoder.tokenizer, 0)):
        count = token_counter(tokenizer)
        assert count is not None
        for text in ("a red circle", LONG, "Don't  shout, caf\u00e9!"):
            ids = tokenizer([text], context_length=300)[0]
            ended = int((ids != padding).nonzero().max()) + 1
            assert count(text) in (ended, ended + 1)  # the embedded tokenizer pads with its end token


def test_captions_of_colours_beyond_the_context() -> None:
    encoder, _ = shared_encoder(CONTEXT, "geneval", "embedded", None)
    label = " ".join(["circle"] * 30)
    colors = ClipColors(encoder, encoder.prompt_length("geneval", "captions of colours"))
    thing = Coloured(np.zeros((8, 8, 3), np.uint8), Detection(label, 0.9, (0, 0, 8, 8)))
    with pytest.warns(UserWarning, match="'geneval': 20 of 30 captions of colours are longer"):
        colors.likeness([thing, Coloured(thing.image, Detection("star", 0.9, (0, 0, 8, 8)))])
    assert colors.cut[label]["prompt_cut"]["context"] == 20
    assert colors.cut["star"] == {}
    reward = GenEvalReward(GenEvalOptions(color="clip", clip_model="embedded"))
    reward.setup(CONTEXT)
    reward.colors = colors
    assert reward._cut({"include": [{"class": label, "count": 1, "color": "red"}]}) == colors.cut[label]
    assert reward._cut({"include": [{"class": label, "count": 1}]}) == {}
