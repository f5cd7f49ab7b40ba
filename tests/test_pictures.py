"""The one reader of image files, and sizes that the golden cases of the release do not cover."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unigrpo_cli.cli.rewards_score import _sample
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.pictures import read_picture, read_picture_and_record, save_png
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.resize import Resize


def test_a_side_is_rounded_to_pixels_before_it_is_rounded_to_the_stride() -> None:
    """118 x 0.2 = 23.6 is 24 pixels, one and a half strides: that rounds to two, 23.6 itself would to one."""
    assert Resize(longest=64, shortest=1, stride=16).size(320, 118) == (64, 32)


def test_too_many_pixels_shrink_by_the_ratio_of_areas() -> None:
    """BAGEL takes that ratio as a factor of the sides, so such a picture ends well below the limit."""
    assert Resize(longest=4096, shortest=512, stride=16).size(3000, 3000) == (608, 608)


def test_small_ones_grow_and_no_side_is_less_than_a_stride() -> None:
    assert Resize(longest=1024, shortest=512, stride=16).size(10, 10) == (512, 512)
    assert Resize(longest=64, shortest=1, stride=16).size(2000, 10) == (64, 16)


CLEAR_RED = (255, 0, 0, 0)


@pytest.mark.parametrize(
    ("mode", "fill", "pixel"),
    [
        ("RGBA", CLEAR_RED, 255),
        ("LA", (9, 0), 255),
        ("L", 7, 7),
        ("P", 0, 0),
        ("CMYK", (0, 0, 0, 255), 0),
        ("1", 1, 255),
    ],
)
def test_files_of_every_kind_become_rgb_on_white(tmp_path: Path, mode: str, fill: object, pixel: int) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (4, 3), fill).save(path)
    pixels = read_picture(path)
    assert pixels.shape == (3, 4, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == pixel).all()


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 3))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "x.png", transparency=0)
    assert (read_picture(tmp_path / "x.png") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    """The marked corner of a picture 8 wide and 4 high ends where the camera saw it."""
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=100)
    pixels = read_picture(tmp_path / "x.jpg")
    assert pixels.shape[:2] == ((40, 80) if orientation < 5 else (80, 40))
    bright = np.argwhere(pixels[..., 0] > 128).mean(0) > np.array(pixels.shape[:2]) / 2
    bottom, right = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    assert bright.tolist() == [bool(bottom), bool(right)]


def test_every_door_reads_a_file_alike(tmp_path: Path) -> None:
    """Rewards and the model get the same pixels of a turned, transparent file."""
    image = Image.new("RGBA", (16, 8), CLEAR_RED)
    image.paste((0, 0, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    pixels = read_picture(tmp_path / "x.png")
    assert pixels.shape == (16, 8, 3)
    assert pixels[12, 4].tolist() == [255, 255, 255]
    assert np.array_equal(_sample(tmp_path / "x.png", "a", None).pixels, pixels)
    seen = []

    class Seeing(MoTPolicy):
        def __init__(self) -> None: ...

        def given_image(self, name: str, pixels: torch.Tensor, latents: bool = True) -> None:
            seen.append(pixels.numpy())

        def given(self, name: str, text: str) -> None: ...

        system_prompt = None

    prompt = Prompt("a", "a", {}, str(tmp_path / "x.png"))
    Seeing().preamble(prompt, False)
    Seeing().question(prompt, False)
    assert [np.array_equal(given, pixels) for given in seen] == [True, True]


def test_the_record_of_a_picture_comes_back(tmp_path: Path) -> None:
    save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "x.png", {"prompt": "ü"})
    assert read_picture_and_record(tmp_path / "x.png")[1] == {"prompt": "ü"}


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n1234"])
def test_what_is_no_picture_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UsageError, match="not readable as a picture"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no picture"):
        read_picture(tmp_path / "gone.png")
