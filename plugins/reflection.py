"""The reward `reflection`: is what a text says of its picture true?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from unigrpo_cli import RewardBatch, RewardOutput, Sample
from unigrpo_plugins.shapes import ShapesReward, shown_scenes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TextOnPicture(NamedTuple):
    """A text after a picture: the number of its sample, its name, and what it is compared with."""

    sample: int
    name: str
    text: str
    pixels: NDArray[np.uint8]
    metadata: Mapping[str, Any]


class ReflectionReward(ShapesReward):
    """Share of a text's statements about its picture that are true, by the detector (shapes world).

    A text is about the picture that the model looked at last: the one it painted, or the source that it was given. Its
    statements are the things that it sees, and the things that it should have seen. A text of a reflecting program also
    says whether all is right, which is true when the picture answers the prompt. A critique of a degraded picture is
    compared with the true one, fault and lost things included. Text outside the grammar has no true statement.
    """

    name = "reflection"
    summary = "share of what a text says of its picture that is true (shapes world)"
    needs = frozenset({"texts", "pictures", "metadata"})
    segments = frozenset({"text"})

    def score(self, batch: RewardBatch) -> RewardOutput:
        texts = [looked for k, sample in enumerate(batch.samples) for looked in _texts_on_pictures(k, sample)]
        shown = shown_scenes(self.detector, [t.pixels for t in texts])
        named: list[dict[str, float]] = [{} for _ in batch.samples]
        for t, scene in zip(texts, shown, strict=True):
            named[t.sample][t.name] = true_share(t.text, scene, t.metadata)
        whole = [fmean(own.values()) if own else None for own in named]
        all_true = [float(min(own.values()) == 1) if own else None for own in named]
        return RewardOutput(whole, {"all_true": all_true}, segments=named)


def _texts_on_pictures(k: int, sample: Sample) -> list[TextOnPicture]:
    """Every text that follows a picture."""
    found: list[TextOnPicture] = []
    seen = sample.source
    for name, part in zip(sample.names, sample.acted, strict=True):
        if not isinstance(part, str):
            seen = part
        elif seen is not None:
            # Only the first text after a source is about the source.
            about_source = seen is sample.source
            metadata = sample.metadata if about_source else _of_painted(sample.metadata)
            found.append(TextOnPicture(k, name, part, seen, metadata))
    return found


def _of_painted(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a text about a painted picture is compared with: the prompt's demands, not the source's truth."""
    return {key: value for key, value in metadata.items() if key not in ("scene", "lost")}


def true_share(text: str, shown: tuple, metadata: Mapping[str, Any]) -> float:
    """Share of true statements, over what is said and what should have been said of a picture that shows `shown`."""
    from unigrpo_cli.toy.reflect import parse_reflection
    from unigrpo_cli.toy.restores import parse_critique, true_critique
    from unigrpo_cli.toy.world import satisfies

    if "scene" in metadata:
        critique, truth = parse_critique(text), true_critique(metadata)
        if critique is None:
            return 0.0
        said, are = ({(t, t.cell in c.lost) for t in c.scene} for c in (critique, truth))
        return (len(said & are) + (critique.fault == truth.fault)) / (len(said | are) + 1)
    reflection = parse_reflection(text)
    if reflection is None:
        return 0.0
    seen = set(reflection.seen)
    true, all_of_them = len(seen & set(shown)), len(seen | set(shown))
    if "include" in metadata and "target" not in metadata:
        true += reflection.correct == satisfies(shown, metadata)
        all_of_them += 1
    return true / all_of_them if all_of_them else 1.0
