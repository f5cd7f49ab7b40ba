"""PickScore and HPSv2 on tiny random models in the released formats, against their libraries; broken files."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms.functional import normalize, to_tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from unigrpo_cli import RewardContext, Sample
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_plugins.preference import HPSv2Reward, PickScoreReward
from unigrpo_plugins.weights import conversion

CONTEXT = RewardContext(device="cpu", seed=0, embedded=True, offline=True)
TOLERANCE = 1e-5
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3944692325\n"


def oblong(count: int = 3) -> list[Sample]:
    """Pictures that are not square, with prompts of unequal length."""
    rows = example_samples(8)[::2][:count]
    return [Sample(r.prompt * (k + 1), r.pixels[8 : 32 + 4 * k]) for k, r in enumerate(rows)]


# ----- PickScore


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random transformers CLIP of width 16 with its processor, saved as PickScore is."""
    out = tmp_path_factory.mktemp("pickscore")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = sorted({w for s in oblong() for w in s.prompt.split()})
    vocabulary = {w: k for k, w in enumerate(["<unk>", "<pad>", *words, "<start>", "<end>"])}
    text = small | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 12,
        "eos_token_id": vocabulary["<end>"],
        "bos_token_id": vocabulary["<start>"],
        "pad_token_id": 1,
    }
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    model = CLIPModel(config)
    with torch.no_grad():  # spread the embeddings: at their initial scale all cosines are alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(out)
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(w, vocabulary[w]) for w in ("<start>", "<end>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), fast).save_pretrained(out)
    return out


def test_pickscore_equals_the_library(pickscore: Path) -> None:
    samples = oblong()
    model = CLIPModel.from_pretrained(pickscore).eval()
    processor = CLIPProcessor.from_pretrained(pickscore)
    inputs = processor(
        text=[s.prompt for s in samples],
        images=[Image.fromarray(s.pixels) for s in samples],
        padding=True,
        truncation=True,
        max_length=12,
        return_tensors="pt",
    )
    assert inputs["attention_mask"].sum(dim=1).unique().numel() > 1
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    assert expected.std() > 0.1
    for scale, factor in (("raw", 1.0), ("unit", 1 / 26)):
        reward = PickScoreReward(PickScoreReward.Options(model=str(pickscore), scale=scale))
        reward.setup(CONTEXT)
        with pytest.warns(UserWarning, match=r"'pickscore': 2 of 3 prompts are longer .* 12 tokens \(up to 18\)"):
            output = reward.score(RewardBatch(tuple(samples)))
        assert [row.get("prompt_cut") for row in output.info] == [
            {"tokens": n, "context": 12} if n > 12 else None for n in (len(s.prompt.split()) + 2 for s in samples)
        ]
        reward.teardown()
        torch.testing.assert_close(output.scores, factor * expected, atol=TOLERANCE, rtol=0)
        assert reward.range[1] == pytest.approx(100 * factor)


def test_two_pickscores_are_one_model(pickscore: Path) -> None:
    here = RewardContext("cpu", 0, True, True)
    plugins = Plugins()
    plugins.rewards.add("pickscore", PickScoreReward)
    choices = parse_rewards(["a=pickscore", "b=pickscore@scale=unit"], {k: {"model": str(pickscore)} for k in "ab"})
    with Scorer(choices, plugins, here) as rewards:
        assert set(rewards.score(oblong())) == {"a", "b"}
    assert list(here.shared.loads.values()) == [1]
    assert not here.shared._held


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_pickscore_with_a_hole_is_refused(pickscore: Path, tmp_path: Path) -> None:
    """transformers fills what is absent with random numbers and only prints it."""
    holed = copied(pickscore, tmp_path / "holed")
    state = load_file(holed / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, holed / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights of a CLIPModel \(visual_projection\.weight\).*refused"):
        PickScoreReward(PickScoreReward.Options(model=str(holed))).setup(CONTEXT)


def test_pickscores_that_are_not_there(pickscore: Path, tmp_path: Path) -> None:
    torn = copied(pickscore, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((pickscore / "model.safetensors").read_bytes()[:500])
    mute = copied(pickscore, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    pickled = copied(pickscore, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    pointer = copied(pickscore, tmp_path / "pointer")
    (pointer / "model.safetensors").write_text(POINTER)
    for name, says in (
        ("nobody/nothing-of-this-name", r"HF_HUB_OFFLINE is set.*hf download nobody/nothing"),
        (str(torn), "torn cannot be loaded"),
        (str(mute), "the processor of .*mute cannot be loaded"),
        (str(pickled), r"pickled cannot be loaded.*safetensors"),
        (str(pointer), r"model\.safetensors is a git-lfs pointer, .*`git lfs pull`"),
    ):
        with pytest.raises(RewardError, match=says) as caught:
            PickScoreReward(PickScoreReward.Options(model=name)).setup(CONTEXT)
        assert "\n" not in str(caught.value)


# ----- HPSv2


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random open_clip model of width 16, its state dict saved as HPSv2's converted file is."""
    out = tmp_path_factory.mktemp("hps")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    eye = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    config = {"embed_dim": 8, "vision_cfg": eye, "text_cfg": text}
    (out / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(out / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "HPS.safetensors")
    return out


def hps_reward(weights: Path | str | None, model: str = "tiny-hps") -> HPSv2Reward:
    return HPSv2Reward(HPSv2Reward.Options(weights=weights and str(weights), model=model))


def test_hpsv2_equals_open_clip_on_the_whole_picture(hps: Path) -> None:
    """The longest side becomes 32 and the rest is black; computed with Pillow, not with open_clip's transform."""
    samples = oblong()
    model = open_clip.create_model("tiny-hps", pretrained=str(hps / "HPS.safetensors")).eval()
    padded = []
    for sample in samples:
        height, width = sample.pixels.shape[:2]
        assert height < width
        seen = Image.fromarray(sample.pixels).resize((32, round(height * 32 / width)), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (32, 32))
        canvas.paste(seen, (0, (32 - seen.height) // 2))
        padded.append(normalize(to_tensor(canvas), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.encode_image(torch.stack(padded)), dim=-1)
        tokens = open_clip.get_tokenizer("tiny-hps")([s.prompt for s in samples])
        read = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        expected = (seen @ read.T).diagonal()
    for where in (hps / "HPS.safetensors", hps):  # the file, or the directory that has it alone
        reward = hps_reward(where)
        reward.setup(CONTEXT)
        scores = reward.score(RewardBatch(tuple(samples))).scores
        reward.teardown()
        torch.testing.assert_close(scores, expected, atol=TOLERANCE, rtol=0)


def test_the_page_has_the_line_that_converts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards" / "hpsv2.md").read_text()
    assert conversion("HPS_v2.1_compressed.pt") in page


def test_hpsv2_files_gone_wrong(hps: Path, tmp_path: Path) -> None:
    state = load_file(hps / "HPS.safetensors")
    pickled = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, pickled)
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "holed.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((hps / "HPS.safetensors").read_bytes()[:300])
    (tmp_path / "lfs.safetensors").write_text(POINTER)
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        save_file({"x": torch.zeros(1)}, two / f"{name}.safetensors")
    for where, model, says in (
        (None, "tiny-hps", r"@weights=FILE; fetch them with `hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt"),
        (pickled, "tiny-hps", r"no other format is read; convert it once with: python -c .*'state_dict'"),
        (tmp_path / "no.safetensors", "tiny-hps", "no such file"),
        ("xswu/HPSv2/HPS_v2.1_compressed.pt", "tiny-hps", r"hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt"),
        ("nobody/nothing-of-this-name", "tiny-hps", r"HF_HUB_OFFLINE is set.*hf download nobody/nothing"),
        (two, "tiny-hps", r"has 2 \.safetensors files \(a\.safetensors, b\.safetensors\); name one"),
        (tmp_path / "holed.safetensors", "tiny-hps", r"cannot be loaded.*visual\.proj"),
        (tmp_path / "torn.safetensors", "tiny-hps", "cannot be loaded"),
        (hps / "HPS.safetensors", "ViT-nothing", "cannot be loaded"),
        (tmp_path / "lfs.safetensors", "tiny-hps", r"lfs\.safetensors is a git-lfs pointer, .*`git lfs pull`"),
    ):
        with pytest.raises(RewardError, match=says) as caught:
            hps_reward(where, model).setup(CONTEXT)
        assert "\n" not in str(caught.value)
