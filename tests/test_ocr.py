"""The OCR reward: what is asked for, how far from it what was read is, and recognisers of both kinds."""

from __future__ import annotations

import itertools
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from unigrpo_cli import RewardContext, Sample
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_plugins.ocr import OcrReward, agreement, edit_distance, normal, targets_of

CONTEXT = RewardContext(device="cpu", seed=0, embedded=True, offline=True)


# ----- distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("kitten", "sitting", 3),  # k>s, e>i, +g
        ("flaw", "lawn", 2),  # -f, +n
        ("ab", "ba", 2),  # a swap is two steps
        ("open", "0pen", 1),
    ],
)
def test_edit_distance_by_hand(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_by_its_definition() -> None:
    """All pairs of words of up to four letters from two, against the recursion that defines it."""

    @cache
    def defined(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(
            defined(a[1:], b) + 1,
            defined(a, b[1:]) + 1,
            defined(a[1:], b[1:]) + (a[0] != b[0]),
        )

    words = ["".join(w) for n in range(5) for w in itertools.product("xy", repeat=n)]
    assert all(edit_distance(a, b) == defined(a, b) for a in words for b in words)


# ----- the wanted text


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "OPEN now" and "closed"', "opennow"),
        ("a 'small' sign that says \"Stop\"", "stop"),
        ('a sign that says "ﬁve ①"', "five1"),
        # quotes of other scripts
        ("a sign that says “Grand Opening”", "grandopening"),
        ("ein Schild mit „ZU“", "zu"),
        ("ein Schild mit „Zu” darauf", "zu"),
        ("ein Schild mit »Zu verkaufen«", "zuverkaufen"),
        ("en skylt med ”ÖPPET”", "öppet"),
        ("знак «Стоп» у дороги", "стоп"),
        ("un panneau « Ouvert »", "ouvert"),
        ("ein Schild mit ‹Halt› in «»", "halt"),
        ("「営業中」と書かれた看板", "営業中"),
        ("看板写着『开门』", "开门"),
        ("看板写着“营业中”的商店", "营业中"),
        ("看板写着‘营业中’的商店", "营业中"),
        ('一个牌子写着"营业中"的商店', "营业中"),
        ("看板に｢ﾊﾟﾝ｣", "パン"),
        ("a poster 《三体》", "三体"),
        ("a sign ＂ＧＯ＂", "go"),
        # single quotes and apostrophes
        ("a shop called 'Blue Moon'", "bluemoon"),
        ("a shop called ‘Blue Moon’", "bluemoon"),
        ("ein Schild mit ‚ZU‘", "zu"),
        ("a shop called 'Bob's Diner'", "bob'sdiner"),
        ("a shop called ‘Bob’s Diner’ at night", "bob'sdiner"),
        ("a dog's bowl with 'Rex' on it", "rex"),
        ("the dogs' bowls, one with 'Rex'", "rex"),
        ("a rock 'n' roll '90s poster saying 'LOUD'", "loud"),
        ("the dog's and the cat's bowl", ""),
        ("the dog’s and the cat’s bowl", ""),
        ("a rock 'n' roll band", ""),
        # inches and feet
        ('a 5" screen that says "HI"', "hi"),
        ('a 27" monitor and a 5½" phone that says "HI"', "hi"),
        ("a 5\" by 7\" photo with 'HI'", "hi"),
        ("a 5” screen that says “HI”", "hi"),
        ('a 5 " screen that says "HI"', "hi"),
        ('a 12" x 18" poster of a 5\'11" man, reading "TALL 7"', "tall7"),
        ('5" wide', ""),
        ('a 5" screen', ""),
        ('a 5" and a 7" screen', ""),
        ("a 6' ladder labelled 'UP', 5'10'' tall", "up"),
        ('a sign "Room 5" and a 7" plate', "room5"),
        ('a sign "24" beside a 5" screen', "24"),
        # nothing
        ("a stop sign", ""),
        ('an empty "" sign', ""),
        ('an "unclosed sign', ""),
        ("", ""),
    ],
)
def test_the_first_quoted_text(prompt: str, target: str) -> None:
    assert "".join(targets_of(prompt, {})) == target


@pytest.mark.parametrize(("which", "targets"), [("first", ["a"]), ("last", ["d"]), ("all", ["a", "b", "c", "d"])])
def test_which_of_several_texts(which: str, targets: list[str]) -> None:
    assert targets_of('"A" «B» and 「C」, on a 5" screen “D”', {}, which) == targets


@pytest.mark.parametrize(
    ("prompt", "text", "target"),
    [("a stop sign", "STOP", ["stop"]), ('a sign "Go"', "STOP", ["go"]), ("a sign", None, []), ('""', "Hi", ["hi"])],
)
def test_the_metadata_of_a_prompt_without_quotes(prompt: str, text: str | None, target: list[str]) -> None:
    assert targets_of(prompt, {"text": text}) == target


@pytest.mark.parametrize(
    ("target", "read", "extra", "score"),
    [
        ("open", "OPEN", 0, 1),
        ("open", "we are O P E N today", 0, 1),  # stands inside
        ("open", "0pen", 0, 3 / 4),
        ("open", "", 0, 0),
        ("open", "x" * 50, 0, 0),  # never below 0
        ("open", "open!!!!", 0.5, 1 - 0.5 * 4 / 8),
        ("open", "open", 0.5, 1),
        ("open", "ope", 1, 3 / 4),  # too little is no surplus
        ("open", "xxxxxxxx", 1, 0),
        ("ａｂ", "ab", 0, 0),  # targets are normalised before, here on purpose not
    ],
)
def test_agreement(target: str, read: str, extra: float, score: float) -> None:
    assert agreement([target], read, extra) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("read", "extra", "score"),
    [
        ("sale TODAY and OPEN", 0, 1),  # both, in any order
        ("0PEN SALE", 0, 1 - 1 / 8),
        ("a big 0PEN sign, then sa1e", 0, 1 - 2 / 8),
        ("open", 0, 1 - 3 / 8),  # the e of sale
        ("", 0, 0),
        ("open sale!!!!!!!!", 1, 1 - 8 / 16),
    ],
)
def test_agreement_with_several_texts(read: str, extra: float, score: float) -> None:
    assert agreement(["open", "sale"], read, extra) == pytest.approx(score, abs=1e-12)


def test_the_distance_to_the_nearest_part_by_its_definition() -> None:
    words = ["".join(w) for n in range(5) for w in itertools.product("xy", repeat=n)]
    for a, b in itertools.product(words, words):
        parts = {b[i:j] for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
        assert edit_distance(a, b, anywhere=True) == min(edit_distance(a, part) for part in parts)


def test_full_width_letters_are_letters() -> None:
    assert normal(" Ａ\u00a0B\tﬀ ") == "abff"


# ----- recognisers


MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
WORDS = {w: i for i, w in enumerate([*MARKS, *"abcdefghijklmnopqrstuvw"])}


def tokenizer() -> PreTrainedTokenizerFast:
    letters = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.add_special_tokens(MARKS)
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def trocr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random TrOCR of width 16, saved as the released ones are."""
    out = tmp_path_factory.mktemp("trocr")
    torch.manual_seed(1)
    eye = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    hand = TrOCRConfig(
        vocab_size=len(WORDS),
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        cross_attention_hidden_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        init_std=1.0,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, hand)
    model = VisionEncoderDecoderModel(config=config)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id = 1, 0
    model.generation_config.eos_token_id = 2
    model.save_pretrained(out)
    size = {"height": 32, "width": 32}
    TrOCRProcessor(ViTImageProcessor(size=size), tokenizer()).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def got(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GOT-OCR2 of width 16 with the 256 image tokens that its processor writes."""
    out = tmp_path_factory.mktemp("got")
    torch.manual_seed(2)
    config = GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 256,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [],
            "mlp_dim": 32,
            "initializer_range": 0.5,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_index=WORDS["<imgpad>"],
        tie_word_embeddings=False,
    )
    GotOcr2ForConditionalGeneration(config).save_pretrained(out)
    eye = GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    GotOcr2Processor(eye, tokenizer()).save_pretrained(out)
    return out


def asked(prompts: list[str]) -> RewardBatch:
    rows = example_samples(8)
    return RewardBatch(tuple(Sample(p, rows[2 * k].pixels) for k, p in enumerate(prompts)))


@pytest.mark.parametrize("kind", ["trocr", "got"])
def test_it_reads_what_the_library_generates(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    batch = asked(['"abc"', "nothing is asked for", "'de fg'"])
    read = []
    for k in (0, 2):  # one by one: the batch must not matter
        inputs = processor(images=[Image.fromarray(batch.pixels[k])], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=[2, WORDS["<|im_end|>"]])
        start = inputs["input_ids"].shape[1] if kind == "got" else 0
        read.append(processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
    assert all(read) and read[0] != read[1], "the tiny models must read something, and something else in each"
    reward = OcrReward(OcrReward.Options(recogniser=str(directory), max_new_tokens=6))
    reward.setup(CONTEXT)
    output = reward.score(batch)
    assert reward.recogniser._ends() == [2, WORDS["<|im_end|>"]]
    reward.teardown()
    assert [row.get("read") for row in output.info] == [read[0], None, read[1]]
    assert output.scores[1] is None
    assert output.scores[::2] == [agreement(["abc"], read[0]), agreement(["defg"], read[1])]
    assert not math.isnan(sum(output.scores[::2]))


def test_nothing_asked_nothing_read(trocr: Path) -> None:
    reward = OcrReward(OcrReward.Options(recogniser=str(trocr)))
    reward.setup(CONTEXT)
    assert reward.score(asked(["a dog", "a cat"])).scores == [None, None]
    reward.teardown()


def test_wrong_recognisers(tmp_path: Path, trocr: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    CLIPModel(
        CLIPConfig(text_config=small | {"vocab_size": 99}, vision_config=small | {"image_size": 32})
    ).save_pretrained(tmp_path / "clip")
    cases = {
        None: "name a recogniser",
        str(tmp_path / "nowhere"): "cannot be loaded",
        str(tmp_path / "clip"): r"is a clip; a recogniser is TrOCR .* or GOT-OCR2",
    }
    for name, says in cases.items():
        with pytest.raises(RewardError, match=says) as caught:
            OcrReward(OcrReward.Options(recogniser=name)).setup(CONTEXT)
        assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in trocr.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    with pytest.raises(RewardError, match="broken cannot be loaded"):
        OcrReward(OcrReward.Options(recogniser=str(broken))).setup(CONTEXT)


# ----- released weights, where their package is installed


def _rendered(text: str, blur: float = 0.0) -> Image.Image:
    picture = Image.new("RGB", (420, 120), "white")
    ImageDraw.Draw(picture).text((30, 30), text, font=ImageFont.load_default(44), fill="black")
    return picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture


def test_rapidocr_scores_rendered_words_as_asked() -> None:
    """Right, misspelt, another word, blurred beyond reading, none."""
    pytest.importorskip("rapidocr", reason="needs the extra unigrpo-cli[ocr]")
    reward = OcrReward(OcrReward.Options(recogniser="rapidocr"))
    reward.setup(CONTEXT)
    pictures = [
        _rendered("OPENING"),
        _rendered("OPEMING"),
        _rendered("CLOSED"),
        _rendered("OPENING", 14),
        _rendered(""),
    ]
    samples = [
        Sample(prompt='a sign that says "OPENING"', pixels=np.asarray(p), reasoning=None, metadata={}, id=str(k))
        for k, p in enumerate(pictures)
    ]
    right, misspelt, other, blurred, none = reward.score(RewardBatch(tuple(samples))).scores
    reward.teardown()
    assert right == 1
    assert 0.7 < misspelt < 1
    assert other < 0.5
    assert (blurred, none) == (0, 0)


def test_a_recogniser_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RewardError, match=r"pip install 'unigrpo-cli\[ocr\]'"):
        OcrReward(OcrReward.Options(recogniser="rapidocr")).setup(CONTEXT)
