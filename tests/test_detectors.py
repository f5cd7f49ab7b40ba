"""Detectors of transformers on tiny random weights in the real format, against plain recomputations."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from unigrpo_cli.cli import app
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.suites.geneval import CLASSES as GENEVAL_CLASSES
from unigrpo_plugins.coco import CLASSES, COCO, IDS, labels_of
from unigrpo_plugins.detector_hf import box_instances, mask_instances
from unigrpo_plugins.detectors import Detection, DetectorChoice, shared_detector

SIZE = (40, 52)


def _sharpen(layer: torch.nn.Linear) -> None:
    """Confidences that differ from class to class; at initialisation they hardly do."""
    torch.nn.init.normal_(layer.weight, std=1.0, generator=torch.Generator().manual_seed(1))


def _stub_scipy(patch: pytest.MonkeyPatch) -> None:
    """A scipy in name: transformers wants it for Mask2Former's loss, which inference never reaches."""
    import transformers.models.mask2former.modeling_mask2former as modeling

    for name in ("scipy", "scipy.optimize"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        patch.setitem(sys.modules, name, module)
    patch.setattr(modeling, "requires_backends", lambda *_: None)


@pytest.fixture
def scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    _stub_scipy(monkeypatch)


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as hf

    backbone = hf.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
    depth = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "num_attention_heads": 2}
    config = hf.Mask2FormerConfig(backbone_config=backbone, num_queries=6, num_labels=80, **width, **depth)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        _stub_scipy(patch)
        model = hf.Mask2FormerForUniversalSegmentation(config)
    _sharpen(model.class_predictor)
    return _saved(tmp_path_factory, model, hf.Mask2FormerImageProcessor(size={"height": 96, "width": 96}))


@pytest.fixture(scope="module")
def rfdetr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as hf
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=12,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 32, "num_queries": 6, "c2f_num_blocks": 1}
    config = hf.RfDetrConfig(backbone_config=backbone, group_detr=2, num_labels=91, **heads, **sizes)
    torch.manual_seed(0)
    model = hf.RfDetrForInstanceSegmentation(config)
    _sharpen(model.model.class_embed)
    return _saved(tmp_path_factory, model, hf.DetrImageProcessor(size={"height": 48, "width": 48}))


@pytest.fixture(scope="module")
def rtdetr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes with a sigmoid per class, 80 classes in a row."""
    import transformers as hf

    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    encoder = {"encoder_hidden_dim": 16, "encoder_in_channels": [8] * 3, "encoder_ffn_dim": 16}
    decoder = {"decoder_in_channels": [16] * 3, "decoder_ffn_dim": 16, "decoder_layers": 2, "num_denoising": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_queries": 8}
    config = hf.RTDetrV2Config(backbone_config=backbone, num_labels=80, **encoder, **decoder, **heads)
    torch.manual_seed(0)
    model = hf.RTDetrV2ForObjectDetection(config)
    for layer in model.class_embed:
        _sharpen(layer)
    return _saved(tmp_path_factory, model, hf.RTDetrImageProcessor(size={"height": 64, "width": 64}))


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes with one softmax over the classes and "no object"; COCO's ids with their gaps."""
    import transformers as hf

    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_queries": 6}
    config = hf.DetrConfig(backbone_config=backbone, num_labels=91, **layers, **heads)
    torch.manual_seed(0)
    model = hf.DetrForObjectDetection(config)
    _sharpen(model.class_labels_classifier)
    return _saved(tmp_path_factory, model, hf.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}))


def _saved(factory: pytest.TempPathFactory, model, prepare) -> Path:
    directory = factory.mktemp(type(model).__name__)
    model.save_pretrained(directory)
    prepare.save_pretrained(directory)
    return directory


def _open(name: str, weights: Path | str | None, size: str | None = None, batch_size: int = 8):
    context = RewardContext("cpu", 0, True, True)
    return shared_detector(context, "geneval", DetectorChoice(name, weights and str(weights), size, batch_size))[0]


def _pictures(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(count)]


def _raw(detector, image: np.ndarray):
    """The library's outputs for one picture, by its own processor."""
    size = {} if detector.size == "own" else {"size": {"shortest_edge": 64, "longest_edge": 96}}
    with torch.inference_mode():
        return detector.model(**detector.prepare(images=[image.copy()], return_tensors="pt", **size))


def _corners(found: list[Detection]) -> torch.Tensor:
    return torch.tensor([d.box for d in found]).reshape(-1, 4)


def test_mask2former_reads_logits_as_mmdet_does(mask2former: Path, scipy: None) -> None:
    """Every candidate without shortcuts: all masks drawn, all products taken, sorted at the end."""
    detector = _open("mask2former", mask2former, size="64x96")
    for image, found in zip(_pictures(), detector.detect(_pictures()), strict=True):
        raw = _raw(detector, image)
        p = raw.class_queries_logits[0].softmax(-1)[:, :-1].reshape(-1)
        masks = torch.nn.functional.interpolate(raw.masks_queries_logits, SIZE, mode="bilinear")[0]
        expected = []
        for k in p.argsort(descending=True)[:100].tolist():
            logits = masks[k // 80]
            inside = logits > 0
            if inside.any():
                ys, xs = torch.where(inside)
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                score = p[k] * (logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
                expected.append((float(score), CLASSES[k % 80], [float(v) for v in box], inside.numpy()))
        expected.sort(key=lambda e: -e[0])
        assert len(found) == len(expected) > 20
        assert [d.score for d in found] == pytest.approx([e[0] for e in expected], abs=1e-5)
        assert [d.label for d in found] == [e[1] for e in expected]
        assert (_corners(found) - torch.tensor([e[2] for e in expected])).abs().max() <= 1e-5
        assert all((d.mask == e[3]).all() for d, e in zip(found, expected, strict=True))


def test_mask2former_sees_pictures_at_800_by_1333_unless_told(mask2former: Path, scipy: None) -> None:
    """The checkpoint's own size is transformers' choice (here 96 x 96), mmdet's is 800 by 1333."""
    image = [np.zeros((300, 600, 3), np.uint8)]
    own = _open("mask2former", mask2former, size="own").inputs(image)
    assert own["pixel_values"].shape[-2:] == (96, 96)
    usual = _open("mask2former", mask2former).inputs(image)
    assert usual["pixel_values"].shape[-2:] == (672, 1344)  # 666.5 x 1333, up to multiples of 32


def test_rfdetr_agrees_with_the_library(rfdetr: Path) -> None:
    detector = _open("rfdetr", rfdetr)
    image = _pictures(1)[0]
    (found,) = detector.detect([image], floor=0.02)
    raw = _raw(detector, image)
    from transformers import RfDetrImageProcessor

    library = RfDetrImageProcessor()
    (boxes,) = library.post_process_object_detection(raw, threshold=0.02, target_sizes=[SIZE])
    (masks,) = library.post_process_instance_segmentation(
        raw, threshold=0.02, target_sizes=[SIZE], return_binary_maps=True
    )
    raw_masks = torch.nn.functional.interpolate(raw.pred_masks, SIZE, mode="bilinear")[0] > 0
    assert raw_masks.flatten(1).any(dim=1).all()  # none is empty, so that boxes and masks are the same instances
    names = labels_of(detector.model.config.id2label)
    kept = [k for k, label in enumerate(boxes["labels"].tolist()) if names[label] is not None]
    assert len(found) == len(kept) > 2
    assert [d.score for d in found] == pytest.approx(boxes["scores"][kept].tolist(), abs=1e-5)
    assert [d.label for d in found] == [names[boxes["labels"][k]] for k in kept]
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
    assert (_corners(found) - boxes["boxes"][kept].clamp_min(0).minimum(limit)).abs().max() <= 1e-5 * max(SIZE)
    for d, k in zip(found, kept, strict=True):
        assert (d.mask == masks["segmentation"][k].bool().numpy()).all()


@pytest.mark.parametrize("name", ["rtdetr", "detr"])
def test_detectors_of_boxes_agree_with_the_library(name: str, request: pytest.FixtureRequest) -> None:
    detector = _open("boxes", request.getfixturevalue(name))
    image = _pictures(1)[0]
    (found,) = detector.detect([image], floor=0.02)
    (boxes,) = detector.prepare.post_process_object_detection(
        _raw(detector, image), threshold=0.02, target_sizes=torch.tensor([SIZE])
    )
    order = boxes["scores"].argsort(descending=True, stable=True).tolist()
    order = [k for k in order if detector.names[boxes["labels"][k]] is not None]
    assert len(found) == len(order) > 2
    assert [d.score for d in found] == pytest.approx(boxes["scores"][order].tolist(), abs=1e-5)
    assert [d.label for d in found] == [detector.names[boxes["labels"][k]] for k in order]
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
    assert (_corners(found) - boxes["boxes"][order].clamp_min(0).minimum(limit)).abs().max() <= 1e-5 * max(SIZE)
    assert all(d.mask is None for d in found)


def test_batches_sizes_and_floor_change_nothing(rtdetr: Path) -> None:
    """Pictures of two sizes, in batches of two, in any company: the same boxes; a floor only cuts the tail."""
    tall = [np.ascontiguousarray(p.transpose(1, 0, 2)) for p in _pictures(2)]
    pictures = [tall[0], *_pictures(3), tall[1]]
    together = _open("boxes", rtdetr, batch_size=2).detect(pictures)
    opened = _open("boxes", rtdetr)
    for alone, batched in zip((opened.detect([p])[0] for p in pictures), together, strict=True):
        assert [d.label for d in alone] == [d.label for d in batched]
        assert (_corners(alone) - _corners(batched)).abs().max() <= 1e-3
    floor = together[1][3].score
    cut = opened.detect(pictures[1:2], floor)[0]
    assert [d.score for d in cut] == pytest.approx([d.score for d in together[1] if d.score > floor], abs=1e-5)
    assert opened.detect([]) == []


def _mask_logits(*inside: tuple[slice, slice], value: float = 4.0) -> torch.Tensor:
    logits = torch.full((len(inside), 8, 8), -4.0)
    for q, where in enumerate(inside):
        logits[q][where] = value
    return logits


def test_overlapping_objects_of_one_class_both_stay_and_ties_keep_their_order() -> None:
    """No suppression; equal confidences in the order of the queries, so that runs agree."""
    where = (slice(2, 6), slice(1, 5))
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    shifted = (slice(2, 6), slice(2, 6))
    found = mask_instances(logits, _mask_logits(where, where, shifted), (8, 8), floor=0.3)
    assert [label for label, *_ in found] == [0, 0, 0]
    assert [box for _, _, box, _ in found] == [(1, 2, 5, 6), (1, 2, 5, 6), (2, 2, 6, 6)]
    p = torch.tensor([3.0, 0.0, 0.0]).softmax(0)[0] * torch.tensor(4.0).sigmoid()
    assert found[0][1] == pytest.approx(float(p), abs=1e-6)


def test_a_query_counts_for_each_class_and_an_empty_mask_for_none() -> None:
    """Two classes of one query are two candidates; a confident query without a mask is nothing."""
    logits = torch.tensor([[2.0, 1.9, -5.0], [9.0, 0.0, 0.0]])
    masks = _mask_logits((slice(0, 8), slice(0, 8)), (slice(0, 0), slice(0, 0)))
    found = mask_instances(logits, masks, (8, 8), floor=0.1)
    assert [label for label, *_ in found] == [0, 1]
    assert mask_instances(logits, torch.full((2, 8, 8), -1.0), (8, 8), floor=0.0) == []


def test_a_weak_mask_moves_an_object_down() -> None:
    """Confidence is the class's times the mask's: the surer class has the weaker mask and comes second."""
    everywhere = (slice(0, 8), slice(0, 8))
    masks = torch.cat([_mask_logits(everywhere, value=0.1), _mask_logits(everywhere, value=6.0)])
    found = mask_instances(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), masks, (8, 8), floor=0.2)
    assert [label for label, *_ in found] == [1, 0]
    assert found[1][1] == pytest.approx(0.909 * 0.525, abs=1e-3)
    sure = mask_instances(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), masks, (8, 8), floor=0.6)
    assert [label for label, *_ in sure] == [1]


def test_boxes_are_cut_at_the_edge_and_only_the_best_q_pairs_stay() -> None:
    boxes = torch.tensor([[0.5, 0.5, 2.0, 0.5], [0.25, 0.25, 0.5, 0.5]])
    logits = torch.tensor([[2.0, 1.0], [0.0, -1.0]])
    found = box_instances(logits, boxes, None, (10, 20), 0.0, exclusive=False)
    assert [(label, box) for label, _, box, _ in found] == [(0, (0, 2.5, 20, 7.5)), (1, (0, 2.5, 20, 7.5))]
    assert found[0][1] == pytest.approx(1 / (1 + np.exp(-2)))


def test_no_object_takes_its_share_of_a_softmax_and_is_no_class() -> None:
    logits = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, -9.0]])
    found = box_instances(logits, torch.full((2, 4), 0.5), None, (10, 10), 0.0, exclusive=True)
    assert [label for label, *_ in found] == [1, 0]
    assert found[1][1] == pytest.approx(np.e / (np.e + 1 + np.e**3))


def test_labels_go_by_index() -> None:
    """GenEval renamed three; spellings differ between checkpoints; some count COCO's ids with their gaps."""
    assert CLASSES == GENEVAL_CLASSES
    assert [a for a, b in zip(CLASSES, COCO, strict=True) if a != b] == [
        "computer mouse",
        "tv remote",
        "computer keyboard",
    ]
    assert labels_of(dict(enumerate(COCO))) == list(CLASSES)
    old = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}
    assert labels_of({k: old.get(name, name) for k, name in enumerate(COCO)}) == list(CLASSES)
    assert labels_of({k: f"LABEL_{k}" for k in range(80)}) == list(CLASSES)
    gaps = labels_of({k: f"LABEL_{k}" for k in range(91)})
    assert len(IDS) == 80
    assert (gaps[0], gaps[1], gaps[12], gaps[13], gaps[74], gaps[90]) == (
        None,
        "person",
        None,
        "stop sign",
        "computer mouse",
        "toothbrush",
    )
    assert labels_of(dict(enumerate(sorted(COCO))))[1] == "apple"  # another order: by name
    assert labels_of({0: "circle", 1: "mouse"}) == ["circle", "computer mouse"]


def test_missing_scipy_is_one_clear_line(mask2former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RewardError, match=r"needs scipy.*pip install.*geneval.*detector=rfdetr"):
        _open("mask2former", mask2former)


def test_weights_that_cannot_be_had_name_the_remedy(
    rtdetr: Path, rfdetr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        RewardError, match=r"HF_HUB_OFFLINE is set.*give a directory, or fetch it with `hf download nobody/nothing`"
    ):
        _open("boxes", "nobody/nothing")
    with pytest.raises(RewardError, match=r"no directory \./nowhere"):
        _open("rfdetr", "./nowhere")
    with pytest.raises(RewardError, match=r"needs weights.*@weights="):
        _open("boxes", None)
    with pytest.raises(RewardError, match=r"is a 'rt_detr_v2', not a 'rf_detr'"):
        _open("rfdetr", rtdetr)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match=r"cannot be loaded.*model\.safetensors"):
        _open("boxes", tmp_path / "empty")


def test_an_old_transformers_is_told_apart(rfdetr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "RfDetrForInstanceSegmentation", None)
    with pytest.raises(RewardError, match=r"is not in transformers .*pip install -U transformers"):
        _open("rfdetr", rfdetr)


def test_incomplete_weights_are_refused(rtdetr: Path, tmp_path: Path) -> None:
    """transformers would only warn and fill the gap with random numbers."""
    from safetensors.torch import load_file, save_file

    for path in rtdetr.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(rtdetr / "model.safetensors")
    name = next(name for name in tensors if "enc_score_head" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights of a RTDetrV2ForObjectDetection.*random"):
        _open("boxes", tmp_path)


def test_a_suite_by_a_detector_directory_from_end_to_end(rtdetr: Path, tmp_path: Path) -> None:
    """The embedded model, GenEval's own prompts, a detector of COCO's classes."""
    reward = f"geneval@detector=boxes@weights={rtdetr}@color=lab@threshold=0.01"
    arguments = ["eval", "--suite", "geneval", "--limit", "1", "--reward", reward, "--out", str(tmp_path / "e")]
    done = CliRunner().invoke(app, [*arguments, "--set", "eval.steps=6", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads(done.stdout)
    assert set(report["per_task"]) == {
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    }
    assert report["scores"]["geneval"]["n"] == 6
