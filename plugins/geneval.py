"""GenEval as a reward: detected objects against the prompt's objects, counts, colours and positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.geneval_rules import COLORS, KINDS, DetectedObject, Verdict, judge, keep_confident

if TYPE_CHECKING:
    from unigrpo_plugins.detectors import Detection

MODES = ("official", "strict", "partial", "soft")


class GenEvalOptions(Options):
    detector: Literal["auto", "shapes", "mask2former", "rfdetr", "boxes"] = Field(
        "auto",
        description="the detector; auto: shapes with the embedded policy or if all prompts are about its shapes, "
        "otherwise an error that asks for one",
    )
    weights: str | None = Field(None, description="hub id or directory of the detector's weights; default: its own")
    size: str | None = Field(
        None,
        pattern=r"^(own|[1-9]\d*x[1-9]\d*)$",
        description="SHORTxLONG, the size of pictures for the detector, or `own`: that of its weights; default "
        "800x1333 for mask2former, own for others",
    )
    threshold: float | None = Field(None, description="least confidence; default: the detector's")
    counting_threshold: float | None = Field(None, description="least confidence for counting prompts")
    batch_size: int = Field(8, ge=1, description="pictures per forward pass of the detector")
    mode: Literal["auto", "official", "strict", "partial", "soft"] = Field(
        "auto",
        description="official: GenEval's verdict, 0 or 1; strict: the same with exact counts; partial: mean over the "
        "requirements, each in [0, 1]; soft: the same with graded colours and positions; auto: partial in training, "
        "official in evaluation",
    )
    color: Literal["auto", "lab", "clip"] = Field(
        "auto",
        description="lab: nearest of ten in CIELAB; clip: GenEval's rule, CLIP's choice; auto: lab for `shapes`, "
        "clip for others",
    )
    clip_model: str = Field("ViT-L-14-quickgelu", description="open_clip name of the CLIP for colours")
    clip_pretrained: str | None = Field("openai", description="open_clip tag or weights file of that CLIP")


class GenEvalReward:
    """GenEval's rules on detected objects; colours by the nearest of ten in CIELAB or by CLIP."""

    name = "geneval"
    summary = "objects, counts, colours and positions of the prompt (GenEval's rules on detections)"
    range = (0.0, 1.0)
    needs = frozenset({"image", "metadata:include"})
    licence = "rules: facts of GenEval (MIT); detector `shapes`: ours; others: that of their weights"
    Options = GenEvalOptions

    def __init__(self, options: GenEvalOptions):
        self.options = options
        self.detector: Any = None
        self.keys: list[tuple] = []

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Refuse options without effect, and prompts about things that only another detector can see."""
        o = self.options
        if o.detector in ("auto", "shapes") and (o.weights or o.size):
            raise RewardError(
                f"reward 'geneval': @{'weights' if o.weights else 'size'} has no effect with detector {o.detector!r}; "
                "name one with weights: @detector=mask2former, rfdetr or boxes"
            )
        if o.detector == "auto" and not context.embedded:
            self._need_shapes(metadata)

    def setup(self, context: RewardContext) -> None:
        """Load the detector and the CLIP for colours; with `auto` the prompts may decide later."""
        self.check_options(context, ())
        self.context, o = context, self.options
        if o.detector != "auto":
            self._open(o.detector)
        elif context.embedded:
            self._open("shapes")

    def _open(self, name: str) -> None:
        from unigrpo_plugins.colors import ClipColors, LabColors
        from unigrpo_plugins.detectors import DetectorChoice, shared_detector
        from unigrpo_plugins.encoders import EMBEDDED, shared_encoder

        o = self.options
        choice = DetectorChoice(name, o.weights, o.size, o.batch_size)
        detector, key = shared_detector(self.context, self.name, choice)
        self.keys.append(key)
        self.colors: LabColors | ClipColors = LabColors()
        if o.color == "clip" or (o.color == "auto" and name != "shapes"):
            try:
                # Named, so that the embedded policy's own small CLIP is not taken: it never learnt to tell colours.
                named = ":" not in o.clip_model and o.clip_model != EMBEDDED
                tag = o.clip_pretrained if named or "clip_pretrained" in o.model_fields_set else None
                encoder, key = shared_encoder(self.context, self.name, o.clip_model, tag, option="clip_model")
            except RewardError as error:
                raise RewardError(
                    f"{str(error).rstrip('.')}; or do without: @color=lab, the nearest of ten colours"
                ) from error
            self.keys.append(key)
            self.colors = ClipColors(encoder, encoder.prompt_length(self.name, "captions of colours"))
        self.detector, self.detector_name = detector, name
        self.threshold = detector.threshold if o.threshold is None else o.threshold
        self.counting_threshold = detector.counting_threshold if o.counting_threshold is None else o.counting_threshold

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        for m in metadata:
            for item in [*m["include"], *m.get("exclude", [])]:
                if item.get("color", COLORS[0]) not in COLORS:
                    raise RewardError(
                        f"reward 'geneval': unknown colour {item['color']!r}; its colours are {', '.join(COLORS)}"
                    )
        self._need_detector(metadata)
        unseen = _unseen(metadata, self.detector.labels)
        if unseen:
            raise RewardError(
                f"reward 'geneval': detector {self.detector_name!r} cannot see {_some(unseen)}; it sees "
                f"{_some(sorted(self.detector.labels), 6)}. {_remedy()}"
            )

    def _need_detector(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Open `shapes` if no detector is open and all prompts are about its shapes."""
        if self.detector is None:
            self._need_shapes(metadata)
            self._open("shapes")

    def _need_shapes(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Without a named detector, prompts must be about shapes."""
        from unigrpo_cli.toy.world import SHAPES

        unseen = _unseen(metadata, SHAPES)
        if unseen:
            raise RewardError(
                f"reward 'geneval': no detector was named, and the detector 'shapes' cannot see "
                f"{_some(unseen)}. {_remedy()}"
            )

    def objects(self, batch: RewardBatch) -> list[dict[str, list[DetectedObject]]]:
        """The confident objects of each picture by class, best first; with colours where the prompt names one."""
        self._need_detector(batch.metadata)
        return self._detect(batch)

    def score(self, batch: RewardBatch) -> RewardOutput:
        mode = self.options.mode
        if mode == "auto":
            mode = "partial" if batch.split == "train" else "official"
        pictures = self.objects(batch)
        verdicts = [judge(seen, m) for seen, m in zip(pictures, batch.metadata, strict=True)]
        components = {m: [_value(v, m) for v in verdicts] for m in MODES}
        for kind in KINDS:
            parts = [v.part(kind) for v in verdicts]
            components[kind] = [math.nan if part is None else part for part in parts]
        return RewardOutput(
            [_value(v, mode) for v in verdicts],
            components=components,
            info=[
                {"reasons": list(v.reasons), "tag": m.get("tag"), "counts": _counts(seen, m), "judge": self.title}
                | self._cut(m)
                for v, m, seen in zip(verdicts, batch.metadata, pictures, strict=True)
            ],
        )

    @property
    def title(self) -> str:
        """Detector and colour rule, for reports. The detector is not GenEval's, so this is never the official score."""
        kind = "shapes" if self.detector_name == "shapes" else "hf"
        return f"geneval ({kind}): {self.detector_name}, {self.colors.name}"

    def _cut(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Of a prompt whose objects have captions beyond the text encoder's context."""
        return next((row for label in _coloured(metadata) if (row := self.colors.cut.get(label))), {})

    def _detect(self, batch: RewardBatch) -> list[dict[str, list[DetectedObject]]]:
        from unigrpo_plugins.colors import Coloured, named

        found = self.detector.detect(batch.pixels, min(self.threshold, self.counting_threshold))
        kept = [self._confident(own, m) for own, m in zip(found, batch.metadata, strict=True)]
        asked = [
            Coloured(image, detection)
            for image, own, m in zip(batch.pixels, kept, batch.metadata, strict=True)
            for label, count in _coloured(m).items()
            for detection in own.get(label, [])[:count]
        ]
        likeness = {id(a.detection): of for a, of in zip(asked, self.colors.likeness(asked), strict=True)}

        def seen(d: Detection) -> DetectedObject:
            of = likeness.get(id(d))
            return DetectedObject(d.score, d.box) if of is None else DetectedObject(d.score, d.box, named(of), of)

        return [{label: [seen(d) for d in own] for label, own in picture.items()} for picture in kept]

    def _confident(self, found: Sequence[Detection], metadata: Mapping[str, Any]) -> dict[str, list[Detection]]:
        by_class: dict[str, list[Detection]] = {}
        for d in found:
            by_class.setdefault(d.label, []).append(d)
        return keep_confident(by_class, metadata, threshold=self.threshold, counting_threshold=self.counting_threshold)

    def teardown(self) -> None:
        self.detector = None
        for key in self.keys:
            self.context.shared.release(key)
        self.keys = []


def _classes(metadata: Mapping[str, Any]) -> list[str]:
    return [item["class"] for item in (*metadata["include"], *metadata.get("exclude", ()))]


def _unseen(metadata: Sequence[Mapping[str, Any]], labels: Sequence[str] | frozenset[str]) -> list[str]:
    return sorted({c for m in metadata for c in _classes(m) if c not in labels})


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _remedy() -> str:
    from unigrpo_plugins.detectors import coco_choices

    return f"For COCO's 80 classes write geneval{coco_choices()}. Or use --reward clip"


def _coloured(metadata: Mapping[str, Any]) -> dict[str, int]:
    """How many objects of each class need a colour."""
    wanted: dict[str, int] = {}
    for item in metadata["include"]:
        if "color" in item:
            wanted[item["class"]] = wanted.get(item["class"], 0) + item["count"]
    return wanted


def _counts(seen: Mapping[str, Sequence[DetectedObject]], metadata: Mapping[str, Any]) -> dict[str, int]:
    return {label: len(seen.get(label, ())) for label in dict.fromkeys(_classes(metadata))}


def _value(verdict: Verdict, mode: str) -> float:
    return float(getattr(verdict, "correct" if mode == "official" else mode))
