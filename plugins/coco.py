"""GenEval's names of a detector's classes: COCO's 80 in COCO's order, three of them longer.

Checkpoints differ in names (`tv` or `tvmonitor`, `LABEL_3`) but hardly in order, so classes are matched by index. Two
orders are in use: 80 in a row, and COCO's ids, which skip eleven of 1 to 90.
"""

from __future__ import annotations

from collections.abc import Mapping

# fmt: off
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
CLASSES = tuple(RENAMED.get(name, name) for name in COCO)
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of 1 to 90; 0 is unused as well
IDS = tuple(i for i in range(1, 91) if i not in UNUSED_IDS)
AGREE = 0.75  # share of equal names: spellings differ, and another order agrees almost nowhere


def labels_of(id2label: Mapping[int, str]) -> list[str | None]:
    """GenEval's name of each of a detector's classes, by index; None for ids that COCO skips.

    The names only decide whether the order is COCO's. If not, they stay as they are.
    """
    names = [str(id2label[k]) for k in sorted(id2label)]
    orders: dict[int, Mapping[int, str]] = {
        80: dict(enumerate(CLASSES)),
        91: dict(zip(IDS, CLASSES, strict=True)),  # DETR, RF-DETR
        90: {i - 1: name for i, name in zip(IDS, CLASSES, strict=True)},
    }
    order = orders.get(len(names))
    if order is not None:
        same = sum(RENAMED.get(names[k], names[k]) == name for k, name in order.items())
        generic = all(name == f"LABEL_{k}" for k, name in enumerate(names))
        if generic or same >= AGREE * len(CLASSES):
            return [order.get(k) for k in range(len(names))]
    return [RENAMED.get(name, name) for name in names]
