"""The contract, and what sharpness means."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from unigrpo_reward_sharpness import Sharpness, laplacian_variance

from unigrpo_cli.testing import assert_reward_contract


def test_contract():
    assert_reward_contract(Sharpness)
    assert_reward_contract(Sharpness, options={"half": 0.1})


def test_a_worked_example():
    """One bright pixel in the dark: the Laplacian is -4 there, 1 beside, above and below, 0 at the corners."""
    grey = np.zeros((5, 5), np.uint8)
    grey[2, 2] = 255
    laplacian = np.array([0, 1, 0, 1, -4, 1, 0, 1, 0])
    assert laplacian_variance(Image.fromarray(grey)) == pytest.approx(laplacian.var())


def test_blur_lowers_it_and_flat_is_nothing():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    blurred = [laplacian_variance(noise.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 3)]
    assert blurred == sorted(blurred, reverse=True)
    assert laplacian_variance(Image.new("RGB", (32, 32), "red")) == 0
