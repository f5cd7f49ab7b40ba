"""Sizes of given pictures where the release's own pictures do not reach; its own cases are in tests/golden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.resize import Resize, read_picture


def test_a_side_is_rounded_to_pixels_before_it_is_rounded_to_the_stride() -> None:
    """118 x 0.2 = 23.6 is 24 pixels, one and a half strides: that rounds to two, 23.6 itself would to one."""
    assert Resize(longest=64, shortest=1, stride=16).size(320, 118) == (64, 32)


def test_too_many_pixels_shrink_by_the_ratio_of_areas() -> None:
    """BAGEL takes that ratio as a factor of the sides, so such a picture ends well below the limit."""
    assert Resize(longest=4096, shortest=512, stride=16).size(3000, 3000) == (608, 608)


def test_small_ones_grow_and_no_side_is_less_than_a_stride() -> None:
    assert Resize(longest=1024, shortest=512, stride=16).size(10, 10) == (512, 512)
    assert Resize(longest=64, shortest=1, stride=16).size(2000, 10) == (64, 16)


def test_files_of_every_kind_become_rgb(tmp_path: Path) -> None:
    """What is transparent is white; grey and palette pictures have three channels."""
    Image.new("RGBA", (4, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    Image.new("P", (4, 3)).save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "clear.png").eq(255).all()
    assert read_picture(tmp_path / "grey.png").eq(7).all()
    for name in ("clear", "grey", "palette"):
        pixels = read_picture(tmp_path / f"{name}.png")
        assert pixels.shape == (3, 4, 3)
        assert pixels.dtype == torch.uint8


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n1234"])
def test_what_is_no_picture_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UsageError, match="not readable as a picture"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no picture"):
        read_picture(tmp_path / "gone.png")
