"""Rows for the pre-training of the embedded model: texts and pictures of one to three rounds, edits and restores.

A row is what an episode reads and does, token for token as `rollout.py` builds it. What a row *teaches* (the texts and
pictures that losses are computed on) and what its context *shows* (the finished pictures that later rounds look at)
have mistakes of their own: a context shows many from the start, and only a last chapter teaches some.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset

from unigrpo_cli.models.mot.tokenizer import CLOSE, OPEN, UNKNOWN
from unigrpo_cli.toy.edits import EDITS, draw_edit, edit_target, edit_targets, scene_of
from unigrpo_cli.toy.prompts import TAGS, corrupt, corrupt_plan, draw_metadata, draw_scene, held_out
from unigrpo_cli.toy.reflect import EXTRA, KEEP, WRONG, by_cell, reflection_text, repair
from unigrpo_cli.toy.render import Canvas
from unigrpo_cli.toy.restores import (
    FAULTS,
    OVERALL,
    Critique,
    critique_text,
    degraded_picture,
    draw_restore,
    original_picture,
    true_critique,
)
from unigrpo_cli.toy.world import CELLS, Scene, plan_text

WITHOUT_THINKING = 0.12
UNCONDITIONAL = 0.1  # share of rows whose picture is painted without text
WRONG_IN_CONTEXT = 0.35  # plans that a context shows
LEFT_OUT_IN_CONTEXT = 0.12  # things of a picture that a context shows
SPOILT_IN_CONTEXT = 0.3  # pictures of a context with another mistake

VERDICTS = (KEEP, WRONG, EXTRA)
CHANGING = ("remove", "recolor", "reshape", "move")  # edits in which a thing of the source does not stay

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Mistakes:
    """Shares of taught mistakes.

    Args:
        wrong_plans, left_out: of first rounds: plans that do not answer the prompt; things left out of pictures.
        overlooked: reflections that say `correct` of a wrong picture.
        spoilt: reflections with one wrong change.
        false_alarm: reflections that change a right picture.
        ignored: later pictures and edits without one of the changes that their text asks for.
        lost: other things left out of later pictures and edits.
        wrong_edits: edit plans with one mistake.
        misdiagnosed: critiques with a wrong fault; the picture then stays as it is.
        unrestored: pictures that stay as they are after a right critique.
    """

    wrong_plans: float = 0.0
    left_out: float = 0.0
    overlooked: float = 0.0
    spoilt: float = 0.0
    false_alarm: float = 0.0
    ignored: float = 0.0
    lost: float = 0.0
    wrong_edits: float = 0.0
    misdiagnosed: float = 0.0
    unrestored: float = 0.0


@dataclass(frozen=True)
class Round:
    """Text that is read, the picture that is painted after it, and the one that later rounds look at.

    `ids` from `start` on are predicted; with `start` = len(ids) none are. Of a drill, which has no picture, only
    verdicts are. Of a stroke only the cells of `stroke` are painted, from noise alone.
    """

    ids: list[int]
    start: int
    picture: Pixels | None
    kept: Pixels | None
    stroke: Scene = ()


@dataclass(frozen=True)
class Row:
    """An episode: a source picture or none, then rounds."""

    source: Pixels | None
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class RoundBatch:
    """One round of several rows; `mask` [B, L - 1] has the predicted tokens."""

    ids: Tensor
    lengths: list[int]
    mask: Tensor
    picture: Tensor | None
    kept: Tensor | None
    stroke: Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows of one structure."""

    source: Tensor | None
    rounds: tuple[RoundBatch, ...]


def stack(rows: Sequence[Row], verdicts: Tensor) -> RowBatch:
    """Rows of one structure as tensors, ids right-padded; `verdicts` are the ids that drills predict."""
    source = None
    if rows[0].source is not None:
        source = torch.from_numpy(np.stack([row.source for row in rows if row.source is not None]))
    batches = []
    for own in zip(*(row.rounds for row in rows), strict=True):
        ids = [torch.tensor(r.ids, dtype=torch.long) for r in own]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        at, lengths = torch.arange(1, padded.shape[1]), [len(r.ids) for r in own]
        mask = (at > torch.tensor([r.start for r in own])[:, None]) & (at < torch.tensor(lengths)[:, None])
        pictures = [r.picture for r in own if r.picture is not None]
        if not pictures:
            mask &= torch.isin(padded[:, 1:], verdicts)
        kept = [r.kept for r in own if r.kept is not None]
        painted, shown = (torch.from_numpy(np.stack(found)) if found else None for found in (pictures, kept))
        stroke = None
        if any(r.stroke for r in own):
            at_cell = torch.tensor([[c in {thing.cell for thing in r.stroke} for c in CELLS] for r in own])
            stroke = at_cell.view(-1, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        batches.append(RoundBatch(padded, lengths, mask, painted, shown, stroke))
    return RowBatch(source, tuple(batches))


@dataclass(frozen=True)
class Mix:
    """Rows of one step by their structure. Every fifth step has a round more, and edits in place of restores.

    Args:
        strokes: edits whose plan is read, of which the cells of things are painted from noise.
        drills: edit plans without pictures, of which verdicts alone are predicted.
    """

    one: int = 0
    two: int = 0
    edits: int = 0
    restores: int = 0
    strokes: int = 0
    drills: int = 0


class Rows(IterableDataset):
    """Endless steps of the training splits, each a list of `RowBatch`."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mix: Mix, mistakes: Mistakes):
        self.words = tokenizer.get_vocab()
        self.seed, self.mix, self.mistakes = seed, mix, mistakes
        self.verdicts = torch.tensor([self.words[word] for word in VERDICTS if word in self.words], dtype=torch.long)

    def __iter__(self) -> Iterator[list[RowBatch]]:
        rng, mix = np.random.default_rng(self.seed), self.mix
        for step in count():
            more = int(step % 5 == 4)
            restores = 0 if more else mix.restores
            parts = [
                [self.prompted(rng, 1) for _ in range(mix.one)],
                [self.prompted(rng, 2 + more) for _ in range(mix.two)],
                [self.edit(rng, 1 + more) for _ in range(mix.edits + mix.restores - restores)]
                + [self.restore(rng) for _ in range(restores)],
                [self.drill(rng) for _ in range(mix.drills)],
                [self.stroke(rng) for _ in range(mix.strokes)],
            ]
            yield [stack(rows, self.verdicts) for rows in parts if rows]

    def text(self, words: str, rng: np.random.Generator, unknown: float = 0.0) -> list[int]:
        """A text in the model's format; some words are replaced by the unknown one."""
        known, other = self.words, self.words[UNKNOWN]
        return [known[OPEN], *(other if rng.random() < unknown else known[w] for w in words.split()), known[CLOSE]]

    def prompted(self, rng: np.random.Generator, rounds: int) -> Row:
        """A row that begins with a prompt; its later rounds reflect on what their context shows."""
        m = self.mistakes
        if rounds == 1 and self.mix.edits and rng.random() < UNCONDITIONAL / 2:
            return self.instruction_alone(rng)
        metadata = draw_metadata(TAGS[rng.integers(len(TAGS))], rng)
        while held_out(metadata):
            metadata = draw_metadata(TAGS[rng.integers(len(TAGS))], rng)
        truth, canvas = draw_scene(metadata, rng), Canvas.draw(rng)
        thinks = rounds > 1 or rng.random() >= WITHOUT_THINKING
        wrong = thinks and rng.random() < (m.wrong_plans if rounds == 1 else WRONG_IN_CONTEXT)
        plan = corrupt_plan(truth, metadata, rng) if wrong else truth
        shown = tuple(thing for thing in plan if rng.random() >= m.left_out)
        ids = self.text(metadata["prompt"], rng, unknown=0.01)
        start = len(ids)
        if thinks:
            ids = ids + self.text(plan_text(plan), rng)
            if rounds > 1 and wrong and rng.random() >= _taught(m.wrong_plans, WRONG_IN_CONTEXT):
                start = len(ids)
        if rounds == 1 and rng.random() < UNCONDITIONAL:
            ids, start = [], 0
        seen = tuple(thing for thing in plan if rng.random() >= LEFT_OUT_IN_CONTEXT)
        if rng.random() < SPOILT_IN_CONTEXT and seen:
            seen = corrupt(seen, rng)
        found = [Round(ids, start, canvas.paint(shown), canvas.paint(seen) if rounds > 1 else None)]
        for k in range(1, rounds):
            one, seen = self.again(seen, repair(seen, truth, metadata), canvas, rng, last=k + 1 == rounds)
            found.append(one)
        return Row(None, tuple(found))

    def again(
        self, seen: Scene, better: Scene, canvas: Canvas, rng: np.random.Generator, last: bool
    ) -> tuple[Round, Scene]:
        """A round that looks at `seen`, of which `better` is the repair; and the scene that its context shows next."""
        m, said = self.mistakes, by_cell(better)
        if said != by_cell(seen):
            draw = rng.random()
            if draw < m.overlooked and seen:
                said = by_cell(seen)
            elif draw < m.overlooked + m.spoilt:
                said = by_cell(corrupt(said, rng))
        elif rng.random() < m.false_alarm:
            said = by_cell(corrupt(said, rng))
        silent = last and rng.random() < UNCONDITIONAL / 2
        ids = [] if silent else self.text(reflection_text(seen, said), rng)
        shown = _with_slips(seen, said, m.ignored, m.lost, rng)
        after = _with_slips(seen, said, 0.4, 0.05, rng)
        if rng.random() < 0.15 and after:
            after = corrupt(after, rng)
        return Round(ids, 0, canvas.paint(shown), None if last else canvas.paint(after)), after

    def edit(self, rng: np.random.Generator, rounds: int) -> Row:
        """A source, an instruction, an edit plan, a picture; in a second round a reflection on that picture."""
        m = self.mistakes
        metadata = draw_edit(EDITS[rng.integers(len(EDITS))], rng)
        source, said = scene_of(metadata["source"]), edit_target(metadata)
        canvas = Canvas.draw(np.random.default_rng(metadata["seed"]))
        if rng.random() < m.wrong_edits:
            said = by_cell(corrupt(said, rng))
        ids = self.text(metadata["prompt"], rng)
        start = len(ids)
        thinks = rounds > 1 or rng.random() >= WITHOUT_THINKING
        if thinks:
            ids = ids + self.text(reflection_text(source, said), rng)
        if rounds == 1 and rng.random() < UNCONDITIONAL / 2:
            ids, start = [], 0
        shown = _with_slips(source, said, m.ignored, m.lost, rng)
        seen = _with_slips(source, said, 0.4, 0.1, rng)
        if rng.random() < SPOILT_IN_CONTEXT and seen:
            seen = corrupt(seen, rng)
        found = [Round(ids, start, canvas.paint(shown), canvas.paint(seen) if rounds > 1 else None)]
        for k in range(1, rounds):
            better = min(edit_targets(metadata), key=lambda scene: len(set(scene) ^ set(seen)))
            one, seen = self.again(seen, better, canvas, rng, last=k + 1 == rounds)
            found.append(one)
        return Row(canvas.paint(source), tuple(found))

    def drill(self, rng: np.random.Generator) -> Row:
        """The text of an edit without its pictures: which of the named things does the instruction mean?

        Two tokens in thirty depend on that, and from rows with pictures it was not learnt (docs/log.md).
        """
        metadata = draw_edit(CHANGING[rng.integers(len(CHANGING))], rng)
        text = reflection_text(scene_of(metadata["source"]), edit_target(metadata))
        ids = self.text(metadata["prompt"], rng) + self.text(text, rng)
        return Row(None, (Round(ids, 0, None, None),))

    def stroke(self, rng: np.random.Generator) -> Row:
        """An edit of which only the cells that hold a thing before or after are painted, from noise alone.

        Elsewhere, and at less noise, the source and the noisy picture say all, and the plan was not followed.
        """
        metadata = draw_edit(EDITS[rng.integers(len(EDITS))], rng)
        source, said = scene_of(metadata["source"]), edit_target(metadata)
        ids = self.text(metadata["prompt"], rng)
        if rng.random() < 0.5:  # the plan decides, not the instruction
            ids, said = [], by_cell(corrupt(source, rng))
        ids = ids + self.text(reflection_text(source, said), rng)
        canvas = Canvas.draw(np.random.default_rng(metadata["seed"]))
        return Row(canvas.paint(source), (Round(ids, len(ids), canvas.paint(said), None, (*source, *said)),))

    def instruction_alone(self, rng: np.random.Generator) -> Row:
        """An instruction without its source: what guidance of an edit leaves out."""
        metadata = draw_edit(EDITS[rng.integers(len(EDITS))], rng)
        canvas = Canvas.draw(np.random.default_rng(metadata["seed"]))
        ids, picture = self.text(metadata["prompt"], rng), canvas.paint(edit_target(metadata))
        return Row(None, (Round(ids, len(ids), picture, None),))

    def restore(self, rng: np.random.Generator) -> Row:
        """A degraded picture, a critique, the picture as it was."""
        m, metadata = self.mistakes, draw_restore((*FAULTS, "lost")[rng.integers(5)], rng)
        critique, picture, degraded = true_critique(metadata), original_picture(metadata), degraded_picture(metadata)
        if rng.random() < m.misdiagnosed:
            critique, picture = _misdiagnosed(critique, rng), degraded
        elif rng.random() < m.unrestored:
            picture = degraded
        ids = self.text(critique_text(critique), rng)
        draw = rng.random()
        if draw < UNCONDITIONAL:
            ids = []
        return Row(degraded, (Round(ids, 0, picture, None),))


def _taught(wanted: float, shown: float) -> float:
    """The share of wrong plans in contexts to teach, so that `wanted` of all taught plans are wrong."""
    return min(1.0, wanted * (1 - shown) / (shown * (1 - wanted)))


def _with_slips(seen: Scene, said: Scene, ignored: float, lost: float, rng: np.random.Generator) -> Scene:
    """`said`, with one of its changes to `seen` left undone or with other things left out."""
    before, after = ({thing.cell: thing for thing in scene} for scene in (seen, said))
    changed = [cell for cell in CELLS if before.get(cell) != after.get(cell)]
    scene = dict(after)
    if changed and rng.random() < ignored:
        cell = changed[rng.integers(len(changed))]
        scene.pop(cell, None)
        if cell in before:
            scene[cell] = before[cell]
    return by_cell(tuple(t for cell, t in scene.items() if cell in changed or rng.random() >= lost))


def _misdiagnosed(critique: Critique, rng: np.random.Generator) -> Critique:
    """A critique with another fault; things are read as they are."""
    others = [fault for fault in OVERALL if fault != critique.fault]
    return Critique(others[rng.integers(len(others))], critique.scene, ())
