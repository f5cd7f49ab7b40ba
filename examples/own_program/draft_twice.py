"""A program of episodes: plan, paint a draft, look at it, paint again."""

from unigrpo_cli import Program, Rows, hookimpl


def draft_twice(rows: Rows) -> None:
    """Text, image, a look at the image, image."""
    rows.sample_text()
    rows.sample_image()
    rows.read_image()
    rows.sample_image()


@hookimpl
def unigrpo_register_programs(registry) -> None:
    registry.add(Program("draft-twice", draft_twice, "plan, paint a draft, look at it, paint again"))
