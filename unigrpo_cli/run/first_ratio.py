"""How far the log-ratio of two passes over the same weights may be from 0.

Before an update the policy and the old policy have the same weights. The first step of a run, the doctor and the tests
score the old policy in a separate pass without gradients, so their first log-ratio compares two computations.

On a CPU both passes run the same kernels on the same batch: the log-ratio is exactly 0.

Elsewhere torch may choose another attention kernel when gradients are recorded, and the two kernels round differently.
With eps of the network's dtype, about 4 eps of relative error reach the output of the network. Then

* a token's log-probability z_a - logsumexp(z) moves by up to 2 |dz|; logits of size 8 give 2 * 8 * 4 eps = 64 eps;
* an image step's log-ratio is mean(e * dmu), with |e| about 1 and dmu a fraction of the velocity's error; with the
  division by the step's deviation of the plain ratio it stays below 8 eps.

A difference below 1 % of the clip range has no consequence either: nothing is clipped, and each action's weight changes
by less than that. The limit is the larger of the two.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unigrpo_cli.config.schema import ObjectiveConfig
from unigrpo_cli.models.policy import TrainablePolicy

TEXT_ROUNDING, IMAGE_ROUNDING = 64, 8  # in eps
NEGLIGIBLE = 0.01  # of the clip range


def ratio_limits(policy: TrainablePolicy, objective: ObjectiveConfig) -> dict[str, float]:
    """The largest first log-ratio of text and image that rounding explains on the policy's device; 0 on a CPU."""
    if policy.device.type == "cpu":
        return {"text": 0.0, "image": 0.0}
    eps = torch.finfo(policy.dtype).eps
    return {
        kind: max(rounding * eps, NEGLIGIBLE * clips_of(objective)[kind])
        for kind, rounding in (("text", TEXT_ROUNDING), ("image", IMAGE_ROUNDING))
    }


def clips_of(objective: ObjectiveConfig) -> dict[str, float]:
    image = objective.fpo_clip if objective.image == "fpo" else objective.image_clip
    return {"text": objective.text_clip, "image": image}


class AttentionKernels(TorchDispatchMode):
    """Records which attention kernels run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.startswith("_scaled_dot_product_"):
            self.found.add(name.removeprefix("_scaled_dot_product_").removesuffix("_attention"))
        return func(*args, **kwargs or {})

    def __str__(self) -> str:
        return ", ".join(sorted(self.found)) or "math"
