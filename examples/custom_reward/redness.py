"""The smallest reward: how red the picture is.

unigrpo train --reward redness,geneval --plugin examples/custom_reward/redness.py
"""

from unigrpo_cli import reward


@reward("redness", range=(0, 1))
def redness(images):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]
