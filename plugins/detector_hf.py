"""Detectors of transformers: Mask2Former, RF-DETR, and any that gives only boxes.

Post-processing from logits is done here. The library's own for Mask2Former resizes masks to 384 x 384, thresholds them
there and lets them overwrite each other; GenEval's mmdet does not.

Shapes: Q queries, C classes, h w a model's mask grid, H W the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.coco import labels_of
from unigrpo_plugins.detectors import Detection, DetectorChoice, Image
from unigrpo_plugins.weights import cannot, load_transformer

if TYPE_CHECKING:
    import torch

TOP = 100  # candidates of Mask2Former per picture, over queries and classes


@dataclass(frozen=True)
class Family:
    """A kind of detector.

    Args:
        architecture: its class in transformers.
        model_type: that of `config.json`; None accepts any.
        size: see `DetectorChoice`.
        threshold, counting_threshold: GenEval's pair belongs to Mask2Former's confidence; see docs/rewards.
    """

    architecture: str
    model_type: str | None
    weights: str | None
    size: str
    threshold: float
    counting_threshold: float
    needs_scipy: bool = False


FAMILIES = {
    # mmdet evaluates at 800 x 1333; the checkpoint's 384 x 384 is transformers' choice.
    "mask2former": Family(
        "Mask2FormerForUniversalSegmentation",
        "mask2former",
        "facebook/mask2former-swin-small-coco-instance",
        "800x1333",
        0.3,
        0.9,
        needs_scipy=True,
    ),
    "rfdetr": Family("RfDetrForInstanceSegmentation", "rf_detr", "Roboflow/rf-detr-seg-medium", "own", 0.3, 0.5),
    "boxes": Family("AutoModelForObjectDetection", None, None, "own", 0.3, 0.5),
}


class TransformersDetector:
    """A model of transformers with its image processor. Pictures of one size are batched."""

    def __init__(self, name: str, model: Any, prepare: Any, size: str, batch_size: int, device: str):
        family = FAMILIES[name]
        self.name, self.model, self.prepare, self.device = name, model, prepare, device
        self.size, self.batch_size = size, batch_size
        self.names = labels_of(model.config.id2label)
        self.labels = frozenset(name for name in self.names if name is not None)
        self.threshold, self.counting_threshold = family.threshold, family.counting_threshold

    def to(self, device: str) -> None:
        self.model.to(device)
        self.device = device

    def detect(self, images: Sequence[Image], floor: float = 0.0) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        for indices in by_size.values():  # no picture is padded
            for at in range(0, len(indices), self.batch_size):
                part = indices[at : at + self.batch_size]
                for index, own in zip(part, self._detect([images[i] for i in part], floor), strict=True):
                    found[index] = own
        return found

    def _detect(self, images: Sequence[Image], floor: float) -> list[list[Detection]]:
        import torch

        with torch.inference_mode():
            inputs = self.inputs(images)
            outputs = self.model(**inputs.to(self.device))
            return [
                [
                    Detection(name, score, box, mask)
                    for label, score, box, mask in self._read(outputs, b, image.shape[:2], floor)
                    if (name := self.names[label]) is not None
                ]
                for b, image in enumerate(images)
            ]

    def inputs(self, images: Sequence[Image]) -> Any:
        """The model's inputs for pictures of one size."""
        edges = {} if self.size == "own" else {"size": _edges(self.size)}
        copies = [np.array(image) for image in images]  # a batch's pixels are read-only, which torch does not accept
        return self.prepare(images=copies, return_tensors="pt", input_data_format="channels_last", **edges)

    def _read(self, outputs: Any, b: int, size: tuple[int, ...], floor: float) -> list[Instance]:
        if self.name == "mask2former":
            return mask_instances(outputs.class_queries_logits[b], outputs.masks_queries_logits[b], size, floor)
        logits, masks = outputs.logits[b], outputs.pred_masks[b] if self.name == "rfdetr" else None
        # One output more than classes: the last is "no object".
        exclusive = logits.shape[-1] == len(self.names) + 1
        return box_instances(logits, outputs.pred_boxes[b], masks, size, floor, exclusive=exclusive)


Box = tuple[float, float, float, float]
Instance = tuple[int, float, Box, Any]
"""Class index, confidence, box in pixels, mask [H, W] or None."""


def mask_instances(
    logits_QC1: torch.Tensor, mask_logits_Qhw: torch.Tensor, size: Sequence[int], floor: float
) -> list[Instance]:
    """Mask2Former's instances as in mmdet's head (Cheng et al. 2022, section 4), best first.

    They are the best 100 pairs of query and class. Confidence is the probability of the class times the mean
    probability inside the mask. The box is the extent of the mask.
    """
    p_QC = logits_QC1.float().softmax(dim=-1)[:, :-1]
    best, index = p_QC.flatten().sort(descending=True, stable=True)
    drawn: dict[int, tuple[float, Box, Any] | None] = {}
    instances = []
    for p, k in zip(best[:TOP].tolist(), index[:TOP].tolist(), strict=True):
        if p <= floor:
            break  # the mean of a mask is at most 1, so no later one can pass
        query, label = divmod(k, p_QC.shape[1])
        if query not in drawn:
            drawn[query] = _draw(mask_logits_Qhw[query], size)
        outline = drawn[query]
        if outline is not None and (score := p * outline[0]) > floor:
            instances.append((label, score, *outline[1:]))
    return sorted(instances, key=lambda instance: -instance[1])


def _draw(logits_hw: torch.Tensor, size: Sequence[int]) -> tuple[float, Box, Any] | None:
    """Mean probability inside a mask at the picture's size, its extent, and the mask; None when it is empty."""
    import torch

    logits_HW = torch.nn.functional.interpolate(
        logits_hw[None, None].float(), size=tuple(size), mode="bilinear", align_corners=False
    )[0, 0]
    mask_HW = logits_HW > 0
    if not mask_HW.any():
        return None
    inside = logits_HW[mask_HW].sigmoid()
    mean = inside.sum() / (inside.numel() + 1e-6)
    ys, xs = (mask_HW.any(dim=axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
    return float(mean), box, mask_HW.cpu().numpy()


def box_instances(
    logits_QC: torch.Tensor,
    boxes_Q4: torch.Tensor,
    mask_logits_Qhw: torch.Tensor | None,
    size: Sequence[int],
    floor: float,
    *,
    exclusive: bool,
) -> list[Instance]:
    """Instances of a DETR, best first: relative (cx, cy, w, h) to pixels, clipped to the picture.

    `exclusive` classes share a softmax with a last "no object", one class per query. Others have a sigmoid each, and
    the best Q pairs of query and class are kept. Instances with an empty mask are dropped.
    """
    logits_QC = logits_QC.float()
    if exclusive:
        p_Q, label_Q = logits_QC.softmax(dim=-1)[:, :-1].max(dim=-1)
        best, query = p_Q.sort(descending=True, stable=True)
        labels = label_Q[query]
    else:
        best, index = logits_QC.sigmoid().flatten().sort(descending=True, stable=True)
        best, index = best[: len(logits_QC)], index[: len(logits_QC)]
        query, labels = index // logits_QC.shape[1], index % logits_QC.shape[1]
    height, width = size
    instances: list[Instance] = []
    for p, q, label in zip(best.tolist(), query.tolist(), labels.tolist(), strict=True):
        if p <= floor:
            break
        cx, cy, w, h = boxes_Q4[q].tolist()
        x0, x1 = (min(max(x, 0.0), 1.0) * width for x in (cx - w / 2, cx + w / 2))
        y0, y1 = (min(max(y, 0.0), 1.0) * height for y in (cy - h / 2, cy + h / 2))
        outline = None if mask_logits_Qhw is None else _draw(mask_logits_Qhw[q], size)
        if mask_logits_Qhw is None or outline is not None:
            instances.append((label, p, (x0, y0, x1, y1), None if outline is None else outline[2]))
    return instances


def _edges(size: str) -> dict[str, int]:
    shortest, longest = map(int, size.split("x"))
    return {"shortest_edge": shortest, "longest_edge": longest}


def load_detector(context: RewardContext, reward: str, choice: DetectorChoice) -> TransformersDetector:
    """Load a detector from the hub or a directory; random weights are refused."""
    import transformers

    family = FAMILIES[choice.name]
    where = f"reward {reward!r}: detector {choice.name!r}"
    weights = choice.weights or family.weights
    if weights is None:
        raise RewardError(
            f"{where} needs weights: a hub id or a directory of transformers, "
            f"e.g. {reward}@detector={choice.name}@weights=PekingU/rtdetr_v2_r50vd"
        )
    if family.needs_scipy and find_spec("scipy") is None:
        raise RewardError(
            f"{where} needs scipy (transformers asks for it when it builds the model): "
            f'pip install "unigrpo-cli[geneval]", or use {reward}@detector=rfdetr, which does not need it'
        )
    directory = Path(weights).expanduser()
    if weights.startswith((".", "/", "~")) and not directory.is_dir():
        raise RewardError(f"{where}: no directory {weights}; give one with config.json, or a hub id")
    source = str(directory) if directory.is_dir() else weights
    architecture = getattr(transformers, family.architecture, None)
    if architecture is None:
        raise RewardError(f"{where} is not in transformers {transformers.__version__}: pip install -U transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=context.offline)
        prepare = transformers.AutoImageProcessor.from_pretrained(source, local_files_only=context.offline)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise RewardError(f"{where}: {source} {cannot(context, source, error)}") from error
    if family.model_type not in (None, config.model_type):
        raise RewardError(
            f"{where}: {source} is a {config.model_type!r}, not a {family.model_type!r}; give other @weights, or "
            "@detector=boxes for a detector of boxes"
        )
    model = load_transformer(context, reward, architecture, source, "float32", config=config)
    size = choice.size or family.size
    return TransformersDetector(choice.name, model, prepare, size, choice.batch_size, context.device)
