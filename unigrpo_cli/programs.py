"""Programs: in which order the texts and images of an episode are sampled and looked at. Imports no torch.

A program is a function over the rows (episodes) of one batch. The built-in ones use nothing that is not public, and a
plugin adds its own by the hook `unigrpo_register_programs`:

    def draft_twice(rows):
        rows.sample_text()
        rows.sample_image()
        rows.read_image()
        rows.sample_image()

    @hookimpl
    def unigrpo_register_programs(registry):
        registry.add(Program("draft-twice", draft_twice, "paint, look, paint again"))

What is given before the first action (system prompt, source picture, prompt) has been read when the function begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from unigrpo_cli.errors import UsageError, suggest


class Rows(Protocol):
    """The episodes of one batch while they are drawn. Each call appends one segment to every episode in the batch.

    A round begins with the episode and after each image: it has its own random numbers, text budget and window.
    """

    @property
    def rounds(self) -> int:
        """`sampling.rounds`."""
        ...

    @property
    def stop_phrase(self) -> str:
        """`sampling.stop_phrase`."""
        ...

    def sample_text(self) -> list[str]:
        """Sample a text for every row; the texts, decoded. None is sampled when `sampling.think` is false."""
        ...

    def sample_image(self) -> None:
        """Sample an image for every row."""
        ...

    def read_image(self) -> None:
        """Let every row look at its latest image, as `sampling.show_images` says."""
        ...

    def stop(self, done: Sequence[bool]) -> None:
        """Rows that are done leave the batch; their episodes end here. Each must have an image by then."""
        ...


@dataclass(frozen=True)
class Program:
    """A program and what it starts from.

    Args:
        run: draws the episodes of one batch.
        summary: one line, for the docs and error messages.
        needs_picture: every prompt must bring a picture.
        reads_prompt: the model reads the prompt's text; rewards see it in any case.
    """

    name: str
    run: Callable[[Rows], None]
    summary: str
    needs_picture: bool = False
    reads_prompt: bool = True

    def refuse_without_picture(self, prompt: str, picture: object) -> None:
        """Refuse a prompt that brings no picture to a program that needs one."""
        if self.needs_picture and picture is None:
            raise UsageError(
                f"sampling.program={self.name} starts from a picture, and the prompt {prompt!r} brings none: give "
                '--image FILE, or prompts with an "image" each'
            )


def write_and_paint(rows: Rows) -> None:
    """Text, image; then as often as there are rounds: look at the image, text, image.

    A text after a look may end the episode; the image that it speaks of is then the last.
    """
    for k in range(rows.rounds):
        if k:
            rows.read_image()
        texts = rows.sample_text()
        if k:
            rows.stop([says(text, rows.stop_phrase) for text in texts])
        rows.sample_image()


def says(text: str, phrase: str) -> bool:
    """Whether a text has the phrase, as whole words in either case; none has the empty one."""
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


THINK_PAINT, REFLECT = "think-paint", "reflect"
BUILT_IN = (
    Program(THINK_PAINT, write_and_paint, "prompt, text, image"),
    Program(REFLECT, write_and_paint, "prompt, text, image, then look, text, image in each further round"),
    Program("edit", write_and_paint, "source picture, instruction, text, image", needs_picture=True),
    Program(
        "critique-edit",
        write_and_paint,
        "source picture without an instruction, critique, image",
        needs_picture=True,
        reads_prompt=False,
    ),
)


@dataclass
class ProgramRegistry:
    """Programs by name."""

    programs: dict[str, Program] = field(default_factory=dict)

    def add(self, program: Program) -> None:
        """Add a program; for `unigrpo_register_programs`.

        Raises:
            UsageError: when another program has its name.
        """
        other = self.programs.get(program.name)
        if other is not None and _origin(other) != _origin(program):
            raise UsageError(f"two programs are named {program.name!r}; rename one")
        self.programs[program.name] = program

    def find(self, name: str) -> Program:
        """The program of that name."""
        if name not in self.programs:
            raise UsageError(f"unknown program sampling.program={name}: {suggest(name, self.programs)}")
        return self.programs[name]


def _origin(program: Program) -> str:
    """Where a program is defined: a plugin file that is loaded twice is one program."""
    return f"{program.run.__module__}.{program.run.__qualname__}"


PROGRAMS = ProgramRegistry({program.name: program for program in BUILT_IN})
"""The programs of this process."""
