"""How sharp a picture is: the variance of the Laplacian of its grey values (Pech-Pacheco et al. 2000)."""

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardOutput


class SharpnessOptions(Options):
    half: float = Field(0.005, gt=0, description="variance of the Laplacian that scores one half")


class Sharpness:
    """v / (v + half), where v is the variance of the Laplacian of grey values in [0, 1]."""

    name = "sharpness"
    summary = "how sharp the picture is, by the variance of its Laplacian"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    batch_size = None
    licence = "Apache-2.0"
    Options = SharpnessOptions

    def __init__(self, options: SharpnessOptions):
        self.options = options

    def score(self, batch: RewardBatch) -> RewardOutput:
        variances = [laplacian_variance(image) for image in batch.images]
        scores = [v / (v + self.options.half) for v in variances]
        return RewardOutput(scores, components={"variance": variances})


def laplacian_variance(image) -> float:
    """Of the four-neighbour Laplacian; the outermost pixels have no four neighbours and are left out."""
    import numpy as np

    grey = np.asarray(image.convert("L"), dtype=np.float64) / 255
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * inner).var())
