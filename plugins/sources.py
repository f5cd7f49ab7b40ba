"""Rewards of pictures that come from a picture: edits, fidelity to the source, improvement over it.

The source is the picture that an episode was given (`sampling.program=edit` or `critique-edit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.shapes import ShapesReward, shown_scenes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.uint8]


class EditOptions(Options):
    mode: Literal["auto", "strict", "share"] = Field(
        "auto",
        description="strict: 1 when the instruction is done and all else is kept; share: done times the share of other "
        "things kept; auto: share in training, strict in evaluation",
    )


class EditReward(ShapesReward):
    """The instruction is done, and the other things are kept: by what a detector sees (shapes world).

    A share of things, not of cells or pixels: a lost thing must cost more than an eighth.
    """

    name = "edit"
    summary = "the instruction is done and all else kept (edits of the shapes world)"
    needs = frozenset({"image", "metadata:source", "metadata:target"})
    Options = EditOptions

    def score(self, batch: RewardBatch) -> RewardOutput:
        from unigrpo_cli.toy.edits import edit_outcome

        shown = shown_scenes(self.detector, batch.pixels)
        found = [edit_outcome(scene, m) for scene, m in zip(shown, batch.metadata, strict=True)]
        mode = self.options.mode
        if mode == "auto":
            mode = "share" if batch.split == "train" else "strict"
        return RewardOutput(
            [float(o.strict) if mode == "strict" else o.done * o.kept for o in found],
            components={
                "done": [float(o.done) for o in found],
                "kept": [o.kept for o in found],
                "strict": [float(o.strict) for o in found],
            },
        )


class SourceFidelityOptions(Options):
    by: Literal["pixels", "clip", "features"] = Field(
        "pixels",
        description="pixels: 1 minus the mean absolute difference outside the mask; clip: cosine of CLIP embeddings; "
        "features: mean cosine of a frozen vision backbone's features at each position outside the mask",
    )
    model: str | None = Field(
        None,
        description="for clip an open_clip model, for features a vision model of transformers; hub id or directory",
    )
    pretrained: str | None = Field(None, description="for clip: an open_clip tag or weights file")
    batch_size: int = Field(32, ge=1, description="pictures per forward pass of the model")


class SourceFidelityReward:
    """Likeness to the source outside of a mask: where an edit may change something is not compared.

    Metadata `mask` has the boxes that may change, [x0, y0, x1, y1] in shares of width and height; edits of the shapes
    world have theirs from what they change; without either the whole picture is compared.
    """

    name = "source-fidelity"
    summary = "likeness to the source picture outside of a mask: pixels, CLIP, or a backbone's features"
    range = (0.0, 1.0)
    needs = frozenset({"image", "source", "metadata"})
    licence = "ours; models: that of their weights"
    Options = SourceFidelityOptions

    def __init__(self, options: SourceFidelityOptions):
        self.options = options
        self.batch_size = options.batch_size

    def setup(self, context: RewardContext) -> None:
        o = self.options
        if o.by == "pixels" and (o.model or o.pretrained):
            raise RewardError("reward 'source-fidelity': @model is for @by=clip or @by=features")
        self.shared = context.shared
        if o.by == "clip":
            from unigrpo_plugins.encoders import shared_encoder

            self.encoder, self.key = shared_encoder(context, self.name, o.model, o.pretrained)
        elif o.by == "features":
            from unigrpo_plugins.features import shared_backbone

            self.backbone, self.key = shared_backbone(context, f"reward {self.name!r}", o.model, o.batch_size)

    def score(self, batch: RewardBatch) -> list[float]:
        import numpy as np

        pairs = list(zip(batch.pixels, sources_of(batch, self.name), strict=True))
        pairs = [(after, _sized(before, after.shape)) for after, before in pairs]
        if self.options.by == "clip":
            after, before = (self.encoder.images([_picture(p[k]) for p in pairs]) for k in range(2))
            return (after * before).sum(dim=1).clamp(0, 1).tolist()
        if self.options.by == "features":
            found = [self.backbone.features([p[k] for p in pairs]) for k in range(2)]
            return [
                float(_outside(_cosine(a, b), m).clip(0, 1).mean())
                for a, b, m in zip(*found, batch.metadata, strict=True)
            ]
        return [
            1.0 - float(_outside(np.abs(a.astype(float) - b).mean(axis=2), m).mean()) / 255
            for (a, b), m in zip(pairs, batch.metadata, strict=True)
        ]

    def teardown(self) -> None:
        if self.options.by != "pixels":
            self.shared.release(self.key)


def sources_of(batch: RewardBatch, name: str) -> list[Pixels]:
    found = [source for source in batch.sources if source is not None]
    if len(found) < len(batch):
        raise RewardError(f"reward {name!r} needs the picture that an episode was given; use sampling.program=edit")
    return found


def _picture(pixels: Pixels) -> Image:
    from PIL import Image

    return Image.fromarray(pixels)


def _sized(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    import numpy as np

    if pixels.shape == shape:
        return pixels
    return np.asarray(_picture(pixels).resize((shape[1], shape[0])))


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    import numpy as np

    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)


def _outside(values: NDArray[np.floating], metadata: Mapping[str, Any]) -> NDArray[np.floating]:
    """The values [rows, columns] whose positions no box of the mask touches; all when the boxes cover everything."""
    import numpy as np

    rows, columns = values.shape
    kept = np.ones(values.shape, dtype=bool)
    for x0, y0, x1, y1 in changed_boxes(metadata):
        kept[int(y0 * rows) : int(np.ceil(y1 * rows)), int(x0 * columns) : int(np.ceil(x1 * columns))] = False
    return values[kept] if kept.any() else values.flatten()


def changed_boxes(metadata: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """Where an edit may change something: boxes in shares of width and height."""
    if "mask" in metadata:
        return [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in metadata["mask"]]
    if not {"source", "target"} <= metadata.keys():
        return []
    changed = {tuple(t) for t in metadata["source"]} ^ {tuple(t) for t in metadata["target"]}
    cells = {thing[2] for thing in changed} | set(metadata.get("cells", ()))
    places = [("abc".index(cell[0]), "123".index(cell[1])) for cell in sorted(cells)]
    return [(x / 3, y / 3, (x + 1) / 3, (y + 1) / 3) for x, y in places]


class ImprovementOptions(Options):
    of: str = Field(
        "aesthetic",
        description="the reward whose score after minus before is given, as in --reward: a name, or in "
        "--reward-opt improvement.of=... also name@key=value",
    )


class ImprovementReward:
    """What a reward says of the last picture minus what it says of the source."""

    name = "improvement"
    summary = "another reward's score of the picture minus its score of the source"
    range = (float("-inf"), float("inf"))
    needs = frozenset({"image", "source"})
    licence = "that of the other reward"
    Options = ImprovementOptions

    def __init__(self, options: ImprovementOptions):
        self.options = options

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Refuse another reward that scores segments or groups, and what that reward itself refuses."""
        self.other = context.other_reward(self.options.of)
        if getattr(self.other, "scope", "sample") != "sample" or getattr(self.other, "segments", ()):
            raise RewardError(
                f"reward 'improvement': {self.options.of!r} does not score a picture by itself; give another"
            )
        if hasattr(self.other, "check_options"):
            self.other.check_options(context, metadata)

    def setup(self, context: RewardContext) -> None:
        self.check_options(context, ())
        if hasattr(self.other, "setup"):
            self.other.setup(context)
        low, high = getattr(self.other, "range", (float("-inf"), float("inf")))
        self.range = (low - high, high - low)
        self.needs = frozenset(getattr(self.other, "needs", ())) | {"image", "source"}
        self.higher_is_better = getattr(self.other, "higher_is_better", True)
        self.concurrency = getattr(self.other, "concurrency", None)
        self.batch_size = getattr(self.other, "batch_size", None)

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        if hasattr(self.other, "check_metadata"):
            self.other.check_metadata(metadata)

    def score(self, batch: RewardBatch) -> RewardOutput:
        sources = sources_of(batch, self.name)
        given = [replace(s, pixels=source) for s, source in zip(batch.samples, sources, strict=True)]
        after, before = (self._scores(replace(batch, samples=tuple(own))) for own in (batch.samples, given))
        return RewardOutput(after - before, components={"after": after, "before": before})

    def _scores(self, batch: RewardBatch) -> NDArray[np.float64]:
        """The other reward's scores; NaN where it abstains."""
        import numpy as np

        answer = self.other.score(batch)
        scores = answer.scores if isinstance(answer, RewardOutput) else answer
        scores = scores.detach().cpu().tolist() if hasattr(scores, "detach") else list(scores)
        return np.array([np.nan if x is None else float(x) for x in scores])

    def teardown(self) -> None:
        if hasattr(self.other, "teardown"):
            self.other.teardown()
